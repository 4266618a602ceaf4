"""Reports of records other than trade-offs: every row in a table, curves as charts, Markdown beside the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.archive import read_any
from bench.chart import Chart
from bench.comparing.rows import rows_in
from bench.compression.record import CompressRecord
from bench.kernels.records import EngineRecord, Measuring, PathTiming, Roof
from bench.kind_charts import charts_of_kind
from bench.other_kinds import sections_of
from bench.record import Estimate, TradeoffRecord
from bench.report import write_report
from bench.scaling.record import ScalingPoint, ScalingRecord
from bench.serving.records import ServingDemand, ServingRecord, ServingSummary
from bench.training_speed.record import TrainingRecord, TrainingTiming

COMPRESSED = Path(__file__).parents[2] / "bench" / "records" / "compress-ml-100k-cpu.jsonl"


@pytest.fixture(scope="module")
def served(tiny_records: list[TradeoffRecord]) -> list[ServingRecord]:
    """A scenario that was measured, and one that failed."""
    row = next(each for each in tiny_records if each.engine == "cached" and each.steps == 1)
    demand = ServingDemand(
        seconds_least=1.0, queries_least=9, batch_most=1, wait_most_ms=0.0, latency_bound_ms=None,
        arrivals_per_second=None, load=None, seed=0,
    )  # fmt: skip
    summary = ServingSummary(
        queries=9, seconds=1.0, latency_ms_p50=1.0, latency_ms_p90=2.0, latency_ms_p95=3.0, latency_ms_p99=4.0,
        latency_ms_most=5.0, window_medians_ms=[1.0, 1.5, 2.0], throughput_users_per_second=9.0,
        bound_met_fraction=None, busy_fraction=0.5, batch_mean=1.0, queue_most=1, valid=True, invalid_because="",
    )  # fmt: skip
    first = ServingRecord(
        measured_at_utc=row.measured_at_utc, scenario="single stream", model="adrec", engine="cached", steps=1,
        precision="float32", demand=demand, summary=summary, accuracy=row.accuracy, error=None, dataset_name="tiny",
        dataset_fingerprint="f" * 64, dataset_items=40, history_length_mean=5.0, split="test",
        model_fingerprint="a" * 64, device="cpu", threads=1, clock="wall clock", results_per_user=20,
        environment=row.environment, command="adrec bench serving",
    )  # fmt: skip
    failed = {"scenario": "offline", "summary": None, "accuracy": None, "error": "RuntimeError: <b>no</b>"}
    return [first, first.model_copy(update=failed)]


@pytest.fixture(scope="module")
def growing(tiny_records: list[TradeoffRecord]) -> ScalingRecord:
    def point(value: int, microseconds: float) -> ScalingPoint:
        timing = PathTiming(
            latency_us_p50=microseconds, latency_us_p95=microseconds, latency_us_p99=microseconds,
            round_medians_us=[microseconds], calls=1, rounds=1, time_ratio_to_baseline=None, peak_memory_mib=None,
            peak_memory_meaning="",
        )  # fmt: skip
        return ScalingPoint(value=value, history_tokens=value, timing=timing, error=None)

    protocol = Measuring(
        clock="wall clock", device="cpu", device_name="cpu", seconds_per_path=1.0, rounds_minimum=1, warmup_calls=1,
        threads=1,
    )  # fmt: skip
    failed = ScalingPoint(value=1000, history_tokens=1, timing=None, error="RuntimeError: no")
    return ScalingRecord(
        measured_at_utc="2026-01-01T00:00:00+00:00", axis="items", path="cached", baseline="cached", items=0, history=9,
        batch=1, steps=1, width=16, precision="float32", points=[point(10, 2000.0), point(100, 20_000.0), failed],
        exponent=Estimate(value=1.0, low=1.0, high=1.0), exponent_last=None, largest_misfit=None, error=None,
        protocol=protocol, environment=tiny_records[0].environment, command="adrec bench run scaling",
    )  # fmt: skip


def test_every_row_of_every_kind_is_in_the_page(
    served: list[ServingRecord], growing: ScalingRecord, tmp_path: Path
) -> None:
    records = [*read_any(COMPRESSED), *served, growing]
    page = write_report(records, tmp_path / "page.html")
    text = page.read_text()
    for title in ("Compressed models", "Serving scenarios", "Growth"):
        assert text.count(f"<span>{title}</span>") == 1
    # A row of heads for each of the three tables, and the table of fits with its one row.
    assert len(re.findall(r"<tr[ >]", text)) == sum(len(rows_in(record)) for record in records) + 3 + 2
    assert "<b>no</b>" not in text
    assert "RuntimeError: &lt;b&gt;no" in text
    markdown = page.with_suffix(".md").read_text()
    assert markdown.count("\n| single stream |") == 1
    assert "RuntimeError: \\<b\\>no" in markdown


def test_a_report_needs_no_trade_off(served: list[ServingRecord], tmp_path: Path) -> None:
    page = write_report(served, tmp_path / "page.html")
    assert "<h1>Measurements</h1>" in page.read_text()
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert page.with_suffix(".md").read_text().startswith("# Measurements\n\n")
    assert "## Serving scenarios" in page.with_suffix(".md").read_text()
    # Nothing was measured: there is nothing to draw, and no picture of earlier records is left.
    write_report(served[1:], page)
    assert not page.with_suffix(".png").exists()


def test_curves_are_those_of_the_records(served: list[ServingRecord], growing: ScalingRecord) -> None:
    (percentiles,) = charts_of_kind(served)
    (line,) = percentiles.lines
    assert line.name == "single stream, cached, 1 step"
    assert line.x == pytest.approx([2.0, 10.0, 20.0, 100.0])
    assert line.y == [1.0, 2.0, 3.0, 4.0]
    (growth,) = charts_of_kind([growing])
    (line,) = growth.lines
    assert line.name == "cached, grows as items^1.00"
    assert (line.x, line.y) == ([10.0, 100.0], [2.0, 20.0])
    poor = growing.model_copy(update={"largest_misfit": 2.125})
    assert charts_of_kind([poor])[0].lines[0].name == "cached, no power law (off by up to 2.1 times)"
    failed = charts_of_kind(served[1:])[0]
    assert isinstance(failed, Chart)
    assert not failed.lines
    assert "No scenario" in failed.empty


def test_fits_are_in_the_tables_with_their_misfit(growing: ScalingRecord) -> None:
    exponent = Estimate(value=0.5, low=0.25, high=0.75)
    found = [
        growing.model_copy(update={"path": "reference"}),
        growing.model_copy(update={"exponent": exponent, "exponent_last": exponent, "largest_misfit": 1.125}),
        growing.model_copy(update={"axis": "batch", "exponent": exponent, "largest_misfit": 1.5}),
    ]
    (section,) = sections_of(found, 0)
    for text in ("too few points", "0.50 [0.25, 0.75]", "1.12 times", "1.5 times", "no: off by more than 1.25 times"):
        assert text in section.html
    shown = [line for line in section.markdown.splitlines() if line.startswith(("| items |", "| batch |"))]
    assert [line.split(" | ")[-1] for line in shown if "float32" in line][:3] == [
        "too few points |", "yes |", "no: off by more than 1.25 times |",
    ]  # fmt: skip
    assert "| items | cached | float32 | 0.50 \\[0.25, 0.75\\] | 0.50 \\[0.25, 0.75\\] | 1.12 times | yes |" in shown


def test_engines_compressed_models_and_training_have_charts(
    served: list[ServingRecord], growing: ScalingRecord
) -> None:
    timing = growing.points[0].timing
    roof = Roof(
        least_bytes=1, least_flops=1, gpu=None, floor_us=None, bound=None, floor_fraction=None,
        gigabytes_per_second=None,
    )  # fmt: skip
    engine = EngineRecord(
        measured_at_utc="2026-01-01T00:00:00+00:00", path="cached", baseline="cached", timing=timing, roof=roof,
        error=None, protocol=growing.protocol, environment=growing.environment, command="", precision="float32",
        batch_size_users=32, history_tokens=9, steps=4, items=30, width=16, top20_overlap_fraction=1.0,
        overlap_with="cached", noise="drawn",
    )  # fmt: skip
    failed = engine.model_copy(update={"path": "triton", "timing": None, "error": "no"})
    chart, other = charts_of_kind(
        [engine, engine.model_copy(update={"batch_size_users": 1}), failed, engine.model_copy(update={"steps": 32})]
    )
    assert (chart.title, other.title) == (
        "Time against batch, 30 items, 4 steps", "Time against batch, 30 items, 32 steps",
    )  # fmt: skip
    assert [(line.name, line.x, line.y) for line in chart.lines] == [("cached", [1.0, 32.0], [2.0, 2.0])]
    half = engine.model_copy(update={"top20_overlap_fraction": 0.5, "path": "onnxruntime-int8"})
    (section,) = sections_of([engine, half, failed], 0)
    heads, *rows = [line.split(" | ") for line in section.markdown.splitlines() if line.startswith("| ")]
    place = next(number for number, head in enumerate(heads) if head.startswith("overlap of the batch"))
    assert [row[place : place + 2] for row in rows if len(row) == len(heads)][-3:] == [
        ["1", "cached"], ["0.5", "cached"], ["1", "cached"],
    ]  # fmt: skip

    trained = TrainingTiming(
        step_ms_p50=1.0, step_ms_p95=1.0, window_medians_ms=[1.0], steps=1, tokens_per_second=500.0,
        users_per_second=50.0, epoch_steps=1, epoch_seconds=1.0, peak_memory_mib=None, peak_memory_meaning="",
    )  # fmt: skip
    training = TrainingRecord(
        measured_at_utc="2026-01-01T00:00:00+00:00", model="adrec", batch_size_users=128, precision="32-true", width=16,
        items=30, timing=trained, error=None, dataset_name="tiny", dataset_fingerprint="f", device="cpu", threads=1,
        clock="wall clock", environment=growing.environment, command="",
    )  # fmt: skip
    (speed,) = charts_of_kind([training])
    assert [(line.name, line.x, line.y) for line in speed.lines] == [("adrec, 32-true", [128.0], [500.0])]

    compressed = [each for each in read_any(COMPRESSED) if isinstance(each, CompressRecord)]
    small, large = charts_of_kind(compressed)
    assert "batch of 1 user" in small.title
    shown = {point for line in large.lines for point in zip(line.x, line.y, strict=True)}
    expected = {
        (time.latency_ms_p50, each.accuracy.ndcg20_kept_percent.value)
        for each in compressed
        if (time := each.timing(512)) and each.accuracy and each.accuracy.ndcg20_kept_percent
    }
    assert shown == expected
    assert len(shown) > 10


def test_machines_have_tables_of_their_own(served: list[ServingRecord]) -> None:
    machine = served[0].environment.machine.model_copy(update={"processor": "another"})
    other = served[0].model_copy(update={"environment": served[0].environment.model_copy(update={"machine": machine})})
    first, second = sections_of([*served, other], 0)
    assert first.title == f"Serving scenarios, {served[0].environment.machine.kind}"
    assert second.title == f"Serving scenarios, {machine.kind}"
    assert [section.title for section in sections_of(served, 0)] == ["Serving scenarios"]


def test_of_a_thing_measured_twice_the_last_is_shown(served: list[ServingRecord]) -> None:
    summary = served[0].summary
    assert summary is not None
    later = served[0].model_copy(update={"summary": summary.model_copy(update={"window_medians_ms": [7.0, 7.0, 7.0]})})
    (section,) = sections_of([*served, later], 0)
    rows = [line for line in section.markdown.splitlines() if line.startswith("| single stream |")]
    assert len(rows) == 1
    assert " | 7 | " in rows[0]
    (chart,) = section.charts
    assert len(chart.lines) == 1
