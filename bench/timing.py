"""Clocks, interleaved measurement of several callables in one process, quantiles and paired ratios.

One round calls every callable in turn (A B A B): a change of the machine's speed during the measurement then
hits all of them, and their ratio within a round stays meaningful. A fast callable is called several times in
its turn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch

MOST_CALLS_A_TURN = 1000
PERCENTILES = (1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.99)

Call = Callable[[int], object]
"""What is measured: takes the number of the call (0, 1, ...), so that it can rotate its inputs."""

Turn = Callable[[int, float], list[float]]
"""Times calls one after the other, from a number on, for so many seconds; milliseconds, one of a call at least."""


class Clock(Protocol):
    """Measures one call in milliseconds."""

    name: str

    def time_ms(self, call: Call, number: int) -> float:
        """Run ``call(number)`` to its end and return the milliseconds that it took."""


class WallClock:
    """Wall clock of the host (`time.perf_counter_ns`), for calls that end when they return."""

    name = "wall clock"

    def time_ms(self, call: Call, number: int) -> float:
        """Run ``call(number)`` and return its wall time in milliseconds."""
        start = time.perf_counter_ns()
        call(number)
        return (time.perf_counter_ns() - start) / 1e6


class DeviceClock:
    """CUDA events around the call; before each call the L2 cache is flushed by writing twice its size.

    The time between the events includes every gap in which the device waits for the host.
    """

    name = "device events, L2 flushed"

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._device = device
        self._flush = torch.empty(max(2 * size, 2**26), dtype=torch.int8, device=device)

    def time_ms(self, call: Call, number: int) -> float:
        """Run ``call(number)`` and return the milliseconds between its two device events."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        torch.cuda.synchronize(self._device)
        start.record()
        call(number)
        end.record()
        torch.cuda.synchronize(self._device)
        return float(start.elapsed_time(end))


def clock_for(device: torch.device) -> Clock:
    """Return the clock that fits a device: device events on CUDA, the wall clock elsewhere."""
    return DeviceClock(device) if device.type == "cuda" else WallClock()


@dataclass(frozen=True)
class TimingProtocol:
    """How long and how often to measure; `seconds` is the budget of one callable, counts are minima.

    A callable whose single call exceeds ``seconds / rounds`` lengthens the measurement rather than lose
    rounds: the minimum is ``rounds_slow`` for a group whose slowest call does not fit ``rounds`` times into
    the budget.
    """

    seconds: float = 2.0
    rounds: int = 5
    rounds_slow: int = 3
    rounds_most: int = 30
    warmup_calls: int = 3


@dataclass
class Series:
    """Samples of one callable, or its error: ``rounds_ms[r]`` are the times of its calls in round r."""

    rounds_ms: list[list[float]] = field(default_factory=list)
    error: str | None = None

    @property
    def samples_ms(self) -> np.ndarray:
        """All samples in milliseconds, `[n]` float64."""
        return np.array([sample for turn in self.rounds_ms for sample in turn], dtype=np.float64)

    @property
    def medians_ms(self) -> np.ndarray:
        """Median of each round in milliseconds, `[rounds]` float64."""
        return np.array([float(np.median(turn)) for turn in self.rounds_ms], dtype=np.float64)


Report = Callable[[float, float], None]
"""Progress: seconds done, seconds expected in all."""


def measure_interleaved(
    calls: Mapping[str, Call],
    protocol: TimingProtocol,
    clock: Clock | None = None,
    progress: Report | None = None,
    called_seconds: Mapping[str, float] | None = None,
) -> dict[str, Series]:
    """Measure every callable in rounds A B A B; one that raises keeps its ``error`` and drops out.

    ``called_seconds``: what a call took that was already made; above the budget, it is the only warm-up.
    """
    turns: dict[str, Turn] = {name: partial(timed_turn, call, clock or WallClock()) for name, call in calls.items()}
    return measure_turns(turns, protocol, progress, called_seconds)


def measure_turns(
    turns: Mapping[str, Turn],
    protocol: TimingProtocol,
    progress: Report | None = None,
    called_seconds: Mapping[str, float] | None = None,
) -> dict[str, Series]:
    """`measure_interleaved` of what times its own calls, as another process does."""
    series = {name: Series() for name in turns}
    expected: dict[str, float] = {}
    for name, turn in turns.items():
        already = (called_seconds or {}).get(name, 0.0)
        if already > protocol.seconds:
            expected[name] = already
            continue
        first = _guarded(series[name], turn, 0, 0.0)
        # A slow call is warm after one; fast ones need a few, and the last is the estimate.
        for number in range(1, protocol.warmup_calls):
            if first is not None and first[-1] < 1e3 * protocol.seconds:
                first = _guarded(series[name], turn, number, 0.0)
        if first is not None:
            expected[name] = first[-1] / 1e3
    if not expected:
        return series
    rounds = round_count(protocol, max(expected.values()))
    turn_seconds = protocol.seconds / rounds
    total = rounds * sum(max(turn_seconds, each) for each in expected.values())
    numbers = dict.fromkeys(expected, 0)
    started = time.perf_counter()
    for _ in range(rounds):
        for name in expected:
            samples = None if series[name].error else _guarded(series[name], turns[name], numbers[name], turn_seconds)
            if samples is not None:
                series[name].rounds_ms.append(samples)
                numbers[name] += len(samples)
            if progress is not None:
                progress(time.perf_counter() - started, total)
    return series


def timed_turn(call: Call, clock: Clock, number: int, seconds: float) -> list[float]:
    """Time a call at least once, from ``number`` on, and as often as fits the seconds; milliseconds."""
    turn: list[float] = []
    spent_ms = 0.0
    while not turn or (spent_ms + turn[-1] < 1e3 * seconds and len(turn) < MOST_CALLS_A_TURN):
        turn.append(clock.time_ms(call, number + len(turn)))
        spent_ms += turn[-1]
    return turn


def round_count(protocol: TimingProtocol, slowest_seconds: float) -> int:
    """Return the rounds of a group: as often as its slowest call fits the budget, within the bounds."""
    fitting = math.floor(protocol.seconds / max(slowest_seconds, 1e-9))
    if fitting < protocol.rounds:
        return max(protocol.rounds_slow, fitting)
    return min(fitting, protocol.rounds_most)


def quantiles_ms(samples_ms: np.ndarray) -> tuple[float, float, float]:
    """Return p50, p95 and p99 of samples `[n]` in ms; of few samples the upper ones are the maximum."""
    p50, p95, p99 = np.quantile(samples_ms, [0.5, 0.95, 0.99])
    return float(p50), float(p95), float(p99)


def percentiles_ms(samples_ms: np.ndarray) -> dict[float, float]:
    """Latency by percentile, ascending: only percentiles that some sample lies beyond (99 from 100 samples on)."""
    reached = [each for each in PERCENTILES if len(samples_ms) * round(100.0 - each, 6) >= 100.0]
    values = np.percentile(samples_ms, reached)
    return {each: round(float(value), 6) for each, value in zip(reached, values, strict=True)}


def paired_ratio(
    numerator: np.ndarray, denominator: np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the median of ``numerator[r] / denominator[r]`` and its bootstrap 95 % interval over rounds.

    Both are `[rounds]` float64, measured in the same rounds. With one common round the interval is the value
    itself. Raises ValueError when there is no common round.
    """
    rounds = min(len(numerator), len(denominator))
    if rounds == 0:
        raise ValueError("a ratio needs at least one round of both series")
    ratios = np.asarray(numerator[:rounds]) / np.asarray(denominator[:rounds])
    picks = np.random.default_rng(seed).integers(0, rounds, size=(resamples, rounds))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def describe_error(error: BaseException) -> str:
    """Return ``Type: first line``, the form in which a failed cell keeps its error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _guarded(series: Series, turn: Turn, number: int, seconds: float) -> list[float] | None:
    try:
        return turn(number, seconds)
    except Exception as error:
        series.error = describe_error(error)
        return None
