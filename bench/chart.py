"""One plot as data, which `bench.plotly_figures` and `bench.pictures` draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

BASELINE_STYLE, POPULARITY_STYLE, FRONT_STYLE = 4, 5, 6
FEW_STEPS = 10


@dataclass(frozen=True)
class Line:
    """One series: equal-long ``x``, ``y``, optional interval ends and labels.

    ``style`` picks colour, marker and dash; ``hollow`` tells a fifth engine from the first, whose colour it has.
    ``level`` draws a horizontal line at ``y[0]`` over the width of the chart; ``folded`` one is left to the legend on
    a page, since its distance would squeeze the others. ``details``: what the page says of each point beyond its
    place. ``engine`` and ``precision``: what the page's filters know the line by, empty for one that always stays.
    ``front`` marks the Pareto line, which a page draws again over what its filters leave.
    """

    name: str
    x: list[float]
    y: list[float]
    style: int
    low: list[float] | None = None
    high: list[float] | None = None
    labels: list[str] = field(default_factory=list)
    markers: bool = True
    connected: bool = True
    level: bool = False
    hollow: bool = False
    folded: bool = False
    front: bool = False
    details: list[str] = field(default_factory=list)
    engine: str = ""
    precision: str = ""


@dataclass(frozen=True)
class Chart:
    """One plot; ``note`` is a sentence below it, ``empty`` the one in its place where it has no lines.

    ``x_names``: labels of ``x_ticks``, where they are not the numbers themselves.
    """

    key: str
    title: str
    note: str
    x_title: str
    y_title: str
    lines: list[Line]
    x_log: bool = True
    y_log: bool = False
    x_ticks: list[float] | None = None
    x_names: list[str] | None = None
    empty: str = "No row has what this chart shows; the table names the errors."


def roof_line(x: Sequence[float], gflops: float, gigabytes_per_second: float) -> Line:
    """The roof over points at ``x`` operations a byte: the rate of a copy up to the ridge, that of a product after."""
    ridge = gflops / gigabytes_per_second
    left, right = min(ridge, *x) / 2, max(ridge, *x) * 2
    said = f"{gflops:.0f} GFLOP/s in a product, {gigabytes_per_second:.1f} GB/s in a copy"
    return Line(
        "roof of this machine",
        [left, ridge, right],
        [left * gigabytes_per_second, gflops, gflops],
        FRONT_STYLE,
        markers=False,
        labels=[said] * 3,
    )
