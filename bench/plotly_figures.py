"""Charts as Plotly figures: plain data for the browser, where the page adds the colours of its theme."""

from __future__ import annotations

from typing import Any

from bench.charts import Chart, Line

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "x", "cross")
DASHES = ("solid", "solid", "solid", "solid", "dash", "dot", "dot")
THIN = 10


def plotly_figure(chart: Chart) -> dict[str, Any]:
    """Return the data and layout; ``meta.style`` of a trace says which colour the page gives it."""
    return {
        "data": [_trace(chart, line) for line in chart.lines if line.x],
        "layout": {
            "xaxis": _axis(chart.x_title, chart.x_log, chart.x_ticks),
            "yaxis": _axis(chart.y_title, chart.y_log, None),
            "margin": {"l": 58, "r": 12, "t": 12, "b": 48},
            "legend": {"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"},
            "hovermode": "closest",
            "hoverlabel": {"namelength": -1},
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
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": line.name,
        "x": xs,
        "y": ys,
        "mode": mode + ("+text" if labelled else ""),
        "meta": {"style": style},
        "line": {"dash": "dot" if line.style >= THIN else DASHES[style], "width": 1.5 if line.level else 2},
        "marker": {"symbol": SYMBOLS[style], "size": 9},
        "hovertemplate": _hover(chart, line),
    }
    if line.labels:
        trace["text"] = line.labels
        trace["textposition"] = "bottom center" if style % 2 else "top center"
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
    label = "step count %{text}<br>" if line.markers and any(line.labels) else "%{text}<br>" if line.labels else ""
    return f"{label}{chart.x_title}: %{{x:.4g}}<br>{chart.y_title}: %{{y:.4g}}"


def _width(chart: Chart) -> list[float]:
    xs = [x for line in chart.lines if not line.level for x in line.x] or [1.0]
    return [min(xs), max(xs)]


def _axis(title: str, log: bool, ticks: list[float] | None) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": title}, "automargin": True, "zeroline": False}
    if log:
        # Only 1, 2 and 5 of each decade get a label: at phone width more would collide.
        axis |= {"type": "log", "dtick": "D2", "exponentformat": "none"}
    if ticks:
        axis |= {"tickmode": "array", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
        axis.pop("dtick", None)
    return axis
