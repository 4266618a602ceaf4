"""The report of records, trade-offs above all: one self-contained HTML page, Markdown and PNG beside it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from adrec.errors import DataError, NotSupportedError
from adrec.files import check_output, check_output_folder, write_bytes, write_text
from bench.archive import AnyRecord
from bench.chart import Chart
from bench.charts import charts_of
from bench.html_page import render_page
from bench.markdown import chart_links, markdown_of
from bench.other_kinds import Section, sections_of
from bench.page_parts import study_section
from bench.picture_files import charts_folder, names_of, write_charts
from bench.pictures import png_of
from bench.plotly_figures import plotly_figure
from bench.recommendation import batch_sizes, counted
from bench.record import TradeoffRecord, latest_records

TITLE = "Steps, speed and accuracy"
DEFAULT_NAME = "report.html"


def write_report(
    records: Sequence[AnyRecord],
    out: Path,
    *,
    command: str | None = None,
    notify: Callable[[str], None] | None = None,
) -> Path:
    """Write ``out`` (a ``.html`` file, or a folder for ``report.html``) with ``.md`` and ``.png`` beside it.

    Trade-offs have studies with charts and advice; records of other kinds have their rows in the page.
    The PNG is a sheet of the first study; each chart of all studies, batch sizes and kinds lies in ``report-charts``
    as a PNG and a Markdown table of its own.
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
    check_output_folder(charts_folder(page), "--out")
    studies = group_studies(latest_records([each for each in records if isinstance(each, TradeoffRecord)]))
    others = sections_of((each for each in records if not isinstance(each, TradeoffRecord)), len(studies))
    last = command or f"adrec bench report RECORDS --out {shlex.quote(page.name)}"
    remake = "\n".join(dict.fromkeys([*(record.command for record in records), last]))
    page.parent.mkdir(parents=True, exist_ok=True)
    title = TITLE if studies else "Measurements"
    measured = max(record.measured_at_utc for record in records)
    subtitle = f"adrec bench: {counted(len(records), 'record')}, last measured {measured}"
    write_text(page, page_of(studies, others, title, subtitle, remake))
    drawn, pictures = False, []
    try:
        drawable = [(study_name(records), _charts(records)) for records in studies]
        drawable += [(section.title, {chart.key: chart for chart in section.charts}) for section in others]
        pictures = write_charts(page, drawable)
        for name, charts in _sheets(studies, others):
            write_bytes(picture, png_of(charts, name))
            drawn = True
            break
    except NotSupportedError as error:
        (notify or _print)(str(error))
    if not drawn:
        # A picture of earlier records beside the new page would be taken for theirs.
        picture.unlink(missing_ok=True)
    beside = [[path.relative_to(page.parent).as_posix() for path in paths] for paths in pictures]
    texts = [
        section.markdown + (f"\n\n{chart_links(names)}" if names else "")
        for section, names in zip(others, beside[len(studies) :] or [[]] * len(others), strict=True)
    ]
    write_text(markdown, markdown_of(studies, title, remake, picture.name if drawn else None, beside, texts))
    return page


def _sheets(
    studies: Sequence[Sequence[TradeoffRecord]], others: Sequence[Section]
) -> Iterator[tuple[str, list[Chart]]]:
    """Title and charts of each part that has any; the first is drawn as the sheet."""
    for records in studies:
        if charts := [each for each in charts_of(records, (batch_sizes(records) or [0])[0]) if each.lines]:
            yield study_name(records), charts
    for section in others:
        if charts := [each for each in section.charts if each.lines]:
            yield section.title, charts


def _charts(records: Sequence[TradeoffRecord]) -> dict[str, Chart]:
    return names_of({size: charts_of(records, size) for size in batch_sizes(records) or [0]})


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


def page_of(
    studies: Sequence[Sequence[TradeoffRecord]], others: Sequence[Section], title: str, subtitle: str, command: str
) -> str:
    """Return the complete HTML page: studies of trade-offs, then records of other kinds."""
    sections, figures = [], []
    for index, records in enumerate(studies):
        sizes = batch_sizes(records) or [0]
        sections.append(study_section(records, index, sizes, study_name(records), charts_of(records, sizes[0])))
        figures.append({str(size): [plotly_figure(chart) for chart in charts_of(records, size)] for size in sizes})
    for section in others:
        sections.append(section.html)
        figures.append(section.figures)
    return render_page(title, subtitle, sections, figures, command)


def _print(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(message, markup=False, highlight=False)
