"""Sections of a report for records other than trade-offs: a kind's rows as a table, and what has a curve as a chart."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.archive import AnyRecord
from bench.calibration import CalibrationRecord, describe
from bench.chart import Chart
from bench.comparing.rows import Row, rows_in
from bench.compression.record import CompressRecord
from bench.compression.slower import slower_sentences
from bench.filters import LEGENDS, filter_boxes, filter_group
from bench.growth_table import growth_table
from bench.html_tables import Cell, Head, TableRow, heading, sortable_table
from bench.kernels.records import CPU_NOTE, EngineRecord, KernelRecord
from bench.kind_charts import charts_of_kind
from bench.markdown import escaped, markdown_table
from bench.page_parts import facts_box, figure_place, machine_facts
from bench.plotly_figures import plotly_figure
from bench.profiling.page import HEADS, WORDS, charts_of, section_of, sentences, stage_cells, subtitle
from bench.profiling.record import ProfileRecord
from bench.recommendation import METRIC
from bench.record import Accuracy, Estimate
from bench.scaling.record import ScalingRecord

METRICS = (METRIC, "HR@20")
UNLEARNED = "Rows without data are of random models, which learned nothing: they have no accuracy."
TITLES = {
    "kernel": "Kernels",
    "engine": "Engines",
    "serving": "Serving scenarios",
    "scaling": "Growth",
    "training": "Training speed",
    "compress": "Compressed models",
}


@dataclass(frozen=True)
class Section:
    """One kind of records on one machine, or one profile: HTML with places of ``figures``, and Markdown."""

    html: str
    figures: dict[str, list[dict[str, Any]]]
    markdown: str
    title: str
    charts: Sequence[Chart] = ()


def sections_of(records: Iterable[AnyRecord], first: int) -> list[Section]:
    """A section for each kind and machine, in the order of the records; ``first`` is the number of the first one."""
    groups: dict[tuple[str, ...], list[AnyRecord]] = {}
    for record in _last_of_each(records):
        # Profiles are not rows of one table.
        alone = (record.measured_at_utc, record.command) if isinstance(record, ProfileRecord) else ()
        groups.setdefault((record.kind, record.environment.machine.kind, *alone), []).append(record)
    kinds = Counter(kind for kind, *_ in groups)
    machines = [machine if kinds[kind] > 1 else "" for kind, machine, *_ in groups]
    return [
        _section(group, first + place, machine)
        for place, (group, machine) in enumerate(zip(groups.values(), machines, strict=True))
    ]


def _last_of_each(records: Iterable[AnyRecord]) -> list[AnyRecord]:
    """Records but those that a later one, of the same rows and machine, replaces: `compare` counts the last too."""
    kept: dict[object, AnyRecord] = {}
    for record in records:
        rows = tuple(row.key for row in rows_in(record))
        key = (record.environment.machine.kind, *rows) if rows else id(record)
        kept.pop(key, None)
        kept[key] = record
    return list(kept.values())


def _section(records: Sequence[AnyRecord], index: int, machine_kind: str) -> Section:
    """machine_kind: named in the title, where others have the kind of these records too; else empty."""
    first = records[-1]
    if isinstance(first, ProfileRecord):
        listed = "\n".join(f"- {escaped(sentence)}" for sentence in sentences(first))
        heads = [Head(name, numeric=place not in WORDS) for place, name in enumerate(HEADS)]
        table = markdown_table(heads, [stage_cells(stage) for stage in first.stages])
        text = f"## {escaped(subtitle(first))}\n\n{listed}\n\n{table}"
        return Section(*section_of(first, index), text, subtitle(first), charts_of(first))
    if isinstance(first, CalibrationRecord):
        return _calibration(first, index)
    charts = charts_of_kind(records)
    anchor, title = f"study-{index + 1}", TITLES[first.kind]
    if all(isinstance(record, KernelRecord) and record.protocol.device == "cpu" for record in records):
        title = f"{title} ({CPU_NOTE})"
    title = f"{title}, {machine_kind}" if machine_kind else title
    heads, rows = _table([row for record in records for row in rows_in(record)])
    machine = first.environment
    said = slower_sentences([record for record in records if isinstance(record, CompressRecord)])
    if any(isinstance(record, EngineRecord) and record.trained is None for record in records):
        said = [UNLEARNED]
    growing = [record for record in records if isinstance(record, ScalingRecord)]
    fits = [("Fitted growth", f"fits-{index + 1}.csv", *growth_table(growing))] if growing else []
    tables = [*fits, (title, f"{first.kind}-{index + 1}.csv", heads, rows)]
    facets = [row.facets for row in rows]
    choices = [name for name in LEGENDS if len({each[name] for each in facets} - {""}) > 1]
    places = "".join(figure_place(index, place, chart) for place, chart in enumerate(charts))
    parts = [
        "<section>",
        heading(2, anchor, title),
        f'<div class="advice">{"".join(f"<p>{html.escape(each)}</p>" for each in said)}</div>' if said else "",
        filter_group(index, filter_boxes(facets, choices)) if choices else "",
        f'<div class="charts">{places}</div>' if charts else "",
        *(sortable_table(name, label, heads, rows) for label, name, heads, rows in tables),
        heading(3, f"{anchor}-machine", "Machine"),
        facts_box(machine_facts(machine, machine.machine.threads)),
        "</section>",
    ]
    texts = [markdown_table(heads, [[cell.text for cell in row.cells] for row in rows]) for *_, heads, rows in tables]
    return Section(
        "\n".join(filter(None, parts)),
        {"all": [plotly_figure(chart) for chart in charts]},
        "\n\n".join(filter(None, [f"## {title}", "\n".join(f"- {escaped(each)}" for each in said), *texts])),
        title,
        charts,
    )


def _calibration(record: CalibrationRecord, index: int) -> Section:
    said = list(describe(record.noise))
    body = "".join(f"<p>{html.escape(each)}</p>" for each in said)
    text = f'<section>{heading(2, f"study-{index + 1}", "Calibration")}<div class="advice">{body}</div></section>'
    return Section(text, {"all": []}, "## Calibration\n\n" + "\n".join(f"- {escaped(each)}" for each in said), "")


def _table(rows: Sequence[Row]) -> tuple[list[Head], list[TableRow]]:
    keys = list(dict.fromkeys(name for row in rows for name, _ in row.key))
    numeric = {key: all(_is_number(dict(row.key).get(key, "0")) for row in rows) for key in keys}
    accurate, related = any(row.accuracy for row in rows), any(row.ratio for row in rows)
    overlapping = any(row.overlap is not None for row in rows)
    heads = [
        *(Head(key, numeric=numeric[key]) for key in keys),
        Head("median (ms)"),
        Head("p95 (ms)"),
        Head("rounds"),
        *([Head("time ratio to baseline", ends=True), Head("baseline", numeric=False)] if related else []),
        *([Head(f"{name} (%)", ends=True) for name in METRICS] if accurate else []),
        *([Head("users"), Head("accuracy measured with", numeric=False)] if accurate else []),
        *([Head("engine agreement"), Head("top-20 overlap with exact")] if accurate else []),
        *([Head("overlap of the batch's lists"), Head("with", numeric=False)] if overlapping else []),
        Head("error", numeric=False),
    ]
    return heads, [_row(row, keys, accurate, related, overlapping) for row in rows]


def _row(row: Row, keys: Sequence[str], accurate: bool, related: bool, overlapping: bool) -> TableRow:
    found = dict(row.key)
    median = float(np.median(row.rounds_ms)) if row.rounds_ms else None
    cells = [Cell(found.get(key, ""), found.get(key)) for key in keys]
    cells += [_number(median), _number(row.tail_ms), Cell(str(len(row.rounds_ms) or ""), len(row.rounds_ms) or None)]
    if related:
        cells += [_interval(row.ratio, 4), Cell(row.baseline, row.baseline or None)]
    if accurate:
        cells += _accuracy(row.accuracy)
    if overlapping:
        cells += [_number(row.overlap), Cell(row.overlap_with, row.overlap_with or None)]
    # A kernel's paths are no engines.
    path = found.get("path", "")
    facets = {
        "engine": found.get("engine", "" if "kernel" in found else path),
        "path": path if "kernel" in found else "",
        "precision": found.get("precision", found.get("dtype", "")),
        "batch": found.get("batch", ""),
    }
    return TableRow([*cells, Cell(row.error or "", row.error, error=bool(row.error))], facets)


def _accuracy(accuracy: Accuracy | None) -> list[Cell]:
    """Metrics with intervals, of whom and by what, and how far the row's engine agrees; dashes where there is none."""
    if accuracy is None:
        return [Cell("-", None)] * (len(METRICS) + 4)
    return [
        *(_interval(accuracy.metrics_percent.get(name), 2) for name in METRICS),
        Cell(str(accuracy.users), accuracy.users),
        Cell(accuracy.measured_with, accuracy.measured_with),
        _number(accuracy.engine_agreement_fraction),
        _number(accuracy.top20_overlap_fraction),
    ]


def _interval(found: Estimate | None, digits: int) -> Cell:
    if found is None:
        return Cell("", None)
    shown = f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"
    return Cell(shown, found.value, (found.low, found.high))


def _number(value: float | None) -> Cell:
    return Cell("" if value is None else f"{value:.4g}", value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
