"""Records as pytest-benchmark's JSON and back; its own statistics are the twin, its own compare the judge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from adrec.errors import ConfigError, DataError
from bench.archive import AnyRecord, read_any
from bench.cli import register
from bench.conversion.pytest_json import UNTIMED, pytest_json, records_of
from bench.conversion.statistics import statistics_of
from bench.json_lines import json_line
from bench.kernels.catalogues import RandomCatalogue
from bench.kernels.engine_sweep import Axes, EngineSweep
from bench.kernels.measure import Timer
from bench.record import TradeoffRecord
from bench.running.registry import engines_here
from bench.serving.records import ServingRecord
from bench.timing import Clock, TimingProtocol
from bench.training_speed.record import TrainingRecord

ROOT = Path(__file__).resolve().parents[2]

stats_module = pytest.importorskip("pytest_benchmark.stats", reason="pytest-benchmark is not installed")


@pytest.fixture(scope="module")
def records(
    tiny_records: list[TradeoffRecord], tiny_protocol: TimingProtocol, counting_clock: Clock
) -> list[AnyRecord]:
    """Rows of two kinds, one without a time in the middle and one that failed."""
    timer = Timer(torch.device("cpu"), tiny_protocol, counting_clock, "adrec bench")
    engines = EngineSweep(timer, Axes(("cached",), (2,), (1,), (RandomCatalogue(30, 16),))).rows(lambda *progress: None)
    broken = tiny_records[2].model_copy(update={"timing": None, "error": "RuntimeError: no"})
    return [tiny_records[1], tiny_records[0], broken, *engines, *tiny_records[3:]]


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40))
def test_statistics_are_those_of_pytest_benchmark(seconds: list[float]) -> None:
    twin = stats_module.Stats()
    for each in seconds:
        twin.update(each)
    ours = statistics_of(seconds)
    assert (ours.pop("data"), ours.pop("iterations")) == (seconds, 1)
    theirs = twin.as_dict()
    for name in ("outliers", "iqr_outliers", "stddev_outliers", "rounds"):
        assert ours.pop(name) == theirs.pop(name)
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_records_survive_the_round_trip(records: list[AnyRecord]) -> None:
    content = json.loads(json.dumps(pytest_json(records), allow_nan=False))
    assert records_of(content, "x.json") == records
    assert len(content[UNTIMED]) == 2
    assert len(content["benchmarks"]) == len(records) - 2
    assert len({each["fullname"] for each in content["benchmarks"]}) == len(content["benchmarks"])
    first = content["benchmarks"][0]
    assert first["extra_info"]["engine"] == "reference"
    assert "NDCG@20" in first["extra_info"]["accuracy"]
    assert first["extra_info"]["model_fingerprint"] == records[0].model_dump()["model_fingerprint"]
    assert "steps 1" in first["name"]
    assert content["machine_info"]["node"] == ""


def test_records_of_several_machines_keep_theirs(tiny_records: list[TradeoffRecord]) -> None:
    environment = tiny_records[2].environment
    moved = environment.model_copy(update={"machine": environment.machine.model_copy(update={"processor": "Other"})})
    mixed: list[AnyRecord] = [tiny_records[1], tiny_records[2].model_copy(update={"environment": moved})]
    content = pytest_json(mixed)
    assert records_of(content, "x.json") == mixed
    assert [("environment" in each["extra_info"]["adrec_record"]) for each in content["benchmarks"]] == [False, True]


def without(content: dict[str, Any], *path: Any) -> dict[str, Any]:
    copy: Any = json.loads(json.dumps(content))
    place = copy
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    return copy  # type: ignore[no-any-return]


def test_what_is_no_file_of_ours_is_named(tiny_records: list[TradeoffRecord]) -> None:
    content = pytest_json(tiny_records[1:3])
    for damaged, message in (
        ([], "not a file of pytest-benchmark"),
        ({"benchmarks": 3}, "not a file of pytest-benchmark"),
        (without(content, "benchmarks", 0, "extra_info"), "'adrec/tradeoff::.*holds no record of adrec"),
        (without(content, "benchmarks", 1, "extra_info", "adrec_record", "seed"), "is damaged: Field required"),
        (without(content, "machine_info"), "is damaged"),
        ({"benchmarks": [3]}, "'row 0' holds no record"),
    ):
        with pytest.raises(DataError, match=message):
            records_of(damaged, "x.json")
    with pytest.raises(DataError, match="no records to convert"):
        pytest_json([])


def test_times_of_a_suite_are_read_from_its_samples(tiny_records: list[TradeoffRecord]) -> None:
    content = pytest_json([tiny_records[1]])
    content["benchmarks"][0]["extra_info"]["adrec_record"]["timing"] = None
    content["benchmarks"][0]["stats"]["data"] = [0.001, 0.002, 0.004]
    (found,) = records_of(content, "x.json")
    assert isinstance(found, TradeoffRecord)
    assert found.timing is not None
    assert found.timing.round_medians_ms == [1.0, 2.0, 4.0]
    assert (found.timing.latency_ms_p50, found.timing.calls) == (2.0, 3)
    assert found.timing.throughput_users_per_second == pytest.approx(1e3 * (found.batch_size_users or 0) / 2.0)
    with pytest.raises(DataError, match="keeps no samples; write it with --benchmark-json"):
        records_of(without(content, "benchmarks", 0, "stats", "data"), "x.json")
    content["benchmarks"][0]["stats"]["data"] = [0.001, 1e-13, 0.002]
    with pytest.raises(DataError, match="is damaged: Input should be greater than 0"):
        records_of(content, "x.json")


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["bench", "convert", *arguments])


def test_command_line(records: list[AnyRecord], tmp_path: Path) -> None:
    lines, table, back = (tmp_path / name for name in ("rows.jsonl", "table.json", "back.jsonl"))
    lines.write_text("".join(json_line(record) for record in records))
    assert invoke(str(lines), str(table)).exit_code == 0
    assert invoke(str(table), str(back)).exit_code == 0
    assert read_any(back) == records
    with pytest.raises(ConfigError, match=r"expected records\.jsonl benchmark\.json"):
        raise invoke(str(lines), str(back)).exception
    for empty in ({"benchmarks": []}, {"benchmarks": [], UNTIMED: []}):
        table.write_text(json.dumps(empty))
        with pytest.raises(DataError, match=r"table\.json: its list of 'benchmarks' is empty"):
            raise invoke(str(table), str(tmp_path / "new" / "none.jsonl")).exception
    assert not (tmp_path / "new").exists()
    table.write_text("{broken")
    with pytest.raises(DataError, match="not a JSON file of pytest-benchmark"):
        raise invoke(str(table), str(back)).exception
    with pytest.raises(DataError, match="no such file"):
        raise invoke(str(tmp_path / "none.json"), str(back)).exception


def run_suite(
    run: Path, chosen: str, *options: str, suites: Sequence[str] = ("bench_engines.py",)
) -> subprocess.CompletedProcess[str]:
    """The benchmarks of suites, by default of engines, whose names hold ``chosen``, on a run."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"bench/suites/{suite}" for suite in suites]
    command += ["--benchmark-only", f"--adrec-run={run}", "-k", chosen, *options]
    # Triton's interpreter, which other tests switch on, is no engine to time; benchmarks are off in pytest-xdist.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "TRITON_INTERPRET" and not name.startswith("PYTEST_")
    }
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment)


def as_baseline(records: Sequence[AnyRecord], seconds: float, path: Path) -> str:
    """Write records as a file of pytest-benchmark whose every round took so long; returns the option that names it."""
    content = pytest_json(records)
    for each in content["benchmarks"]:
        each["stats"] = statistics_of([seconds] * 5)
    path.write_text(json.dumps(content))
    return f"--benchmark-compare={path}"


def test_records_are_a_baseline_of_the_suite_and_its_file_gives_them_back(
    tmp_path: Path, tiny_run: Path, tiny_records: list[TradeoffRecord]
) -> None:
    """Rows of `adrec bench tradeoff` match benchmarks: far faster ones are a regression, far slower ones are none."""
    chosen, out, fail = "cached-steps1-batch1", tmp_path / "out.json", "--benchmark-compare-fail=median:5%"
    fast = as_baseline(tiny_records, 1e-9, tmp_path / "0001_ours.json")
    regressed = run_suite(tiny_run, chosen, fast, fail, f"--benchmark-json={out}")
    assert regressed.returncode != 0
    assert "Performance has regressed" in regressed.stdout + regressed.stderr, regressed.stdout + regressed.stderr
    measured = json.loads(out.read_text())
    found = records_of(measured, "out.json")
    (record,) = found
    assert isinstance(record, TradeoffRecord)
    assert (record.engine, record.steps, record.batch_size_users) == ("cached", 1, 1)
    # The same benchmark again, but for what differs between the statistics of two libraries.
    (first,), (again,) = measured["benchmarks"], pytest_json(found)["benchmarks"]
    for name in ("group", "name", "fullname", "params", "param"):
        assert again[name] == first[name]
    for each in (first, again):
        del each["extra_info"]["adrec_record"]
        each["extra_info"].pop("adrec_position", None)
    assert again["extra_info"] == first["extra_info"]
    assert first["extra_info"]["accuracy"]["NDCG@20"] >= 0.0
    assert {"engine": "cached", "steps": "1", "batch": "1"}.items() <= first["extra_info"].items()
    assert first["extra_info"]["model_fingerprint"] == record.model_fingerprint
    assert again["stats"]["median"] == pytest.approx(first["stats"]["median"], rel=1e-6)
    slow = run_suite(tiny_run, chosen, as_baseline(found, 1e3, tmp_path / "0002_own.json"), fail)
    assert slow.returncode == 0, slow.stdout + slow.stderr


def test_serving_and_training_convert_both_ways(tmp_path: Path, tiny_run: Path) -> None:
    """Their records are whole in the file: nothing is told from its samples alone, and they come back as they went."""
    out = tmp_path / "out.json"
    suites = ("bench_serving.py", "bench_training.py")
    done = run_suite(tiny_run, "cached-steps1 or adrec", f"--benchmark-json={out}", suites=suites)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(out.read_text())
    found = records_of(measured, "out.json")
    assert records_of(json.loads(json.dumps(pytest_json(found))), "again.json") == found
    stream, offline, training = found
    for record, queries, batch in ((stream, 64, 1), (offline, 8, 32)):
        assert isinstance(record, ServingRecord)
        assert record.summary is not None
        assert (record.engine, record.steps, record.demand.batch_most) == ("cached", 1, batch)
        assert (record.summary.queries, record.summary.valid) == (queries * batch, True)
        assert record.accuracy is not None
    assert isinstance(training, TrainingRecord)
    assert training.timing is not None
    assert training.timing.steps == 20
    for first, again in zip(measured["benchmarks"], pytest_json(found)["benchmarks"], strict=True):
        for name in ("group", "name", "fullname", "params", "param"):
            assert again[name] == first[name]
    infos = [each["extra_info"] for each in measured["benchmarks"]]
    assert {"scenario": "single stream", "engine": "cached", "steps": "1", "batch": "1"}.items() <= infos[0].items()
    assert infos[1]["model_fingerprint"] == offline.model_dump()["model_fingerprint"]
    assert infos[1]["accuracy"]["NDCG@20"] >= 0.0
    assert "accuracy" not in infos[2]
    assert "`adrec evaluate`" in infos[2]["accuracy_missing"]
    # What the file's own samples say: tokens of all steps over their time.
    samples = measured["benchmarks"][2]["stats"]["data"]
    assert training.timing.step_ms_p50 == pytest.approx(1e3 * measured["benchmarks"][2]["stats"]["median"])
    tokens = infos[2]["tokens_per_second"] * sum(samples)
    assert tokens == pytest.approx(round(tokens))


@pytest.mark.slow
def test_the_suite_of_engines_converts_with_the_accuracy_of_a_run(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run_suite(tiny_run, "batch1", f"--benchmark-json={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = records_of(json.loads(out.read_text()), "out.json")
    # Every engine here at 1 and 4 steps; the run has no 32.
    assert {(each.engine, each.steps) for each in found if isinstance(each, TradeoffRecord)} == {
        (engine, steps) for engine in engines_here(torch.device("cpu")) for steps in (1, 4)
    }
    for each in found:
        assert isinstance(each, TradeoffRecord)
        assert each.accuracy is not None
        assert each.timing is not None
        assert each.timing.rounds == 5
