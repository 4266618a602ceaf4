"""Inputs of `denoise_last` for its tests: jagged histories, padding of every kind, NaN where nothing may be read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.block_weights import BlockWeights
from kernels.denoise_last import denoise_last, denoise_last_twin
from tests.kernels.conftest import assert_matches, embedded, guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [3, 1, 9, 2, 20, 1]
OPTIONS: dict[str, dict[str, Any]] = {
    "one pad row": {},
    "masked padding": {"pads": 0},
    "pad rows": {"pads": 20},
    "guided": {"branches": 2, "guidance_scale": 1.5},
    "guided, pad rows": {"branches": 2, "guidance_scale": 0.5, "pads": 20},
    "two branches, no guidance": {"branches": 2},
    "geodesic": {"geodesic": True},
    "guided, geodesic, masked": {"branches": 2, "guidance_scale": 1.5, "geodesic": True, "pads": 0},
    "one block": {"blocks": 1},
    "three blocks": {"blocks": 3},
    "one step": {"steps": 1},
    "four steps": {"steps": 4},
    "no row keys": {"row_keys": None},
    "given noise": {"noise": True},
    "weak noise": {"mix_weight": 0.001},
}


def arguments(
    lengths: list[int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    width: int = 32,
    heads: int = 2,
    blocks: int = 2,
    branches: int = 1,
    steps: int = 2,
    max_length: int = 20,
    pads: int = 1,
    spare: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Random arguments between NaN margins; what must not be read holds NaN. spare: tokens that belong to no user."""
    generator = torch.Generator().manual_seed(0)
    B, D, tokens = len(lengths), width, sum(lengths)

    def normal(*size: int, scale: float = 1.0, shift: float = 0.0, kind: torch.dtype = torch.float32) -> Tensor:
        return embedded((torch.randn(*size, generator=generator) * scale + shift).to(kind).to(device))

    def matrix(rows: int, columns: int) -> Tensor:
        return normal(blocks, rows, columns, scale=columns**-0.5, kind=dtype)

    weights = BlockWeights(
        qkv=matrix(3 * D, D),
        qkv_bias=normal(blocks, 3 * D, scale=0.2),
        out=matrix(D, D),
        out_bias=normal(blocks, D, scale=0.2),
        attention_norm=normal(blocks, 2, D, scale=0.2, shift=1.0),
        up=matrix(4 * D, D),
        up_bias=normal(blocks, 4 * D, scale=0.2),
        down=matrix(D, 4 * D),
        down_bias=normal(blocks, D, scale=0.2),
        feed_forward_norm=normal(blocks, 2, D, scale=0.2, shift=1.0),
    )
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    keys_values = normal(branches, blocks, 2, tokens + spare, D, kind=dtype)
    keys_values[:, :, :, tokens:] = torch.nan
    keys_values[:, :, :, offsets[1:] - 1] = torch.nan
    coefficients = torch.rand(steps, 3, generator=generator) * 0.7
    coefficients[0] = torch.nan
    noise = normal(steps + 1, B, D) if options.pop("noise", None) else None
    if noise is not None:
        noise[-1] = torch.nan
    return {
        "condition": normal(B, D),
        "weights": weights,
        "keys_values": keys_values,
        "pads": normal(branches, blocks, 2, pads, D, kind=dtype) if pads else None,
        "offsets": embedded(offsets),
        "times": normal(steps, D),
        "coefficients": embedded(coefficients.to(device)),
        "mix_weight": 1.0,
        "heads": heads,
        "max_length": max_length,
        "seed": 5,
        "row_keys": embedded(torch.arange(B, device=device) * (2**39 - 1) // max(1, B)),
        "noise": noise,
        **options,
    }


def check(values: dict[str, Any], found: Tensor | None = None) -> Tensor:
    """Hold the kernel to its twin in float64; returns what the kernel found."""
    if found is None:
        with guarded():
            found = denoise_last(**values)
    assert found.dtype == torch.float32
    expected = denoise_last_twin(**{**values, "condition": values["condition"].double()})
    assert expected.dtype == torch.float64
    assert_matches(found, expected, values["weights"].qkv.dtype)
    return found
