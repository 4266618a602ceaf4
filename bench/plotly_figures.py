"""Charts as Plotly figures: plain data for the browser, where the page adds the colours of its theme."""

from __future__ import annotations

import html
import math
from typing import Any

from bench.chart import Chart, Line

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "x", "cross")
DASHES = ("solid", "solid", "solid", "solid", "dash", "longdashdot", "dot")
THIN = 10
# More would collide at phone width.
MOST_TICKS, MOST_ACROSS = 7, 5


def plotly_figure(chart: Chart) -> dict[str, Any]:
    """Return title, sentence for no data, traces and layout.

    ``meta`` of a trace is for the page: ``style`` says which colour to give it, ``engine`` and ``precision`` what its
    filters know it by, ``front`` that it is the Pareto line of what is shown.
    """
    xs = [x for line in chart.lines if not line.level for x in line.x]
    ys = [y for line in chart.lines for y in (*line.y, *(line.low or ()), *(line.high or ()))]
    return {
        "title": chart.title,
        "empty": chart.empty,
        "data": [_trace(chart, line) for line in chart.lines if line.x],
        "layout": {
            "xaxis": _axis(
                chart.x_title, chart.x_log, chart.x_ticks or _ticks(chart.x_log, xs, MOST_ACROSS), chart.x_names
            ),
            "yaxis": _axis(chart.y_title, chart.y_log, _ticks(chart.y_log, ys, MOST_TICKS), None),
            "margin": {"l": 58, "r": 24, "t": 12, "b": 48},
            "legend": {"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"},
            "hovermode": "closest",
            "hoverlabel": {"namelength": -1, "align": "left"},
        },
    }


def _trace(chart: Chart, line: Line) -> dict[str, Any]:
    style = line.style % THIN
    xs, ys = line.x, line.y
    if line.level:
        xs = _width(chart)
        ys = [line.y[0]] * len(xs)
    mode = "lines" if line.level or not line.markers else "lines+markers" if line.connected else "markers"
    labelled = line.markers and any(line.labels) and not line.level
    dash = "dot" if line.style >= THIN else "dashdot" if line.hollow else DASHES[style]
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": _shown(line.name),
        "x": xs,
        "y": ys,
        "mode": mode + ("+text" if labelled else ""),
        "meta": {"style": style, "engine": line.engine, "precision": line.precision, "front": line.front},
        "line": {"dash": dash, "width": 1.5 if line.level else 2},
        "marker": {"symbol": SYMBOLS[style] + ("-open" if line.hollow else ""), "size": 9},
        # The points of the Pareto line are those of other lines, which have more to say. Plotly reads `hoverinfo` only
        # where there is no template.
        **({"hoverinfo": "skip"} if line.front else {"hovertemplate": _hover(chart, line)}),
        # The label of the last point may reach beyond the axis.
        "cliponaxis": False,
    }
    if line.folded:
        trace["visible"] = "legendonly"
    if line.labels:
        trace["text"] = [_shown(label) for label in line.labels]
        # Beside the marker: above and below it there are error bars.
        trace["textposition"] = "bottom right" if style % 2 else "top right"
    if line.details:
        details = [_shown(each) for each in line.details]
        trace["customdata"] = details[:1] * len(xs) if line.level else details
    if line.low is not None and line.high is not None and not line.level:
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [high - value for high, value in zip(line.high, line.y, strict=True)],
            "arrayminus": [value - low for low, value in zip(line.low, line.y, strict=True)],
            "thickness": 1,
            "width": 3,
        }
    return trace


def _hover(chart: Chart, line: Line) -> str:
    x = "" if chart.x_names else f"<br>{_shown(chart.x_title)}: %{{x:.4g}}"
    place = f"{x}<br>{_shown(chart.y_title)}: %{{y:.4g}}"
    label = "%{text}" if line.labels and not line.details else ""
    return ("%{customdata}" if line.details else label) + place


def _shown(text: str) -> str:
    # Plotly takes some tags for markup, links among them.
    return html.escape(text, quote=False).replace("\n", "<br>")


def _width(chart: Chart) -> list[float]:
    xs = [x for line in chart.lines if not line.level for x in line.x] or [1.0]
    return [min(xs), max(xs)]


def log_ticks(low: float, high: float, most: int = MOST_TICKS) -> list[float]:
    """Two to ``most`` round values between two positive ones, of the finest of several grids that gives so few.

    Plotly's own ticks of a logarithmic axis drop the powers of ten on a short one, and collide at phone width.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    grids: list[list[float]] = [
        [digit * 10.0**decade for decade in decades for digit in digits]
        for digits in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
    ]
    inside = [[tick for tick in grid if low <= tick <= high] for grid in grids]
    whole = inside[-1]
    found = next((ticks for ticks in inside if len(ticks) <= most), whole[:: 1 + len(whole) // most])
    return found if len(found) > 1 else [low, high]


def _ticks(log: bool, values: list[float], most: int) -> list[float] | None:
    return log_ticks(min(values), max(values), most) if log and values and min(values) < max(values) else None


def _axis(title: str, log: bool, ticks: list[float] | None, names: list[str] | None) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": title}, "automargin": True, "zeroline": False}
    if log:
        axis |= {"type": "log", "dtick": "D2", "exponentformat": "none"}
    if ticks:
        names = names or [_number(tick) for tick in ticks]
        axis |= {"tickmode": "array", "tickvals": ticks, "ticktext": names}
        axis.pop("dtick", None)
    return axis


def _number(tick: float) -> str:
    return f"{tick:.0f}" if tick >= 1000 else f"{tick:.3g}"
