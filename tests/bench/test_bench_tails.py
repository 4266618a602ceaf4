"""Tails: a slow-down of the slowest calls alone is caught, a run against itself is not, too few calls say so."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from typer.testing import CliRunner

from adrec.errors import DataError
from bench.archive import read_any
from bench.cli import register
from bench.comparing.comparison import Comparison, Pair, compare
from bench.comparing.rows import Tail, rows_of
from bench.comparing.tables import markdown_of
from bench.comparing.verdict import judge_tail
from bench.json_lines import json_line
from bench.latency_blocks import LatencyBlocks
from bench.record import TradeoffRecord
from bench.serving.measure import summarise
from bench.serving.records import ServingDemand, ServingRecord
from bench.serving.scenarios import Served

TRIES = 20
Times = NDArray[np.float64]


def latencies(seed: int, count: int, tail: float = 1.0) -> Times:
    """Latencies of about a millisecond, one in ten with an exponential addition; noise that lasts and drifts.

    ``tail``: by which the slowest tenth is multiplied.
    """
    generator = np.random.default_rng(seed)
    level = np.repeat(np.cumsum(generator.normal(0.0, 0.004, 20)), -(-count // 20))[:count]
    late = np.where(generator.random(count) < 0.1, generator.exponential(1.0, count), 0.0)
    times = (np.exp(generator.normal(0.0, 0.05, count)) + late) * np.exp(level + generator.normal(0.0, 0.005))
    found: Times = np.where(times > np.quantile(times, 0.9), tail * times, times)
    return found


@pytest.fixture(scope="module")
def row(tiny_records: list[TradeoffRecord]) -> TradeoffRecord:
    """A row of `cached` that was measured on an idle machine."""
    found = next(each for each in tiny_records if each.engine == "cached" and each.steps == 1)
    machine = found.environment.machine.model_copy(update={"load_one_minute": 0.0, "cores_usable": 2})
    return found.model_copy(update={"environment": found.environment.model_copy(update={"machine": machine})})


def served(row: TradeoffRecord, times: Times, rate: float | None = None) -> ServingRecord:
    """The record of a scenario with these latencies; ``rate``: of arrivals that followed the throughput."""
    seconds = float(times.sum()) / 1e3
    demand = ServingDemand(
        seconds_least=1.0, queries_least=9, batch_most=1, wait_most_ms=0.0, latency_bound_ms=None,
        arrivals_per_second=rate, load=None if rate is None else 0.5, seed=0,
    )  # fmt: skip
    return ServingRecord(
        measured_at_utc=row.measured_at_utc, scenario="single stream" if rate is None else "server", model="adrec",
        engine="cached", steps=1, precision="float32", demand=demand,
        summary=summarise(Served(times.tolist(), [1] * times.size, seconds, seconds), [], None),
        accuracy=row.accuracy, error=None, dataset_name="tiny", dataset_fingerprint="f" * 64, dataset_items=40,
        history_length_mean=5.0, split="test", model_fingerprint="a" * 64, device="cpu", threads=1, clock="wall clock",
        results_per_user=20, environment=row.environment, command="adrec bench serving",
    )  # fmt: skip


def swept(row: TradeoffRecord, times: Times) -> TradeoffRecord:
    """The row with these latencies in thirty rounds."""
    rounds = np.array_split(times, 30)
    timing = row.timing.model_copy(  # type: ignore[union-attr]
        update={
            "round_medians_ms": [float(np.median(each)) for each in rounds],
            "latencies": LatencyBlocks.of(rounds),
            "latency_ms_p95": float(np.quantile(times, 0.95)),
        }
    )
    return row.model_copy(update={"timing": timing})


def compared(old: Any, new: Any, **options: Any) -> Comparison:
    return compare(rows_of([old]), rows_of([new]), **{"bound": 0.05, "accuracy_bound": 0.01, **options})


def only(comparison: Comparison) -> Pair:
    (pair,) = comparison.pairs
    return pair


def verdict(pair: Pair) -> str:
    assert pair.tail is not None
    return pair.tail.verdict


@pytest.mark.parametrize(("make", "count"), [(served, 20_000), (swept, 3000)])
def test_a_slower_tail_is_caught_and_a_run_against_itself_is_not(row: TradeoffRecord, make: Any, count: int) -> None:
    caught = 0
    for attempt in range(TRIES):
        old = make(row, latencies(2 * attempt, count))
        assert compared(old, make(row, latencies(2 * attempt + 1, count))).regressions == []
        slow = compared(old, make(row, latencies(2 * attempt + 1, count, tail=1.5)))
        assert only(slow).time.verdict in ("no difference", "too noisy to tell")
        caught += slow.regressions == slow.pairs
        assert verdict(only(slow)) in ("slower", "too noisy to tell")
    assert caught >= TRIES - 1


def test_where_few_calls_lie_beyond_a_percentile_it_is_not_judged(row: TradeoffRecord) -> None:
    old, new = served(row, latencies(0, 999)), served(row, latencies(1, 999, tail=9.0))
    found = compared(old, new)
    assert verdict(only(found)) == "too noisy to tell"
    assert only(found).tail.ratio is None  # type: ignore[union-attr]
    assert found.regressions == []
    assert "| p99 too noisy to tell: 999 calls; 1000 are needed |" in markdown_of(found, "old", "new")
    enough = only(compared(swept(row, latencies(0, 200)), swept(row, latencies(1, 200)))).tail
    assert enough is not None
    assert enough.ratio is not None
    two = LatencyBlocks.of([[1.0] * 500, [2.0] * 500])
    assert judge_tail(two, two, 99.0, 0.05).reason == "2 rounds; 3 are needed"


def test_the_ratio_is_that_of_the_percentiles(row: TradeoffRecord) -> None:
    old, new = latencies(0, 20_000), latencies(1, 20_000, tail=1.5)
    for make, share in ((served, 0.99), (swept, 0.95)):
        change = only(compared(make(row, old), make(row, new))).tail
        assert change is not None
        assert change.ratio is not None
        exact = np.quantile(new, share) / np.quantile(old, share)
        assert change.ratio.value == pytest.approx(exact, rel=0.01)
        assert change.ratio.low < exact < change.ratio.high


def test_records_of_an_older_adrec_compare_by_their_medians(row: TradeoffRecord, tmp_path: Path) -> None:
    new = served(row, latencies(1, 20_000, tail=1.5))
    content = json.loads(json_line(served(row, latencies(0, 20_000))))
    del content["summary"]["latencies"]
    path = tmp_path / "old.jsonl"
    path.write_text(json.dumps(content) + "\n")
    found = compare(rows_of(read_any(path)), rows_of([new]), bound=0.05, accuracy_bound=0.01)
    assert only(found).time.ratio is not None
    assert only(found).tail is None
    assert any(note.startswith("tails of 1 rows are not judged") for note in found.notes)
    assert re.search(r"\| p95 1\.[45]\d, not judged \|", markdown_of(found, "old", "new"))


def test_an_overloaded_machine_gets_no_verdict_on_tails(row: TradeoffRecord) -> None:
    machine = row.environment.machine.model_copy(update={"load_one_minute": 9.0})
    busy = row.model_copy(update={"environment": row.environment.model_copy(update={"machine": machine})})
    old, new = served(row, latencies(0, 20_000)), served(busy, latencies(1, 20_000, tail=1.5))
    found = compared(old, new)
    assert found.regressions == []
    assert "too noisy to tell: slower, but the machine was overloaded" in markdown_of(found, "old", "new")
    assert compared(old, new, allow_busy_machine=True).regressions


@pytest.mark.parametrize(("factor", "caught"), [(1.0, True), (0.9, True), (1.08, False)])
def test_what_a_higher_rate_of_arrivals_explains_is_no_regression(
    row: TradeoffRecord, factor: float, caught: bool
) -> None:
    """At a load of a half, 8 % more arrivals may make latencies longer by 16 %."""
    old = served(row, latencies(0, 20_000), rate=400.0)
    new = served(row, 1.15 * latencies(1, 20_000), rate=400.0 * factor)
    found = compared(old, new)
    assert bool(found.regressions) == caught
    assert any("follow their throughput" in note for note in found.notes) == (factor != 1.0)
    quicker = compared(served(row, latencies(0, 20_000), 400.0), served(row, latencies(1, 20_000) / 1.15, 400 / factor))
    assert (only(quicker).time.verdict == "faster") == caught


def test_figures_that_do_not_count_or_are_gone_are_a_regression(row: TradeoffRecord) -> None:
    old = served(row, latencies(0, 2000))
    assert old.summary is not None
    late = {"valid": False, "invalid_because": "it did not keep up"}
    invalid = old.model_copy(update={"summary": old.summary.model_copy(update=late)})
    failed = only(compared(old, invalid)).time
    assert (failed.verdict, failed.reason) == ("fails now", "does not count: it did not keep up")
    assert only(compared(invalid, old)).time.verdict == "works now"
    for gone in ({"summary": None}, {"accuracy": None}):
        pair = only(compared(old, old.model_copy(update=gone)))
        assert pair.time.verdict == "fails now"
        assert pair.time.reason.startswith("the new record holds no ")


def test_command_line(row: TradeoffRecord, tmp_path: Path) -> None:
    app = typer.Typer()
    register(app)
    names = {"old": (0, 1.0), "same": (1, 1.0), "slow": (1, 1.5)}
    for name, (seed, tail) in names.items():
        (tmp_path / f"{name}.jsonl").write_text(json_line(served(row, latencies(seed, 20_000, tail))))
    old, same, slow, page = (str(tmp_path / name) for name in ("old.jsonl", "same.jsonl", "slow.jsonl", "page.md"))
    assert CliRunner().invoke(app, ["bench", "compare", old, same]).exit_code == 0
    failed = CliRunner().invoke(app, ["bench", "compare", old, slow, "--markdown", page])
    assert failed.exit_code == 1
    assert "1 slower in the tail" in failed.output
    text = Path(page).read_text()
    assert text.startswith("### adrec bench compare: regression\n")
    assert "; slower in the tail |" in text
    assert "| p99 1." in text


@given(
    blocks=st.lists(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=60), min_size=1, max_size=8),
    share=st.floats(0.6, 0.99),
)
def test_quantiles_above_the_median_are_within_a_bucket(blocks: list[list[float]], share: float) -> None:
    kept = LatencyBlocks.of(blocks)
    times = np.sort(np.concatenate([np.asarray(block) for block in blocks]))
    assert (kept.blocks, kept.calls) == (len(blocks), times.size)
    # The first latency that so many are not above.
    exact = times[math.ceil(share * times.size - 1e-9) - 1]
    exact = max(exact, float(np.median(times)))
    (found,) = np.exp(kept.log_quantile(share))
    assert exact / 1.0101 <= found <= exact * 1.0101


def test_a_block_that_counts_twice_is_there_twice() -> None:
    blocks = [[1.0, 2.0, 3.0], [4.0, 5.0], [6.0, 7.0, 8.0]]
    kept = LatencyBlocks.of(blocks)
    weights = np.array([[2.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    often, once = np.exp(kept.log_quantile(0.9, weights))
    assert often == pytest.approx(8.0, rel=0.011)
    assert once == pytest.approx(8.0, rel=0.011)
    assert np.exp(kept.log_quantile(0.9, np.eye(3)))[1:] == pytest.approx([5.0, 8.0], rel=0.011)


@pytest.mark.parametrize(
    "counts", [{}, {1: []}, {1: [1, 2], 2: [1]}, {1: [0, 2], 2: [0, 1]}, {1: [1, -1]}, {99_999: [1, 1]}]
)
def test_damaged_counts_are_refused(counts: dict[int, list[int]]) -> None:
    with pytest.raises(ValidationError):
        LatencyBlocks(counts=counts)


def test_a_record_with_damaged_counts_is_named(row: TradeoffRecord, tmp_path: Path) -> None:
    content = json.loads(json_line(served(row, latencies(0, 100))))
    content["summary"]["latencies"]["counts"] = {"1": [0]}
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(content) + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1: field .*latencies.*a block holds no latency"):
        read_any(path)


def test_rows_that_are_measured_more_than_once_are_said(row: TradeoffRecord) -> None:
    first, last = served(row, latencies(0, 3000)), served(row, latencies(1, 3000))
    rows = rows_of([first, last, last])
    ((found),) = rows.values()
    assert found.times_measured == 3
    assert found.tail == Tail(99.0, last.summary.latencies)  # type: ignore[union-attr, arg-type]
    notes = compare(rows_of([first]), rows, bound=0.05, accuracy_bound=0.01).notes
    (note,) = [each for each in notes if "more than once" in each]
    assert note.startswith("1 rows of the new file were measured more than once and the last counts, such as scenario ")
    assert note.endswith("(3 times)")
    machine = row.environment.machine.model_copy(update={"processor": "Another 9000"})
    other = last.model_copy(update={"environment": row.environment.model_copy(update={"machine": machine})})
    with pytest.raises(DataError, match=r"was measured twice, on different machines \(processor: .* -> Another 9000"):
        rows_of([first, other, last])


def test_what_lies_beyond_in_few_blocks_tells_less() -> None:
    calm = [[1.0] * 98] * 10
    spread = LatencyBlocks.of([[*block, 5.0, 5.0] for block in calm])
    burst = LatencyBlocks.of([*calm[:9], [*calm[9], *[5.0] * 20]])
    assert (spread.blocks_beyond(0.9), burst.blocks_beyond(0.9)) == (10.0, 1.0)
    # All latencies are equal: every block says so.
    assert LatencyBlocks.of(calm).blocks_beyond(0.9) == 10.0
