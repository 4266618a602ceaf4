"""Merge the gradients of several losses, with or without projecting conflicts away (PCGrad, arXiv 2001.06782)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = Sequence[Tensor | None]


def merge_gradients(per_loss: Sequence[Gradients], *, pcgrad: bool) -> list[Tensor | None]:
    """Mean over losses where every loss reaches a parameter, sum where only some do (the released code's rule).

    per_loss: for each loss, the gradient of each parameter or None where the loss does not reach it. pcgrad: first
    replace each loss's whole gradient g_i by ``g_i - (g_i . g_j) / |g_j|^2 g_j`` for every g_j with ``g_i . g_j < 0``.
    Returns one gradient a parameter, None where no loss reaches it.
    """
    merged: list[Tensor | None] = []
    projected = [_project(index, per_loss) for index in range(len(per_loss))] if pcgrad else per_loss
    for index in range(len(per_loss[0])):
        reached = [gradients[index] is not None for gradients in per_loss]
        parts = [part for part in (gradients[index] for gradients in projected) if part is not None]
        if not parts:
            merged.append(None)
        else:
            total = torch.stack(parts).sum(0)
            merged.append(total / len(per_loss) if all(reached) else total)
    return merged


def _project(index: int, per_loss: Sequence[Gradients]) -> list[Tensor | None]:
    own = list(per_loss[index])
    for other_index, other in enumerate(per_loss):
        if other_index == index:
            continue
        dot = _dot(own, other)
        if dot < 0:
            share = dot / _dot(other, other)
            own = [_subtract(mine, theirs, share) for mine, theirs in zip(own, other, strict=True)]
    return own


def _dot(first: Gradients, second: Gradients) -> Tensor:
    products = [(a * b).sum() for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return torch.stack(products).sum() if products else torch.zeros(())


def _subtract(mine: Tensor | None, theirs: Tensor | None, share: Tensor) -> Tensor | None:
    if theirs is None:
        return mine
    return -share * theirs if mine is None else mine - share * theirs
