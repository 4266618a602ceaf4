"""HTML of headings with link anchors, and of tables that the page sorts, filters and gives as CSV. All is escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Head:
    """A column's title; ``ends`` says that its cells may have an interval, which CSV gives two columns of their own."""

    title: str
    numeric: bool = True
    ends: bool = False


@dataclass(frozen=True)
class Cell:
    """What is shown, what is sorted by and written to CSV (None for nothing), and the ends of an interval if any."""

    text: str
    value: float | str | None
    ends: tuple[float, float] | None = None
    error: bool = False


@dataclass(frozen=True)
class TableRow:
    """Cells in the order of the heads; ``facets`` are the values that the page's filters know the row by."""

    cells: Sequence[Cell]
    facets: Mapping[str, str] = field(default_factory=dict)


def sortable_table(name: str, label: str, heads: Sequence[Head], rows: Sequence[TableRow]) -> str:
    """Return a table in a box that scrolls, with a button that downloads its shown rows as ``name``."""
    head = "".join(
        f'<th scope="col"{_kind(each.numeric)}{" data-ends" if each.ends else ""}>'
        f'<button type="button">{html.escape(each.title)}</button></th>'
        for each in heads
    )
    body = "".join(
        f"<tr{_data(row.facets)}>"
        f"{''.join(_cell(cell, head.numeric) for cell, head in zip(row.cells, heads, strict=True))}</tr>"
        for row in rows
    )
    return (
        f'<div class="rows"><p class="tools"><button type="button" class="csv" data-name="{_quoted(name)}">Download CSV'
        f'</button> <span class="soft count" role="status">{len(rows)} of {len(rows)} rows</span></p>'
        f"{scroll_box(label, f'<thead><tr>{head}</tr></thead><tbody>{body}</tbody>')}</div>"
    )


def scroll_box(label: str, table: str) -> str:
    """Return a table (its inner HTML) in a box that scrolls by itself, by keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{_quoted(label)}"><table>{table}</table></div>'


def heading(level: int, anchor: str, text: str) -> str:
    """Return a heading with a link to itself."""
    shown = html.escape(text)
    return f'<h{level} id="{anchor}"><span>{shown}</span> {anchor_link(anchor, text)}</h{level}>'


def anchor_link(anchor: str, text: str) -> str:
    """Return the small link beside a heading."""
    return f'<a class="anchor" href="#{anchor}" aria-label="Link to {_quoted(text)}">#</a>'


def _cell(cell: Cell, numeric: bool) -> str:
    kind = ' class="error"' if cell.error else _kind(numeric)
    value = "" if cell.value is None else str(cell.value)
    ends = {} if cell.ends is None else {"low": str(cell.ends[0]), "high": str(cell.ends[1])}
    return f"<td{kind}{_data({'sort': value, **ends})}>{html.escape(cell.text)}</td>"


def _data(values: Mapping[str, str]) -> str:
    return "".join(f' data-{name}="{_quoted(value)}"' for name, value in values.items())


def _kind(numeric: bool) -> str:
    return "" if numeric else ' class="words"'


def _quoted(text: str) -> str:
    return html.escape(text, quote=True)
