"""Records of serving scenarios."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from adrec.environment import Environment, Frozen
from bench.latency_blocks import LatencyBlocks
from bench.record import Accuracy, Duration

Scenario = Literal["single stream", "server", "offline"]


class ServingDemand(Frozen):
    """What a scenario had to reach before its figures count, as in MLPerf: least duration and least queries.

    ``latency_bound_ms`` (None: no bound) and ``arrivals_per_second`` are of the server scenario only. ``batch_most``:
    users in a batch at most; ``wait_most_ms``: how long the first of a batch may wait for others. ``load``: share of
    the throughput in full batches, measured just before, that the arrival rate was set to; `None` for a given rate.
    """

    seconds_least: float
    queries_least: int
    batch_most: int
    wait_most_ms: float
    latency_bound_ms: float | None
    arrivals_per_second: float | None = Field(gt=0)
    load: float | None
    seed: int


class ServingSummary(Frozen):
    """Latency of single users from arrival to result, and what the server did meanwhile.

    ``window_medians_ms``: median latency (offline: time of a batch) in consecutive windows of equally many queries;
    ``latencies``: all of them by window (`None` in older records).
    ``valid``: duration and query count were reached, the server kept up with its arrivals, and 99 % of its queries met
    the latency bound, where there is one.
    """

    queries: int = Field(ge=1)
    seconds: float = Field(gt=0)
    latency_ms_p50: float = Field(gt=0)
    latency_ms_p90: float = Field(gt=0)
    latency_ms_p95: float = Field(gt=0)
    latency_ms_p99: float = Field(gt=0)
    latency_ms_most: float = Field(gt=0)
    window_medians_ms: list[Duration]
    latencies: LatencyBlocks | None = None
    throughput_users_per_second: float = Field(gt=0)
    bound_met_fraction: float | None = Field(ge=0, le=1)
    busy_fraction: float = Field(ge=0)
    batch_mean: float = Field(ge=1)
    queue_most: int = Field(ge=0)
    valid: bool
    invalid_because: str


class ServingRecord(Frozen):
    """One engine at one step count in one scenario, with its accuracy."""

    schema_version: Literal[1] = 1
    kind: Literal["serving"] = "serving"
    measured_at_utc: str
    scenario: Scenario
    model: str
    engine: str
    steps: int | None
    sampler: str | None = None
    precision: str
    demand: ServingDemand
    summary: ServingSummary | None
    accuracy: Accuracy | None
    error: str | None
    dataset_name: str
    dataset_fingerprint: str
    dataset_items: int
    history_length_mean: float
    split: str
    model_fingerprint: str
    device: str
    threads: int
    clock: str
    results_per_user: int
    environment: Environment
    command: str
