"""Nodes that a provider leaves to the CPU: found by name, and told from arithmetic on sizes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adrec.engines.exported import ExportError
from adrec.engines.onnx_placement import RECORD, check_placement, size_nodes
from adrec.engines.onnxruntime import PROVIDERS, make_session
from adrec.errors import NotSupportedError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
CUDA = PROVIDERS["cuda"]


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """``x [n, 3] @ w`` made flat: its length from Shape, Gather and Mul, its pad by an Expand of a float."""
    helper, kind = onnx.helper, onnx.TensorProto
    constants = {
        "w": np.ones((3, 2), np.float32), "zero": np.array([0]), "two": np.array([2]), "pad": np.zeros(1, np.float32)
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], "product"),
        helper.make_node("Shape", ["x"], ["shape"], "shape"),
        helper.make_node("Gather", ["shape", "zero"], ["rows"], "rows"),
        helper.make_node("Mul", ["rows", "two"], ["size"], "size"),
        helper.make_node("Reshape", ["y", "size"], ["flat"], "flat"),
        helper.make_node("Expand", ["pad", "size"], ["padding"], "padding"),
        helper.make_node("Add", ["flat", "padding"], ["out"], "sum"),
    ]
    made = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", kind.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("out", kind.FLOAT, ["m"])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def assigned(**nodes: str) -> Any:
    """A session that says which provider each node (name and operator are one) runs on."""
    parts = [
        SimpleNamespace(ep_name=provider, get_nodes=lambda name=name: [SimpleNamespace(name=name, op_type=name)])
        for name, provider in nodes.items()
    ]
    return SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)


def test_sizes_are_told_from_what_is_computed(graph: Path) -> None:
    # An Expand of a float by a size is as large as a request, and no arithmetic on sizes.
    assert size_nodes(graph) == {"shape", "rows", "size"}


def test_sizes_may_be_on_the_cpu_and_nothing_else(graph: Path) -> None:
    cpu = PROVIDERS["cpu"]
    check_placement(assigned(shape=cpu, rows=cpu, size=cpu, product=CUDA, flat=CUDA), graph, CUDA)
    with pytest.raises(
        ExportError, match=r"CUDAExecutionProvider leaves 2 nodes to the CPU: product 'product', fused 'fused'; use"
    ):
        check_placement(assigned(shape=cpu, product=cpu, flat=CUDA, fused=cpu), graph, CUDA)
    many = {f"node{place}": cpu for place in range(13)}
    with pytest.raises(ExportError, match=r"leaves 13 nodes .* node9 'node9' and 3 more"):
        check_placement(assigned(**many), graph, CUDA)


def test_a_real_session_names_its_nodes(graph: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(RECORD, "1")
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    with pytest.raises(ExportError, match=r"g\.onnx: .* leaves \d nodes to the CPU: .*MatMul 'product'"):
        check_placement(session, graph, CUDA)


def test_a_session_of_a_gpu_is_checked_and_one_of_the_cpu_is_not(graph: Path) -> None:
    asked: dict[str, Any] = {}

    class Session:
        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            asked[providers[0][0]] = options.entries

        def get_providers(self) -> list[str]:
            return list(asked)[-1:]

        def get_provider_graph_assignment_info(self) -> list[Any]:
            return assigned(product=PROVIDERS["cpu"]).get_provider_graph_assignment_info()  # type: ignore[no-any-return]

    class Options:
        def __init__(self) -> None:
            self.entries: dict[str, str] = {}

        def add_session_config_entry(self, name: str, value: str) -> None:
            self.entries[name] = value

    runtime: Any = SimpleNamespace(SessionOptions=Options, InferenceSession=Session)
    make_session(runtime, graph, PROVIDERS["cpu"], 1)
    assert RECORD not in asked[PROVIDERS["cpu"]]
    with pytest.raises(ExportError, match="leaves 1 nodes to the CPU: product 'product'"):
        make_session(runtime, graph, CUDA, 1)
    assert asked[CUDA][RECORD] == "1"


def test_a_runtime_that_cannot_tell_is_refused(graph: Path) -> None:
    with pytest.raises(NotSupportedError, match="cannot tell which nodes CUDAExecutionProvider leaves to the CPU"):
        check_placement(SimpleNamespace(), graph, CUDA)
