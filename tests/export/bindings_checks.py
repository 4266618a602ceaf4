"""Run in a process with TensorRT's real bindings over stub libraries: registration and launches of the plugins.

Prints JSON. Symbolic sizes are evaluated here, for TensorRT's own builder of expressions is one of its libraries.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import tensorrt as trt
import tensorrt.plugin as plugin
from plugin_cases import BATCHES, CASES, dtypes_of, shapes_of
from tensorrt.plugin import _lib, _tensor
from tensorrt_cases import PROFILES, save_graph
from tensorrt_surface import read_surface

from adrec.engines.tensorrt import library
from adrec.engines.tensorrt.library import TensorRTError
from compress.export.tensorrt.builder import build
from compress.export.tensorrt.graph import read_graph
from compress.export.tensorrt.operators import OPERATORS
from compress.export.tensorrt.options import BuildOptions
from compress.export.tensorrt.plugins import data_type, register_plugins
from kernels.plugin_kernels import Integers


class Registry:
    """Keeps creators; TensorRT's own is in the library that is not there."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, namespace]


class Size(trt.IDimensionExpr):  # type: ignore[misc, name-defined]
    """An expression with its value."""

    value: int

    @classmethod
    def of(cls, value: int) -> Size:
        # The bindings have no constructor for it.
        made: Size = cls.__new__(cls)
        made.value = value
        return made

    def is_constant(self) -> bool:
        return False

    def get_constant_value(self) -> int:
        return self.value


class Expressions:
    """`IExprBuilder` on values."""

    def constant(self, value: int) -> Size:
        return Size.of(value)

    def operation(self, kind: Any, first: Size, second: Size) -> Size:
        kinds, a, b = trt.DimensionOperation, first.value, second.value
        found = {
            kinds.SUM: a + b, kinds.SUB: a - b, kinds.PROD: a * b, kinds.MAX: max(a, b), kinds.MIN: min(a, b),
            kinds.FLOOR_DIV: a // b, kinds.CEIL_DIV: -(-a // b),
        }  # fmt: skip
        return Size.of(found[kind])


def check(name: str, attributes: dict[str, Any], batch: int) -> dict[str, Any]:
    """What the hooks say, beside what `operators` says on integers."""
    operator, shapes, dtypes = OPERATORS[name], shapes_of(name, batch), dtypes_of(name)
    known = _lib.QDP_REGISTRY[f"adrec::{name}"]
    inputs = [
        plugin.from_shape_expr(tuple(plugin.ShapeExpr(Size.of(size)) for size in shape), data_type(trt, dtype))
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    outputs = known.register_func(*inputs, **attributes)
    entry, text, parameters, extra = known.aot_impl_func(*inputs, *attributes.values(), outputs, 0)
    assert all(isinstance(each, plugin.SymInt32) for each in extra)
    assert isinstance(parameters, plugin.KernelLaunchParams)
    value = lambda each: each._expr.value  # noqa: E731
    launch = operator.launch(attributes, shapes, dtypes, Integers())
    return {
        "outputs": [[[value(size) for size in each.shape_expr], each.dtype.name] for each in outputs],
        "expected": [
            [list(each.shape), data_type(trt, each.dtype).name]
            for each in operator.describe(attributes, shapes, dtypes, Integers())
        ],
        "grid": [value(parameters.grid_x), value(parameters.grid_y), value(parameters.grid_z)],
        "expected_grid": [*launch.grid, 1, 1][:3],
        "integers": [value(each) for each in extra],
        "expected_integers": list(launch.integers),
        "threads": value(parameters.block_x),
        "shared": value(parameters.shared_mem),
        "entry": f".entry {entry}(" in text,
    }


def main() -> None:
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    register_plugins("9.0")
    logger = library.collecting_logger(trt)
    logger.log(trt.ILogger.Severity.ERROR, "an error")
    logger.log(trt.ILogger.Severity.INFO, "chatter")
    # Before a network is there, TensorRT asks for dtypes with sizes that have no value.
    unknown = {}
    for name, attributes in CASES.items():
        inputs = [
            plugin.TensorDesc(plugin.ShapeExprs(len(shape), _is_dummy=True), data_type(trt, dtype))
            for shape, dtype in zip(shapes_of(name, 1), dtypes_of(name), strict=True)
        ]
        outputs = _lib.QDP_REGISTRY[f"adrec::{name}"].register_func(*inputs, **attributes)
        unknown[name] = [each.dtype.name for each in outputs]
    _tensor.SymIntExpr._exprBuilder = Expressions()
    with tempfile.TemporaryDirectory() as folder:
        graph = read_graph(save_graph(Path(folder) / "small.onnx"))
        try:
            build(trt, graph, PROFILES, BuildOptions())
            refused = "nothing"
        except TensorRTError as error:
            refused = str(error)
    found = {
        "version": trt.__version__,
        "refused": refused,
        "surface": read_surface(trt, plugin),
        "messages": logger.messages,
        "flags": library.flag_bits(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", "EXPLICIT_BATCH"),
        "creators": sorted(registry.creators),
        "unknown": unknown,
        "launches": {name: [check(name, attributes, batch) for batch in BATCHES] for name, attributes in CASES.items()},
    }
    Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
