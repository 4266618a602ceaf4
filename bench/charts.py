"""The plots of a report as data, which `bench.plotly_figures` and `bench.pictures` draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.pareto import pareto_front
from bench.recommendation import METRIC, batch_sizes, counted, points_of, rows_of_batch
from bench.record import BASELINE_MODEL, POPULARITY, TradeoffRecord

BASELINE_STYLE, POPULARITY_STYLE, FRONT_STYLE = 4, 5, 6


@dataclass(frozen=True)
class Line:
    """One series: equal-long ``x``, ``y``, optional interval ends and labels.

    ``style`` picks colour, marker and dash; ``dash`` overrides the dash. ``level`` draws a horizontal line at
    ``y[0]`` over the width of the chart.
    """

    name: str
    x: list[float]
    y: list[float]
    style: int
    low: list[float] | None = None
    high: list[float] | None = None
    labels: list[str] = field(default_factory=list)
    markers: bool = True
    connected: bool = True
    level: bool = False


@dataclass(frozen=True)
class Chart:
    """One plot; ``note`` is a sentence below it."""

    key: str
    title: str
    note: str
    x_title: str
    y_title: str
    lines: list[Line]
    x_log: bool = True
    y_log: bool = False
    x_ticks: list[float] | None = None


def charts_of(records: Sequence[TradeoffRecord], size: int) -> list[Chart]:
    """Return the four charts of one study; the first two are for batch size ``size``."""
    rows = rows_of_batch(records, size)
    return [
        accuracy_against_latency(records, rows, size),
        latency_against_steps(rows, size),
        accuracy_against_steps(records),
        throughput_against_batch(records),
    ]


def accuracy_against_latency(records: Sequence[TradeoffRecord], rows: Sequence[TradeoffRecord], size: int) -> Chart:
    """NDCG@20 against median latency, one line an engine, with the Pareto line over everything measured."""
    lines = []
    first = _first_seed(rows)
    for name, style, members in _series(first):
        lines.append(
            Line(
                name=name,
                x=[each.timing.latency_ms_p50 for each in members if each.timing],
                y=_metric(members, "value"),
                low=_metric(members, "low"),
                high=_metric(members, "high"),
                labels=["" if each.steps is None else str(each.steps) for each in members],
                style=style,
            )
        )
    front = pareto_front(points_of(first))
    if len(front) > 1:
        lines.append(
            Line(
                name="Pareto line",
                x=[point.latency_ms for point in front],
                y=[point.accuracy_percent for point in front],
                labels=[point.label for point in front],
                style=FRONT_STYLE,
                markers=False,
            )
        )
    lines += _popularity_level(records)
    return Chart(
        key="accuracy-latency",
        title=f"Accuracy against latency, batch {size}",
        note="Labels are step counts; bars are 95 % bootstrap intervals over users. Up and left is better.",
        x_title="median latency of a batch (ms)",
        y_title=f"{METRIC} (%)",
        lines=lines,
    )


def latency_against_steps(rows: Sequence[TradeoffRecord], size: int) -> Chart:
    """Median latency against steps for each engine; bars reach to p99."""
    lines = []
    first = _first_seed(rows)
    for name, style, members in _series(first):
        timings = [each.timing for each in members if each.timing]
        level = members[0].steps is None
        lines.append(
            Line(
                name=name,
                x=[float(each.steps or 1) for each in members],
                y=[timing.latency_ms_p50 for timing in timings],
                low=None if level else [timing.latency_ms_p50 for timing in timings],
                high=None if level else [timing.latency_ms_p99 for timing in timings],
                style=style,
                level=level,
            )
        )
    return Chart(
        key="latency-steps",
        title=f"Latency against steps, batch {size}",
        note="Markers are medians, bars reach up to p99. Both axes are logarithmic.",
        x_title="steps",
        y_title="latency of a batch (ms)",
        lines=lines,
        y_log=True,
        x_ticks=_step_ticks(first),
    )


def accuracy_against_steps(records: Sequence[TradeoffRecord]) -> Chart:
    """NDCG@20 against steps, one line a seed, beside the models without steps."""
    lines = []
    seeds = sorted({each.seed for each in records if each.steps is not None})
    for index, seed in enumerate(seeds):
        members = list(
            {each.steps: each for each in records if each.steps and each.seed == seed and each.accuracy}.values()
        )
        members.sort(key=lambda each: each.steps or 0)
        if members:
            lines.append(
                Line(
                    name=members[0].model if len(seeds) == 1 else f"{members[0].model}, seed {seed}",
                    x=[float(each.steps or 1) for each in members],
                    y=_metric(members, "value"),
                    low=_metric(members, "low"),
                    high=_metric(members, "high"),
                    style=index % BASELINE_STYLE,
                )
            )
    baseline = [each for each in records if each.model == BASELINE_MODEL and each.accuracy][:1]
    if baseline:
        lines.append(Line(BASELINE_MODEL, x=[1.0], y=_metric(baseline, "value"), style=BASELINE_STYLE, level=True))
    lines += _popularity_level(records)
    return Chart(
        key="accuracy-steps",
        title="Accuracy against steps",
        note="Bars are 95 % bootstrap intervals over users; they share their users, so they move together.",
        x_title="steps",
        y_title=f"{METRIC} (%)",
        lines=lines,
        x_ticks=_step_ticks(records),
    )


def throughput_against_batch(records: Sequence[TradeoffRecord]) -> Chart:
    """Users per second against batch size, for one step and the exact count of each engine."""
    lines = []
    complete = _first_seed([each for each in records if each.timing])
    steps = sorted({each.steps for each in complete if each.steps is not None})
    shown = list(dict.fromkeys((*steps[:1], *steps[-1:])))
    wanted = [each for each in complete if each.steps is None or each.steps in shown]
    for name, style, engine_rows in _series(wanted):
        for count in sorted({each.steps or 0 for each in engine_rows}):
            members = [each for each in engine_rows if (each.steps or 0) == count]
            members.sort(key=lambda each: each.batch_size_users or 0)
            lines.append(
                Line(
                    name=f"{name}, {counted(count, 'step')}" if count else name,
                    x=[float(each.batch_size_users or 1) for each in members],
                    y=[each.timing.throughput_users_per_second for each in members if each.timing],
                    style=style + (0 if count in (0, shown[-1]) else 10),
                )
            )
    return Chart(
        key="throughput-batch",
        title="Throughput against batch size",
        note="Batch size over median latency. Both axes are logarithmic.",
        x_title="users in a batch",
        y_title="users per second",
        lines=lines,
        y_log=True,
        x_ticks=[float(size) for size in batch_sizes(records)],
    )


def _series(rows: Sequence[TradeoffRecord]) -> list[tuple[str, int, list[TradeoffRecord]]]:
    engines = sorted({each.engine or "" for each in rows if each.steps is not None}, reverse=True)
    found = []
    for index, engine in enumerate(engines):
        members = [each for each in rows if each.steps is not None and each.engine == engine]
        found.append((engine, index % BASELINE_STYLE, sorted(members, key=lambda each: each.steps or 0)))
    baseline = [each for each in rows if each.model == BASELINE_MODEL]
    if baseline:
        found.append((BASELINE_MODEL, BASELINE_STYLE, baseline))
    return found


def _first_seed(rows: Sequence[TradeoffRecord]) -> list[TradeoffRecord]:
    # Latency does not depend on the seed: a row a setting is enough.
    kept: dict[tuple[object, ...], TradeoffRecord] = {}
    for row in rows:
        kept.setdefault((row.model, row.engine, row.steps, row.batch_size_users), row)
    return list(kept.values())


def _metric(rows: Sequence[TradeoffRecord], end: str) -> list[float]:
    return [float(getattr(each.accuracy.metrics_percent[METRIC], end)) for each in rows if each.accuracy]


def _popularity_level(records: Sequence[TradeoffRecord]) -> list[Line]:
    rows = [each for each in records if each.model == POPULARITY and each.accuracy][:1]
    return [Line(POPULARITY, x=[1.0], y=_metric(rows, "value"), style=POPULARITY_STYLE, level=True) for _ in rows]


def _step_ticks(rows: Sequence[TradeoffRecord]) -> list[float]:
    return [float(count) for count in sorted({each.steps for each in rows if each.steps is not None})]
