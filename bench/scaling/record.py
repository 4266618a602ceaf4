"""Records of growth: measured points and the exponent fitted to them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from adrec.environment import Environment, Frozen
from bench.kernels.records import Measuring, PathTiming
from bench.record import Estimate

Axis = Literal["items", "history", "batch"]


class ScalingPoint(Frozen):
    """One value of the axis: its timing, or why there is none. ``history_tokens``: of the whole batch."""

    value: int = Field(ge=1)
    history_tokens: int
    timing: PathTiming | None
    error: str | None


class ScalingRecord(Frozen):
    """One engine along one axis, everything else fixed (``items``, ``history`` and ``batch`` are what is fixed).

    ``exponent``: b of time = a value^b, fitted to the logarithms of all points by least squares, with a bootstrap
    interval over rounds; it says nothing about the fit itself, of which ``largest_misfit`` does: the largest ratio of
    a measured to a fitted time, or its inverse. ``exponent_last``: between the last two points, where fixed costs
    weigh least. `None` with fewer than 3 points (2 for the last).
    """

    schema_version: Literal[1] = 1
    kind: Literal["scaling"] = "scaling"
    measured_at_utc: str
    axis: Axis
    path: str
    baseline: str
    items: int
    history: int
    batch: int
    steps: int
    width: int
    precision: str
    points: list[ScalingPoint]
    exponent: Estimate | None
    exponent_last: Estimate | None
    largest_misfit: float | None
    error: str | None
    protocol: Measuring
    environment: Environment
    command: str
