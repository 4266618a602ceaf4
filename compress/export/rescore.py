"""Rank a catalogue by rounded scores, and the best of it again by exact ones.

Of all that int8 rounds, the score changes lists most: neighbours in a list differ by less than it rounds. So rounded
scores only choose candidates, and a graph computes theirs once more from the float table, which is there to be looked
up. That is a few dozen rows a user, or twice the length of long lists, whatever the size of the catalogue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto

LEAST_CANDIDATES = 40


def candidate_count(k: int, rows: int) -> int:
    """Rows that are scored again for lists of ``k``; lists are then those of exact scores, as good as always."""
    return min(max(LEAST_CANDIDATES, 2 * k), rows)


def rescore(model: ModelProto) -> str | None:
    """Add to a graph the exact ranking of its candidates; returns the product that may be rounded from now on.

    None for a graph that ranks nothing, or whose table is not inside: that one stays as it is. The graph's outputs keep
    their names, shapes and dtypes.
    """
    import onnx
    from onnx import helper, numpy_helper

    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    constants = {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"} | stored
    made = {name: node for node in graph.node for name in node.output}
    ranking = next((node for node in graph.node if node.op_type == "TopK"), None)
    if ranking is None or made[ranking.input[0]].op_type != "Gemm" or made[ranking.input[0]].input[1] not in stored:
        return None
    score = made[ranking.input[0]]
    rows, table, bias = score.input
    listed = int(numpy_helper.to_array(constants[ranking.input[1]]).item())
    numbers = {"rescored_count": candidate_count(listed, stored[table].dims[0]), "rescored_axis": 2}
    graph.initializer.extend(numpy_helper.from_array(np.array([n], np.int64), name) for name, n in numbers.items())
    nodes: list[onnx.NodeProto] = [
        helper.make_node("TopK", [score.output[0], "rescored_count"], ["rounded_scores", "unordered"], sorted=0),
        # By id, so that of equal scores the lower id comes first, as without candidates.
        helper.make_node("TopK", ["unordered", "rescored_count"], ["candidates", "order"], largest=0),
        helper.make_node("Gather", [table, "candidates"], ["candidate_rows"], axis=0),
        helper.make_node("Unsqueeze", [rows, "rescored_axis"], ["row_columns"]),
        helper.make_node("MatMul", ["candidate_rows", "row_columns"], ["candidate_columns"]),
        helper.make_node("Squeeze", ["candidate_columns", "rescored_axis"], ["candidate_products"]),
        helper.make_node("Gather", [bias, "candidates"], ["candidate_bias"], axis=0),
        helper.make_node("Add", ["candidate_products", "candidate_bias"], ["exact_scores"]),
        helper.make_node("TopK", ["exact_scores", ranking.input[1]], [ranking.output[0], "places"]),
        helper.make_node("GatherElements", ["candidates", "places"], [ranking.output[1]], axis=1),
    ]
    for node in nodes:
        node.name = f"rescore_{node.output[0]}"
    place = list(graph.node).index(ranking)
    graph.node.remove(ranking)
    for offset, node in enumerate(nodes):
        graph.node.insert(place + offset, node)
    return str(score.name)
