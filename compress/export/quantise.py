"""Quantised variants of an exported float32 graph.

``int8-dynamic`` is for ONNX Runtime on CPUs: weights of linear layers per channel, activations at run time.
``int8-qdq`` and ``fp8-qdq`` are for GPUs: symmetric Q/DQ pairs around the same layers, scales from real histories. The
quantiser's own preprocessing is left out: it stores the item table twice.
"""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from adrec.data.jagged import Jagged
from adrec.engines.exported import ExportError
from adrec.errors import NotSupportedError
from compress.export.graphs import Graph

QuantisationName = Literal["int8-dynamic", "int8-qdq", "fp8-qdq"]
CALIBRATION_BATCH = 32


def quantise_graph(
    source: Path,
    target: Path,
    kind: QuantisationName,
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
            if kind == "int8-dynamic":
                _dynamic(source, made)
            elif quantiser == "modelopt":
                _modelopt(source, made, kind, list(calibration_inputs(graph, calibration)))
            else:
                _static(source, made, kind, calibration_inputs(graph, calibration, one_shape=kind == "fp8-qdq"))
        except NotSupportedError:
            raise
        except Exception as error:
            raise ExportError(f"{source.name}: cannot be quantised to {kind}: {error}") from error
        _finish(made, target, facts, data)
    return data


def calibration_inputs(
    graph: Graph, histories: Jagged | None, *, one_shape: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """Inputs of a graph for real histories, 32 users of similar length at a time, with drawn noise.

    one_shape: all in one shape without padding, the last items of histories of the median length or more; the
    calibration of float8 stacks what it collects.
    """
    if histories is None or len(histories) == 0:
        raise ExportError("no histories to calibrate with; name the data with --data")
    if unknown := {spec.name for spec in graph.inputs} - {"histories", "lengths", "noise", "times", "coefficients"}:
        raise NotSupportedError(f"a graph with the input '{sorted(unknown)[0]}' is not quantised with calibration")
    if graph.plan.loop:
        raise NotSupportedError("a loop is not quantised with calibration; export unrolled steps with --int8 qdq")
    histories = histories.tail(graph.core.config.max_length)
    if one_shape:
        middle = int(histories.lengths.median())
        histories = histories.select((histories.lengths >= middle).nonzero().squeeze(1)).tail(middle)
        size = min(CALIBRATION_BATCH, len(histories))
        histories = histories.select(torch.arange(len(histories) // size * size))
    histories = histories.select(torch.argsort(histories.lengths, stable=True))
    size = min(CALIBRATION_BATCH, len(histories))
    generator = torch.Generator().manual_seed(0)
    for first in range(0, len(histories), size):
        batch = histories.select(torch.arange(first, min(first + size, len(histories))))
        given = {
            "histories": batch.padded(int(batch.lengths.max())).numpy(),
            "lengths": batch.lengths.numpy(),
        }
        for spec in graph.inputs:
            if spec.name == "noise":
                shape = (int(spec.shape[0]), len(batch), int(spec.shape[2]))
                given["noise"] = torch.randn(shape, generator=generator).numpy()
        yield given


def _dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet_root():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": 1},
        )


def _static(source: Path, target: Path, kind: str, batches: Iterator[dict[str, np.ndarray]]) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(batches, None)

    eight = QuantType.QFLOAT8E4M3FN if kind == "fp8-qdq" else QuantType.QInt8
    method = CalibrationMethod.Distribution if kind == "fp8-qdq" else CalibrationMethod.MinMax
    # The calibrator of float8 prints its progress.
    with _quiet_root(), redirect_stdout(io.StringIO()):
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Gemm"],
            # float8 is as exact for small numbers as for large ones, and the zero padding row has no scale of its own.
            per_channel=kind != "fp8-qdq",
            activation_type=eight,
            weight_type=eight,
            calibrate_method=method,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                # TensorRT takes biases and the outputs of products as floats.
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": ["Gemm"],
            },
        )


def _modelopt(source: Path, target: Path, kind: str, batches: list[dict[str, np.ndarray]]) -> None:
    try:
        from modelopt.onnx.quantization import quantize
    except ImportError:
        raise NotSupportedError(
            "NVIDIA's quantiser is not installed: pip install 'adrec[modelopt]', or leave --quantiser out"
        ) from None
    widest = max(batches, key=lambda batch: batch["histories"].size)
    quantize(
        str(source),
        quantize_mode="fp8" if kind == "fp8-qdq" else "int8",
        calibration_data=widest,
        calibration_eps=["cpu"],
        op_types_to_quantize=["Gemm"],
        output_path=str(target),
    )


def _finish(made: Path, target: Path, facts: dict[str, str], data: str | None) -> None:
    import onnx

    model = onnx.load(str(made))
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, facts)
    # Quantisers name every size they do not know alike, which ONNX Runtime takes for one size.
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.doc_string = ""
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
