"""Latencies of consecutive blocks, counted on a logarithmic scale: what a record keeps for its tail to be judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, model_validator

from adrec.environment import Frozen

WIDTH = math.log(1.01)
# Far beyond any latency: 1.01^3000 ms are three hundred years.
MOST_BUCKET = 3000
LEAST_MS = 1e-9

Bucket = Annotated[int, Field(ge=-MOST_BUCKET, le=MOST_BUCKET)]


class LatencyBlocks(Frozen):
    """How many latencies of each block (a round of calls, a window of queries) lie in each bucket, 1 % wide.

    ``counts``: by bucket n, from 1.01^n up to 1.01^(n+1) ms, a number for each block in the order of measuring.
    Latencies below the median of all are counted in its bucket, so that only quantiles above it follow.
    """

    counts: dict[Bucket, list[NonNegativeInt]]

    @model_validator(mode="after")
    def _whole(self) -> LatencyBlocks:
        if len({len(each) for each in self.counts.values()}) != 1:
            raise ValueError("every bucket needs a count for each block")
        if not self.blocks or not self._table().sum(axis=0).all():
            raise ValueError("a block holds no latency")
        return self

    @classmethod
    def of(cls, blocks_ms: Sequence[Sequence[float] | NDArray[np.float64]]) -> LatencyBlocks:
        """Count the latencies in ms of one block at least, none of them empty."""
        logs = [np.log(np.maximum(np.asarray(block, dtype=np.float64), LEAST_MS)) for block in blocks_ms]
        middle = math.floor(np.median(np.concatenate(logs)) / WIDTH)
        buckets = [np.maximum(np.floor(block / WIDTH).astype(np.int64), middle) for block in logs]
        found = np.unique(np.concatenate(buckets))
        rows = [np.bincount(np.searchsorted(found, block), minlength=found.size) for block in buckets]
        return cls(counts=dict(zip(found.tolist(), np.stack(rows, axis=1).tolist(), strict=True)))

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(next(iter(self.counts.values())))

    @property
    def calls(self) -> int:
        """Number of latencies."""
        return sum(map(sum, self.counts.values()))

    def log_quantile(self, share: float, weights: NDArray[Any] | None = None) -> NDArray[np.float64]:
        """Natural logarithm of a quantile in ms, interpolated in its bucket; share: above .5 and below 1.

        weights `[R, blocks]`: how often each block counts, each row a quantile: `[R]`. None: each once, `[1]`.
        """
        rows = np.ones((1, self.blocks)) if weights is None else weights
        totals = np.cumsum(rows @ self._table().T, axis=1)
        totals = np.concatenate([np.zeros((len(rows), 1)), totals], axis=1)
        wanted = share * totals[:, -1]
        place = (totals[:, 1:] < wanted[:, None]).sum(axis=1)
        each = np.arange(len(rows))
        before, after = totals[each, place], totals[each, place + 1]
        found: NDArray[np.float64] = WIDTH * (
            np.array(sorted(self.counts))[place] + (wanted - before) / (after - before)
        )
        return found

    def blocks_beyond(self, share: float) -> float:
        """How many blocks hold what lies beyond a quantile, by their shares of it: 1 where one block has it all."""
        buckets = np.array(sorted(self.counts))
        beyond = self._table()[WIDTH * buckets > self.log_quantile(share)[0]].sum(axis=0)
        return float(beyond.sum() ** 2 / (beyond @ beyond)) if beyond.any() else float(self.blocks)

    def _table(self) -> NDArray[np.float64]:
        return np.array([self.counts[bucket] for bucket in sorted(self.counts)], dtype=np.float64)
