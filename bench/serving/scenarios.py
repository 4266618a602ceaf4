"""The three scenarios, as loops over a clock that a test can replace; one server that answers one batch at a time.

Latency of a query runs from its arrival, scheduled or at once, to the end of the batch that answered it, so that the
time in the queue counts. Arrivals are drawn beforehand: a slow server cannot hold them back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adrec.errors import ConfigError

Serve = Callable[[range], object]
"""Answers the queries of these numbers in one batch."""

Progress = Callable[[float, float], None]

SPIN_SECONDS = 0.002
SATURATED = 0.98
BOUND_SHARE = 0.99
MOST_ARRIVALS = 10_000_000


class Timeline(Protocol):
    """Seconds since any moment, and waiting until one."""

    def now(self) -> float:
        """Seconds."""

    def wait_until(self, moment: float) -> None:
        """Return at ``moment`` or, if it has passed, at once."""


class WallTimeline:
    """The host's clock; waits by sleeping, and spins over the last two milliseconds, which sleep cannot hit."""

    def now(self) -> float:
        return time.perf_counter()

    def wait_until(self, moment: float) -> None:
        left = moment - time.perf_counter() - SPIN_SECONDS
        if left > 0:
            time.sleep(left)
        while time.perf_counter() < moment:
            pass


@dataclass(frozen=True)
class Extent:
    """How long a scenario runs: until both minima are reached, or ``seconds_most`` have passed."""

    seconds_least: float
    queries_least: int
    seconds_most: float = math.inf


@dataclass
class Served:
    """What a scenario saw. ``times_ms``: latency of each query in order of arrival; offline, the time of each batch.

    ``full_seconds``: of ``busy_seconds``, those spent on batches that could hold no more.
    """

    times_ms: list[float] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    busy_seconds: float = 0.0
    queue_most: int = 0
    full_seconds: float = 0.0

    @property
    def queries(self) -> int:
        """Queries answered."""
        return sum(self.batch_sizes)


def single_stream(serve: Serve, timeline: Timeline, extent: Extent, report: Progress) -> Served:
    """One user at a time: the next query arrives when the last one is answered."""
    return _back_to_back(serve, timeline, extent, 1, report)


def offline(serve: Serve, timeline: Timeline, extent: Extent, batch: int, report: Progress) -> Served:
    """All queries are there from the start: full batches, one after the other."""
    return _back_to_back(serve, timeline, extent, batch, report)


def server(
    serve: Serve,
    timeline: Timeline,
    arrivals: NDArray[np.float64],
    batch_most: int,
    wait_most: float,
    report: Progress,
    seconds_most: float = math.inf,
) -> Served:
    """Queries arrive at ``arrivals`` `[n]`, ascending seconds from the start; the server takes what is waiting.

    A batch starts when the server is free and it is full, or its first query has waited ``wait_most`` seconds, or
    nothing else will arrive; none starts ``seconds_most`` after the start or later.
    """
    found = Served(times_ms=[0.0] * len(arrivals))
    start, done, total = timeline.now(), 0, len(arrivals)
    stop = start + seconds_most
    while done < total:
        first = start + float(arrivals[done])
        last = start + float(arrivals[min(done + batch_most, total) - 1])
        timeline.wait_until(min(stop, max(first, min(first + wait_most, last))))
        begin = timeline.now()
        if begin >= stop:
            break
        waiting = max(1, int(np.searchsorted(arrivals, begin - start, side="right")) - done)
        size = min(waiting, batch_most)
        serve(range(done, done + size))
        end = timeline.now()
        for number in range(done, done + size):
            found.times_ms[number] = 1e3 * (end - start - float(arrivals[number]))
        found.batch_sizes.append(size)
        found.busy_seconds += end - begin
        found.full_seconds += (end - begin) * (size == batch_most)
        found.queue_most = max(found.queue_most, waiting)
        done += size
        report(end - start, max(end - start, float(arrivals[-1])))
    del found.times_ms[done:]
    found.seconds = timeline.now() - start
    return found


def arrival_count(rate: float, extent: Extent) -> int:
    """How many queries arrive at a rate a second until both minima of the extent are reached.

    Raises ConfigError beyond ten million, which are drawn before the first one arrives.
    """
    count = max(float(extent.queries_least), rate * extent.seconds_least)
    if count > MOST_ARRIVALS:
        raise ConfigError(
            f"{rate:g} arrivals a second, for {extent.seconds_least:g} seconds and {extent.queries_least} queries at"
            f" least, are {count:.3g} arrivals; allowed are {MOST_ARRIVALS}: give a lower --rate or --load, or fewer"
            " --seconds or --queries"
        )
    return math.ceil(count)


def poisson_arrivals(rate: float, extent: Extent, seed: int) -> NDArray[np.float64]:
    """Arrival times in seconds of a Poisson process, as many as `arrival_count` says."""
    count = arrival_count(rate, extent)
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, count)
    times: NDArray[np.float64] = np.cumsum(gaps)
    return times


def complaints(served: Served, extent: Extent, *, arrivals: bool, bound_ms: float | None = None) -> list[str]:
    """Why the figures do not count; empty when they do. bound_ms: what `BOUND_SHARE` of the queries must meet."""
    found = []
    if served.queries < extent.queries_least:
        found.append(f"{served.queries} of at least {extent.queries_least} queries")
    # A Poisson process of the right count ends some percent early or late.
    least = extent.seconds_least * (0.9 if arrivals else 1.0)
    if served.seconds < least:
        found.append(f"{served.seconds:.3g} of at least {extent.seconds_least:g} seconds")
    # A server that takes what waits is busy at any load; behind it is when every batch is full.
    if arrivals and served.full_seconds > SATURATED * served.seconds:
        found.append("the server answered full batches all the time: it did not keep up with its arrivals")
    if bound_ms is not None and served.times_ms:
        met = float((np.asarray(served.times_ms) <= bound_ms).mean())
        if met < BOUND_SHARE:
            found.append(f"{met:.1%} of the queries, of at least {BOUND_SHARE:.0%}, took {bound_ms:g} ms or less")
    return found


def _back_to_back(serve: Serve, timeline: Timeline, extent: Extent, batch: int, report: Progress) -> Served:
    found = Served(queue_most=batch)
    start = end = timeline.now()
    while True:
        elapsed = end - start
        if elapsed >= extent.seconds_most:
            break
        if elapsed >= extent.seconds_least and found.queries >= extent.queries_least:
            break
        begin = end
        serve(range(found.queries, found.queries + batch))
        end = timeline.now()
        found.times_ms.append(1e3 * (end - begin))
        found.batch_sizes.append(batch)
        left = (extent.queries_least - found.queries) * (end - start) / found.queries
        report(end - start, max(extent.seconds_least, end - start + max(0.0, left)))
    found.seconds = found.busy_seconds = end - start
    return found
