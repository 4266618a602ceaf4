"""Comparing two files of records: a doctored slow-down is caught, an A/A run is not flagged, files are judged first."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from adrec.errors import AdrecError, ConfigError, DataError
from adrec.evaluation import METRICS, point_metrics
from bench.calibration import CalibrationRecord, RunMedians, noise_of
from bench.cli import register
from bench.comparing.commands import share
from bench.comparing.comparison import Comparison, compare
from bench.comparing.rows import Row, label, rows_of
from bench.comparing.tables import markdown_of
from bench.comparing.verdict import LEAST_ROUNDS, compare_accuracy, judge_times
from bench.json_lines import json_line
from bench.places import MOST_USERS, metric_gains, pack_places, unpack_places
from bench.record import Accuracy, Estimate, TradeoffRecord
from bench.timing import TimingProtocol
from bench.tradeoff import run_tradeoff


def noisy_rounds(
    milliseconds: float,
    generator: np.random.Generator,
    rounds: int = 30,
    spread: float = 0.015,
    persistence: float = 0.7,
    between_runs: float = 0.005,
) -> list[float]:
    """Round medians of a busy machine: noise over several rounds, drift between runs, one round in ten disturbed."""
    usual = np.zeros(rounds)
    usual[0] = generator.normal(0.0, spread)
    for place in range(1, rounds):
        fresh = generator.normal(0.0, spread * math.sqrt(1 - persistence**2))
        usual[place] = persistence * usual[place - 1] + fresh
    disturbed = np.where(generator.random(rounds) < 0.1, generator.exponential(0.3, rounds), 0.0)
    return list(milliseconds * np.exp(usual + generator.normal(0.0, between_runs) + disturbed))


def measured(records: list[TradeoffRecord], seed: int, slow: dict[str, float] | None = None) -> list[TradeoffRecord]:
    """Records of an idle machine with synthetic times; ``slow``: factor by which an engine takes longer."""
    generator = np.random.default_rng(seed)
    found = []
    for record in [other_machine(each, load_one_minute=0.0) for each in records]:
        if record.timing is None:
            found.append(record)
            continue
        base = 2.0 * (record.steps or 1) * (record.batch_size_users or 1) ** 0.5
        rounds = noisy_rounds(base * (slow or {}).get(record.engine or "", 1.0), generator)
        timing = record.timing.model_copy(
            update={"round_medians_ms": rounds, "latency_ms_p50": float(np.median(rounds))}
        )
        found.append(record.model_copy(update={"timing": timing}))
    return found


def compared(old: list[TradeoffRecord], new: list[TradeoffRecord], **options: Any) -> Comparison:
    return compare(rows_of(old), rows_of(new), **{"bound": 0.05, "accuracy_bound": 0.01, **options})


def test_a_slow_down_of_ten_percent_is_caught_and_a_run_against_itself_is_not(
    tiny_records: list[TradeoffRecord],
) -> None:
    for attempt in range(20):
        old = measured(tiny_records, 2 * attempt)
        assert compared(old, measured(tiny_records, 2 * attempt + 1)).regressions == []
        slowed = compared(old, measured(tiny_records, 2 * attempt + 1, {"cached": 1.1}))
        caught = {(row.engine, row.steps) for row in tiny_records if row.engine == "cached"}
        found = {(dict(each.key)["engine"], int(dict(each.key).get("steps", 0)) or None) for each in slowed.regressions}
        assert found <= caught
        # A tenth lies within the interval of a row now and then, never in most rows.
        slow_rows = [each for each in slowed.pairs if dict(each.key).get("engine") == "cached"]
        assert sum(each in slowed.regressions for each in slow_rows) >= len(slow_rows) / 2
        assert all(each.time.verdict in ("slower", "too noisy to tell") for each in slow_rows)


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ([10.0] * 5, [11.0] * 5, "slower"),
        ([11.0] * 5, [10.0] * 5, "faster"),
        ([10.0] * 5, [10.4] * 5, "no difference"),
        ([10.0, 9.0, 11.0, 8.0, 12.0], [10.0, 9.0, 11.0, 8.0, 12.0], "too noisy to tell"),
        ([10.0] * 5, [20.0] * (LEAST_ROUNDS - 1), "too noisy to tell"),
    ],
)
def test_verdicts(old: list[float], new: list[float], verdict: str) -> None:
    assert judge_times(old, new, 0.05).verdict == verdict


def test_ratio_is_that_of_medians_and_the_interval_widens_by_the_noise_between_runs() -> None:
    plain = judge_times([1.0, 2.0, 3.0], [2.0, 4.0, 60.0], 0.05)
    assert plain.ratio is not None
    assert plain.ratio.value == pytest.approx(2.0)
    exact = judge_times([10.0] * 9, [11.0] * 9, 0.05, between_runs=0.01)
    assert exact.ratio is not None
    # 2.576 deviations of the difference of two runs, each of 1 %.
    half = 2.576 * math.sqrt(2.0) * 0.01
    assert exact.ratio.low == pytest.approx(1.1 * math.exp(-half), rel=0.005)
    assert exact.ratio.high == pytest.approx(1.1 * math.exp(half), rel=0.005)
    assert judge_times([10.0] * 9, [11.0] * 9, 0.05, between_runs=0.05).verdict == "too noisy to tell"


def test_places_keep_every_metric() -> None:
    ranks = torch.tensor([0, 4, 5, 9, 10, 19, 20, 3000])
    text = pack_places(ranks)
    assert text is not None
    places = unpack_places(text)
    assert places.tolist() == [1, 5, 6, 10, 11, 20, 0, 0]
    expected = point_metrics(ranks)
    for name in METRICS:
        assert metric_gains(places, name).mean() == pytest.approx(expected[name])
    assert pack_places(torch.zeros(MOST_USERS + 1, dtype=torch.int64)) is None


@pytest.mark.parametrize("text", ["%%%", "AAAA", pack_places(torch.arange(50))[:-12], ""])  # type: ignore[index]
def test_damaged_places_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not packed places"):
        unpack_places(text)


def accuracy_of(ranks: torch.Tensor, *, keep: bool = True) -> Accuracy:
    value = point_metrics(ranks)["NDCG@20"]
    return Accuracy(
        metrics_percent={"NDCG@20": Estimate(value=value, low=value - 0.5, high=value + 0.5)},
        users=ranks.numel(),
        measured_with="cached",
        ndcg20_kept_percent=None,
        top20_overlap_fraction=None,
        top20_overlap_against="",
        engine_agreement_fraction=None,
        engine_agreement_users=0,
        places_base64=pack_places(ranks) if keep else None,
    )


def test_paired_accuracy_sees_what_independent_intervals_hide() -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(0, 60, (3000,), generator=generator)
    # One user in twenty falls out of the list.
    worse = torch.where(torch.rand(3000, generator=generator) < 0.05, 100, ranks)
    paired = compare_accuracy(accuracy_of(ranks), accuracy_of(worse), "NDCG@20", same_users=True)
    assert paired.paired
    exact = point_metrics(worse)["NDCG@20"] - point_metrics(ranks)["NDCG@20"]
    assert paired.difference.value == pytest.approx(exact)
    assert paired.difference.high < 0.0
    assert paired.lower_by(0.01)
    independent = compare_accuracy(accuracy_of(ranks), accuracy_of(worse), "NDCG@20", same_users=False)
    assert not independent.paired
    assert independent.difference.high - independent.difference.value == pytest.approx(math.hypot(0.5, 0.5))
    for lacking in (accuracy_of(ranks, keep=False), accuracy_of(ranks[:10])):
        assert not compare_accuracy(lacking, accuracy_of(worse), "NDCG@20", same_users=True).paired
    same = compare_accuracy(accuracy_of(ranks), accuracy_of(ranks), "NDCG@20", same_users=True)
    assert (same.difference.low, same.difference.high) == (0.0, 0.0)
    assert not same.lower_by(0.0)


def test_records_of_the_same_run_pair_their_accuracy(tiny_records: list[TradeoffRecord]) -> None:
    pairs = compared(tiny_records, tiny_records).pairs
    assert all(pair.accuracy is not None and pair.accuracy.paired for pair in pairs if "steps" in dict(pair.key))
    assert all(pair.accuracy.difference.value == 0.0 for pair in pairs if pair.accuracy is not None)


def test_rows_in_one_file_only_failures_and_repeats(tiny_records: list[TradeoffRecord]) -> None:
    old, new = measured(tiny_records, 0), measured(tiny_records, 1)
    broken = new[1].model_copy(update={"error": "RuntimeError: no", "timing": None, "accuracy": None})
    again = measured(tiny_records, 2)[2]
    found = compared(old[:-1], [broken, *new[2:], again])
    verdicts = {pair.key: pair.time for pair in found.pairs}
    assert verdicts[next(iter(rows_of([broken])))].verdict == "fails now"
    assert verdicts[next(iter(rows_of([broken])))].reason == "RuntimeError: no"
    assert [each.new.error for each in found.regressions] == ["RuntimeError: no"]
    assert found.only_old == [next(iter(rows_of([tiny_records[0]])))]
    assert found.only_new == [next(iter(rows_of([tiny_records[-1]])))]
    assert {pair.new.rounds_ms for pair in found.pairs} >= {tuple(again.timing.round_medians_ms)}  # type: ignore[union-attr]
    back = compared([broken], [old[1]])
    assert [pair.time.verdict for pair in back.pairs] == ["works now"]
    assert back.regressions == []
    assert [pair.time.verdict for pair in compared([broken], [broken]).pairs] == ["not measured"]


def other_machine(record: TradeoffRecord, **changes: object) -> TradeoffRecord:
    machine = record.environment.machine.model_copy(update=changes)
    return record.model_copy(update={"environment": record.environment.model_copy(update={"machine": machine})})


def test_other_machines_are_refused_with_the_reason(tiny_records: list[TradeoffRecord]) -> None:
    old = measured(tiny_records, 0)
    new = [other_machine(record, processor="Another 9000", memory_gib=1.0) for record in measured(tiny_records, 1)]
    with pytest.raises(DataError, match=r"processor: .* -> Another 9000; memory, GiB: .*--allow-other-machine"):
        compared(old, new)
    allowed = compared(old, new, allow_other_machine=True)
    assert any(note.startswith("different machines: processor") for note in allowed.notes)
    quiet = [other_machine(record, load_one_minute=0.0) for record in old]
    busy = compared(quiet, [other_machine(record, load_one_minute=50000.0) for record in old])
    assert sum("busy before some of the new rows (load 50000" in note for note in busy.notes) == 1
    with pytest.raises(DataError, match="no row is in both files"):
        compared(old[:1], new[1:])
    with pytest.raises(DataError, match="neither file holds a row"):
        compared([], [])


def test_a_thing_measured_on_two_machines_is_refused(tiny_records: list[TradeoffRecord]) -> None:
    first = tiny_records[1]
    assert len(rows_of([first, first])) == 1
    with pytest.raises(DataError, match="was measured twice, on different machines"):
        rows_of([other_machine(first, processor="another"), first])


def test_an_overloaded_machine_gets_no_verdict(tiny_records: list[TradeoffRecord]) -> None:
    old = measured(tiny_records, 0)
    new = [
        other_machine(record, load_one_minute=3.1, cores_usable=2)
        for record in measured(tiny_records, 1, {"cached": 2.0})
    ]
    idle = [other_machine(record, cores_usable=2) for record in old]
    found = compared(idle, new)
    assert found.regressions == []
    reasons = {pair.time.reason for pair in found.pairs if dict(pair.key).get("engine") == "cached" and pair.time.ratio}
    assert "slower, but the machine was overloaded (load 3.1 on 2 cores)" in reasons
    assert compared(idle, new, allow_busy_machine=True).regressions
    # A benchmark that ran just before on both cores is no overload.
    after = [other_machine(record, load_one_minute=2.9) for record in new]
    assert compared(idle, after).regressions


def test_a_drift_of_everything_is_said(tiny_records: list[TradeoffRecord]) -> None:
    old = measured(tiny_records, 0)
    slow = compared(old, measured(tiny_records, 1, {"reference": 1.3, "cached": 1.3}))
    assert any("nearly all rows changed by about +" in note for note in slow.notes)
    assert not any("nearly all" in note for note in compared(old, measured(tiny_records, 1)).notes)


def calibration_of(record: TradeoffRecord, runs: list[RunMedians]) -> CalibrationRecord:
    return CalibrationRecord(
        measured_at_utc="2026-01-01T00:00:00+00:00",
        workload="cached, 4 steps",
        noise=noise_of(runs),
        runs=runs,
        clock=record.protocol.clock,
        seconds_per_cell=1.0,
        device=record.protocol.device,
        threads=record.protocol.threads,
        load_before=0.0,
        load_after=1.0,
        environment=record.environment,
        command="adrec bench calibrate",
    )


def test_calibration_widens_and_must_be_of_the_machine(tiny_records: list[TradeoffRecord]) -> None:
    old, new = measured(tiny_records, 0), measured(tiny_records, 1, {"cached": 1.1})
    noisy = [RunMedians(first_ms=[10.0 * (1.2 if run % 2 else 1.0)], second_ms=[10.0]) for run in range(8)]
    found = compared(old, new, calibration=calibration_of(old[1], noisy))
    assert found.regressions == []
    assert any(note.startswith("calibrated: two runs tell") for note in found.notes)
    wrong = calibration_of(old[1], noisy).model_copy(update={"threads": 99})
    with pytest.raises(DataError, match=r"calibration is of another machine or setting.*threads: 99 -> "):
        compared(old, new, calibration=wrong)


def test_markdown_is_complete_and_escaped(tiny_records: list[TradeoffRecord]) -> None:
    old, new = measured(tiny_records, 0), measured(tiny_records, 1, {"cached": 1.5})
    found = compared(old[1:], new[:-1])
    text = markdown_of(found, "old|1.jsonl", "new.jsonl")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(found.pairs)
    assert text.startswith("### adrec bench compare: regression\n")
    assert "old\\|1.jsonl -> new.jsonl" in text
    assert "Only in old" in text
    assert "Only in new" in text
    assert "slower" in rows[1]


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["bench", "compare", *arguments])


def write(path: Path, records: list[TradeoffRecord]) -> str:
    path.write_text("".join(json_line(record) for record in records))
    return str(path)


def test_command_line(tiny_records: list[TradeoffRecord], tmp_path: Path) -> None:
    old = write(tmp_path / "old.jsonl", measured(tiny_records, 0))
    same = write(tmp_path / "same.jsonl", measured(tiny_records, 1))
    slow = write(tmp_path / "slow.jsonl", measured(tiny_records, 1, {"cached": 1.2}))
    page = tmp_path / "page.md"
    assert invoke(old, same).exit_code == 0
    failed = invoke(old, slow, "--markdown", str(page), "--bound", "5%")
    assert failed.exit_code == 1
    assert "slower" in page.read_text()
    assert invoke(old, slow, "--bound", "40%").exit_code == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-40], "the last line is half-written"),
        (lambda text: text.replace('"schema_version":1', '"schema_version":0', 1), "line 1: .*older adrec"),
        (lambda text: "{" + text, "line 1: not valid JSON"),
        (lambda text: text.replace('"kind":"tradeoff"', '"kind":"opinion"', 1), "line 1: .*'opinion'"),
        (lambda text: text.replace('"seed":0', '"seed":"many"', 1), "line 1: field 'tradeoff.seed'"),
        (lambda text: "", "is empty, as after a run that measured nothing"),
    ],
)
def test_a_bad_file_is_named_before_anything_is_compared(
    tiny_records: list[TradeoffRecord], tmp_path: Path, damage: Any, message: str
) -> None:
    old = write(tmp_path / "old.jsonl", tiny_records)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(damage(Path(old).read_text()))
    result = invoke(old, str(bad))
    assert isinstance(result.exception, AdrecError)
    with pytest.raises(DataError, match=message):
        raise result.exception


@pytest.mark.parametrize("text", ["5", "-5%", "x%", "nan%", ""])
def test_a_bound_is_a_percentage(text: str) -> None:
    assert share(" 2.5% ", "--bound", 1000) == 0.025
    with pytest.raises(ConfigError, match=r"--bound .*expected a percentage"):
        share(text, "--bound", 1000)


def test_work_added_to_one_engine_is_found_by_the_whole_chain(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counting_clock: Any
) -> None:
    """From the sweep through the file to the verdict; the clock reports 1 ms plus what a call returns."""
    monkeypatch.setattr("bench.sweep.clock_for", lambda device: counting_clock)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    protocol = TimingProtocol(seconds=1e-6, rounds=5, rounds_slow=5, rounds_most=5, warmup_calls=1)
    rows: dict[str, dict[Any, Row]] = {}
    for name, extra in (("old", 0.0), ("again", 0.0), ("slow", 0.1)):
        out = tmp_path / f"{name}.jsonl"
        # Accuracy needs the real engine: only what is timed is replaced.
        monkeypatch.setattr("bench.cells.GroupTimer._call", lambda self, cell, batches, number, e=extra: (
            e if cell.engine == "cached" else 0.0
        ))  # fmt: skip
        records = run_tradeoff(
            tiny_run, steps=[1], batch_sizes=[2], protocol=protocol, out=out, quiet=True, users=9
        ).records
        rows[name] = rows_of(records)
        assert rows_of([TradeoffRecord.model_validate(json.loads(line)) for line in out.read_text().splitlines()])
    assert compare(rows["old"], rows["again"], bound=0.05, accuracy_bound=0.01).regressions == []
    found = compare(rows["old"], rows["slow"], bound=0.05, accuracy_bound=0.01)
    assert {dict(each.key)["engine"] for each in found.regressions} == {"cached"}
    assert label(found.regressions[0].key, found.shared).startswith("model ")


def test_rows_that_were_measured_unlike_are_named(tiny_records: list[TradeoffRecord]) -> None:
    old = measured(tiny_records, 0)
    assert not [note for note in compared(old, measured(tiny_records, 1)).notes if "rows" in note and "longer" in note]
    row = next(each for each in old if each.timing and each.accuracy)
    assert row.timing is not None
    assert row.accuracy is not None
    calls = row.timing.calls
    longer = row.model_copy(update={"timing": row.timing.model_copy(update={"calls": 10 * calls})})
    fewer = row.model_copy(
        update={"dataset_users": 30, "accuracy": row.accuracy.model_copy(update={"users": 30, "places_base64": None})}
    )
    (note,) = [each for each in compared([longer], [row]).notes if "far longer in one file" in each]
    assert note.startswith("1 rows were measured far longer in one file than in the other, most of all model adrec")
    assert f"({10 * calls} calls before, {calls} now, 10 times as long in all)" in note
    (note,) = [each for each in compared([row], [fewer]).notes if "other users" in each]
    assert note.startswith("accuracies of 1 rows are of other users (60 before, 30 now)")


def test_no_more_accuracy_than_all_can_be_lost() -> None:
    assert share("100%", "--accuracy-bound", 100) == 1.0
    with pytest.raises(ConfigError, match="--accuracy-bound 200%: expected a percentage from 0% to 100%, such as 5%"):
        share("200%", "--accuracy-bound", 100)
