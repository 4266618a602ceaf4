"""HTML of one study: recommendation, chart places, tables, machine and protocol. Every value is escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence

from bench.charts import Chart
from bench.environment import Environment
from bench.recommendation import budget_table, counted, recommendation
from bench.record import TradeoffRecord
from bench.tables import Column, accuracy_columns, accuracy_rows, main_columns

SHORT = 12


def study_section(
    records: Sequence[TradeoffRecord], index: int, sizes: Sequence[int], name: str, charts: Sequence[Chart]
) -> str:
    """Return the section of a study; ``index`` ties its charts to the page's figure data."""
    return "\n".join(
        [
            f"<section><h2>{html.escape(name)}</h2>",
            _advice(recommendation(records), len([size for size in sizes if size])),
            _batch_choice(index, sizes),
            '<div class="charts">',
            *(figure_place(index, place, chart.title, chart.note) for place, chart in enumerate(charts)),
            "</div>",
            "<h2>Pareto front and budgets</h2>",
            _budgets(records),
            "<h2>All rows</h2>",
            '<p class="soft">Select a heading to sort. Brackets are 95 % intervals.</p>',
            _table(main_columns(), records),
            "<details><summary>All nine metrics</summary>",
            _table(accuracy_columns(), accuracy_rows(records)),
            "</details>",
            "<h2>Machine and protocol</h2>",
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
        ("Processor", machine.processor),
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
        f"full ranking over {record.dataset_items} items, bootstrap over {accuracy.users} users; measured "
        f"with the {accuracy.measured_with} engine; overlap is with {accuracy.top20_overlap_against}; engine "
        "agreement is the overlap of a row's engine with the measuring one on sampled users, on which the "
        "overlap of a row's own engine with the exact result is measured too"
    )


def _advice(sentences: Sequence[str], choices: int) -> str:
    leading = "".join(f'<p class="choice">{html.escape(each)}</p>' for each in sentences[:choices])
    rest = "".join(f"<li>{html.escape(each)}</li>" for each in sentences[choices:])
    return f'<div class="advice">{leading}<ul>{rest}</ul></div>'


def _batch_choice(index: int, sizes: Sequence[int]) -> str:
    options = "".join(f'<option value="{size}">{size}</option>' for size in sizes)
    return (
        f'<div class="pick"><label for="batch-{index}">Batch size of the latency charts</label>'
        f'<select id="batch-{index}">{options}</select></div>'
    )


def figure_place(index: int, place: int, title: str, note: str) -> str:
    """Return where the page draws figure ``place`` of study ``index``."""
    title = html.escape(title)
    return (
        f'<figure><h3>{title}</h3><div class="plot" role="img" aria-label="{title}" data-study="{index}" '
        f'data-chart="{place}"></div><figcaption>{html.escape(note)}</figcaption></figure>'
    )


def _budgets(records: Sequence[TradeoffRecord]) -> str:
    rows = []
    for size, front, bend, best in budget_table(records):
        under = "; ".join(f"{budget:g} ms: {label}" for budget, label in best) or "none within a second"
        cells = "".join(f'<td class="words">{html.escape(each)}</td>' for each in (front, bend, under))
        rows.append(f"<tr><td>{size}</td>{cells}</tr>")
    heads = "".join(
        f'<th class="words">{each}</th>' for each in ("Pareto front, fast to slow", "knee", "most accurate under")
    )
    return (
        f'<div class="scroll"><table><thead><tr><th>batch</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _table(columns: Sequence[Column], records: Sequence[TradeoffRecord]) -> str:
    heads = "".join(
        f'<th scope="col"{"" if each.numeric else _WORDS}><button type="button">{html.escape(each.title)}</button></th>'
        for each in columns
    )
    rows = "".join(f"<tr>{''.join(_cell(each, record) for each in columns)}</tr>" for record in records)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(column: Column, record: TradeoffRecord) -> str:
    value = column.sort(record)
    sort = "" if value is None else html.escape(str(value), quote=True)
    kind = "" if column.numeric else _WORDS
    if column.title == "error" and value:
        kind = ' class="error"'
    return f'<td{kind} data-sort="{sort}">{html.escape(column.text(record))}</td>'


def facts_box(facts: Sequence[tuple[str, str]]) -> str:
    """Return a box of (name, value) pairs."""
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts)
    return f'<div class="box"><dl>{rows}</dl></div>'


_WORDS = ' class="words"'
