"""The report of trade-off records: one self-contained HTML page, Markdown and PNG beside it."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console

from adrec.errors import DataError, NotSupportedError
from adrec.files import check_output, write_bytes, write_text
from bench.charts import charts_of
from bench.markdown import markdown_of
from bench.page_parts import study_section
from bench.pictures import png_of
from bench.plotly_figures import plotly_figure
from bench.recommendation import batch_sizes
from bench.record import TradeoffRecord, latest_records

TITLE = "Steps, speed and accuracy"
DEFAULT_NAME = "report.html"


def write_report(
    records: Sequence[TradeoffRecord],
    out: Path,
    *,
    command: str | None = None,
    notify: Callable[[str], None] | None = None,
) -> Path:
    """Write ``out`` (a ``.html`` file, or a folder for ``report.html``) with ``.md`` and ``.png`` beside it.

    Returns the path of the page. ``command`` is the line that makes the report again. ``notify`` receives a
    message when the PNG cannot be drawn; `None` prints it on standard error. Raises DataError without
    records.
    """
    if not records:
        raise DataError("there are no records to report; `adrec bench tradeoff RUN` measures some")
    page = out if out.suffix.lower() in (".html", ".htm") else out / DEFAULT_NAME
    picture, markdown = page.with_suffix(".png"), page.with_suffix(".md")
    for path in (page, picture, markdown):
        check_output(path, "--out", make_folder=True)
    studies = group_studies(latest_records(records))
    last = command or f"adrec bench report RECORDS --out {shlex.quote(page.name)}"
    remake = "\n".join(dict.fromkeys([*(record.command for record in records), last]))
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, page_of(studies, remake))
    first = studies[0]
    drawn = True
    try:
        charts = charts_of(first, (batch_sizes(first) or [0])[0])
        write_bytes(picture, png_of(charts, study_name(first)))
    except NotSupportedError as error:
        # A picture of earlier records beside the new page would be taken for theirs.
        picture.unlink(missing_ok=True)
        drawn = False
        (notify or _print)(str(error))
    write_text(markdown, markdown_of(studies, TITLE, remake, picture.name if drawn else None))
    return page


def group_studies(records: Sequence[TradeoffRecord]) -> list[list[TradeoffRecord]]:
    """Split records into groups whose rows may be compared: same run, data, machine, device, threads."""
    groups: dict[tuple[str | int, ...], list[TradeoffRecord]] = {}
    for record in records:
        groups.setdefault(record.study, []).append(record)
    return list(groups.values())


def study_name(records: Sequence[TradeoffRecord]) -> str:
    """Name a study by its data, split and device."""
    first = records[0]
    return f"{first.dataset_name} ({first.split}), {first.protocol.device}"


def page_of(studies: Sequence[Sequence[TradeoffRecord]], command: str) -> str:
    """Return the complete HTML page."""
    sections, figures = [], []
    for index, records in enumerate(studies):
        sizes = batch_sizes(records) or [0]
        sections.append(study_section(records, index, sizes, study_name(records), charts_of(records, sizes[0])))
        figures.append(
            {
                str(size): [plotly_figure(chart) | {"title": chart.title} for chart in charts_of(records, size)]
                for size in sizes
            }
        )
    rows = sum(len(records) for records in studies)
    measured = max(record.measured_at_utc for records in studies for record in records)
    return render_page(TITLE, f"adrec bench: {rows} rows, last measured {measured}", sections, figures, command)


def render_page(
    title: str, subtitle: str, sections: Sequence[str], figures: Sequence[Mapping[str, Any]], command: str
) -> str:
    """Return a self-contained page with Plotly inlined.

    sections: HTML, with places of `bench.page_parts.figure_place`. figures: for each study, Plotly figures by batch
    size, or by ``all`` where there is no choice of one.
    """
    from plotly.offline import get_plotlyjs

    parts = {
        "title": html.escape(title),
        "subtitle": html.escape(subtitle),
        "studies": "\n".join(sections),
        "command": html.escape(command),
        "plotly": get_plotlyjs(),
        # "<" would let a value end the script element.
        "figures": json.dumps(figures, allow_nan=False).replace("<", "\\u003c"),
    }
    template = resources.files("bench").joinpath("report_template.html").read_text(encoding="utf-8")
    # One pass: a value that looks like a placeholder is not replaced again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match.group(1)], template)


def _print(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(message, markup=False, highlight=False)
