"""A profile in words, as a console table and as a self-contained page."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from bench.charts import Chart, Line
from bench.page_parts import facts_box, figure_place, machine_facts
from bench.plotly_figures import plotly_figure
from bench.profiling.record import ProfileRecord, Stage
from bench.report import render_page

HEADS = ("stage", "calls", "median, ms", "p95, ms", "share", "floor, ms", "set by", "floor / time")


def stage_cells(stage: Stage) -> list[str]:
    """One row of the table, as text."""
    return [
        stage.name,
        str(stage.calls),
        f"{stage.milliseconds_p50:.4g}",
        f"{stage.milliseconds_p95:.4g}",
        f"{stage.share:.1%}",
        "-" if stage.floor_ms is None else f"{stage.floor_ms:.3g}",
        stage.floor_bound or "-",
        "-" if stage.floor_fraction is None else f"{stage.floor_fraction:.1%}",
    ]


def console_table(record: ProfileRecord) -> Table:
    """All stages in the order of the request."""
    table = Table(*HEADS)
    for stage in record.stages:
        table.add_row(*stage_cells(stage))
    return table


def sentences(record: ProfileRecord) -> Iterator[str]:
    """What the profile says: where the time goes, and how far from the floor it is."""
    largest = max(record.stages, key=lambda stage: stage.milliseconds_p50)
    yield (
        f"A request of {record.batch_size_users} users takes {record.request_ms_p50:.3g} ms;"
        f" {largest.share:.0%} of its stages' time is {largest.name}."
    )
    known = [stage for stage in record.stages if stage.floor_ms is not None]
    if known:
        floor = sum(stage.floor_ms or 0.0 for stage in known)
        yield (
            f"Floor of encoding, denoising and scoring: {floor:.3g} ms at {record.rates.gflops:.0f} GFLOP/s and"
            f" {record.rates.gigabytes_per_second:.1f} GB/s, which this machine reached in a product of"
            f" {record.rates.product_size} squared and a copy: {floor / record.request_ms_p50:.0%} of the request."
        )
        farthest = max(known, key=lambda stage: stage.milliseconds_p50 - (stage.floor_ms or 0.0))
        yield (
            f"Most is to be gained in {farthest.name}: {farthest.milliseconds_p50 - (farthest.floor_ms or 0.0):.3g} ms"
            " above its floor."
        )
    over = record.probed_ms_p50 / record.request_ms_p50
    yield f"Probed stage by stage the request takes {over:.2f} times as long, scores twice included."


def page_of(record: ProfileRecord) -> str:
    """The whole page."""
    figures: list[dict[str, Any]] = [_stage_figure(record)]
    places = [figure_place(0, 0, "Stages of a request", "Median over rounds; diamonds are floors of this machine.")]
    if record.step_ms_p50:
        chart = _step_chart(record)
        figures.append(plotly_figure(chart) | {"title": chart.title})
        places.append(figure_place(0, 1, chart.title, chart.note))
    rows = "".join(
        "<tr>" + "".join(_cell(place, text) for place, text in enumerate(stage_cells(stage))) + "</tr>"
        for stage in record.stages
    )
    heads = "".join(
        f'<th scope="col"{_words(place)}><button type="button">{html.escape(name)}</button></th>'
        for place, name in enumerate(HEADS)
    )
    section = "\n".join(
        [
            f"<section><h2>{html.escape(subtitle(record))}</h2>",
            f'<div class="advice">{"".join(f"<p>{html.escape(each)}</p>" for each in sentences(record))}</div>',
            '<div class="charts">',
            *places,
            "</div>",
            f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>',
            "<h2>Machine and protocol</h2>",
            facts_box(
                [
                    *machine_facts(record.environment, record.threads),
                    (
                        "Timing",
                        f"{record.clock}, {record.rounds} rounds after one to warm up; device waited for at stages",
                    ),
                    ("Model", f"{record.model}, fingerprint {record.model_fingerprint[:12]}, {record.precision}"),
                    ("Data", f"{record.dataset_name}, {record.items} items, {record.history_tokens} tokens in a batch"),
                ]
            ),
            "</section>",
        ]
    )
    return render_page(
        "Where a request's time goes",
        f"adrec bench profile, measured {record.measured_at_utc}",
        [section],
        [{"all": figures}],
        record.command,
    )


def subtitle(record: ProfileRecord) -> str:
    """What was profiled."""
    steps = "" if record.steps is None else f", {record.steps} steps"
    return f"{record.engine}{steps}, batch {record.batch_size_users}, {record.dataset_name}, {record.device}"


def _stage_figure(record: ProfileRecord) -> dict[str, Any]:
    stages = list(reversed(record.stages))
    names = [stage.name for stage in stages]
    return {
        "title": "Stages of a request",
        "data": [
            {
                "type": "bar",
                "orientation": "h",
                "name": "median",
                "x": [stage.milliseconds_p50 for stage in stages],
                "y": names,
                "meta": {"style": 0},
                "marker": {},
                "hovertemplate": "%{y}: %{x:.4g} ms",
            },
            {
                "type": "scatter",
                "mode": "markers",
                "name": "floor",
                "x": [stage.floor_ms for stage in stages],
                "y": names,
                "meta": {"style": 1},
                "line": {},
                "marker": {"symbol": "diamond", "size": 10},
                "hovertemplate": "floor of %{y}: %{x:.4g} ms",
            },
        ],
        "layout": {
            "xaxis": {"title": {"text": "milliseconds"}, "automargin": True, "rangemode": "tozero"},
            "yaxis": {"title": {"text": ""}, "automargin": True},
            "margin": {"l": 8, "r": 12, "t": 12, "b": 48},
            "legend": {"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"},
            "hovermode": "closest",
            "hoverlabel": {"namelength": -1},
        },
    }


def _step_chart(record: ProfileRecord) -> Chart:
    count = len(record.step_ms_p50)
    numbers = [float(number) for number in range(1, count + 1)]
    lines = [Line("median", numbers, record.step_ms_p50, 0), Line("p95", numbers, record.step_ms_p95, 3, markers=False)]
    return Chart(
        key="steps",
        title="Each denoise step",
        note="In the order of sampling; equal steps should take equal time.",
        x_title="step of the request",
        y_title="milliseconds",
        lines=lines,
        x_log=False,
    )


def _cell(place: int, text: str) -> str:
    sort = text if place in (0, 6) else text.rstrip("%").replace("-", "")
    return f'<td{_words(place)} data-sort="{html.escape(sort, quote=True)}">{html.escape(text)}</td>'


def _words(place: int) -> str:
    return ' class="words"' if place in (0, 6) else ""
