"""Every rule of the linter on a file that breaks it and nothing else, and the command's output and exit status."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from adrec.cli import build_app
from adrec.engines.exported import ExportError
from adrec.errors import ConfigError
from compress.export.lint import lint
from compress.export.lint_rules import RULES
from compress.export.tensorrt.graph import read_graph

onnx = pytest.importorskip("onnx")
helper = onnx.helper
FLOAT, FLOAT16, DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE
UINT8, INT64 = onnx.TensorProto.UINT8, onnx.TensorProto.INT64
Build = Callable[[], Any]


def tensor(name: str, values: Any, dtype: Any = np.float32) -> Any:
    return onnx.numpy_helper.from_array(np.asarray(values, dtype=dtype), name)


def model(
    nodes: list[Any],
    constants: list[Any] | None = None,
    *,
    inputs: dict[str, tuple[int, list[Any]]] | None = None,
    output: tuple[str, int, list[Any]] = ("y", 1, ["batch", 4]),
    opset: int = 20,
    ir: int = 10,
    domains: tuple[str, ...] = (),
    functions: list[Any] | None = None,
) -> Any:
    given = inputs or {"x": (FLOAT, ["batch", 4])}
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in given.items()],
        [helper.make_tensor_value_info(*output)],
        constants or [],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir, functions=functions or [])


def relu() -> Any:
    return helper.make_node("Relu", ["x"], ["y"], name="r")


def quantised(zero: Any = 0, zero_type: Any = np.int8, scale: Any = 0.1) -> Any:
    constants = [tensor("scale", scale), tensor("zero", zero, zero_type)]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="q", axis=1),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], name="d", axis=1),
    ]
    return model(nodes, constants)


def top_k(k: int, items: int, *, computed: bool = False) -> Any:
    nodes = [helper.make_node("TopK", ["x", "k"], ["v", "y"], name="t")]
    constants = [] if computed else [tensor("k", [k], np.int64)]
    inputs = {"x": (FLOAT, ["batch", items]), **({"k": (INT64, [1])} if computed else {})}
    return model(nodes, constants, inputs=inputs, output=("y", INT64, ["batch", None] if computed else ["batch", k]))


def top_k_by(place: str, k: int, folder: Path) -> Any:
    """``top_k`` whose K is a number or a list of a Constant node, or stands in a file of weights."""
    made = top_k(k, 5000)
    (stored,) = made.graph.initializer
    if place == "file":
        (folder / "k.data").write_bytes(np.array([k], np.int64).tobytes())
        stored.CopyFrom(onnx.numpy_helper.from_array(np.array([k], np.int64), "k"))
        onnx.external_data_helper.set_external_data(stored, "k.data", 0, 8)
        stored.ClearField("raw_data")
        return made
    del made.graph.initializer[:]
    made.graph.node.insert(0, helper.make_node("Constant", [], ["k"], **{place: k if place == "value_int" else [k]}))
    return made


def int8_weight(*, in_graph: bool, channels: int = 1) -> Any:
    """``x @ w`` with w in int8: stored so with a scale for each of ``channels``, or sliced and quantised as it runs."""
    scale, axis = (0.1, 1) if channels == 1 else (np.full(channels, 0.1), 1)
    zero = np.zeros(np.shape(scale), np.int8)
    constants = [tensor("scale", scale), tensor("zero", zero, np.int8)]
    back = helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["w"], name="d", axis=axis)
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    if not in_graph:
        return model([back, product], [*constants, tensor("q", np.ones((4, 4)), np.int8)])
    constants += [tensor("whole", np.ones((8, 4))), tensor("start", [4], np.int64), tensor("end", [8], np.int64)]
    nodes = [
        helper.make_node("Slice", ["whole", "start", "end"], ["half"]),
        helper.make_node("QuantizeLinear", ["half", "scale", "zero"], ["q"], name="q"),
    ]
    return model([*nodes, back, product], constants)


def attention_guard() -> Any:
    nodes = [
        helper.make_node("Softmax", ["x"], ["p"]),
        helper.make_node("IsNaN", ["p"], ["n"], name="guard"),
        helper.make_node("Where", ["n", "zero", "p"], ["y"]),
    ]
    return model(nodes, [tensor("zero", 0.0)])


def table_twice() -> Any:
    table = np.random.default_rng(0).standard_normal((8192, 16), dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "transposed"], ["s"]),
        helper.make_node("MatMul", ["s", "table"], ["y"]),
    ]
    return model(
        nodes, [tensor("table", table), tensor("transposed", np.ascontiguousarray(table.T))],
        inputs={"x": (FLOAT, ["batch", 16])}, output=("y", FLOAT, ["batch", 16]),
    )  # fmt: skip


def unknown_size() -> Any:
    made = model([helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Relu", ["h"], ["y"])])
    made.graph.value_info.append(helper.make_tensor_value_info("h", FLOAT, ["unk__0", 4]))
    return made


def matmul_integer() -> Any:
    nodes = [helper.make_node("MatMulInteger", ["x", "w"], ["y"], name="m")]
    weights = [tensor("w", np.ones((4, 4)), np.int8)]
    return model(nodes, weights, inputs={"x": (UINT8, ["batch", 4])}, output=("y", 6, ["batch", 4]))


def vendor() -> Any:
    node = helper.make_node("FusedMatMul", ["x", "x"], ["y"], name="f", domain="com.microsoft")
    return model([node], domains=("com.microsoft",))


def float16_infinity() -> Any:
    nodes = [helper.make_node("Add", ["x", "mask"], ["y"])]
    return model(
        nodes, [tensor("mask", [-np.inf, 0, 0, 0], np.float16)],
        inputs={"x": (FLOAT16, ["batch", 4])}, output=("y", FLOAT16, ["batch", 4]),
    )  # fmt: skip


BROKEN: dict[str, tuple[Build, str]] = {
    "ir-version": (lambda: model([relu()], ir=99), "IR version 99; read by the runtimes of today: 4 to 11"),
    "opset": (lambda: model([relu()], opset=8), "opset 8; TensorRT's parser reads 9 to 25"),
    "domain": (vendor, "operator of the domain 'com.microsoft'"),
    "operator": (lambda: model([helper.make_node("Hardmax", ["x"], ["y"], name="h")]), "has no Hardmax"),
    "random": (lambda: model([helper.make_node("RandomNormalLike", ["x"], ["y"])]), "TensorRT ignores its seed"),
    "double": (
        lambda: model([relu()], inputs={"x": (DOUBLE, ["batch", 4])}, output=("y", DOUBLE, ["batch", 4])),
        "is float64",
    ),
    "integer-product": (matmul_integer, "MatMulInteger is dynamic or integer quantisation of ONNX Runtime on CPUs"),
    "zero-point": (lambda: quantised(zero=3), "the zero point is 3; TensorRT has symmetric quantisation only"),
    "scale": (lambda: quantised(scale=-1.0), "a scale is -1.0; allowed: finite and above 0"),
    "quantised-type": (lambda: quantised(zero_type=np.uint8), "another type than int8 or float8_e4m3fn"),
    "granularity": (
        lambda: quantised(zero=[0, 0, 0, 0], scale=[0.1, 0.2, 0.3, 0.4]),
        "an activation has a scale per channel; TensorRT takes one per tensor",
    ),
    "weight-granularity": (lambda: int8_weight(in_graph=False), "an int8 weight has one scale for all channels"),
    "top-k": (lambda: top_k(3841, 5000), "K is 3841; TensorRT allows at most 3840"),
    "dimension-name": (
        lambda: model([relu()], inputs={"x": (FLOAT, [None, 4])}, output=("y", FLOAT, ["batch", 4])),
        "a dynamic size without a name",
    ),
    "infinite": (float16_infinity, "is infinite in float16"),
    "stored-twice": (table_twice, "has the values of 'table'"),
    "softmax-guard": (attention_guard, "tests a softmax for NaN"),
    "unknown-size": (unknown_size, "one name stands for different unknown sizes"),
    "checker": (
        lambda: model([helper.make_node("Relu", ["nowhere"], ["y"])]),
        "Nodes in a graph must be topologically sorted",
    ),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def to_file(made: Any, **options: Any) -> Path:
        path = tmp_path / "graph.onnx"
        onnx.save(made, str(path), **options)
        return path

    return to_file


def adrec(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "250"}).invoke(build_app(), [str(argument) for argument in arguments])


def test_a_sound_file_is_clean(write: Callable[..., Path]) -> None:
    assert lint(write(model([relu()])), profiles={"batch": (1, 512)}) == []
    assert lint(write(quantised())) == []
    assert lint(write(top_k(3840, 5000))) == []


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_finds_what_breaks_it(write: Callable[..., Path], rule: str) -> None:
    build, reason = BROKEN[rule]
    found = lint(write(build()))
    assert rule in {each.rule for each in found}
    finding = next(each for each in found if each.rule == rule)
    assert reason in finding.reason
    assert finding.where
    assert finding.fix == next(each.fix for each in RULES if each.name == rule)


@pytest.mark.parametrize("place", ["value_int", "value_ints", "file"])
def test_k_is_read_wherever_it_is_constant(write: Callable[..., Path], tmp_path: Path, place: str) -> None:
    assert "top-k" not in {each.rule for each in lint(write(top_k_by(place, 3840, tmp_path)))}
    found = lint(write(top_k_by(place, 3841, tmp_path)))
    assert [each.reason for each in found if each.rule == "top-k"] == ["K is 3841; TensorRT allows at most 3840"]
    with pytest.raises(ConfigError, match="takes the best 3841 items"):
        read_graph(write(top_k_by(place, 3841, tmp_path)))


def test_a_weight_that_is_quantised_as_an_activation_is_found(write: Callable[..., Path]) -> None:
    (found,) = lint(write(int8_weight(in_graph=True)))
    assert (found.rule, found.severity, found.where) == ("weight-granularity", "warning", "QuantizeLinear 'q'")
    assert found.reason == "quantises a weight in the graph, as if it were an activation"
    assert lint(write(int8_weight(in_graph=False, channels=4))) == []


def test_every_rule_is_broken_somewhere_here() -> None:
    # Profiles and external data have tests of their own below; the attention operator needs opset 23.
    assert {rule.name for rule in RULES} - set(BROKEN) == {"external-data", "profile", "attention-operator"}


def test_a_sub_graph_is_read_too(write: Callable[..., Path]) -> None:
    inner = helper.make_graph(
        [helper.make_node("RandomNormalLike", ["x"], ["inside"], name="hidden")], "then", [],
        [helper.make_tensor_value_info("inside", FLOAT, ["batch", 4])],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["outside"])], "else", [],
        [helper.make_tensor_value_info("outside", FLOAT, ["batch", 4])],
    )  # fmt: skip
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=other)
    found = lint(write(model([node], [tensor("c", True, np.bool_)])))
    assert [each.where for each in found if each.rule == "random"] == ["RandomNormalLike 'hidden'"]


def test_an_operator_that_the_file_defines_is_no_stranger(write: Callable[..., Path]) -> None:
    node = helper.make_node("twice", ["x"], ["y"], domain="mine")
    function = helper.make_function(
        "mine", "twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 20)]
    )
    assert lint(write(model([node], domains=("mine",), functions=[function]))) == []


def test_profiles_cover_every_dimension_and_no_other(write: Callable[..., Path]) -> None:
    path = write(model([relu()]))
    assert [(each.rule, each.where) for each in lint(path, profiles={})] == [("profile", "dimension 'batch'")]
    found = lint(path, profiles={"batch": (1, 8), "lenght": (1, 50)})
    assert [each.reason for each in found] == ["a profile covers it, but the inputs have batch"]


def test_the_volume_of_a_ranking_counts_the_largest_batch(write: Callable[..., Path]) -> None:
    path = write(top_k(20, 2**22))
    assert lint(path, profiles={"batch": (1, 511)}) == []
    found = lint(path, profiles={"batch": (1, 512)})
    assert [each.reason for each in found] == [f"ranks up to {2**31} numbers at once; TensorRT allows fewer than 2^31"]


def test_a_computed_k_and_a_computed_scale_are_found(write: Callable[..., Path]) -> None:
    assert any("K is computed" in each.reason for each in lint(write(top_k(5, 40, computed=True))))
    made = quantised()
    made.graph.initializer.pop(0)
    made.graph.input.append(helper.make_tensor_value_info("scale", FLOAT, []))
    assert any("the scale is computed" in each.reason for each in lint(write(made)))


def test_external_data_is_there_and_whole(write: Callable[..., Path], tmp_path: Path) -> None:
    def build() -> Any:
        return model([helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor("w", np.ones((4, 4)))])

    path = write(build(), save_as_external_data=True, location="w.data", size_threshold=0)
    assert lint(path) == []
    (tmp_path / "w.data").write_bytes(b"1234")
    assert [each.reason for each in lint(path)] == ["its values end beyond the end of 'w.data': the file was cut"]
    (tmp_path / "w.data").unlink()
    assert [(each.rule, each.reason) for each in lint(path)] == [("external-data", "holds weights and is missing")]


def test_external_data_outside_the_folder_is_refused(write: Callable[..., Path]) -> None:
    made = model([helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor("w", np.ones((4, 4)))])
    onnx.external_data_helper.set_external_data(made.graph.initializer[0], "../../etc/weights", 0, 64)
    made.graph.initializer[0].ClearField("raw_data")
    found = lint(write(made))
    assert [each.reason for each in found] == ["its values are in '../../etc/weights', outside the folder of the file"]


def test_a_malformed_file_is_findings_and_no_crash(write: Callable[..., Path]) -> None:
    made = quantised()
    del made.graph.node[0].input[1:]
    made.graph.node.append(helper.make_node("TopK", [], ["v", "i"], name="t"))
    found = {each.rule: each.reason for each in lint(write(made))}
    assert {"checker", "scale", "top-k"} <= set(found)
    assert "is malformed, so that this rule cannot be checked" in found["scale"]
    made = quantised()
    made.graph.initializer[0].raw_data = b"ab"
    assert {"checker", "scale"} <= {each.rule for each in lint(write(made))}


def test_external_data_of_no_length_is_a_finding(write: Callable[..., Path], tmp_path: Path) -> None:
    made = model([helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor("w", np.ones((4, 4)))])
    onnx.external_data_helper.set_external_data(made.graph.initializer[0], "w.data", 0, 64)
    made.graph.initializer[0].ClearField("raw_data")
    next(each for each in made.graph.initializer[0].external_data if each.key == "length").value = "many"
    (tmp_path / "w.data").write_bytes(bytes(64))
    found = lint(write(made))
    assert ("external-data", "its place in 'w.data' is no pair of numbers") in {
        (each.rule, each.reason) for each in found
    }


def test_a_file_for_cpus_may_hold_what_tensorrt_has_not(write: Callable[..., Path]) -> None:
    made = matmul_integer()
    assert {each.rule for each in lint(write(made))} == {"integer-product"}
    assert lint(write(made), target="onnxruntime") == []
    helper.set_model_props(made, {"adrec.runtime": "onnxruntime-cpu"})
    assert lint(write(made)) == []


@pytest.mark.parametrize("content", [b"", b"no graph at all", b"\x08\x0a\x12\x05"])
def test_what_is_no_onnx_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"foreign\.onnx: is no ONNX file"):
        lint(path)
    with pytest.raises(ExportError, match="there is no such file"):
        lint(tmp_path / "missing.onnx")


def test_the_command_prints_a_table_or_json_and_exits_with_1_for_errors(write: Callable[..., Path]) -> None:
    path = write(quantised(zero=3))
    result = adrec("export", "lint", path)
    assert result.exit_code == 1, result.output
    assert "zero-point" in result.output
    assert "quantise symmetrically: zero points 0" in result.output
    result = adrec("export", "lint", path, "--json")
    assert [each["rule"] for each in json.loads(result.output)[str(path)]] == ["zero-point", "zero-point"]
    # Warnings alone do not fail it.
    result = adrec("export", "lint", write(attention_guard()))
    assert result.exit_code == 0, result.output
    assert "softmax-guard" in result.output
    result = adrec("export", "lint", write(model([relu()])), "--profile", "batch=1:8:512")
    assert (result.exit_code, "clean" in result.output) == (0, True)
