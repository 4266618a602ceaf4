"""Records of training speed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from adrec.environment import Environment, Frozen
from bench.record import Duration


class TrainingTiming(Frozen):
    """Times of single optimiser steps, loading their batch included; the first ones are left out as warm-up.

    ``window_medians_ms``: medians of consecutive windows of steps. ``epoch_seconds``: the median step times the steps
    of an epoch, without validation. ``tokens_per_second``: all tokens over all time.
    """

    step_ms_p50: float = Field(gt=0)
    step_ms_p95: float = Field(gt=0)
    window_medians_ms: list[Duration]
    steps: int = Field(ge=1)
    tokens_per_second: float = Field(gt=0)
    users_per_second: float = Field(gt=0)
    epoch_steps: int = Field(ge=1)
    epoch_seconds: float = Field(gt=0)
    peak_memory_mib: float | None
    peak_memory_meaning: str


class TrainingRecord(Frozen):
    """One model at one batch size; the accuracy that training leads to is the business of `adrec train`."""

    schema_version: Literal[1] = 1
    kind: Literal["training"] = "training"
    measured_at_utc: str
    model: str
    batch_size_users: int
    precision: str
    width: int
    items: int
    timing: TrainingTiming | None
    error: str | None
    dataset_name: str
    dataset_fingerprint: str
    device: str
    threads: int
    clock: str
    environment: Environment
    command: str
