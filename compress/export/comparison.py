"""How far exported graphs are from the model they came from, in scores, lists and accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adrec.config import StrictModel
from adrec.data.dataset import Examples
from adrec.engines.base import Engine, TopK
from adrec.engines.exported import ExportError, Precision
from adrec.evaluation import Interval, kept_percent
from adrec.evaluation.metrics import CUTOFFS
from adrec.respacing import Steps

# Scores are compared relatively above 1 and absolutely below it.
EXACT = 1e-5
# Float16 has 11 bits of significand: 5e-4 a rounding; what adds up over the layers stays well below this.
MOST_HALF_ERROR = 1e-2
LEAST_OVERLAP = 0.995
MOST_LOSS_PERCENT = 0.5
RESULTS = max(CUTOFFS)
_RESAMPLES = 1000


class Pair(StrictModel):
    """One runtime and precision against `cached`, on the same histories and noise.

    score_error: largest difference of an item's scores. tie_tolerance: by how much scores would have to be called equal
    for all lists to be the same; 0 where they are. overlap: mean share of list items that are also the model's, an item
    within ``EXACT`` of the model's last one included. hr_difference, ndcg_kept: HR@20 of the graph less that of the
    model, and NDCG@20 in percent of the model's, ``(value, low, high)`` with 95 % intervals over paired users; None
    where no example has a target in a list.
    """

    runtime: str
    graph: str
    precision: Precision
    steps: int | None
    users: int
    batch_sizes: tuple[int, ...]
    score_error: float
    tie_tolerance: float
    overlap: float
    hr_difference: tuple[float, float, float]
    ndcg_kept: tuple[float, float, float] | None

    @property
    def faults(self) -> list[str]:
        """What is beyond the bound of the precision, in words; empty where nothing is."""
        found = []
        if self.precision == "fp32":
            if self.score_error > EXACT:
                found.append(f"score error {self.score_error:.1e}, allowed {EXACT:.0e}")
            if self.tie_tolerance > EXACT:
                found.append(f"lists differ by more than ties: {self.tie_tolerance:.1e}, allowed {EXACT:.0e}")
        elif self.precision == "fp16":
            if self.score_error > MOST_HALF_ERROR:
                found.append(f"score error {self.score_error:.1e}, allowed {MOST_HALF_ERROR:.0e}")
            if self.overlap < LEAST_OVERLAP:
                found.append(f"overlap {self.overlap:.4f}, allowed from {LEAST_OVERLAP}")
        elif self.ndcg_kept is None:
            found.append("no list of the model has a target, so NDCG@20 tells nothing; compare on more users")
        elif self.ndcg_kept[0] < 100.0 - MOST_LOSS_PERCENT:
            found.append(f"keeps {self.ndcg_kept[0]:.2f} % of NDCG@20, allowed from {100.0 - MOST_LOSS_PERCENT} %")
        return found

    @property
    def verdict(self) -> str:
        """`faults` or ok, and where the value decides though its interval is too wide to tell."""
        said, least = "; ".join(self.faults) or "ok", 100.0 - MOST_LOSS_PERCENT
        if (
            self.precision in ("fp32", "fp16")
            or self.ndcg_kept is None
            or not self.ndcg_kept[1] < least <= self.ndcg_kept[2]
        ):
            return said
        return f"{said} by the value; the interval over {self.users} users is too wide to tell: compare on more"


@dataclass(frozen=True)
class Candidate:
    """An engine to compare. graph: file it runs. steps: the plan it is asked for."""

    runtime: str
    graph: str
    precision: Precision
    steps: Steps
    engine: Engine


def compare(
    candidate: Candidate, exact: Engine, examples: Examples, *, batch_sizes: Sequence[int], seed: int = 0
) -> Pair:
    """Run a candidate and the exact engine on the same users, a part of them in each batch size.

    All users go through the largest batch; a few batches through each other one, whose lists must be the same. Raises
    ExportError for scores that are infinite or no numbers.
    """
    k = min(RESULTS, exact.model.config.items)
    errors, needed, shared, ours, theirs = [], [], [], [], []
    largest = max(batch_sizes)
    for size, rows in _batches(len(examples), batch_sizes):
        histories, keys = examples.histories.select(rows), examples.users[rows]
        wanted = exact.represent(histories, candidate.steps, seed, row_keys=keys)
        best = exact.top_k(wanted, k)
        found = candidate.engine.recommend(histories, k, candidate.steps, seed, keys)
        found = TopK(found.items.to(exact.device), found.scores.to(exact.device))
        if not bool(found.scores.isfinite().all()):
            raise ExportError(
                f"{candidate.graph}, {candidate.runtime}: scores of a batch of {size} are not finite; export again, in"
                " fp32 if it is fp16"
            )
        true = _scores_of(exact, wanted, found.items)
        scale = best.scores.abs().amax(-1, keepdim=True).clamp(min=1.0)
        errors.append(((found.scores - true).abs() / scale).max())
        needed.append(((true - best.scores).abs() / scale).max())
        shared.append(tied_overlap(found, best, true))
        if size == largest:
            ours.append(_ranks(found.items, examples.targets[rows]))
            theirs.append(_ranks(best.items, examples.targets[rows]))
    here, there = torch.cat(ours), torch.cat(theirs)
    kept = kept_percent(here, there)
    return Pair(
        runtime=candidate.runtime,
        graph=candidate.graph,
        precision=candidate.precision,
        steps=None if (table := exact.table(candidate.steps)) is None else table.steps,
        users=len(here),
        batch_sizes=tuple(batch_sizes),
        score_error=float(torch.stack(errors).max()),
        tie_tolerance=float(torch.stack(needed).max()),
        overlap=float(torch.cat(shared).mean()),
        hr_difference=_triple(hit_difference(here, there)),
        ndcg_kept=None if kept is None else _triple(kept),
    )


def tied_overlap(found: TopK, best: TopK, true: Tensor) -> Tensor:
    """Share of each row's items that belong to the exact list, or tie with its last one; `[B]` in 0..1.

    An item that a list repeats counts once. true: the exact engine's scores of ``found.items``, `[B, k]`.
    """
    listed = (found.items[:, :, None] == best.items[:, None, :]).any(-1)
    last = best.scores[:, -1:]
    tied = true >= last - EXACT * last.abs().clamp(min=1.0)
    repeated = (found.items[:, :, None] == found.items[:, None, :]).tril(-1).any(-1)
    return ((listed | tied) & ~repeated).float().mean(-1)


def hit_difference(ranks: Tensor, exact_ranks: Tensor, seed: int = 0) -> Interval:
    """HR@20 of one ranking less that of another of the same users, in percentage points, with a paired interval."""
    gain = ((ranks < RESULTS).double() - (exact_ranks < RESULTS).double()).numpy()
    generator = np.random.default_rng(seed)
    draws = [100.0 * gain[generator.integers(0, len(gain), len(gain))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(100.0 * float(gain.mean()), float(low), float(high))


def _batches(users: int, sizes: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    generator = np.random.default_rng(0)
    for size in sorted(set(sizes)):
        if size == max(sizes):
            for first in range(0, users, size):
                yield size, torch.arange(first, min(first + size, users))
        else:
            for _ in range(max(1, min(16, 64 // size))):
                yield size, torch.from_numpy(generator.choice(users, size, replace=size > users))


def _scores_of(engine: Engine, rows: Tensor, items: Tensor) -> Tensor:
    """The exact engine's scores of given items `[B, k]`."""
    return torch.einsum("bd,bkd->bk", rows, engine.model.table.detach()[items])


def _ranks(items: Tensor, targets: Tensor) -> Tensor:
    """Rank of each target in its list, the list's length where it is not in it; `[B]` int64."""
    inside = items == targets[:, None]
    return torch.where(inside.any(-1), inside.int().argmax(-1), torch.tensor(RESULTS))


def _triple(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high
