"""Candidates by rounded scores, ranked by exact ones: a small scoring graph by hand, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compress.export.rescore import candidate_count, rescore

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

WIDTH = 16
helper, numpy_helper = onnx.helper, onnx.numpy_helper


def scoring(items: int, k: int, *, inside: bool = True) -> Any:
    """Rows to the best k of a table of ``items``, ties among them, and the padding row, whose bias keeps it out."""
    table = np.random.default_rng(0).standard_normal((items + 1, WIDTH)).astype(np.float32)
    # Every other item has a twin.
    table[2::4] = table[1::4][: len(table[2::4])]
    bias = np.zeros(items + 1, np.float32)
    bias[0] = -3e4
    stored = [("bias", bias), ("count", np.array([k], np.int64)), *([("table", table)] if inside else [])]
    given = [("rows", ["batch", WIDTH]), *([] if inside else [("table", ["items", WIDTH])])]
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["rows", "table", "bias"], ["all"], name="score", transB=1),
            helper.make_node("TopK", ["all", "count"], ["scores", "items"]),
        ],
        "scoring",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in given],
        [
            helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["batch", k]),
            helper.make_tensor_value_info("items", onnx.TensorProto.INT64, ["batch", k]),
        ],
        [numpy_helper.from_array(value, name) for name, value in stored],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def round_scores(model: Any, places: float) -> None:
    """Let the score read a coarser table, as a quantiser does."""
    (table,) = (each for each in model.graph.initializer if each.name == "table")
    coarse = np.rint(numpy_helper.to_array(table) * places) / places
    model.graph.initializer.append(numpy_helper.from_array(coarse.astype(np.float32), "coarse"))
    (score,) = (node for node in model.graph.node if node.name == "score")
    score.input[1] = "coarse"


def run(model: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    scores, items = session.run(["scores", "items"], {"rows": rows})
    return scores, items


@pytest.mark.parametrize(("items", "k"), [(500, 10), (41, 20), (3, 3), (5, 1)])
@pytest.mark.parametrize("users", [1, 7])
def test_lists_are_those_of_exact_scores(items: int, k: int, users: int) -> None:
    rows = np.random.default_rng(users).standard_normal((users, WIDTH)).astype(np.float32)
    scores, best = run(scoring(items, k), rows)
    model = scoring(items, k)
    assert rescore(model) == "score"
    round_scores(model, 4.0)
    found, chosen = run(model, rows)
    # Also of equal scores, the lower id first.
    np.testing.assert_array_equal(chosen, best)
    np.testing.assert_allclose(found, scores, rtol=1e-5, atol=1e-6)


def test_rounding_alone_changes_those_lists() -> None:
    rows = np.random.default_rng(7).standard_normal((7, WIDTH)).astype(np.float32)
    rounded = scoring(500, 10)
    round_scores(rounded, 4.0)
    assert (run(rounded, rows)[1] != run(scoring(500, 10), rows)[1]).any()


def test_few_rows_of_the_table_are_read_again() -> None:
    model = scoring(500, 10)
    rescore(model)
    counts = [numpy_helper.to_array(each) for each in model.graph.initializer if each.name == "rescored_count"]
    assert counts == [40]
    assert [candidate_count(k, 501) for k in (1, 40, 41, 250, 300)] == [40, 80, 82, 500, 501]


def test_what_cannot_be_rounded_stays_as_it_is() -> None:
    model = scoring(41, 10, inside=False)
    before = model.SerializeToString()
    assert rescore(model) is None
    assert model.SerializeToString() == before
