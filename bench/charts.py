"""The plots of a study of trade-off records."""

from __future__ import annotations

from collections.abc import Sequence

from bench.chart import BASELINE_STYLE, FRONT_STYLE, POPULARITY_STYLE, Chart, Line, roof_line
from bench.pareto import pareto_front
from bench.recommendation import METRIC, batch_sizes, points_of, rows_of_batch
from bench.record import BASELINE_MODEL, POPULARITY, RequestRoof, TimingSummary, TradeoffRecord
from bench.series import details_of, few_and_exact, first_seed, series_of

PERCENTILE_TICKS = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)


def charts_of(records: Sequence[TradeoffRecord], size: int) -> list[Chart]:
    """Return the six charts of one study; all but accuracy against steps and throughput are for batch size ``size``."""
    rows = rows_of_batch(records, size)
    return [
        accuracy_against_latency(records, rows, size),
        latency_against_steps(rows, size),
        accuracy_against_steps(records),
        throughput_against_batch(records),
        latency_percentiles([row for row in records if row.batch_size_users == size and row.timing], size),
        roofline([row for row in records if row.batch_size_users == size], size),
    ]


def accuracy_against_latency(records: Sequence[TradeoffRecord], rows: Sequence[TradeoffRecord], size: int) -> Chart:
    """NDCG@20 against median latency, one line an engine, with the Pareto line over everything measured."""
    lines = []
    first = first_seed(rows)
    for series in series_of(first):
        lines.append(
            series.line(
                x=[each.timing.latency_ms_p50 for each in series.rows if each.timing],
                y=_metric(series.rows, "value"),
                low=_metric(series.rows, "low"),
                high=_metric(series.rows, "high"),
                labels=["" if each.steps is None else str(each.steps) for each in series.rows],
                details=[details_of(each) for each in series.rows],
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
                front=True,
            )
        )
    lines += _popularity_level(records, lines)
    return Chart(
        key="accuracy-latency",
        title=f"Accuracy against latency, batch {size}",
        note="Labels are step counts; bars are 95 % bootstrap intervals over users. Up and left is better.",
        x_title="median latency of a batch (ms)",
        y_title=f"{METRIC} (%)",
        lines=lines if first else [],
        empty="No row of this batch size has both a latency and an accuracy; the table names the errors.",
    )


def latency_against_steps(rows: Sequence[TradeoffRecord], size: int) -> Chart:
    """Median latency against steps for each engine; bars reach to p99."""
    lines = []
    first = first_seed(rows)
    for series in series_of(first):
        timings = [each.timing for each in series.rows if each.timing]
        level = series.rows[0].steps is None
        lines.append(
            series.line(
                x=[float(each.steps or 1) for each in series.rows],
                y=[timing.latency_ms_p50 for timing in timings],
                low=None if level else [timing.latency_ms_p50 for timing in timings],
                high=None if level else [timing.latency_ms_p99 for timing in timings],
                level=level,
                details=[details_of(each) for each in series.rows],
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
        empty="No row of this batch size has a latency; the table names the errors.",
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
    lines += _popularity_level(records, lines)
    return Chart(
        key="accuracy-steps",
        title="Accuracy against steps",
        note="Bars are 95 % bootstrap intervals over users; they share their users, so they move together.",
        x_title="steps",
        y_title=f"{METRIC} (%)",
        lines=lines,
        x_ticks=_step_ticks(records),
        empty="No row has an accuracy; the table names the errors.",
    )


def throughput_against_batch(records: Sequence[TradeoffRecord]) -> Chart:
    """Users per second against batch size, for one step and the exact count of each engine."""
    lines = []
    for series in few_and_exact([each for each in records if each.timing]):
        members = sorted(series.rows, key=lambda each: each.batch_size_users or 0)
        lines.append(
            series.line(
                x=[float(each.batch_size_users or 1) for each in members],
                y=[each.timing.throughput_users_per_second for each in members if each.timing],
                details=[details_of(each) for each in members],
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
        empty="No row has a latency; the table names the errors.",
    )


def latency_percentiles(rows: Sequence[TradeoffRecord], size: int) -> Chart:
    """Latency at the percentiles of single calls, for one step and the exact count of each engine.

    The axis is `1 / (1 - percentile)`, logarithmic, which gives each nine of the tail the same room.
    """
    lines = []
    for series in few_and_exact(rows):
        points = _percentiles(series.rows[0].timing)
        lines.append(
            series.line(
                x=[_tail(percentile) for percentile in points],
                y=list(points.values()),
                details=[f"p{percentile:g} of {series.calls}" for percentile in points],
                markers=len(points) < 4,
            )
        )
    return Chart(
        key="percentiles",
        title=f"Percentiles of latency, batch {size}",
        note="Single calls. A flat curve is a steady engine; what few calls stand behind (see the table) ends early.",
        x_title="percentile of calls",
        y_title="latency of a batch (ms)",
        lines=lines,
        y_log=True,
        x_ticks=[_tail(percentile) for percentile in PERCENTILE_TICKS],
        x_names=[f"{percentile:g}" for percentile in PERCENTILE_TICKS],
        empty="No row of this batch size has a latency; the table names the errors.",
    )


def roofline(rows: Sequence[TradeoffRecord], size: int) -> Chart:
    """Reached GFLOP/s against operations per byte, both of the least work, under what the machine reached."""
    lines = []
    found = [each for each in first_seed(rows) if each.timing and each.roof]
    for series in series_of(found):
        pairs = [(each.timing, each.roof, each.steps) for each in series.rows if each.timing and each.roof]
        lines.append(
            series.line(
                x=[roof.least_flops / roof.least_bytes for _, roof, _ in pairs],
                y=[roof.least_flops / timing.latency_ms_p50 / 1e6 for timing, roof, _ in pairs],
                labels=[str(steps) for _, _, steps in pairs],
                details=[_share_of_roof(timing, roof) for timing, roof, _ in pairs],
            )
        )
    if lines and (roof := found[0].roof) is not None:
        xs = [x for line in lines for x in line.x]
        lines.append(roof_line(xs, roof.gflops, roof.gigabytes_per_second))
    return Chart(
        key="roofline",
        title=f"Roofline, batch {size}",
        note="Least operations and bytes of a batch, whatever the engine does, under what this machine reached in a "
        "product and a copy. Labels are step counts.",
        x_title="operations per byte",
        y_title="GFLOP/s of the least work",
        lines=lines,
        y_log=True,
        empty="No row of this batch size knows its least work: it was measured before adrec noted it, or the model is "
        "not ADRec with attention. `adrec bench tradeoff RUN` measures it; `adrec bench profile RUN` does by stage.",
    )


def _percentiles(timing: TimingSummary | None) -> dict[float, float]:
    if timing is None:
        return {}
    known = {50.0: timing.latency_ms_p50, 95.0: timing.latency_ms_p95, 99.0: timing.latency_ms_p99}
    return timing.latency_ms_percentiles or known


def _tail(percentile: float) -> float:
    return 1.0 / (1.0 - percentile / 100.0)


def _share_of_roof(timing: TimingSummary, roof: RequestRoof) -> str:
    floor = max(roof.least_flops / roof.gflops, roof.least_bytes / roof.gigabytes_per_second) / 1e6
    return f"floor {floor:.3g} ms, {floor / timing.latency_ms_p50:.1%} of the {timing.latency_ms_p50:.4g} ms it took"


def _metric(rows: Sequence[TradeoffRecord], end: str) -> list[float]:
    return [float(getattr(each.accuracy.metrics_percent[METRIC], end)) for each in rows if each.accuracy]


def _popularity_level(records: Sequence[TradeoffRecord], others: Sequence[Line]) -> list[Line]:
    rows = [each for each in records if each.model == POPULARITY and each.accuracy][:1]
    ends = [end for line in others for end in (*(line.low or line.y), *(line.high or line.y))]
    levels = _metric(rows, "value")
    # So far from the others that they would be told apart no more.
    folded = bool(ends) and any(min(ends) - level > max(ends) - min(ends) for level in levels)
    return [Line(POPULARITY, x=[1.0], y=levels, style=POPULARITY_STYLE, level=True, folded=folded) for _ in rows]


def _step_ticks(rows: Sequence[TradeoffRecord]) -> list[float]:
    return [float(count) for count in sorted({each.steps for each in rows if each.steps is not None})]
