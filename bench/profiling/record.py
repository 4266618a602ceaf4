"""The record of a profile."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from adrec.environment import Environment, Frozen
from bench.profiling.floors import Rates


class Stage(Frozen):
    """One stage: its median and 95 % quantile over rounds, and the least that it needs on this machine.

    ``calls``: how often it runs in a request. Floors are `None` where nothing is known about the least work.
    ``share``: of the sum of all stages. ``least_flops`` and ``least_bytes``: of all calls (`None` in older records).
    """

    name: str
    calls: int = Field(ge=1)
    milliseconds_p50: float = Field(ge=0)
    milliseconds_p95: float = Field(ge=0)
    share: float = Field(ge=0, le=1)
    floor_ms: float | None
    floor_bound: str | None
    floor_fraction: float | None
    least_flops: int | None = None
    least_bytes: int | None = None


class ProfileRecord(Frozen):
    """Where a request's time goes.

    ``request_ms_p50``: `Engine.recommend` without any probe, interleaved with the probed rounds; the sum of the stages
    exceeds it by what the probes cost and by the scores, which are computed a second time.
    """

    schema_version: Literal[1] = 1
    kind: Literal["profile"] = "profile"
    measured_at_utc: str
    model: str
    engine: str
    steps: int | None
    sampler: str | None = None
    batch_size_users: int
    precision: str
    stages: list[Stage]
    step_ms_p50: list[float]
    step_ms_p95: list[float]
    request_ms_p50: float = Field(gt=0)
    probed_ms_p50: float = Field(gt=0)
    rounds: int
    history_tokens: int
    items: int
    width: int
    rates: Rates
    clock: str
    device: str
    threads: int
    dataset_name: str
    dataset_fingerprint: str
    model_fingerprint: str
    environment: Environment
    command: str
