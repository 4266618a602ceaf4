"""Records of measurements: JSON lines with a schema version, validated on reading and on writing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from adrec.environment import Environment, Frozen
from bench.json_lines import LineWriter, read_json_lines
from bench.latency_blocks import LatencyBlocks
from bench.places import PackedPlaces

BASELINE_MODEL = "sasrec+"
POPULARITY = "popularity"

Duration = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A time that was measured; the name of the field that holds it says in which unit."""


class Estimate(Frozen):
    """A value with its 95 % bootstrap interval; the unit is in the name of the field that holds it."""

    value: float
    low: float
    high: float


class TimingSummary(Frozen):
    """Latency of one cell: quantiles over ``calls`` samples; ``round_medians_ms`` has one median a round.

    ``latency_ms_percentiles``: more of the same quantiles by percentile, ascending, the last that the calls reach
    (`None` in older records). ``latencies``: the samples by round (`None` in older records).
    """

    latency_ms_p50: float = Field(gt=0)
    latency_ms_p95: float = Field(gt=0)
    latency_ms_p99: float = Field(gt=0)
    latency_ms_percentiles: dict[float, float] | None = None
    round_medians_ms: list[Duration]
    latencies: LatencyBlocks | None = None
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
    ``places_base64``: the place of every user's target in the top 20, see `bench.places` (`None` in older records).
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
    places_base64: PackedPlaces | None = None


class RequestRoof(Frozen):
    """The least work of answering one batch, and the rates at which this machine did such work before the sweep.

    ``gflops``: 10^9 operations a second in a square product. ``gigabytes_per_second``: 10^9 bytes, read and written,
    in a copy.
    """

    least_flops: int = Field(gt=0)
    least_bytes: int = Field(gt=0)
    gflops: float = Field(gt=0)
    gigabytes_per_second: float = Field(gt=0)


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
    latency (popularity) and for a failed cell, whose ``error`` says why. ``roof`` is `None` in older records and for
    models whose least work is not known.
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
    roof: RequestRoof | None = None
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
            self.environment.machine.kind,
            self.protocol.device,
            self.protocol.threads,
        )


class RecordWriter(LineWriter[TradeoffRecord]):
    """Appends rows of a sweep to a file.

    Raises DataError when the file's existing content is not readable, a half-written last line included.
    """

    def __init__(self, path: Path) -> None:
        if path.exists():
            read_records(path)
        super().__init__(path)


def read_records(path: Path) -> list[TradeoffRecord]:
    """Read and validate every line; DataError names the file, the line and the way out."""
    return read_json_lines(path, TradeoffRecord.model_validate, "adrec bench tradeoff RUN", ("tradeoff",))


def latest_records(records: Sequence[TradeoffRecord]) -> list[TradeoffRecord]:
    """Keep the last record of every cell, in the order of first appearance."""
    found: dict[tuple[str | int, ...], TradeoffRecord] = {}
    for record in records:
        found[record.cell] = record
    return list(found.values())
