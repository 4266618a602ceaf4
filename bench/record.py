"""Records of measurements: JSON lines with a schema version, validated on reading and on writing."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

from pydantic import Field, ValidationError

from adrec.data.json_text import parse_json
from adrec.errors import DataError
from bench.environment import Environment, Frozen

SCHEMA_VERSION = 1
BASELINE_MODEL = "sasrec+"
POPULARITY = "popularity"


class Estimate(Frozen):
    """A value with its 95 % bootstrap interval; the unit is in the name of the field that holds it."""

    value: float
    low: float
    high: float


class TimingSummary(Frozen):
    """Latency of one cell: quantiles over ``calls`` samples; ``round_medians_ms`` has one median a round."""

    latency_ms_p50: float = Field(gt=0)
    latency_ms_p95: float = Field(gt=0)
    latency_ms_p99: float = Field(gt=0)
    round_medians_ms: list[float]
    calls: int = Field(ge=1)
    rounds: int = Field(ge=1)
    throughput_users_per_second: float = Field(gt=0)
    time_ratio_to_baseline: Estimate | None
    baseline_engine: str
    baseline_steps: int
    history_tokens_per_batch_mean: float
    peak_memory_mib: float | None
    peak_memory_meaning: str
    seed: int


class Accuracy(Frozen):
    """Accuracy of one model at one step count and seed, and its agreement with the exact result.

    ``metrics_percent`` maps HR@k, NDCG@k, MRR@k (k in 5, 10, 20) to percent, interval over users.
    ``ndcg20_kept_percent``: NDCG@20 relative to the exact step count, resampled over the same users; `None`
    when the model has no step count. ``top20_overlap_fraction``: as computed by ``measured_with`` for all
    ``users``. Of this row's own engine, on ``engine_agreement_users`` sampled users, the mean top-20 overlap
    with ``measured_with`` at the same steps is ``engine_agreement_fraction``, and with the exact result
    ``engine_top20_overlap_fraction`` (that of ``engine_top20_overlap_users``; `None` in older records).
    """

    metrics_percent: dict[str, Estimate]
    users: int = Field(ge=1)
    measured_with: str
    ndcg20_kept_percent: Estimate | None
    top20_overlap_fraction: float | None = Field(ge=0, le=1)
    top20_overlap_against: str
    engine_agreement_fraction: float | None = Field(ge=0, le=1)
    engine_agreement_users: int = Field(ge=0)
    engine_top20_overlap_fraction: float | None = Field(None, ge=0, le=1)
    engine_top20_overlap_users: int = Field(0, ge=0)


class MeasuringProtocol(Frozen):
    """How a cell was measured."""

    clock: str
    interleaved: bool
    seconds_per_cell: float
    rounds_minimum: int
    warmup_calls: int
    threads: int
    device: str
    distinct_batches: int
    results_per_user: int


class TradeoffRecord(Frozen):
    """One row of a trade-off table: speed and accuracy of one setting, or its error.

    ``steps`` and ``engine`` are `None` where the model has none; ``timing`` is `None` for a row without a
    latency (popularity) and for a failed cell, whose ``error`` says why.
    """

    schema_version: Literal[1] = 1
    kind: Literal["tradeoff"] = "tradeoff"
    measured_at_utc: str
    model: str
    engine: str | None
    steps: int | None
    exact_steps: int
    batch_size_users: int | None
    seed: int
    precision: str
    split: str
    timing: TimingSummary | None
    accuracy: Accuracy | None
    error: str | None
    protocol: MeasuringProtocol
    dataset_name: str
    dataset_fingerprint: str
    dataset_users: int
    dataset_items: int
    model_fingerprint: str
    run_fingerprint: str
    environment: Environment
    command: str

    @property
    def cell(self) -> tuple[str | int, ...]:
        """What is equal in two measurements of the same thing; in a report the later one counts."""
        return (
            self.model,
            self.model_fingerprint,
            *self.study,
            self.engine or "",
            self.steps or 0,
            self.batch_size_users or 0,
            self.seed,
        )

    @property
    def study(self) -> tuple[str | int, ...]:
        """What rows must share to be compared: run, data, split, machine, device and threads."""
        return (
            self.run_fingerprint,
            self.dataset_fingerprint,
            self.split,
            self.environment.machine.processor,
            self.protocol.device,
            self.protocol.threads,
        )


class RecordWriter:
    """Appends records to a file, one flushed line each, so that an interrupted sweep keeps what it measured.

    Raises DataError when the file's existing content is not readable, a half-written last line included.
    """

    def __init__(self, path: Path) -> None:
        if path.exists():
            read_records(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, record: TradeoffRecord) -> None:
        """Append one record and flush it to the disk."""
        self._stream.write(_line(record))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def read_records(path: Path) -> list[TradeoffRecord]:
    """Read and validate every line; DataError names the file, the line and the way out."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file of records; `adrec bench tradeoff RUN` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 JSON lines ({error})") from error
    lines = text.split("\n")
    # A complete file ends with a newline, so that what follows the last one is a line cut short.
    unfinished = lines.pop()
    records = [_parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if unfinished:
        raise DataError(
            f"{path}, line {len(lines) + 1}: the last line is half-written ({len(unfinished)} characters, no "
            "line end), as after an interrupted run; delete that line to keep the records before it"
        )
    return records


def latest_records(records: Sequence[TradeoffRecord]) -> list[TradeoffRecord]:
    """Keep the last record of every cell, in the order of first appearance."""
    found: dict[tuple[str | int, ...], TradeoffRecord] = {}
    for record in records:
        found[record.cell] = record
    return list(found.values())


def _line(record: TradeoffRecord) -> str:
    # JSON has no NaN: a record that holds one must fail here, not in the next reader.
    return json.dumps(record.model_dump(mode="json"), allow_nan=False, separators=(",", ":")) + "\n"


def _parse(path: Path, number: int, line: str) -> TradeoffRecord:
    where = f"{path}, line {number}"
    try:
        content = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}); delete the line") from None
    if not isinstance(content, dict):
        raise DataError(f"{where}: a record is a JSON object, this is a {type(content).__name__}; delete the line")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        if isinstance(version, int) and version > SCHEMA_VERSION:
            way_out = "it was written by a newer adrec: upgrade this one"
        elif isinstance(version, int):
            way_out = "it was written by an older adrec: measure again with this one"
        else:
            way_out = "it is not a record of `adrec bench`"
        raise DataError(f"{where}: schema version {version!r}, this adrec reads {SCHEMA_VERSION}; {way_out}")
    try:
        return TradeoffRecord.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "record"
        raise DataError(
            f"{where}: field {field!r}: {first['msg']} ({error.error_count()} problem(s) in the line); "
            "correct or delete the line"
        ) from None
