"""API SHAPE ONLY: the plugins against what `tensorrt.plugin` of TensorRT 10.16, 11.1 and 11.4 accepts.

No kernel is compiled and none is run here: see `test_plugin_ptx` and `test_tensorrt_plugins`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import strict_tensorrt
from plugin_cases import BATCHES, CASES, OUTPUT_TYPES, dtypes_of, shapes_of
from plugin_standin import PluginStandIn, value_of, values_of
from strict_tensorrt import FOLDER, VERSIONS, SurfaceError
from tensorrt_surface import PRIVATE_PLUGIN, USED_FUNCTIONS, USED_PLUGIN

from adrec.engines.tensorrt import library
from compress.export.tensorrt import plugins
from compress.export.tensorrt.operators import OPERATORS
from compress.export.tensorrt.plugins import data_type, register_plugins
from kernels.plugin_kernels import Integers
from kernels.ptx import Ptx


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PluginStandIn:
    """TensorRT, as the plugins see it; kernels are compiled to nothing."""
    return installed(PluginStandIn(request.param), monkeypatch)


def installed(found: PluginStandIn, monkeypatch: pytest.MonkeyPatch) -> PluginStandIn:
    monkeypatch.setattr(library, "load", lambda: found)
    monkeypatch.setattr(library, "load_plugins", lambda: found.plugin)
    monkeypatch.setattr(plugins, "_registered", {})
    monkeypatch.setattr(plugins, "check_compiler", lambda: None)
    monkeypatch.setattr(plugins, "plugin_ptx", lambda kernel, pointers, target: Ptx("entry", "text", 128, 1024))
    return found


def described(trt: PluginStandIn, name: str, batch: int | None) -> tuple[list[Any], tuple[Any, ...]]:
    """Descriptors of inputs and outputs, by the hook as TensorRT calls it. batch: None before sizes are known."""
    inputs = [
        trt.descriptor(tuple(trt.size(size if batch else None) for size in shape), data_type(trt, dtype))
        for shape, dtype in zip(shapes_of(name, batch or 1), dtypes_of(name), strict=True)
    ]
    return inputs, trt.hooks["register"][f"adrec::{name}"](*inputs, **CASES[name])


def launched(trt: PluginStandIn, name: str, batch: int) -> tuple[Any, ...]:
    """What the other hook returns, called as TensorRT calls it."""
    inputs, outputs = described(trt, name, batch)
    found: tuple[Any, ...] = trt.hooks["aot_impl"][f"adrec::{name}"](*inputs, *CASES[name].values(), list(outputs), 0)
    return found


def run_all() -> None:
    """All that a build asks of the plugins."""
    register_plugins("9.0")
    for name in CASES:
        launched(library.load(), name, 33)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_surface_has_the_names_of_the_script_and_no_more(version: str) -> None:
    surface = json.loads((FOLDER / f"tensorrt_surface_{version}.json").read_text())["plugin"]
    assert surface["private"] == list(PRIVATE_PLUGIN)
    assert tuple(surface["functions"]) == USED_FUNCTIONS
    members = {name: {*each["methods"], *each["properties"]} for name, each in surface["classes"].items()}
    assert members == {name: set(used) for name, used in USED_PLUGIN.items()}


def test_every_operator_is_registered_with_the_signature_that_tensorrt_reads(trt: PluginStandIn) -> None:
    register_plugins("9.0")
    plugin = trt.plugin
    assert [name for name, _ in trt.log] == ["plugin.register", "plugin.aot_impl"] * len(OPERATORS)
    for name, operator in OPERATORS.items():
        outputs = tuple[tuple(plugin.TensorDesc for _ in operator.outputs)]  # type: ignore[misc]
        hook = inspect.signature(trt.hooks["register"][f"adrec::{name}"])
        given = dict.fromkeys(operator.inputs, plugin.TensorDesc) | dict(operator.attributes)
        assert {each.name: each.annotation for each in hook.parameters.values()} == given
        assert hook.return_annotation == outputs
        hook = inspect.signature(trt.hooks["aot_impl"][f"adrec::{name}"])
        given |= {"outputs": outputs, "tactic": int}
        assert {each.name: each.annotation for each in hook.parameters.values()} == given
        assert hook.return_annotation == tuple[str, str, plugin.KernelLaunchParams, plugin.SymIntExprs]
        assert all(each.default is each.empty for each in hook.parameters.values())


@pytest.mark.parametrize("name", CASES)
def test_dtypes_are_known_before_sizes_are(trt: PluginStandIn, name: str) -> None:
    register_plugins("9.0")
    assert [each.dtype.name for each in described(trt, name, None)[1]] == OUTPUT_TYPES[name]


@pytest.mark.parametrize("name", CASES)
def test_symbolic_launches_are_those_of_integers(trt: PluginStandIn, name: str) -> None:
    register_plugins("9.0")
    operator, dtypes = OPERATORS[name], dtypes_of(name)
    for batch in BATCHES:
        shapes = shapes_of(name, batch)
        outputs = described(trt, name, batch)[1]
        wanted = operator.describe(CASES[name], shapes, dtypes, Integers())
        assert [values_of(each.shape_expr) for each in outputs] == [list(each.shape) for each in wanted]
        assert [each.dtype for each in outputs] == [data_type(trt, each.dtype) for each in wanted]
        entry, text, parameters, extra = launched(trt, name, batch)
        launch = operator.launch(CASES[name], shapes, dtypes, Integers())
        assert (entry, text) == ("entry", "text")
        assert [value_of(size) for size in (parameters.grid_x, parameters.grid_y)] == [*launch.grid, 1][:2]
        assert (parameters.block_x, parameters.shared_mem) == (128, 1024)
        assert isinstance(extra, trt.plugin.SymIntExprs)
        assert all(type(each) is trt.plugin.SymInt32 for each in vars(extra)["items"])
        assert [value_of(each) for each in vars(extra)["items"]] == list(launch.integers)
    # What TensorRT hands out is immutable.
    assert {each for each, _ in trt.log if each.endswith("=")} <= {
        f"KernelLaunchParams.{member}=" for member in USED_PLUGIN["KernelLaunchParams"]
    }


@pytest.mark.parametrize(
    "name", [*USED_FUNCTIONS, *(f"{owner}.{member}" for owner, members in USED_PLUGIN.items() for member in members)]
)
def test_every_name_of_the_surface_is_used_and_refused_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """As a misspelt one would be."""
    surface = json.loads((FOLDER / "tensorrt_surface_11_4.json").read_text())
    owner, _, member = name.rpartition(".")
    if owner:
        there = surface["plugin"]["classes"][owner]
        del there["methods" if member in there["methods"] else "properties"][member]
    else:
        del surface["plugin"]["functions"][name]
    (tmp_path / "tensorrt_surface_cut.json").write_text(json.dumps(surface))
    monkeypatch.setattr(strict_tensorrt, "FOLDER", tmp_path)
    installed(PluginStandIn("cut"), monkeypatch)
    # A missing operator is Python's to refuse.
    with pytest.raises((SurfaceError, TypeError), match=owner or f"has no '{name}' in the surface"):
        run_all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, size: p.register("adrec::x", lazy=True), r"plugin\.register.*: unexpected keyword 'lazy'"),
        (lambda p, size: p.aot_impl(), "'plugin_id' is missing"),
        (lambda p, size: p.aot_impl("adrec::x", True), "takes 1 arguments"),
        (lambda p, size: p.aot_implementation("adrec::x"), "has no 'aot_implementation' in the surface"),
        (lambda p, size: p.SymIntExpr(1), "has no 'SymIntExpr' in the surface"),
        (lambda p, size: p.cdiv(size, 2.0), r"'second' is a float, not int \| ShapeExpr"),
        (lambda p, size: p.cdiv(7, 2), "both arguments are integers"),
        (lambda p, size: p.SymInt32("7"), "'value' is a str, not int"),
        (lambda p, size: p.from_shape_expr([size], 0), "'shape_expr' is a list, not tuple"),
        (lambda p, size: p.from_shape_expr((size, 1.0), 0), "'shape_expr' is a tuple, not tuple"),
        (lambda p, size: p.KernelLaunchParams(threads=128), "unexpected keyword 'threads'"),
        (lambda p, size: setattr(p.KernelLaunchParams(), "threads", 128), "no 'threads' to write"),
        (lambda p, size: p.KernelLaunchParams().block, "KernelLaunchParams has no 'block'"),
        (lambda p, size: setattr(size, "value", 3), "ShapeExpr has no 'value' to write"),
    ],
)
def test_a_wrong_call_is_refused(trt: PluginStandIn, call: Callable[[Any, Any], Any], message: str) -> None:
    with pytest.raises(SurfaceError, match=message):
        call(trt.plugin, trt.size(7))


def test_sizes_have_the_operators_that_tensorrt_gives_them(trt: PluginStandIn) -> None:
    size = trt.size(7)
    assert [value_of(each) for each in (size * 3, size // 2, trt.plugin.ShapeExpr(9) // size)] == [21, 3, 1]
    with pytest.raises(SurfaceError, match=r"ShapeExpr\.__mul__.*: 'other' is a float"):
        size * 2.0
    with pytest.raises(TypeError, match="unsupported operand"):
        9 // size
