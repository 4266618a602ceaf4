"""How noisy this machine is: one workload against itself, and the smallest difference that can be told.

Two noises are kept apart. Interleaved: the same workload under two names, A B A B in one process, as engines within
one record file are compared. Between runs: the workload in one new process after another, as two record files are.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from adrec.environment import Environment, Frozen, read_environment
from adrec.errors import DataError
from bench.json_lines import LineWriter, read_json_lines
from bench.timing import DeviceClock, Series, TimingProtocol, WallClock, clock_for, measure_interleaved

# A difference is told when the 99 % interval leaves it out, in 90 of 100 attempts.
CONFIDENT, DETECTED = 2.5758, 1.2816
LEAST_RUNS = 4
BUSY_SHARE = 0.5
START_SECONDS = 8.0


@dataclass(frozen=True)
class Workload:
    """What is timed: an engine on a random model of the paper's size; the same histories in every call."""

    engine: str = "cached"
    steps: int = 4
    batch_size: int = 32
    items: int = 4000
    threads: int | None = None
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.engine}, {self.steps} steps, batch {self.batch_size}, {self.items} items, {self.device}"


class RunMedians(Frozen):
    """Round medians in ms of one process; first and second are the same workload, interleaved."""

    first_ms: list[float] = Field(min_length=1)
    second_ms: list[float] = Field(min_length=1)


class Noise(Frozen):
    """Standard deviations of the log of times, and what they let one tell.

    ``between_runs_log_sd``: of a run's median; two runs differ by sqrt 2 times as much. ``interleaved_log_sd``: of the
    ratio of two medians in one process. ``smallest_*_percent``: the slow-down that a 99 % interval tells from none in
    90 of 100 attempts.
    """

    between_runs_log_sd: float = Field(ge=0)
    interleaved_log_sd: float = Field(ge=0)
    smallest_between_runs_percent: float = Field(ge=0)
    smallest_interleaved_percent: float = Field(ge=0)


class CalibrationRecord(Frozen):
    """Noise of one machine at one protocol, and the medians that it follows from."""

    schema_version: Literal[1] = 1
    kind: Literal["calibration"] = "calibration"
    measured_at_utc: str
    workload: str
    noise: Noise
    runs: list[RunMedians]
    clock: str
    seconds_per_cell: float
    device: str
    threads: int
    load_before: float | None
    load_after: float | None
    environment: Environment
    command: str


def noise_of(runs: Sequence[RunMedians]) -> Noise:
    """Estimate both noises from at least 4 runs; raises ValueError for fewer."""
    if len(runs) < LEAST_RUNS:
        raise ValueError(f"{len(runs)} runs; noise between runs needs {LEAST_RUNS} or more")
    first = np.log([np.median(run.first_ms) for run in runs])
    second = np.log([np.median(run.second_ms) for run in runs])
    between = float(np.std(first, ddof=1))
    interleaved = float(np.std(second - first, ddof=1))
    reach = CONFIDENT + DETECTED
    return Noise(
        between_runs_log_sd=between,
        interleaved_log_sd=interleaved,
        smallest_between_runs_percent=100 * math.expm1(reach * math.sqrt(2) * between),
        smallest_interleaved_percent=100 * math.expm1(reach * interleaved),
    )


def measure_run(workload: Workload, protocol: TimingProtocol) -> RunMedians:
    """Time the workload against itself in this process."""
    from adrec.engines import make_engine
    from bench.kernels.catalogues import random_histories, random_model
    from bench.kernels.engine_sweep import RESULTS

    if workload.threads is not None:
        torch.set_num_threads(workload.threads)
    device = torch.device(workload.device)
    engine = make_engine(workload.engine, random_model(workload.items, 128, workload.steps, device))
    histories = random_histories(workload.batch_size, workload.items)

    def call(number: int) -> object:
        return engine.recommend(histories, min(RESULTS, workload.items), steps=workload.steps)

    series = measure_interleaved({"first": call, "second": call}, protocol, clock_for(device))
    return RunMedians(first_ms=_medians(series["first"]), second_ms=_medians(series["second"]))


def in_new_processes(
    workload: Workload, protocol: TimingProtocol, runs: int, report: Callable[[int], None] = lambda done: None
) -> list[RunMedians]:
    """Measure ``runs`` times, each in a process of its own, so that memory layout and start-up differ as in life."""
    found = []
    for done in range(runs):
        # A new pool each time: a worker that lives on would keep its memory layout.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(measure_run, (workload, protocol)))
        report(done + 1)
    return found


def calibrate(
    workload: Workload,
    protocol: TimingProtocol,
    runs: int,
    command: str,
    report: Callable[[int], None] = lambda done: None,
) -> CalibrationRecord:
    """Measure ``runs`` processes one after the other and return the record."""
    before = load_now()
    found = in_new_processes(workload, protocol, runs, report)
    environment = read_environment()
    return CalibrationRecord(
        measured_at_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        workload=str(workload),
        noise=noise_of(found),
        runs=found,
        clock=clock_name(workload),
        seconds_per_cell=protocol.seconds,
        device=workload.device,
        threads=workload.threads or environment.machine.threads,
        load_before=before,
        load_after=load_now(),
        environment=environment,
        command=command,
    )


def append_calibration(path: Path, record: CalibrationRecord) -> None:
    """Add a record to a file."""
    with LineWriter[CalibrationRecord](path) as writer:
        writer.write(record)


def busy(record: CalibrationRecord) -> float | None:
    """Load before the calibration where it exceeds half the cores; the load after it is that of the calibration."""
    load = record.load_before
    return load if load is not None and load > BUSY_SHARE * record.environment.machine.cores_usable else None


def clock_name(workload: Workload) -> str:
    """Name of the clock that `measure_run` uses."""
    return WallClock.name if workload.device == "cpu" else DeviceClock.name


def load_now() -> float | None:
    """Load of the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def read_calibration(path: Path) -> CalibrationRecord:
    """Read the last calibration of a file."""
    records = read_json_lines(path, CalibrationRecord.model_validate, "adrec bench calibrate", ("calibration",))
    if not records:
        raise DataError(f"{path}: holds no calibration; `adrec bench calibrate --out {path.name}` writes one")
    return records[-1]


def describe(noise: Noise) -> Iterable[str]:
    """The noise in words."""
    yield (
        f"between runs: a median varies by {100 * noise.between_runs_log_sd:.2g} % (standard deviation); two record"
        f" files tell a difference of {noise.smallest_between_runs_percent:.2g} % or more"
    )
    yield (
        f"interleaved in one run: a ratio varies by {100 * noise.interleaved_log_sd:.2g} %; rows of one record file"
        f" tell a difference of {noise.smallest_interleaved_percent:.2g} % or more"
    )
    yield "told: the 99 % interval excludes no difference, in 90 of 100 attempts"


def _medians(series: Series) -> list[float]:
    if series.error is not None:
        raise DataError(f"the workload fails here: {series.error}")
    return [round(float(each), 6) for each in series.medians_ms]
