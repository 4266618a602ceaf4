"""Charts of records other than trade-offs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.archive import AnyRecord
from bench.chart import BASELINE_STYLE, Chart, Line
from bench.compression.record import CompressRecord
from bench.growth_table import grows
from bench.kernels.records import EngineRecord
from bench.recommendation import METRIC, counted, interval
from bench.scaling.record import ScalingRecord
from bench.serving.records import ServingRecord
from bench.training_speed.record import TrainingRecord


def charts_of_kind(records: Sequence[AnyRecord]) -> list[Chart]:
    """The charts of one kind of records; none for a kind without any."""
    growing = [record for record in records if isinstance(record, ScalingRecord)]
    served = [record for record in records if isinstance(record, ServingRecord)]
    engines = [record for record in records if isinstance(record, EngineRecord)]
    compressed = [record for record in records if isinstance(record, CompressRecord)]
    trained = [record for record in records if isinstance(record, TrainingRecord)]
    cells = sorted({(_data(each), each.items, each.steps) for each in engines})
    sizes = sorted({timing.batch_size_users for record in compressed for timing in record.timings})
    return [
        *(
            _growth(axis, [each for each in growing if each.axis == axis])
            for axis in dict.fromkeys(e.axis for e in growing)
        ),
        *([_served(served)] if served else []),
        *(
            _engines(*cell, [each for each in engines if (_data(each), each.items, each.steps) == cell])
            for cell in cells
        ),
        *(_compressed(size, compressed) for size in sizes),
        *([_trained(trained)] if trained else []),
    ]


def _styled(name: str, number: int, x: list[float], y: list[float], **more: Any) -> Line:
    """The line of a number, told from the others by colour and marker, and every fifth by hollow ones."""
    return Line(name, x, y, number % BASELINE_STYLE, hollow=number // BASELINE_STYLE % 2 == 1, **more)


def _growth(axis: str, records: Sequence[ScalingRecord]) -> Chart:
    lines = []
    for number, record in enumerate(records):
        points = [(float(point.value), point.timing.latency_us_p50 / 1e3) for point in record.points if point.timing]
        name, x, y = f"{record.path}{grows(record)}", [x for x, _ in points], [y for _, y in points]
        lines.append(_styled(name, number, x, y, engine=record.path, precision=record.precision))
    return Chart(
        key=f"growth-{axis}",
        title=f"Time against {axis}",
        note="Medians; both axes are logarithmic, so that a power law is a straight line.",
        x_title=axis,
        y_title="median latency (ms)",
        lines=[line for line in lines if line.x],
        y_log=True,
        empty="No point of this axis has a latency; the table names the errors.",
    )


def _served(records: Sequence[ServingRecord]) -> Chart:
    ticks = (50.0, 90.0, 95.0, 99.0)
    places = [100.0 / (100.0 - percentile) for percentile in ticks]
    lines: list[Line] = []
    for record in records:
        if (summary := record.summary) is None:
            continue
        steps = "" if record.steps is None else f", {counted(record.steps, 'step')}"
        times = [summary.latency_ms_p50, summary.latency_ms_p90, summary.latency_ms_p95, summary.latency_ms_p99]
        name = f"{record.scenario}, {record.engine}{steps}"
        lines.append(_styled(name, len(lines), places, times, engine=record.engine, precision=record.precision))
    return Chart(
        key="percentiles",
        title="Percentiles of latency",
        note="Of single users, from arrival to result.",
        x_title="percentile of queries",
        y_title="latency (ms)",
        lines=lines,
        y_log=True,
        x_ticks=places,
        x_names=[f"{percentile:g}" for percentile in ticks],
        empty="No scenario was measured to its end; the table names the errors.",
    )


def _data(record: EngineRecord) -> tuple[str, str]:
    """Name and fingerprint of a run's data; both empty for random models."""
    run = record.trained
    return (run.dataset_name, run.dataset_fingerprint[:8]) if run else ("", "")


def _engines(data: tuple[str, str], items: int, steps: int, records: Sequence[EngineRecord]) -> Chart:
    name, fingerprint = data
    lines = []
    for number, (path, precision) in enumerate(dict.fromkeys((each.path, each.precision) for each in records)):
        points = sorted(
            (float(each.batch_size_users), each.timing.latency_us_p50 / 1e3)
            for each in records
            if (each.path, each.precision) == (path, precision) and each.timing
        )
        x, y = [x for x, _ in points], [y for _, y in points]
        lines.append(_styled(path, number, x, y, engine=path, precision=precision))
    return Chart(
        key=f"engines-{f'{fingerprint}-' if name else ''}{items}-{steps}",
        title=f"Time against batch, {f'{name}, ' if name else ''}{items} items, {counted(steps, 'step')}",
        note="Medians, histories of test users."
        if name
        else "Medians, random models: their times alone mean anything.",
        x_title="users in a batch",
        y_title="median latency (ms)",
        lines=[line for line in lines if line.x],
        y_log=True,
        x_ticks=sorted({float(each.batch_size_users) for each in records}),
    )


def _compressed(size: int, records: Sequence[CompressRecord]) -> Chart:
    lines = []
    pairs = list(dict.fromkeys((each.engine, each.precision) for each in records))
    for number, (engine, precision) in enumerate(pairs):
        points = [
            (timing.latency_ms_p50, kept, each)
            for each in records
            if (each.engine, each.precision) == (engine, precision)
            and (timing := each.timing(size))
            and each.accuracy
            and (kept := each.accuracy.ndcg20_kept_percent)
        ]
        lines.append(
            _styled(
                f"{engine}, {precision}",
                number,
                [time for time, _, _ in points],
                [kept.value for _, kept, _ in points],
                low=[kept.low for _, kept, _ in points],
                high=[kept.high for _, kept, _ in points],
                connected=False,
                engine=engine,
                precision=precision,
                details=[f"{_network(each)}\n{time:.4g} ms, kept {interval(kept)} %" for time, kept, each in points],
            )
        )
    return Chart(
        key=f"compress-{size}",
        title=f"Accuracy kept against time, batch of {counted(size, 'user')}",
        note=f"{METRIC} in percent of the run's at every trained step, with 95 % intervals over users.",
        x_title="median latency (ms)",
        y_title=f"{METRIC} kept (%)",
        lines=[line for line in lines if line.x],
    )


def _network(record: CompressRecord) -> str:
    steps = [] if record.steps is None else [counted(record.steps, "step")]
    return ", ".join([record.network, *steps, record.precision])


def _trained(records: Sequence[TrainingRecord]) -> Chart:
    lines = []
    for number, (model, precision) in enumerate(dict.fromkeys((each.model, each.precision) for each in records)):
        points = sorted(
            (float(each.batch_size_users), each.timing.tokens_per_second)
            for each in records
            if (each.model, each.precision) == (model, precision) and each.timing
        )
        x, y = [x for x, _ in points], [y for _, y in points]
        lines.append(_styled(f"{model}, {precision}", number, x, y, precision=precision))
    return Chart(
        key="training",
        title="Training speed against batch",
        note="All tokens over all time, without validation.",
        x_title="users in a batch",
        y_title="tokens a second",
        lines=[line for line in lines if line.x],
        x_ticks=sorted({float(each.batch_size_users) for each in records}),
    )
