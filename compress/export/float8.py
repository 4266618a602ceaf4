"""Q/DQ pairs in float8 (e4m3) around the products of an exported graph, with scales from the largest values seen.

ONNX Runtime's own float8 quantiser derives scales from standard deviations: what lies beyond three of them saturates.
Here the largest value maps to float8's largest, and nothing does. A float is as exact for small numbers as for large
ones, so one scale a tensor is enough, for weights too.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.export.onnx_graph import all_graphs

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LARGEST = 448.0


def quantise_float8(
    source: Path, target: Path, floats: Iterable[str], batches: Iterable[dict[str, np.ndarray]]
) -> None:
    """Write ``source`` with Q/DQ pairs around its Gemm nodes, but those named in ``floats``.

    batches: inputs of the graph, whose largest activations set the scales.
    """
    import onnx

    kept_in_float = set(floats)
    model = onnx.load(str(source))
    products = [node for node in model.graph.node if node.op_type == "Gemm" and node.name not in kept_in_float]
    largest = _largest(model, sorted({node.input[0] for node in products}), target.parent, batches)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    added: dict[str, list[NodeProto]] = {}
    for node in products:
        before = []
        for place in (0, 1):
            name = node.input[place]
            if name not in added:
                added[name] = _pair(
                    model, name, weights.get(name), largest.get(name, 0.0), weights[node.input[1]].dtype
                )
                before += added[name]
            node.input[place] = f"{name}_dequantised"
        position = list(model.graph.node).index(node)
        for offset, each in enumerate(before):
            model.graph.node.insert(position + offset, each)
    # The body of a loop may read in float what is quantised outside of it.
    used = {name for graph in all_graphs(model.graph) for node in graph.node for name in node.input}
    for tensor in [each for each in model.graph.initializer if each.name not in used]:
        model.graph.initializer.remove(tensor)
    onnx.save(model, str(target), save_as_external_data=True, location=f"{target.stem}.data")


def _pair(model: ModelProto, name: str, weight: np.ndarray | None, largest: float, dtype: np.dtype) -> list[NodeProto]:
    """The nodes that quantise a tensor and back, their constants added to the graph; a weight is stored quantised."""
    import ml_dtypes
    from onnx.helper import make_node
    from onnx.numpy_helper import from_array

    if weight is not None:
        largest = float(np.abs(weight).max())
    # Of a float8 a larger scale takes nothing but its smallest numbers.
    scale = np.array(max(largest / LARGEST, float(np.finfo(dtype).smallest_normal)), dtype)
    names = [f"{name}_scale", f"{name}_zero_point"]
    model.graph.initializer.extend(
        [from_array(scale, names[0]), from_array(np.zeros((), ml_dtypes.float8_e4m3fn), names[1])]
    )
    back = make_node("DequantizeLinear", [f"{name}_quantised", *names], [f"{name}_dequantised"], f"{name}_dequantise")
    if weight is None:
        return [make_node("QuantizeLinear", [name, *names], [f"{name}_quantised"], f"{name}_quantise"), back]
    stored = np.clip(weight.astype(np.float32) / float(scale), -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)
    model.graph.initializer.append(from_array(stored, f"{name}_quantised"))
    return [back]


def _largest(
    model: ModelProto, names: list[str], folder: Path, batches: Iterable[dict[str, np.ndarray]]
) -> dict[str, float]:
    """Largest absolute value of each tensor over all batches."""
    import onnx
    import onnxruntime

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    present = {output.name for output in watched.graph.output}
    infos = {info.name: info for info in watched.graph.value_info}
    watched.graph.output.extend(infos[name] for name in names if name not in present)
    path = folder / "watched.onnx"
    onnx.save(watched, str(path), save_as_external_data=True, location="watched.data")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = dict.fromkeys(names, 0.0)
    for batch in batches:
        for name, values in zip(names, session.run(names, batch), strict=True):
            found[name] = max(found[name], float(np.abs(values).max()))
    return found
