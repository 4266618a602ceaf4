"""Comparing two rankings of the same users: what share of the accuracy is kept, with a paired interval."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from adrec.evaluation.metrics import CUTOFFS, Interval


def ndcg_gains(ranks: Tensor, cutoff: int = max(CUTOFFS)) -> Tensor:
    """Return ``1 / log2(rank + 2)`` below the cutoff, else 0; ranks `[n]` int64 from 0 -> float64."""
    gains = 1.0 / torch.log2(ranks.to(torch.float64) + 2.0)
    return torch.where(ranks < cutoff, gains, torch.zeros_like(gains))


def kept_percent(ranks: Tensor, exact_ranks: Tensor, *, resamples: int = 1000, seed: int = 0) -> Interval | None:
    """Return NDCG@20 in percent of the exact NDCG@20, with a paired bootstrap 95 % interval over users.

    Both are `[n]` int64 ranks from 0 of the same users. `None` when the exact NDCG@20 is zero, and so no
    ratio exists.
    """
    here, exact = ndcg_gains(ranks).cpu().numpy(), ndcg_gains(exact_ranks).cpu().numpy()
    if exact.sum() == 0.0:
        return None
    generator = np.random.default_rng(seed)
    ratios = []
    for _ in range(resamples):
        picks = generator.integers(0, len(here), len(here))
        below = exact[picks].sum()
        if below > 0.0:
            ratios.append(100.0 * here[picks].sum() / below)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(100.0 * float(here.sum() / exact.sum()), float(low), float(high))
