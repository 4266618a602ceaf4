"""Quantised variants of an exported float graph.

``int8-dynamic`` is for ONNX Runtime on CPUs: weights of linear layers per channel, activations at run time.
``int8-qdq`` and ``fp8-qdq`` are for GPUs: symmetric Q/DQ pairs around linear layers, scales from real histories. The
quantiser's own preprocessing is left out: it stores the item table twice.

What is rounded are the layers that run once for every item of a history, nearly all of the work of a few steps. Layers
that run once for a user (the reverse steps and the score) stay in float: what they round reaches the list undamped.
int8-dynamic rounds the score as well, but only to choose candidates: see `compress.export.rescore`.

Of a graph whose steps are a loop, what runs before and after it is quantised alike; the loop's body and the embeddings
of its steps stay in float in every variant. A weight that is read both ways is stored in both forms.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from adrec.data.jagged import Jagged
from adrec.engines.exported import ExportError, Quantisation
from adrec.errors import NotSupportedError
from compress.export.float8 import quantise_float8
from compress.export.graphs import Graph
from compress.export.onnx_graph import all_graphs, dimensions
from compress.export.rescore import rescore

if TYPE_CHECKING:
    from onnx import ModelProto

CALIBRATION_BATCH = 32


def quantise_graph(
    source: Path,
    target: Path,
    kind: Quantisation,
    graph: Graph,
    facts: dict[str, str],
    calibration: Jagged | None,
    inline_limit: int,
    quantiser: Literal["onnxruntime", "modelopt"] = "onnxruntime",
) -> str | None:
    """Quantise ``source`` to ``target``; returns the file of its weights where they are not inside.

    facts: metadata of the new file. calibration: histories whose activations set the scales of Q/DQ variants. Raises
    NotSupportedError without the quantiser, ExportError where it fails.
    """
    data = f"{target.stem}.data" if _stored(source) > inline_limit else None
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        try:
            folded = Path(scratch) / "folded.onnx"
            floats = prepare(source, folded, rank_again=kind == "int8-dynamic")
            if kind == "int8-dynamic":
                _dynamic(folded, made, floats)
            else:
                batches = calibration_inputs(graph, calibration)
                if quantiser == "modelopt":
                    _modelopt(folded, made, kind, graph, floats, batches)
                elif kind == "fp8-qdq":
                    quantise_float8(folded, made, floats, batches)
                else:
                    _static(folded, made, floats, batches)
        except NotSupportedError:
            raise
        except Exception as error:
            raise ExportError(f"{source.name}: cannot be quantised to {kind}: {error}") from error
        _finish(made, target, facts, data)
    return data


def calibration_inputs(graph: Graph, histories: Jagged | None) -> Iterator[dict[str, np.ndarray]]:
    """Inputs of a graph for real histories, 32 users of similar length at a time, with drawn noise."""
    if histories is None or len(histories) == 0:
        raise ExportError("no histories to calibrate with; name the data with --data")
    histories = histories.tail(graph.core.config.max_length)
    histories = histories.select(torch.argsort(histories.lengths, stable=True))
    size = min(CALIBRATION_BATCH, len(histories))
    generator = torch.Generator().manual_seed(0)
    for first in range(0, len(histories), size):
        batch = histories.select(torch.arange(first, min(first + size, len(histories))))
        items, given = batch.padded(int(batch.lengths.max())), {}
        for spec in graph.inputs:
            if spec.name == "noise":
                # A loop is given one step, of any kind: what is calibrated runs before it.
                draws = 2 if graph.plan.loop else int(spec.shape[0])
                shape = (draws, len(batch), int(spec.shape[2]))
                given["noise"] = torch.randn(shape, generator=generator).numpy()
            elif spec.name == "times":
                given["times"] = np.zeros(1, np.int64)
            elif spec.name == "coefficients":
                given["coefficients"] = np.zeros((1, 3), np.float32)
            elif spec.name == "lengths":
                given["lengths"] = batch.lengths.numpy()
            elif spec.name == "histories":
                given["histories"] = items.numpy()
            elif spec.name == "embedded":
                given["embedded"] = graph.core.embed(items).detach().numpy()
            else:
                given["table"] = graph.core.model.table.detach().numpy()
        yield given


def prepare(source: Path, target: Path, *, rank_again: bool = False) -> list[str]:
    """Write a graph that is ready for a quantiser; returns the products that stay in float, by node.

    Those have one row a user, or one a step; with rank_again not the score, see `rescore`. A slice of a weight becomes
    a constant: it would be taken for an activation and get one scale instead of one per channel. A weight that products
    of both kinds read is stored for each.
    """
    import onnx

    model = onnx.load(str(source))
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    kept = []
    for node in model.graph.node:
        if node.op_type == "Slice" and all(name in constants for name in node.input):
            weight, *numbers = (onnx.numpy_helper.to_array(constants[name]) for name in node.input)
            part = np.ascontiguousarray(weight[_cut(*numbers, dimensions=weight.ndim)])
            constants[node.output[0]] = onnx.numpy_helper.from_array(part, node.output[0])
            model.graph.initializer.append(constants[node.output[0]])
        else:
            kept.append(node)
    products = [node for node in kept if node.op_type == "Gemm"]
    floats = products_with(model, "batch", "steps")
    read_as_floats = {node.input[1] for node in products if node.name in floats}
    copies: set[str] = set()
    for node in products:
        name = node.input[1]
        if node.name not in floats and name in read_as_floats:
            node.input[1] = f"{name}_of_items"
            if name not in copies:
                copies.add(name)
                model.graph.initializer.add().CopyFrom(constants[name])
                model.graph.initializer[-1].name = node.input[1]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    if rank_again and (rounded := rescore(model)) is not None:
        floats.remove(rounded)
    # As external data: above 2 GiB a file holds no weights itself.
    onnx.save(model, str(target), save_as_external_data=True, location=f"{target.stem}.data")
    return floats


def products_with(model: ModelProto, *rows: str) -> list[str]:
    """Names of the products outside of loops whose first input has one of these sizes of rows."""
    infos = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    found = {info.name: dimensions(info)[:1] for info in infos}
    wanted = [[size] for size in rows]
    return [node.name for node in model.graph.node if node.op_type == "Gemm" and found.get(node.input[0]) in wanted]


def _cut(
    starts: np.ndarray, ends: np.ndarray, axes: np.ndarray, steps: np.ndarray | None = None, *, dimensions: int
) -> tuple[slice, ...]:
    """What ONNX's Slice takes of an array."""
    found = [slice(None)] * dimensions
    strides = np.ones_like(axes) if steps is None else steps
    for axis, first, last, stride in zip(axes, starts, ends, strides, strict=True):
        found[int(axis)] = slice(int(first), int(last), int(stride))
    return tuple(found)


def _dynamic(source: Path, target: Path, floats: list[str]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet_root():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            # The quantiser renames products first.
            nodes_to_exclude=[f"{name}_MatMul" for name in floats],
            per_channel=True,
            # Unsigned: sums of signed weights saturate on CPUs without VNNI unless they are cut to 7 bits, and those
            # round twice as coarsely.
            weight_type=QuantType.QUInt8,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": 1},
        )


def _static(source: Path, target: Path, floats: list[str], batches: Iterator[dict[str, np.ndarray]]) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    with _quiet_root():
        quantize_static(
            source,
            target,
            _reader(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Gemm"],
            nodes_to_exclude=floats,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=True,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                # TensorRT takes biases and the outputs of products as floats.
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": ["Gemm"],
            },
        )


def require_modelopt() -> Any:
    """NVIDIA's quantiser; raises NotSupportedError where it is missing."""
    try:
        from modelopt.onnx.quantization import quantize
    except ImportError:
        raise NotSupportedError(
            "NVIDIA's quantiser is not installed: pip install 'adrec[modelopt]', or leave --quantiser out"
        ) from None
    return quantize


def _modelopt(
    source: Path, target: Path, kind: str, graph: Graph, floats: list[str], batches: Iterator[dict[str, np.ndarray]]
) -> None:
    import onnx_ir
    from onnx_ir.passes.common import DeduplicateHashedInitializersPass

    require_modelopt()(
        str(source),
        quantize_mode="fp8" if kind == "fp8-qdq" else "int8",
        calibration_data_reader=_reader(batches),
        # Its other method stacks what it collects, which needs one shape for all batches.
        calibration_method="max",
        calibration_eps=["cpu"],
        op_types_to_quantize=["Gemm"],
        nodes_to_exclude=[f"^{re.escape(name)}$" for name in floats],
        # Else it makes float16 of the rest by itself.
        high_precision_dtype=str(graph.core.dtype).replace("torch.float", "fp"),
        # Weights as they are quantised, not as floats that a node quantises.
        dq_only=True,
        use_external_data_format=True,
        output_path=str(target),
        # Of a machine without a GPU it says so as an error.
        log_level="CRITICAL",
    )
    # It stores a tensor once for each node that reads it.
    model = onnx_ir.load(target)
    DeduplicateHashedInitializersPass()(model)
    onnx_ir.save(model, target, external_data=f"{target.stem}-once.data")


def _reader(batches: Iterator[dict[str, np.ndarray]]) -> Any:
    """Batches as both quantisers read them; the first may be asked for once more."""
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.first, self.rest = next(batches), batches
            self.begun = False

        def get_first(self) -> dict[str, np.ndarray]:
            return self.first

        def get_next(self) -> dict[str, np.ndarray] | None:
            if not self.begun:
                self.begun = True
                return self.first
            return next(self.rest, None)

    return Reader()


def _finish(made: Path, target: Path, facts: dict[str, str], data: str | None) -> None:
    import onnx
    import onnx_ir

    model = onnx.load(str(made))
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, facts)
    for graph in all_graphs(model.graph):
        # Quantisers name every size they do not know alike, which ONNX Runtime takes for one size.
        del graph.value_info[:]
        for node in graph.node:
            node.doc_string = ""
    # ONNX Runtime's quantiser orders nodes by their own inputs, and overlooks what the body of a loop reads.
    ordered = onnx_ir.from_proto(model)
    ordered.graph.sort()
    model = onnx_ir.to_proto(ordered)
    onnx.save(model, str(target), save_as_external_data=data is not None, location=data, size_threshold=1024)


def _stored(source: Path) -> int:
    return sum(file.stat().st_size for file in (source, source.with_suffix(".data")) if file.is_file())


class _quiet_root:  # noqa: N801
    """The quantiser advises its own preprocessing through the root logger."""

    def __enter__(self) -> None:
        self.level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)

    def __exit__(self, *raised: Any) -> None:
        logging.getLogger().setLevel(self.level)
