"""Evaluate an engine on the examples of a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adrec.engines.base import Engine
from adrec.evaluation.metrics import CUTOFFS, Interval, interval_table, target_ranks
from adrec.respacing import Steps

if TYPE_CHECKING:
    from adrec.data.dataset import Examples

LISTED = max(CUTOFFS)


@dataclass(frozen=True)
class Evaluation:
    """ranks: `[n]` int64, 0 is best. top_items: `[n, min(20, N)]` int64. metrics: percent, with 95 % intervals.

    mean_steps: reverse steps a user took on average; None where there were none.
    """

    ranks: Tensor
    top_items: Tensor
    metrics: dict[str, Interval] = field(default_factory=dict)
    mean_steps: float | None = None

    @property
    def users(self) -> int:
        return self.ranks.numel()


def evaluate(
    engine: Engine,
    examples: Examples,
    *,
    steps: Steps = None,
    seed: int = 0,
    batch_size: int = 512,
    exclude_history: bool = False,
    bootstrap: int = 1000,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Rank the whole catalogue for every example; averages over users, counts ties against the model.

    Of an engine that rounds, which may score in its own precision, what counts is the list that it serves.

    The row key of a user's noise is the user's row in the data set. exclude_history: leave out the user's own items.
    progress: called with the number of users done. Every history needs 1 item or more.
    """
    ranks, tops, taken = [], [], 0
    listed = min(LISTED, engine.model.config.items)
    for first in range(0, examples.targets.numel(), batch_size):
        rows = torch.arange(first, min(first + batch_size, examples.targets.numel()))
        histories, keys = examples.histories.select(rows), examples.users[rows]
        sampled = engine.generate(histories, steps, seed, row_keys=keys)
        represented, taken = sampled.rows, taken + int(sampled.steps.sum())
        exclude = histories.to(engine.device) if exclude_history else None
        targets = examples.targets[rows].to(engine.device)
        found = target_ranks(represented, engine.model.table.detach(), targets, exclude)
        if engine.dtype == torch.float32:
            items = engine.top_k(represented, listed, exclude).items
        else:
            items = engine.recommend(histories, listed, steps, seed, keys, exclude).items
            found = _places(items, targets, found)
        ranks.append(found.cpu())
        tops.append(items.cpu())
        if progress is not None:
            progress(rows.numel())
    evaluation = _evaluation(ranks, tops, bootstrap)
    return replace(evaluation, mean_steps=taken / evaluation.users) if taken else evaluation


def popularity_evaluation(
    item_counts: Tensor, examples: Examples, *, exclude_history: bool = False, bootstrap: int = 1000
) -> Evaluation:
    """Recommend the items with the most training interactions `[N + 1]` to everybody."""
    listed = min(LISTED, item_counts.numel() - 1)
    ranks, tops = [], []
    # Popularity is a representation of one dimension: the score of an item is its count. Ties count against it.
    table, batch = item_counts.to(torch.float32)[:, None], 512
    for first in range(0, examples.targets.numel(), batch):
        rows = torch.arange(first, min(first + batch, examples.targets.numel()))
        exclude = examples.histories.select(rows) if exclude_history else None
        ones = torch.ones(rows.numel(), 1)
        ranks.append(target_ranks(ones, table, examples.targets[rows], exclude))
        scores = (ones @ table[1:].T).clone()
        if exclude is not None:
            scores[exclude.rows, exclude.values - 1] = -torch.inf
        best = scores.topk(listed, -1)
        tops.append((best.indices + 1).masked_fill(best.values == -torch.inf, 0))
    return _evaluation(ranks, tops, bootstrap)


def top_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Share of the items two top lists `[n, k]` have in common, whatever their order; `[n]` in [0, 1]."""
    same = (first[:, :, None] == second[:, None, :]) & (first != 0)[:, :, None]
    return same.any(-1).float().mean(-1)


def _places(items: Tensor, targets: Tensor, ranks: Tensor) -> Tensor:
    """Places of targets in the lists `[n, k]` that were served; of others the rank, behind the last place."""
    inside = items == targets[:, None]
    return torch.where(inside.any(-1), inside.int().argmax(-1), ranks.clamp(min=LISTED))


def _evaluation(ranks: list[Tensor], tops: list[Tensor], bootstrap: int) -> Evaluation:
    joined = torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64)
    lists = torch.cat(tops) if tops else torch.zeros(0, LISTED, dtype=torch.int64)
    return Evaluation(joined, lists, interval_table(joined, bootstrap))
