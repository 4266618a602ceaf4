"""Timing candidates of a search, each interleaved with one partner, so that their ratios can be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from adrec.data.jagged import Jagged
from adrec.engines import Engine
from adrec.errors import NotSupportedError
from adrec.respacing import Steps
from bench.accuracy import RESULTS
from bench.subject import draw_batches
from bench.timing import Call, Clock, TimingProtocol, WallClock, measure_interleaved, paired_ratio, quantiles_ms
from compress.budget import Timing
from compress.technique import Reading

Served = tuple[Engine, Steps]
"""An engine, and how it samples (None: every step that was trained)."""


class Stopwatch:
    """Times requests of real histories, top 20, A B A B with ``partner``, which is made at its first use."""

    def __init__(
        self,
        histories: Jagged,
        partner: Callable[[], Served],
        protocol: TimingProtocol,
        *,
        seed: int = 0,
        clock: Clock | None = None,
    ) -> None:
        self._histories, self._make_partner = histories, partner
        self._protocol, self._seed, self._clock = protocol, seed, clock or WallClock()
        self._partner: Served | None = None
        self._batches: dict[int, list[Jagged]] = {}

    def measure(self, served: Served, sizes: Sequence[int]) -> dict[int, Timing]:
        """Latency at each batch size, and its ratio to the partner's; NotSupportedError with an engine's own error."""
        self._partner = self._partner or self._make_partner()
        return {size: self._timing(served, self._partner, size) for size in sizes}

    def _timing(self, served: Served, beside: Served, size: int) -> Timing:
        calls = {"candidate": self._call(served, size), "partner": self._call(beside, size)}
        series = measure_interleaved(calls, self._protocol, self._clock)
        own, other = series["candidate"], series["partner"]
        if own.error is not None or other.error is not None:
            raise NotSupportedError(f"batch {size}: {own.error or other.error}")
        p50, p95, p99 = quantiles_ms(own.samples_ms)
        value, low, high = paired_ratio(own.medians_ms, other.medians_ms)
        return Timing(
            batch=size,
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            calls=len(own.samples_ms),
            ratio=Reading(value=value, low=low, high=high),
        )

    def _call(self, served: Served, size: int) -> Call:
        if size not in self._batches:
            self._batches[size] = draw_batches(self._histories, size)
        return partial(recommend, served, self._batches[size], self._seed)


def recommend(served: Served, batches: Sequence[Jagged], seed: int, number: int) -> object:
    """One request: the top 20 of a batch, which rotates with the number of the call."""
    engine, steps = served
    count = min(RESULTS, engine.model.config.items)
    return engine.recommend(batches[number % len(batches)], k=count, steps=steps, seed=seed)
