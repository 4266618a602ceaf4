"""The report as Markdown, for reading in a terminal or a pull request."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.page_parts import facts_of
from bench.recommendation import budget_table, recommendation
from bench.record import TradeoffRecord
from bench.tables import Column, accuracy_columns, accuracy_rows, main_columns


def markdown_of(studies: Sequence[Sequence[TradeoffRecord]], title: str, command: str, picture: str | None) -> str:
    """Return the report as Markdown; ``picture`` is the name of the PNG beside it, if any."""
    parts = [f"# {title}"]
    if picture is not None:
        # Angle brackets let the name hold spaces and parentheses.
        parts.append(f"![Charts of the first study](<{picture}>)")
    for records in studies:
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
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", command)), 3)
    parts += ["## Make this report again", f"{fence}\n{command}\n{fence}"]
    return "\n\n".join(parts) + "\n"


def _budgets(records: Sequence[TradeoffRecord]) -> str:
    lines = ["| batch | Pareto front, fast to slow | knee | most accurate under |", "|---:|---|---|---|"]
    for size, front, bend, best in budget_table(records):
        under = "; ".join(f"{budget:g} ms: {label}" for budget, label in best) or "none within a second"
        lines.append(f"| {size} | {escaped(front)} | {escaped(bend)} | {escaped(under)} |")
    return "\n".join(lines)


def _table(columns: Sequence[Column], records: Sequence[TradeoffRecord]) -> str:
    # A column that is empty in every row only makes the table wider.
    used = [column for column in columns if any(column.text(record) for record in records)]
    lines = [
        "| " + " | ".join(escaped(column.title) for column in used) + " |",
        "|" + "|".join("---:" if column.numeric else "---" for column in used) + "|",
    ]
    lines += ["| " + " | ".join(escaped(column.text(record)) for column in used) + " |" for record in records]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text of one line in which nothing is Markdown."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", flat)
