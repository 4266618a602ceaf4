"""Verdicts on two measurements of the same thing, by bootstrap of what their records keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bench.latency_blocks import LatencyBlocks
from bench.places import metric_gains, unpack_places
from bench.record import Accuracy, Estimate

CONFIDENCE = 0.99
LEAST_ROUNDS = 3
LEAST_FREEDOM = 3.0
# Of a percentile that fewer calls lie beyond, the calls at hand say next to nothing.
LEAST_BEYOND = 10
RESAMPLES = 4000
# As if so many rounds of this autocorrelation had been seen before: a few rounds alone cannot tell theirs.
PRIOR_PERSISTENCE, PRIOR_ROUNDS, MOST_PERSISTENCE = 0.5, 4, 0.9

Verdict = Literal["slower", "faster", "no difference", "too noisy to tell", "fails now", "works now", "not measured"]


@dataclass(frozen=True)
class TimeChange:
    """Ratio new / old of a median or a tail percentile, its 99 % interval, and what it is against the bound."""

    ratio: Estimate | None
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class AccuracyChange:
    """New minus old of one metric, in percentage points, with its 95 % interval.

    paired: resampled over the same users in both; else from the two separate intervals, which is wider.
    """

    metric: str
    old_percent: float
    difference: Estimate
    paired: bool

    def lower_by(self, bound: float) -> bool:
        """Whether the loss surely exceeds ``bound``, a share of the old value."""
        return self.difference.high < -bound * self.old_percent and self.difference.high < 0.0


def judge_times(
    old_ms: Sequence[float],
    new_ms: Sequence[float],
    bound: float,
    between_runs: float = 0.0,
    lean: float = 0.0,
    seed: int = 0,
) -> TimeChange:
    """Compare round medians `[n]`, `[m]` in ms of two runs.

    slower, faster: the whole 99 % interval of the ratio lies beyond the bound (a share, 0.05 for 5 %). no difference:
    the whole interval lies within it. Else too noisy to tell, as with fewer than 3 rounds. The interval is a bootstrap
    of the difference of log medians, studentised (few rounds do not know their own spread) and widened by
    `persistence`, since disturbances outlast a round. between_runs: standard deviation of the log time between runs of
    the same code, from a calibration, by which the interval widens. lean: logarithm of the ratio that something else
    than the code may have made, towards which the interval extends.
    """
    if (few := min(len(old_ms), len(new_ms))) < LEAST_ROUNDS:
        return TimeChange(None, "too noisy to tell", f"{few} rounds; {LEAST_ROUNDS} are needed")
    old, new = np.log(np.asarray(old_ms)), np.log(np.asarray(new_ms))
    change = float(np.median(new) - np.median(old))

    def draw(drawn: np.random.Generator) -> NDArray[np.float64]:
        return _medians(new, drawn) - _medians(old, drawn)

    return _judge((old, new), old.size + new.size, change, draw, bound, between_runs, lean, seed)


def judge_tail(
    old: LatencyBlocks,
    new: LatencyBlocks,
    percentile: float,
    bound: float,
    between_runs: float = 0.0,
    lean: float = 0.0,
    seed: int = 0,
) -> TimeChange:
    """Compare a percentile above the 50th of all calls of two runs, as `judge_times` does; blocks are resampled whole.

    What lies beyond comes in bursts, as in a queue: it tells as much as there are blocks that share it. Too noisy to
    tell where either has fewer than 3 blocks, or fewer than 10 calls lie beyond the percentile.
    """
    share, needed = percentile / 100.0, math.ceil(100 * LEAST_BEYOND / (100.0 - percentile))
    if (few := min(old.calls, new.calls)) < needed:
        return TimeChange(None, "too noisy to tell", f"{few} calls; {needed} are needed")
    if (few := min(old.blocks, new.blocks)) < LEAST_ROUNDS:
        return TimeChange(None, "too noisy to tell", f"{few} rounds; {LEAST_ROUNDS} are needed")
    change = float(new.log_quantile(share)[0] - old.log_quantile(share)[0])
    by_block = old.log_quantile(share, np.eye(old.blocks)), new.log_quantile(share, np.eye(new.blocks))

    def draw(drawn: np.random.Generator) -> NDArray[np.float64]:
        taken = [
            drawn.multinomial(each.blocks, np.full(each.blocks, 1 / each.blocks), RESAMPLES) for each in (new, old)
        ]
        return new.log_quantile(share, taken[0]) - old.log_quantile(share, taken[1])

    rounds = old.blocks_beyond(share) + new.blocks_beyond(share)
    return _judge(by_block, rounds, change, draw, bound, between_runs, lean, seed)


def _judge(
    series: tuple[NDArray[np.float64], NDArray[np.float64]],
    rounds: float,
    change: float,
    draw: Callable[[np.random.Generator], NDArray[np.float64]],
    bound: float,
    between_runs: float,
    lean: float,
    seed: int,
) -> TimeChange:
    """Judge a logarithm of a ratio by its bootstrap; series: what each round says, for how long noise lasts.

    rounds: that stand behind the change, of both runs together.
    """
    generator = np.random.default_rng(seed)
    weight = persistence(*series)
    inflation = (1.0 + weight) / (1.0 - weight)
    freedom = max(LEAST_FREEDOM, rounds / inflation - 2.0)
    student = np.sqrt(inflation * freedom / generator.chisquare(freedom, RESAMPLES))
    changes = change + student * (draw(generator) - change)
    if between_runs > 0.0:
        changes = changes + generator.normal(0.0, math.sqrt(2.0) * between_runs, RESAMPLES)
    ends = np.quantile(changes, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]) - [max(lean, 0.0), min(lean, 0.0)]
    low, high = np.exp(ends)
    ratio = Estimate(value=math.exp(change), low=float(low), high=float(high))
    slower, faster = 1.0 + bound, 1.0 / (1.0 + bound)
    if low > slower:
        return TimeChange(ratio, "slower")
    if high < faster:
        return TimeChange(ratio, "faster")
    if faster <= low and high <= slower:
        return TimeChange(ratio, "no difference")
    return TimeChange(ratio, "too noisy to tell", "the interval crosses the bound")


def persistence(*series: NDArray[np.float64]) -> float:
    """Autocorrelation of successive rounds, from 0 to .9: of all series `[n]`, outliers clipped, pulled towards .5.

    The estimate of each is freed of its bias of about -(1 + 3 r) / n (Marriott and Pope 1954).
    """
    found, rounds = PRIOR_ROUNDS * PRIOR_PERSISTENCE, float(PRIOR_ROUNDS)
    for values in series:
        centre = np.median(values)
        reach = 3.0 * 1.4826 * np.median(np.abs(values - centre))
        clipped = np.clip(values, centre - reach, centre + reach)
        clipped = clipped - clipped.mean()
        energy = float(clipped @ clipped)
        if values.size > LEAST_ROUNDS + 1 and energy > 0.0:
            raw = float(clipped[1:] @ clipped[:-1]) / energy
            found += values.size * (values.size * raw + 1.0) / (values.size - 3.0)
            rounds += values.size
    return min(max(found / rounds, 0.0), MOST_PERSISTENCE)


def compare_accuracy(old: Accuracy, new: Accuracy, metric: str, same_users: bool, seed: int = 0) -> AccuracyChange:
    """Compare one metric; paired where both records keep the places of the same users, else independent."""
    before, after = old.metrics_percent[metric], new.metrics_percent[metric]
    if same_users and old.places_base64 and new.places_base64:
        places = unpack_places(old.places_base64), unpack_places(new.places_base64)
        if places[0].size == places[1].size > 0:
            gains = metric_gains(places[1], metric) - metric_gains(places[0], metric)
            return AccuracyChange(metric, before.value, _mean_interval(gains, seed), paired=True)
    # The sum of two roughly normal errors: half-widths add in squares, on each side by itself.
    down = math.hypot(after.value - after.low, before.high - before.value)
    up = math.hypot(after.high - after.value, before.value - before.low)
    value = after.value - before.value
    return AccuracyChange(metric, before.value, Estimate(value=value, low=value - down, high=value + up), paired=False)


def _medians(values: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    picks = generator.integers(0, values.size, (RESAMPLES, values.size))
    medians: NDArray[np.float64] = np.median(values[picks], axis=1)
    return medians


def _mean_interval(gains: NDArray[np.float64], seed: int) -> Estimate:
    # Most users are equal in both: resample counts of the distinct differences instead of users.
    distinct, counts = np.unique(gains, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(gains.size, counts / gains.size, RESAMPLES)
    low, high = np.quantile(drawn @ distinct / gains.size, [0.025, 0.975])
    return Estimate(value=float(gains.mean()), low=float(low), high=float(high))
