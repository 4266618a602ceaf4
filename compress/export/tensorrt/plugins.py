"""Register the kernels as TensorRT plugins that are compiled ahead of time (TensorRT's API for it is experimental).

TensorRT asks for a kernel while it builds: PTX and symbolic launch parameters go into the plan, which needs neither
Python nor Triton afterwards. The hooks' signatures are made from `operators.OPERATORS`, as TensorRT reads them.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from adrec.engines.tensorrt import library
from adrec.engines.tensorrt.library import TensorRTError
from adrec.engines.tensorrt.session import DATA_TYPES
from compress.export.tensorrt.operators import DOMAIN, OPERATORS, Operator
from kernels.compilation import CompilationError, check_compiler
from kernels.ptx import Ptx, plugin_ptx, target_of

_registered: dict[str, str] = {}


class SymbolicSizes:
    """`kernels.plugin_kernels.Arithmetic` on TensorRT's symbolic sizes."""

    def __init__(self, plugin: ModuleType) -> None:
        self._plugin = plugin

    def cdiv(self, count: Any, size: Any) -> Any:
        return self._plugin.cdiv(count, size)

    def least(self, first: Any, second: Any) -> Any:
        return self._plugin.min(first, second)

    def most(self, first: Any, second: Any) -> Any:
        return self._plugin.max(first, second)

    def constant(self, value: int) -> Any:
        return self._plugin.ShapeExpr(value)


def register_plugins(capability: str) -> None:
    """Make the operators known to TensorRT in this process, compiled for one compute capability (``"8.9"``).

    Raises TensorRTError for a capability that the kernels are not made for, or another one than before, and where
    kernels cannot be compiled.
    """
    if _registered and _registered["capability"] != capability:
        raise TensorRTError(
            f"this process compiled plugins for {_registered['capability']}, not {capability}: use another process"
        )
    if _registered:
        return
    try:
        target_of(capability)
        check_compiler()
    except CompilationError as error:
        raise TensorRTError(f"{error}; export without --plugins") from None
    trt, plugin = library.load(), library.load_plugins()
    for operator in OPERATORS.values():
        register(trt, plugin, operator, capability)
    _registered["capability"] = capability


def register(trt: ModuleType, plugin: ModuleType, operator: Operator, capability: str) -> None:
    """Register one operator: what its outputs are, and its kernel."""
    identifier, sizes = f"{DOMAIN}::{operator.name}", SymbolicSizes(plugin)
    compiled: dict[tuple[Any, ...], Ptx] = {}

    def describe(*inputs: Any, **attributes: Any) -> Any:
        given = bound(operator, inputs, attributes)
        shapes, dtypes = described(trt, inputs[: len(operator.inputs)])
        return tuple(
            plugin.from_shape_expr(each.shape, data_type(trt, each.dtype))
            for each in operator.describe(given, shapes, dtypes, sizes)
        )

    def implement(*arguments: Any, **options: Any) -> Any:
        count, named = len(operator.inputs), [*operator.inputs, *operator.attributes, "outputs", "tactic"]
        values = dict(zip(named, arguments, strict=False)) | options
        attributes = {name: values[name] for name in operator.attributes}
        shapes, dtypes = described(trt, arguments[:count])
        launch = operator.launch(attributes, shapes, dtypes, sizes)
        outputs = described(trt, values["outputs"])[1]
        key = (tuple(attributes.items()), tuple(dtypes), tuple(outputs))
        if key not in compiled:
            pointers = operator.pointer_types(launch.kernel, dtypes, outputs)
            compiled[key] = plugin_ptx(launch.kernel, pointers, target_of(capability))
        kernel = compiled[key]
        parameters = plugin.KernelLaunchParams()
        for axis, size in zip("xyz", launch.grid, strict=False):
            setattr(parameters, f"grid_{axis}", size)
        parameters.block_x = kernel.threads
        parameters.shared_mem = kernel.shared
        extra = plugin.SymIntExprs(len(launch.integers))
        for place, value in enumerate(launch.integers):
            extra[place] = plugin.SymInt32(value)
        return kernel.name, kernel.text, parameters, extra

    # Annotations are what TensorRT reads; nobody else does.
    outputs = types.GenericAlias(tuple, tuple(plugin.TensorDesc for _ in operator.outputs))
    result = types.GenericAlias(tuple, (str, str, plugin.KernelLaunchParams, plugin.SymIntExprs))
    describe.__signature__ = _signature(plugin, operator, {}, outputs)  # type: ignore[attr-defined]
    implement.__signature__ = _signature(  # type: ignore[attr-defined]
        plugin, operator, {"outputs": outputs, "tactic": int}, result
    )
    plugin.register(identifier)(describe)
    plugin.aot_impl(identifier)(implement)


def bound(operator: Operator, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes by name, whether TensorRT passed them by name or behind the inputs."""
    behind = inputs[len(operator.inputs) :]
    return dict(zip(operator.attributes, behind, strict=False)) | dict(attributes)


def described(trt: ModuleType, descriptors: Sequence[Any]) -> tuple[list[Any], list[torch.dtype]]:
    """Symbolic shapes and dtypes of TensorRT's descriptors."""
    by_member = {getattr(trt.DataType, member): name for name, member in DATA_TYPES.items()}
    dtypes = [getattr(torch, by_member[each.dtype]) for each in descriptors]
    return [each.shape_expr for each in descriptors], dtypes


def data_type(trt: ModuleType, dtype: torch.dtype) -> Any:
    """TensorRT's data type of a torch dtype."""
    return getattr(trt.DataType, DATA_TYPES[str(dtype).removeprefix("torch.")])


def _signature(plugin: ModuleType, operator: Operator, more: Mapping[str, Any], returns: Any) -> inspect.Signature:
    kinds: dict[str, Any] = dict.fromkeys(operator.inputs, plugin.TensorDesc) | dict(operator.attributes) | dict(more)
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
        for name, kind in kinds.items()
    ]
    return inspect.Signature(parameters, return_annotation=returns)
