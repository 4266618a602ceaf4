"""Boxes by which a reader of a page chooses what it shows: of engines and precisions in charts and tables, of batch
sizes in tables. All is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

LEGENDS = {"engine": "Engines", "path": "Paths", "precision": "Precision", "batch": "Batch size in the table"}


def filter_boxes(rows: Sequence[Mapping[str, str]], names: Sequence[str]) -> str:
    """A box for each value that rows have of each facet (of `LEGENDS`), numbers by size; none for an empty value."""
    groups = []
    for name in names:
        values = sorted({row.get(name, "") for row in rows} - {""}, key=_order)
        if values:
            boxes = "".join(_box(name, value) for value in values)
            groups.append(f"<fieldset><legend>{LEGENDS[name]}</legend>{boxes}</fieldset>")
    return "".join(groups)


def filter_group(index: int, choices: str) -> str:
    """The choices (inner HTML) of study ``index``, with a button that undoes them."""
    return (
        f'<div class="pick" role="group" aria-label="Filters" data-study="{index}">{choices}'
        '<button type="button" class="reset">Show all</button></div>'
    )


def _box(name: str, value: str) -> str:
    shown = html.escape(value, quote=True)
    return f'<label><input type="checkbox" name="{name}" value="{shown}" autocomplete="off" checked> {shown}</label>'


def _order(value: str) -> tuple[int, str]:
    return (int(value), "") if value.isdecimal() else (0, value)
