"""Measuring engines along one axis, and fitting how their time grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from adrec.data.jagged import Jagged
from adrec.engines import ENGINES, make_engine
from bench.kernels.catalogues import random_histories, random_model
from bench.kernels.engine_sweep import RESULTS, check_memory
from bench.kernels.measure import INPUTS, Timer, now_utc
from bench.kernels.records import PathTiming
from bench.kernels.selection import dtype_name
from bench.record import Estimate
from bench.scaling.record import Axis, ScalingPoint, ScalingRecord
from bench.timing import describe_error

RESAMPLES = 2000
LEAST_POINTS = 3

Report = Callable[[float, float], None]


@dataclass(frozen=True)
class Fixed:
    """What the other axes are held at. ``history``: 0 draws lengths like those of the Amazon sets."""

    items: int = 12_000
    history: int = 0
    batch: int = 32
    steps: int = 4
    width: int = 128


@dataclass(frozen=True)
class ScalingBench:
    """Measures engines (the first is the baseline of the ratios) at each value of an axis, interleaved."""

    timer: Timer
    engines: tuple[str, ...]
    fixed: Fixed

    def records(self, axis: Axis, values: Sequence[int], report: Report) -> Iterator[ScalingRecord]:
        """Measure every value; one record an engine, an error in a point where that alone failed."""
        found: dict[str, list[ScalingPoint]] = {name: [] for name in self.engines}
        budget = len(self.engines) * self.timer.protocol.seconds
        for number, value in enumerate(values):
            place = partial(_part, report, number * budget, len(values) * budget)
            for name, point in self._point(axis, value, place).items():
                found[name].append(point)
        for name, points in found.items():
            yield self._record(axis, name, points)

    def _point(self, axis: Axis, value: int, report: Report) -> Mapping[str, ScalingPoint]:
        fixed = self.fixed
        items = value if axis == "items" else fixed.items
        batch = value if axis == "batch" else fixed.batch
        history = value if axis == "history" else fixed.history
        timings: dict[str, PathTiming | str] = {}
        tokens = 0
        try:
            check_memory(items, fixed.width, self.engines, self.timer.device)
            model = random_model(items, fixed.width, fixed.steps, self.timer.device)
            if history:
                model.config = model.config.model_copy(update={"max_length": max(history, model.config.max_length)})
            batches = [
                equal_histories(batch, history, items, variant) if history else random_histories(batch, items, variant)
                for variant in range(INPUTS)
            ]
            tokens = batches[0].values.numel()
            calls: dict[str, Sequence[Callable[[], object]]] = {}
            for name in self.engines:
                try:
                    engine = make_engine(name, model)
                    k = min(RESULTS, items)
                    calls[name] = [partial(engine.recommend, each, k, steps=fixed.steps) for each in batches]
                except Exception as error:
                    timings[name] = describe_error(error)
            measured, _ = self.timer.measure(calls, self.engines[0], report)
            timings |= measured
        except Exception as error:
            timings = dict.fromkeys(self.engines, describe_error(error))
        return {
            name: ScalingPoint(
                value=value,
                history_tokens=tokens,
                timing=timing if isinstance(timing, PathTiming) else None,
                error=timing if isinstance(timing, str) else None,
            )
            for name, timing in timings.items()
        }

    def _record(self, axis: Axis, name: str, points: list[ScalingPoint]) -> ScalingRecord:
        timed = [(point.value, point.timing.round_medians_us) for point in points if point.timing is not None]
        exponent, misfit = growth(timed)
        failed = [f"{axis} {point.value}: {point.error}" for point in points if point.error is not None]
        fixed = self.fixed
        return ScalingRecord(
            measured_at_utc=now_utc(),
            axis=axis,
            path=name,
            baseline=self.engines[0],
            items=0 if axis == "items" else fixed.items,
            history=0 if axis == "history" else fixed.history,
            batch=0 if axis == "batch" else fixed.batch,
            steps=fixed.steps,
            width=fixed.width,
            precision=dtype_name(ENGINES[name].dtype),
            points=points,
            exponent=exponent if len(timed) >= LEAST_POINTS else None,
            exponent_last=growth(timed[-2:])[0],
            largest_misfit=misfit if len(timed) >= LEAST_POINTS else None,
            error="; ".join(failed) or None,
            protocol=self.timer.protocol_of(next((point.timing for point in points if point.timing), None)),
            environment=self.timer.environment,
            command=self.timer.command,
        )


def growth(points: Sequence[tuple[int, Sequence[float]]], seed: int = 0) -> tuple[Estimate | None, float | None]:
    """Fit time = a value^b to (value, round medians) pairs; returns b with its 95 % interval, and the largest misfit.

    Least squares on logarithms; the interval is a bootstrap over the rounds of each point. (None, None) for fewer than
    2 different values.
    """
    if len({value for value, _ in points}) < 2:
        return None, None
    values = np.log([value for value, _ in points])
    generator = np.random.default_rng(seed)
    middle = np.log([float(np.median(rounds)) for _, rounds in points])
    slope, offset = _line(values, middle[None])
    drawn = []
    for _, rounds in points:
        samples = np.asarray(rounds)
        picks = generator.integers(0, samples.size, (RESAMPLES, samples.size))
        drawn.append(np.log(np.median(samples[picks], axis=1)))
    low, high = np.quantile(_line(values, np.stack(drawn, axis=1))[0], [0.025, 0.975])
    misfit = float(np.exp(np.abs(middle - (offset[0] + slope[0] * values)).max()))
    return Estimate(value=float(slope[0]), low=float(low), high=float(high)), misfit


def equal_histories(users: int, length: int, items: int, variant: int = 0) -> Jagged:
    """Histories of one length; the same for each call of a variant, which has items of its own."""
    generator = np.random.default_rng([users, variant])
    rows = generator.integers(1, items + 1, (users, length))
    return Jagged(torch.from_numpy(rows.reshape(-1)), torch.arange(users + 1) * length)


def _line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Slopes and offsets of least-squares lines through rows `[R, n]` of y at x `[n]`."""
    centred = x - x.mean()
    slopes = (y @ centred) / (centred @ centred)
    return slopes, y.mean(axis=1) - slopes * x.mean()


def _part(report: Report, before: float, total: float, done: float, expected: float) -> None:
    report(before + done, max(total, before + expected))
