"""HTML of one study: recommendation, chart places, tables, machine and protocol. Every value is escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence

from adrec.environment import Environment
from bench.chart import Chart
from bench.filters import filter_boxes, filter_group
from bench.html_tables import Cell, Head, TableRow, anchor_link, heading, scroll_box, sortable_table
from bench.recommendation import budget_table, counted, recommendation
from bench.record import TradeoffRecord
from bench.tables import Column, accuracy_columns, accuracy_rows, main_columns

SHORT = 12


def study_section(
    records: Sequence[TradeoffRecord], index: int, sizes: Sequence[int], name: str, charts: Sequence[Chart]
) -> str:
    """Return the section of a study; ``index`` ties its charts to the page's figure data."""
    anchor = f"study-{index + 1}"
    return "\n".join(
        [
            "<section>",
            heading(2, anchor, name),
            _advice(recommendation(records), len([size for size in sizes if size])),
            heading(3, f"{anchor}-charts", "Charts"),
            _filters(records, index, sizes),
            '<div class="charts">',
            *(figure_place(index, place, chart) for place, chart in enumerate(charts)),
            "</div>",
            heading(3, f"{anchor}-budgets", "Pareto front and budgets"),
            _budgets(records),
            heading(3, f"{anchor}-rows", "All rows"),
            '<p class="soft">Select a heading to sort. Brackets are 95 % intervals. The filters above the charts hold '
            "here too.</p>",
            _table(f"rows-{index + 1}.csv", "All rows", main_columns(), records),
            "<details><summary>All nine metrics</summary>",
            _table(f"metrics-{index + 1}.csv", "All nine metrics", accuracy_columns(), accuracy_rows(records)),
            "</details>",
            heading(3, f"{anchor}-protocol", "Machine and protocol"),
            facts_box(facts_of(records)),
            "</section>",
        ]
    )


def facts_of(records: Sequence[TradeoffRecord]) -> list[tuple[str, str]]:
    """Return (name, value) pairs on machine, versions, protocol, data and model of a study."""
    timed = [record for record in records if record.timing]
    first = (timed or list(records))[0]
    memory = next((record.timing.peak_memory_meaning for record in timed if record.timing), "not measured")
    return [
        *machine_facts(first.environment, first.protocol.threads),
        ("Timing", _timing_words(first, timed)),
        (
            "Ratios",
            "median over rounds of the ratio to the baseline in the same round, bootstrap over rounds",
        ),
        ("Batches", "real histories of the split, drawn with a fixed seed and rotated"),
        ("Peak memory", memory),
        ("Accuracy", _accuracy_words(records)),
        (
            "Data",
            f"{first.dataset_name}, fingerprint {first.dataset_fingerprint[:SHORT]}, {first.split} split",
        ),
        ("Model", f"{first.model}, fingerprint {first.run_fingerprint[:SHORT]}, {first.precision}"),
    ]


def machine_facts(environment: Environment, threads: int) -> list[tuple[str, str]]:
    """Return (name, value) pairs on hardware, system, versions and revision."""
    machine, revision, versions = environment.machine, environment.revision, environment.versions
    state = {True: "with uncommitted changes", False: "clean", None: "state unknown"}[revision.dirty]
    cores = (
        f"{machine.cores_physical or 'unknown'} physical, {machine.cores_logical} logical, "
        f"{machine.cores_usable} usable; {counted(threads, 'thread')} used"
    )
    accelerators = [f"{each.name}, {each.memory_gib} GiB, driver {each.driver}" for each in machine.accelerators]
    load = machine.load_one_minute
    return [
        ("Processor", machine.kind),
        ("Cores", cores),
        ("Memory", "unknown" if machine.memory_gib is None else f"{machine.memory_gib} GiB"),
        ("System", machine.system),
        ("Frequency governor", machine.governor or "not readable"),
        ("Load before", "unknown" if load is None else f"{load} (1 minute)"),
        ("Accelerators", "; ".join(accelerators) or "none"),
        ("Versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value)),
        ("Revision", f"{revision.git}, {state}" if revision.git else "no commit known"),
    ]


def _timing_words(record: TradeoffRecord, timed: Sequence[TradeoffRecord]) -> str:
    protocol = record.protocol
    minima = sorted({each.protocol.rounds_minimum for each in timed}, reverse=True)
    return (
        f"{protocol.clock}; {'interleaved A B A B' if protocol.interleaved else 'one after the other'}; "
        f"{protocol.seconds_per_cell:g} s a cell and at least {' or (slow batches) '.join(map(str, minima))} "
        f"rounds; {protocol.warmup_calls} warm-up calls (1 where a call exceeds the budget); quantiles "
        f"over single calls; top {protocol.results_per_user}"
    )


def _accuracy_words(records: Sequence[TradeoffRecord]) -> str:
    found = next(((each, each.accuracy) for each in records if each.accuracy and each.steps), None)
    if found is None:
        return "not measured"
    record, accuracy = found
    return (
        f"full ranking over {record.dataset_items} items, bootstrap over {accuracy.users} users; measured with the"
        f" {accuracy.measured_with} engine, or a row's own where that rounds; overlap is with"
        f" {accuracy.top20_overlap_against}; engine agreement is the overlap of a row's engine with the measuring one"
        " on sampled users, on which the overlap of a row's own engine with the exact result is measured too"
    )


def _advice(sentences: Sequence[str], choices: int) -> str:
    leading = "".join(f'<p class="choice">{html.escape(each)}</p>' for each in sentences[:choices])
    rest = "".join(f"<li>{html.escape(each)}</li>" for each in sentences[choices:])
    return f'<div class="advice">{leading}<ul>{rest}</ul></div>'


def _filters(records: Sequence[TradeoffRecord], index: int, sizes: Sequence[int]) -> str:
    """Boxes of a study's engines and precisions, and which batch its charts draw."""
    options = "".join(f'<option value="{size}">{size}</option>' for size in sizes)
    batch = (
        f'<label>Batch size <select name="batch" autocomplete="off">{options}</select></label>'
        '<label><input type="checkbox" name="every" autocomplete="off" checked> every batch size in the table</label>'
    )
    return filter_group(index, batch + filter_boxes([_facets(record) for record in records], ("engine", "precision")))


def _facets(record: TradeoffRecord) -> dict[str, str]:
    """What the filters know a row by; empty where a row stays whatever they say."""
    return {
        "engine": record.engine or "",
        "precision": "" if record.engine is None else record.precision,
        "batch": "" if record.batch_size_users is None else str(record.batch_size_users),
    }


def figure_place(index: int, place: int, chart: Chart) -> str:
    """Return where the page draws figure ``place`` of study ``index``, or says why it is empty."""
    title, anchor = html.escape(chart.title), f"study-{index + 1}-{chart.key}"
    label = html.escape(f"{chart.title}: its values are in the table of rows", quote=True)
    return (
        f'<figure id="{anchor}"><h3><span class="title">{title}</span> {anchor_link(anchor, chart.title)}</h3>'
        f'<div class="plot" role="img" aria-label="{label}" data-study="{index}" data-chart="{place}"></div>'
        f'<p class="none" hidden></p><figcaption>{html.escape(chart.note)}</figcaption></figure>'
    )


def _budgets(records: Sequence[TradeoffRecord]) -> str:
    rows = []
    for size, front, bend, best in budget_table(records):
        under = "; ".join(f"{budget:g} ms: {label}" for budget, label in best) or "none within a second"
        cells = "".join(f'<td class="words">{html.escape(each)}</td>' for each in (front, bend, under))
        rows.append(f"<tr><td>{size}</td>{cells}</tr>")
    heads = "".join(
        f'<th scope="col" class="words">{each}</th>'
        for each in ("Pareto front, fast to slow", "knee", "most accurate under")
    )
    return scroll_box(
        "Pareto front and budgets",
        f'<thead><tr><th scope="col">batch</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody>',
    )


def _table(name: str, label: str, columns: Sequence[Column], records: Sequence[TradeoffRecord]) -> str:
    # A column that is empty in every row only makes the table wider.
    used = [column for column in columns if any(column.text(record) for record in records)]
    return sortable_table(
        name,
        label,
        [Head(column.title, column.numeric, column.ends is not None) for column in used],
        [TableRow([_cell(column, record) for column in used], _facets(record)) for record in records],
    )


def _cell(column: Column, record: TradeoffRecord) -> Cell:
    value = column.sort(record)
    ends = None if column.ends is None else column.ends(record)
    return Cell(column.text(record), value, ends, error=column.title == "error" and bool(value))


def facts_box(facts: Sequence[tuple[str, str]]) -> str:
    """Return a box of (name, value) pairs."""
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts)
    return f'<div class="box"><dl>{rows}</dl></div>'
