"""Records of measured kernels and engines: JSON lines with a schema version, validated on reading."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from adrec.environment import Environment, Frozen
from bench.json_lines import LineWriter, read_json_lines
from bench.record import Accuracy, Duration, Estimate

CPU_NOTE = "CPU: twins only, no kernel ran"
COMPILED = "-compiled"
BASELINE = "sasrec-"
"""Before the name of an engines' path: SASRec+ in it, of the same size or of the same run."""


class PathTiming(Frozen):
    """Latency of one path in microseconds: quantiles over ``calls`` samples, one median a round.

    ``time_ratio_to_baseline`` is the median over rounds of this path's time over that of the row's ``baseline``, and
    None where that one failed.
    """

    latency_us_p50: float = Field(gt=0)
    latency_us_p95: float = Field(gt=0)
    latency_us_p99: float = Field(gt=0)
    round_medians_us: list[Duration]
    calls: int = Field(ge=1)
    rounds: int = Field(ge=1)
    time_ratio_to_baseline: Estimate | None
    peak_memory_mib: float | None
    peak_memory_meaning: str


class Roof(Frozen):
    """Least bytes and operations, and what they take at best on the GPU of the measurement (None: no figures for it).

    ``floor_fraction`` is the floor over the median time: 1 is the roof.
    """

    least_bytes: int = Field(ge=0)
    least_flops: int = Field(ge=0)
    gpu: str | None
    floor_us: float | None
    bound: Literal["memory", "compute"] | None
    floor_fraction: float | None
    gigabytes_per_second: float | None


class Measuring(Frozen):
    """How a row was measured."""

    clock: str
    device: str
    device_name: str
    seconds_per_path: float
    rounds_minimum: int
    warmup_calls: int
    threads: int


class Measured(Frozen):
    """What rows of kernels and of engines share. ``path`` is what was timed, ``baseline`` the path of its ratio."""

    schema_version: Literal[1] = 1
    measured_at_utc: str
    path: str
    baseline: str
    timing: PathTiming | None
    roof: Roof
    error: str | None
    protocol: Measuring
    environment: Environment
    command: str


class KernelRecord(Measured):
    """One path of one kernel at one shape and storage dtype.

    ``rms_ratio`` is the root mean square of the difference to the eager twin's floating-point results over theirs, the
    largest over the results; ``different_integers`` the share of integer results that differ. None for a copy.
    ``note``: what a reader must know of the row, above all that no kernel ran (`None` in older records).
    """

    kind: Literal["kernel"] = "kernel"
    kernel: str
    shape_name: str
    shape: dict[str, int]
    dtype: str
    rms_ratio: float | None
    different_integers: float | None
    note: str | None = None


class TrainedOn(Frozen):
    """The run whose models a row is of, and the ``users`` of ``split`` whose histories and targets it was given."""

    run_fingerprint: str
    baseline_fingerprint: str | None
    dataset_name: str
    dataset_fingerprint: str
    split: str
    users: int = Field(ge=1)
    exact_steps: int = Field(ge=1)


class EngineRecord(Measured):
    """One way to compute recommendations, at one batch size, step count and catalogue.

    steps: of the cell; a path of SASRec+ (``sasrec-cached``), which has none, is timed beside each.
    ``top20_overlap_fraction``: mean overlap of the batch's items with those of ``overlap_with`` (same noise).
    ``trained``: `None` for a random model, which learned nothing and so has no ``accuracy``.
    """

    kind: Literal["engine"] = "engine"
    precision: str
    batch_size_users: int
    history_tokens: int
    steps: int
    items: int
    width: int
    top20_overlap_fraction: float | None
    overlap_with: str
    noise: str
    trained: TrainedOn | None = None
    accuracy: Accuracy | None = None

    @property
    def weights(self) -> str:
        """Fingerprint of the run's model that the path computes; empty for a random one."""
        if self.trained is None:
            return ""
        baseline = self.path.startswith(BASELINE)
        return (self.trained.baseline_fingerprint or "") if baseline else self.trained.run_fingerprint


KernelsRecord = KernelRecord | EngineRecord
_ADAPTER: TypeAdapter[KernelsRecord] = TypeAdapter(Annotated[KernelsRecord, Field(discriminator="kind")])


def append_record(path: Path, record: KernelsRecord) -> None:
    """Append one line and flush it to the disk, so that an interrupted run keeps what it measured."""
    with LineWriter[KernelsRecord](path) as writer:
        writer.write(record)


def read_kernel_records(paths: Iterable[Path]) -> list[KernelsRecord]:
    """Read and validate the records of all files; DataError names the file, the line and the way out."""
    return [record for path in paths for record in _read(path)]


def _read(path: Path) -> list[KernelsRecord]:
    return read_json_lines(path, _ADAPTER.validate_python, "adrec bench kernels", ("kernel", "engine"))
