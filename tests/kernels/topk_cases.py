"""Inputs of `score_topk` for its tests, and how a result is held to what it must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.score_topk import FLOAT8, score_topk, score_topk_twin
from tests.kernels.conftest import assert_matches, embedded, guarded

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def margins(values: Tensor) -> Tensor:
    """The same values between margins that show a stray read; float8 cannot be filled, so its bytes are."""
    if values.dtype == FLOAT8:
        return embedded(values.view(torch.uint8)).view(FLOAT8)
    return embedded(values)


def exclusions(lists: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    """Jagged lists as the two arguments of `score_topk`."""
    lengths = torch.tensor([0] + [len(one) for one in lists])
    items = torch.tensor([item for one in lists for item in one], dtype=torch.int64)
    return {
        "exclude_items": embedded(items.to(device)),
        "exclude_offsets": embedded(lengths.cumsum(0).to(device)),
    }


def problem(
    device: torch.device,
    *,
    batch: int = 5,
    items: int = 300,
    width: int = 32,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
    scaled: bool = False,
    whole: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Rows, table and scale between margins. whole: small whole numbers, whose scores are exact and often tie."""
    generator = torch.Generator().manual_seed(seed)
    stored = dtype if stored is None else stored

    def values(count: int, kind: torch.dtype) -> Tensor:
        if whole:
            return torch.randint(-2, 3, (count, width), generator=generator).to(torch.float32).to(kind)
        if kind == torch.int8:
            return torch.randint(-127, 128, (count, width), generator=generator).to(kind)
        return torch.randn(count, width, generator=generator).to(kind)

    found = {"rows": values(batch, dtype), "table": values(items + 1, stored)}
    if scaled:
        powers = 2.0 ** torch.randint(-1, 2, (items + 1,), generator=generator)
        found["scale"] = powers if whole else torch.rand(items + 1, generator=generator)
    return {name: margins(value.to(device)) for name, value in found.items()}


def check_exact(k: int, values: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Hold the kernel to the twin where scores are exact: the same items and the same bits."""
    expected_items, expected = score_topk_twin(k=k, **values)
    with guarded():
        items, scores = score_topk(k=k, **values)
    assert (items.dtype, scores.dtype) == (torch.int64, torch.float32)
    assert torch.equal(scores, expected)
    assert torch.equal(items, expected_items)
    return items, scores


def check_close(k: int, values: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Hold the kernel to the twin up to the order of sums: close scores, and items that the twin scores the same."""
    expected_items, expected = score_topk_twin(k=k, **values)
    with guarded():
        items, scores = score_topk(k=k, **values)
    assert_matches(scores, expected, torch.float32)
    found = scores.isfinite()
    assert torch.equal(items > 0, expected_items > 0)
    wide = values["rows"].double()
    own = (wide[:, None] * values["table"].to(torch.float64)[items]).sum(-1)
    if values.get("scale") is not None:
        own = own * values["scale"].double()[items]
    assert_matches(scores[found], own[found], torch.float32)
    assert bool((scores[:, 1:] <= scores[:, :-1]).all())
    for row, mask in zip(items, found, strict=True):
        assert row[mask].unique().numel() == int(mask.sum()), "an item was returned twice"
    return items, scores
