"""HR, NDCG and MRR of one relevant item per user, from its rank in the whole catalogue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adrec.data.jagged import Jagged

CUTOFFS = (5, 10, 20)
METRICS = tuple(f"{name}@{k}" for name in ("HR", "NDCG", "MRR") for k in CUTOFFS)
SCORES_BUDGET = 2**25
TIE = 1e-6


@dataclass(frozen=True)
class Interval:
    """A value in percent with its 95 % bootstrap interval over users."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def target_ranks(rows: Tensor, table: Tensor, targets: Tensor, exclude: Jagged | None = None) -> Tensor:
    """Rank of each target among all N items, 0 is best; ties count against the target. Returns `[B]` int64.

    Scores within 1e-6 of each other, relatively, are ties: equal rows of the table may differ by that much after a
    matrix product. Scores that are not numbers tie with everything, so a diverged model ranks last.

    rows: `[B, D]`. table: `[N + 1, D]`, row 0 is padding and takes no part. targets: `[B]` int64 in 1..N. exclude:
    items that cannot be recommended to each row; a target among them counts as a miss at every cutoff. Works in item
    chunks, never holding more than 2^25 scores.
    """
    items = table.shape[0] - 1
    chunk = max(1, min(items, SCORES_BUDGET // max(1, rows.shape[0])))
    spans = [(first, min(first + chunk, items + 1)) for first in range(1, items + 1, chunk)]
    own = torch.empty_like(rows[:, 0])
    single = rows @ table[1:].T if len(spans) == 1 else None
    for first, last in spans:
        inside = ((targets >= first) & (targets < last)).nonzero().squeeze(1)
        scores = single if single is not None else rows @ table[first:last].T
        own[inside] = scores[inside, targets[inside] - first]
    ranks = torch.zeros_like(targets)
    owners = None if exclude is None else exclude.rows
    for first, last in spans:
        scores = single if single is not None else rows @ table[first:last].T
        at_least = ~(scores < (own - TIE * own.abs())[:, None])
        if exclude is not None and owners is not None:
            here = (exclude.values >= first) & (exclude.values < last)
            at_least[owners[here], exclude.values[here] - first] = False
        inside = ((targets >= first) & (targets < last)).nonzero().squeeze(1)
        at_least[inside, targets[inside] - first] = False
        ranks += at_least.sum(1)
    if exclude is not None and owners is not None:
        hidden = owners[exclude.values == targets[owners]]
        ranks[hidden] = max(items, *CUTOFFS)
    return ranks


def point_metrics(ranks: Tensor) -> dict[str, float]:
    """Metrics in percent of ranks `[n]` int64, averaged over users; nan for no user."""
    if ranks.numel() == 0:
        return dict.fromkeys(METRICS, float("nan"))
    histogram, gains = _histogram(ranks), _gains()
    values = 100.0 * (histogram / histogram.sum()) @ gains
    return dict(zip(METRICS, values.tolist(), strict=True))


def interval_table(ranks: Tensor, bootstrap: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """Metrics with percentile bootstrap intervals over users.

    Metrics see a rank only through one of 21 classes (0..19, beyond), so resampling users is one multinomial draw over
    those classes: exact, and its cost does not grow with the number of users.
    """
    point = point_metrics(ranks)
    if ranks.numel() == 0:
        return {name: Interval(value, value, value) for name, value in point.items()}
    histogram = _histogram(ranks)
    draws = np.random.default_rng(seed).multinomial(ranks.numel(), histogram / histogram.sum(), size=bootstrap)
    low, high = np.percentile(100.0 * draws / ranks.numel() @ _gains(), [2.5, 97.5], axis=0)
    return {name: Interval(point[name], float(low[i]), float(high[i])) for i, name in enumerate(METRICS)}


def _histogram(ranks: Tensor) -> np.ndarray:
    longest = max(CUTOFFS)
    return np.bincount(ranks.clamp(max=longest).cpu().numpy(), minlength=longest + 1).astype(np.float64)


def _gains() -> np.ndarray:
    """What a rank of each class adds to each metric, `[21, 9]`."""
    rank = np.arange(max(CUTOFFS) + 1)[:, None]
    inside = rank < np.array(CUTOFFS)
    return np.concatenate([inside * 1.0, inside / np.log2(rank + 2.0), inside / (rank + 1.0)], axis=1)
