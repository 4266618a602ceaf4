"""The operators as plugins: attributes of each, and shapes and dtypes of its inputs for a batch."""

from __future__ import annotations

from typing import Any

import torch

from compress.export.tensorrt.operators import DENOISE_INPUTS, OPERATORS
from kernels.plugin_kernels import Integers

SCORE = {"count": 12102, "width": 128, "k": 20, "first": 1}
DENOISE = {
    "width": 128, "heads": 4, "blocks": 2, "steps": 1, "pad_rows": 1, "max_length": 50, "mix_weight": 0.001,
    "guidance_scale": 1.0, "geodesic": 0,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {"score_splits": SCORE, "merge_splits": SCORE, "denoise_last": DENOISE}
BATCHES = (1, 33, 512)
# TensorRT's names of the outputs' dtypes.
OUTPUT_TYPES = {
    "score_splits": ["INT64", "FLOAT"],
    "merge_splits": ["INT64", "INT64", "FLOAT"],
    "denoise_last": ["FLOAT", "FLOAT", "FLOAT"],
}


def shapes_of(name: str, batch: int) -> list[tuple[int, ...]]:
    if name == "score_splits":
        return [(batch, 128), (12102, 128)]
    if name == "merge_splits":
        splits = OPERATORS["score_splits"].describe(
            SCORE, shapes_of("score_splits", batch), dtypes_of("score_splits"), Integers()
        )
        return [each.shape for each in splits]
    known = {"condition": (batch, 128), "keys_values": (1, 2, 2, batch, 50, 128)}
    return [known.get(each, (1,)) for each in DENOISE_INPUTS]


def dtypes_of(name: str) -> list[torch.dtype]:
    return [torch.int64 if each in {"offsets", "candidates"} else torch.float32 for each in OPERATORS[name].inputs]
