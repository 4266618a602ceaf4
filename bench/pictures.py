"""Charts as one PNG, drawn with matplotlib (an optional dependency, imported at use)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from adrec.errors import NotSupportedError
from bench.chart import Chart, Line

# Those of the page on a light background.
COLOURS = ("#0072B2", "#BC4A00", "#00795A", "#9A3C8C", "#95663A", "#565D66", "#8A9099")
MARKERS = ("o", "s", "D", "^", "*", "x", "+")
DASHES = ("-", "-", "-", "-", "--", ":", ":")
THIN = 10
WIDTH, HEIGHT, DOTS_PER_INCH = 6.0, 4.6, 120
"""Size of one chart in inches."""
SHORT = 6


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
    columns = min(2, len(charts))
    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.4), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_plain(title))
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, chart in zip(places, charts, strict=False):
        _draw(axes, chart)
    for axes in places[len(charts) :]:
        axes.set_axis_off()
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
        _plain_decades(axes.xaxis)
    if chart.y_log:
        axes.set_yscale("log")
        _plain_decades(axes.yaxis)
    if chart.x_ticks:
        axes.set_xticks(chart.x_ticks, labels=chart.x_names or [f"{tick:g}" for tick in chart.x_ticks])
        axes.minorticks_off()
    slanted = any(len(name) > SHORT for name in chart.x_names or [])
    if slanted:
        axes.tick_params(axis="x", labelsize=8)
        for label in axes.get_xticklabels():
            label.set(rotation=20, horizontalalignment="right")
    axes.grid(True, alpha=0.3)
    if chart.lines:
        axes.legend(
            fontsize=8,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.26 if slanted else -0.13),
            ncols=3,
            frameon=False,
        )


def _plain_decades(axis: Any) -> None:
    """Label 1, 2 and 5 of each decade as plain numbers: powers of ten of all digits would run into each other."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_line(axes: Any, line: Line) -> None:
    style = line.style % THIN
    colour = COLOURS[style]
    name = _plain(line.name)
    dash = ":" if line.style >= THIN else "-." if line.hollow else DASHES[style]
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
        markerfacecolor="none" if line.hollow else colour,
        linestyle=dash if line.connected else "none",
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
