"""The report as Markdown, for reading in a terminal or a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from bench.html_tables import Head
from bench.page_parts import facts_of
from bench.recommendation import budget_table, recommendation
from bench.record import TradeoffRecord
from bench.tables import Column, accuracy_columns, accuracy_rows, main_columns


def markdown_of(
    studies: Sequence[Sequence[TradeoffRecord]],
    title: str,
    command: str,
    picture: str | None,
    charts: Sequence[Sequence[str]] = (),
    others: Sequence[str] = (),
) -> str:
    """Return the report as Markdown; ``picture`` is the name of the PNG beside it, if any.

    charts: of each study, the PNG files of its charts, each with a ``.md`` of its numbers beside it. others: sections
    on records of other kinds, as Markdown.
    """
    parts = [f"# {title}"]
    if picture is not None:
        # Angle brackets let the name hold spaces and parentheses.
        parts.append(f"![Charts of the first study](<{picture}>)")
    for index, records in enumerate(studies):
        pictures = charts[index] if charts else ()
        first = records[0]
        parts += [
            f"## {escaped(f'{first.dataset_name} ({first.split}), {first.protocol.device}')}",
            "\n".join(f"- {escaped(each)}" for each in recommendation(records)),
            "### Pareto front and budgets",
            _budgets(records),
            "### All rows",
            _table(main_columns(), records),
            "### All nine metrics",
            _table(accuracy_columns(), accuracy_rows(records)),
            "### Machine and protocol",
            "\n".join(f"- {name}: {escaped(value)}" for name, value in facts_of(records)),
        ]
        if pictures:
            parts += ["### Charts", chart_links(pictures)]
    parts += others
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", command)), 3)
    parts += ["## Make this report again", f"{fence}\n{command}\n{fence}"]
    return "\n\n".join(parts) + "\n"


def chart_links(pictures: Sequence[str]) -> str:
    """A list of PNG files, each with the ``.md`` of its numbers beside it."""
    return "\n".join(
        f"- [{PurePosixPath(name).stem}](<{name}>), [numbers](<{name.removesuffix('.png')}.md>)" for name in pictures
    )


def _budgets(records: Sequence[TradeoffRecord]) -> str:
    lines = ["| batch | Pareto front, fast to slow | knee | most accurate under |", "|---:|---|---|---|"]
    for size, front, bend, best in budget_table(records):
        under = "; ".join(f"{budget:g} ms: {label}" for budget, label in best) or "none within a second"
        lines.append(f"| {size} | {escaped(front)} | {escaped(bend)} | {escaped(under)} |")
    return "\n".join(lines)


def markdown_table(heads: Sequence[Head], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts, a row a line."""
    lines = [
        "| " + " | ".join(escaped(head.title) for head in heads) + " |",
        "|" + "|".join("---:" if head.numeric else "---" for head in heads) + "|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(map(escaped, row)) + " |" for row in rows)])


def _table(columns: Sequence[Column], records: Sequence[TradeoffRecord]) -> str:
    # A column that is empty in every row only makes the table wider.
    used = [column for column in columns if any(column.text(record) for record in records)]
    heads = [Head(column.title, column.numeric) for column in used]
    return markdown_table(heads, [[column.text(record) for column in used] for record in records])


def escaped(text: str) -> str:
    """Text of one line in which nothing is Markdown."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", flat)
