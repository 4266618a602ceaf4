"""A profile in words, as a console table and as a self-contained page."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from rich.table import Table

from bench.chart import Chart, Line, roof_line
from bench.html_page import render_page
from bench.html_tables import Cell, Head, TableRow, heading, sortable_table
from bench.markdown import escaped
from bench.page_parts import facts_box, figure_place, machine_facts
from bench.plotly_figures import plotly_figure
from bench.profiling.record import ProfileRecord, Stage

HEADS = ("stage", "calls", "median, ms", "p95, ms", "share", "floor, ms", "set by", "floor / time")
WORDS = (0, 6)
STAGES_NOTE = "Median over rounds; diamonds are the floors of this machine, where they are known."


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
    section, figures = section_of(record, 0)
    return render_page(
        "Where a request's time goes",
        f"adrec bench profile, measured {record.measured_at_utc}",
        [section],
        [figures],
        record.command,
    )


def section_of(record: ProfileRecord, index: int) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """The section of a profile, the ``index``-th of its page, and its figures."""
    anchor = f"study-{index + 1}"
    charts = charts_of(record)
    figures: list[dict[str, Any]] = [_stage_figure(record), *map(plotly_figure, charts[1:])]
    section = "\n".join(
        [
            "<section>",
            heading(2, anchor, subtitle(record)),
            f'<div class="advice">{"".join(f"<p>{html.escape(each)}</p>" for each in sentences(record))}</div>',
            heading(3, f"{anchor}-charts", "Charts"),
            '<div class="charts">',
            *(figure_place(index, place, chart) for place, chart in enumerate(charts)),
            "</div>",
            heading(3, f"{anchor}-table", "Stages"),
            sortable_table(
                f"stages-{index + 1}.csv",
                "Stages",
                [Head(name, numeric=place not in WORDS) for place, name in enumerate(HEADS)],
                [TableRow(_cells(stage)) for stage in record.stages],
            ),
            heading(3, f"{anchor}-protocol", "Machine and protocol"),
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
    return section, {"all": figures}


def charts_of(record: ProfileRecord) -> list[Chart]:
    """The charts of the page: stages (which it draws as bars), single steps, and the roofline."""
    return [_stage_chart(record), _step_chart(record), _roofline(record)]


def markdown_of(record: ProfileRecord, pictures: Sequence[str]) -> str:
    """The profile as Markdown; pictures: PNG files beside it, each with a ``.md`` of its numbers."""
    rows = [HEADS, ["---" if place in WORDS else "---:" for place in range(len(HEADS))]]
    table = ["| " + " | ".join(row) + " |" for row in rows]
    table += ["| " + " | ".join(map(escaped, stage_cells(stage))) + " |" for stage in record.stages]
    machine = machine_facts(record.environment, record.threads)
    parts = [f"# {escaped(subtitle(record))}", "\n".join(f"- {escaped(each)}" for each in sentences(record))]
    parts += [f"![{PurePosixPath(name).stem}](<{name}>)" for name in pictures]
    parts += ["\n".join(table), "\n".join(f"- {name}: {escaped(value)}" for name, value in machine)]
    return "\n\n".join([*parts, f"```\n{record.command}\n```"]) + "\n"


def subtitle(record: ProfileRecord) -> str:
    """What was profiled."""
    steps = "" if record.steps is None else f", {record.steps} steps"
    return f"{record.engine}{steps}, batch {record.batch_size_users}, {record.dataset_name}, {record.device}"


def _stage_figure(record: ProfileRecord) -> dict[str, Any]:
    stages = list(reversed(record.stages))
    names = [stage.name for stage in stages]
    return {
        "title": "Stages of a request",
        "empty": "No stage was timed.",
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


def _stage_chart(record: ProfileRecord) -> Chart:
    places = [float(place) for place in range(1, len(record.stages) + 1)]
    floors = [
        (place, stage.floor_ms)
        for place, stage in zip(places, record.stages, strict=True)
        if stage.floor_ms is not None
    ]
    return Chart(
        key="stages",
        title="Stages of a request",
        note=STAGES_NOTE,
        x_title="stage",
        y_title="milliseconds",
        lines=[
            Line("median", places, [stage.milliseconds_p50 for stage in record.stages], 0, connected=False),
            Line("floor", [place for place, _ in floors], [floor for _, floor in floors], 2, connected=False),
        ],
        x_log=False,
        x_ticks=places,
        x_names=[stage.name for stage in record.stages],
    )


def _step_chart(record: ProfileRecord) -> Chart:
    count = len(record.step_ms_p50)
    numbers = [float(number) for number in range(1, count + 1)]
    lines = [
        Line("median", numbers, record.step_ms_p50, 0),
        Line("p95", numbers, record.step_ms_p95, 1, connected=False),
    ]
    return Chart(
        key="steps",
        title="Each denoise step",
        note="In the order of sampling; equal steps should take equal time.",
        x_title="step of the request",
        y_title="milliseconds",
        lines=lines if count else [],
        x_log=False,
        empty="The steps were not timed one by one: this engine fuses them, or the model has none.",
    )


def _roofline(record: ProfileRecord) -> Chart:
    """Stages of known least work under the roof that this machine reached."""
    rates = record.rates
    known = [stage for stage in record.stages if stage.least_flops and stage.least_bytes and stage.milliseconds_p50]
    lines = []
    for style, stage in enumerate(known):
        flops, read = float(stage.least_flops or 0), float(stage.least_bytes or 0)
        lines.append(
            Line(
                stage.name,
                [flops / read],
                [flops / stage.milliseconds_p50 / 1e6],
                style,
                details=[f"{stage.name}\n{stage.milliseconds_p50:.4g} ms, floor {stage.floor_ms or 0.0:.3g} ms"],
                connected=False,
            )
        )
    if lines:
        lines.append(roof_line([line.x[0] for line in lines], rates.gflops, rates.gigabytes_per_second))
    return Chart(
        key="roofline",
        title="Roofline of the stages",
        note="Least operations and bytes; the roof is what this machine reached in a product and a copy.",
        x_title="operations per byte",
        y_title="GFLOP/s of the least work",
        lines=lines,
        y_log=True,
        empty="No stage's least work is known: that of ADRec with attention is.",
    )


def _cells(stage: Stage) -> list[Cell]:
    values: list[float | str | None] = [
        stage.name,
        stage.calls,
        stage.milliseconds_p50,
        stage.milliseconds_p95,
        stage.share,
        stage.floor_ms,
        stage.floor_bound,
        stage.floor_fraction,
    ]
    return [Cell(text, value) for text, value in zip(stage_cells(stage), values, strict=True)]
