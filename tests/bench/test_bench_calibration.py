"""Calibration: the noise of made-up runs is found again, and what is told follows from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from adrec.errors import AdrecError, DataError
from bench.calibration import (
    Noise,
    RunMedians,
    Workload,
    append_calibration,
    calibrate,
    describe,
    in_new_processes,
    noise_of,
    read_calibration,
)
from bench.cli import register
from bench.comparing.verdict import judge_times
from bench.timing import TimingProtocol

PROTOCOL = TimingProtocol(seconds=1e-6, rounds=2, rounds_slow=2, rounds_most=2, warmup_calls=1)


def runs_with(between: float, interleaved: float, count: int, seed: int = 0) -> list[RunMedians]:
    """Runs whose medians vary by ``between``, and whose second median by ``interleaved`` around the first."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        first = 10.0 * math.exp(generator.normal(0.0, between))
        found.append(RunMedians(first_ms=[first], second_ms=[first * math.exp(generator.normal(0.0, interleaved))]))
    return found


def test_noise_is_found_again() -> None:
    noise = noise_of(runs_with(0.02, 0.005, 4000))
    assert noise.between_runs_log_sd == pytest.approx(0.02, rel=0.05)
    assert noise.interleaved_log_sd == pytest.approx(0.005, rel=0.05)
    assert noise_of([RunMedians(first_ms=[5.0], second_ms=[5.0])] * 4) == Noise(
        between_runs_log_sd=0.0,
        interleaved_log_sd=0.0,
        smallest_between_runs_percent=0.0,
        smallest_interleaved_percent=0.0,
    )
    with pytest.raises(ValueError, match="3 runs; noise between runs needs 4"):
        noise_of(runs_with(0.1, 0.1, 3))


def test_the_smallest_difference_is_told_nine_times_in_ten_and_nothing_else_is() -> None:
    spread = 0.01
    noise = noise_of(runs_with(spread, spread, 20_000))
    generator = np.random.default_rng(1)

    def told(change: float, attempts: int = 400) -> float:
        found = 0
        for attempt in range(attempts):
            old, new = (10.0 * math.exp(generator.normal(0.0, spread)) for _ in range(2))
            verdict = judge_times([old] * 5, [new * change] * 5, 0.0, noise.between_runs_log_sd, seed=attempt).verdict
            found += verdict == "slower"
        return found / attempts

    assert told(1.0 + noise.smallest_between_runs_percent / 100) == pytest.approx(0.9, abs=0.05)
    # One side of a 99 % interval.
    assert told(1.0) <= 0.02


def test_record_round_trip_and_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.calibration.in_new_processes", lambda *arguments: runs_with(0.02, 0.005, 8))
    record = calibrate(Workload(threads=3), PROTOCOL, 8, "adrec bench calibrate")
    assert (record.threads, len(record.runs), record.clock) == (3, 8, "wall clock")
    path = tmp_path / "calibration.jsonl"
    with pytest.raises(DataError, match="no such file"):
        read_calibration(path)
    append_calibration(path, record.model_copy(update={"command": "earlier"}))
    append_calibration(path, record)
    assert read_calibration(path) == record
    path.write_text("")
    with pytest.raises(DataError, match="holds no calibration"):
        read_calibration(path)
    words = " ".join(describe(record.noise))
    assert f"{record.noise.smallest_between_runs_percent:.2g} % or more" in words


def test_a_real_run_in_a_process_of_its_own() -> None:
    seen: list[int] = []
    (found,) = in_new_processes(Workload(batch_size=1, steps=1, items=50, threads=1), PROTOCOL, 1, seen.append)
    assert (len(found.first_ms), len(found.second_ms), seen) == (2, 2, [1])
    assert min(found.first_ms + found.second_ms) > 0.0


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["bench", "calibrate", "--quiet", *arguments])


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.calibration.in_new_processes", lambda *arguments: runs_with(0.02, 0.005, 8))
    out = tmp_path / "deep" / "noise.jsonl"
    done = invoke("--out", str(out))
    assert done.exit_code == 0, done.output
    assert "two record files tell a difference of" in done.output
    assert len(read_calibration(out).runs) == 8
    (tmp_path / "other.jsonl").write_text("mine\n")
    for arguments, message in (
        (["--out", str(tmp_path / "other.jsonl")], "no file of records but not JSON: it starts with 'mine'"),
        (["--engine", "cachet"], "did you mean 'cached'"),
        (["--seconds-per-cell", "0"], "--seconds-per-cell 0.0"),
    ):
        with pytest.raises(AdrecError, match=message):
            raise invoke("--out", str(out), *arguments).exception
