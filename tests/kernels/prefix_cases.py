"""Inputs of prefix attention for its tests: jagged histories, padding of every kind, NaN around everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.block_weights import pad_weights
from kernels.prefix_attention import prefix_attention, prefix_attention_twin
from tests.kernels.conftest import assert_matches, embedded, guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Histories that start and end inside tiles, span several, share one, are empty or a single token.
LENGTHS = (3, 0, 1, 7, 0, 18, 1, 2, 5)
# What of the padding: none; one row for all of it; a row for each position; each shared or each user's own.
PADDING: dict[str, dict[str, Any]] = {
    "masked": {"pads": 0},
    "one": {"pads": 1},
    "one of each user": {"pads": 1, "own": True},
    "positions": {"pads": 18},
    "positions of each user": {"pads": 18, "own": True},
    "one, given bias": {"pads": 1, "bias": True},
    "positions, given bias": {"pads": 18, "bias": True},
    "some of each user, given bias": {"pads": 5, "own": True, "bias": True},
}


def arguments(
    device: torch.device,
    lengths: tuple[int, ...] = LENGTHS,
    *,
    heads: int = 2,
    width: int = 8,
    pads: int = 1,
    own: bool = False,
    bias: bool = False,
    max_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    seed: int | Tensor = 2**40 + 5,
) -> dict[str, Any]:
    """Arguments of `prefix_attention`; the longest history has no padding unless ``max_length`` says otherwise."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.tensor(lengths, dtype=torch.int64)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    longest = max_length or max(lengths, default=1)
    values: dict[str, Any] = {
        "qkv": torch.randn(int(offsets[-1]), 3, heads, width, generator=generator).to(dtype),
        "offsets": offsets,
    }
    if pads:
        users = len(lengths) if own else 1
        values["pads"] = torch.randn(2, users, heads, pads, width, generator=generator).to(dtype)
        if not bias:
            values["max_length"] = longest
        elif pads in (1, longest):
            values["pad_bias"] = pad_weights(counts, pads, longest)
        else:
            values["pad_bias"] = torch.randn(len(lengths), pads, generator=generator)
    placed = {
        name: embedded(value.to(device)) if isinstance(value, Tensor) else value for name, value in values.items()
    }
    return {**placed, "dropout": dropout, "seed": seed}


def widened(values: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The same arguments with floating-point tensors in another dtype, cut off from the originals."""
    return {
        name: value.detach().to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in values.items()
    }


def compare(values: dict[str, Any]) -> Tensor:
    """Hold the kernel to its twin in float32 on the same numbers."""
    expected = prefix_attention_twin(**widened(values))
    with guarded():
        found = prefix_attention(**values)
    assert found.dtype == values["qkv"].dtype
    assert_matches(found, expected, found.dtype)
    return found


def compare_gradients(values: dict[str, Any]) -> list[Tensor]:
    """Hold the kernel's gradients of qkv and pads to those of the twin in float32."""
    results = []
    gradient = torch.randn(values["qkv"][:, 0].shape, generator=torch.Generator().manual_seed(2))
    gradient = embedded(gradient.to(values["qkv"].dtype).to(values["qkv"].device))
    for function, own in ((prefix_attention, values), (prefix_attention_twin, widened(values))):
        inputs = [
            own[name].detach().requires_grad_()
            for name in ("qkv", "pads")
            if own.get("pads") is not None or name == "qkv"
        ]
        given = {**own, **dict(zip(("qkv", "pads"), inputs, strict=False))}
        if function is prefix_attention:
            with guarded():
                found = torch.autograd.grad(function(**given), inputs, gradient)
        else:
            found = torch.autograd.grad(function(**given), inputs, gradient.float())
        results.append(found)
    for actual, expected, name in zip(*results, ("qkv", "pads"), strict=False):
        assert actual.dtype == values["qkv"].dtype, name
        assert_matches(actual, expected, actual.dtype)
    return list(results[0])
