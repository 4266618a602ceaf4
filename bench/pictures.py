"""Charts as one PNG, drawn with matplotlib (an optional dependency, imported at use)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from adrec.errors import NotSupportedError
from bench.charts import Chart, Line

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B8860B", "#666666", "#999999")
MARKERS = ("o", "s", "D", "^", "*", "x", "+")
DASHES = ("-", "-", "-", "-", "--", ":", ":")
THIN = 10


def png_of(charts: Sequence[Chart], title: str) -> bytes:
    """Draw charts on one sheet and return the PNG; NotSupportedError when matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise NotSupportedError(
            "no PNG was written: matplotlib is not installed; install it with `pip install 'adrec[png]'` and "
            "run `adrec bench report` again"
        ) from None
    rows = (len(charts) + 1) // 2
    figure = Figure(figsize=(12, 4.6 * rows + 0.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_plain(title))
    for axes, chart in zip(figure.subplots(rows, 2, squeeze=False).flat, charts, strict=False):
        _draw(axes, chart)
    stream = io.BytesIO()
    # Without this, the file would name the version, and equal records would not give equal files.
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _draw(axes: Any, chart: Chart) -> None:
    for line in chart.lines:
        if line.x:
            _draw_line(axes, line)
    axes.set_title(_plain(chart.title), fontsize=11)
    axes.set_xlabel(chart.x_title)
    axes.set_ylabel(chart.y_title)
    if chart.x_log:
        axes.set_xscale("log")
    if chart.y_log:
        axes.set_yscale("log")
    if chart.x_ticks:
        axes.set_xticks(chart.x_ticks, labels=[f"{tick:g}" for tick in chart.x_ticks])
        axes.minorticks_off()
    axes.grid(True, alpha=0.3)
    if chart.lines:
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False)


def _draw_line(axes: Any, line: Line) -> None:
    style = line.style % THIN
    colour = COLOURS[style]
    name = _plain(line.name)
    dash = ":" if line.style >= THIN else DASHES[style]
    if line.level:
        axes.axhline(line.y[0], color=colour, linestyle=dash, label=name)
        return
    errors = None
    if line.low is not None and line.high is not None:
        errors = [
            [value - low for low, value in zip(line.low, line.y, strict=True)],
            [high - value for high, value in zip(line.high, line.y, strict=True)],
        ]
    marker = MARKERS[style] if line.markers else None
    axes.errorbar(
        line.x,
        line.y,
        yerr=errors,
        color=colour,
        marker=marker,
        linestyle=dash,
        label=name,
        capsize=2,
        linewidth=1.5,
    )
    if line.markers:
        for x, y, label in zip(line.x, line.y, line.labels, strict=False):
            axes.annotate(_plain(label), (x, y), textcoords="offset points", xytext=(4, 5), fontsize=8)


def _plain(text: str) -> str:
    # A dollar sign starts a formula in matplotlib, and a broken one is an error.
    return text.replace("$", r"\$")
