"""Finding the line of a text file that a message must name.

Reading is done by Polars in bulk, which knows rows at best. Only when something is wrong is the file read
again line by line, so that good files do not pay for it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from adrec.data.csv_text import LONGEST_FIELD, csv_rows
from adrec.data.json_text import parse_json

BYTE_ORDER_MARK = "\ufeff"


def line_of_row(path: Path, row: int, layout: str, separator: str) -> int:
    """Return the 1-based line on which data row ``row`` (0-based) starts.

    layout: ``"quoted"`` (header line, CSV quoting), ``"header"`` (header line, no quoting), ``"bare"`` (no
    header) or ``"json"`` (blank lines are no rows).
    """
    if layout == "quoted":
        header = True
        with suppress(csv.Error):
            for start, fields, _ in _records(path, separator):
                if header:
                    # Blank lines before the header are no rows; after it they are (empty) rows.
                    header = not fields
                elif row == 0:
                    return start
                else:
                    row -= 1
        return 1
    if layout == "json":
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                if row == 0:
                    return number
                row -= 1
        return 1
    return row + (2 if layout == "header" else 1)


def malformed_line(path: Path, layout: str, separator: str, width: int) -> tuple[int, str] | None:
    """Return the first line that cannot be read, and why; ``None`` when every line looks fine.

    width: number of fields in a row (ignored for JSON).
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as error:
                return number, f"byte {raw[error.start]:#04x} is not UTF-8; convert the file to UTF-8"
    if layout == "json":
        for number, line in enumerate(_lines(path), start=1):
            if not line.strip():
                continue
            try:
                if not isinstance(parse_json(line, constants=False), dict):
                    return number, f"expected a JSON object, found {line.strip()[:40]!r}"
            except ValueError as error:
                return number, f"not a JSON object ({error})"
        return None
    if layout != "quoted":
        for number, line in enumerate(_lines(path), start=1):
            if line.count(separator) >= width:
                return number, f"{line.count(separator) + 1} fields, expected {width}"
        return None
    number, text = 1, ""
    try:
        for number, fields, text in _records(path, separator):
            if len(fields) > width:
                return (
                    number,
                    f"{len(fields)} fields, the header has {width}; quote values that hold the separator",
                )
            if text.count('"') % 2:
                return number, "a quote is opened and not closed; double a quote that is part of a value"
            if not _is_strict(text, separator):
                return number, "text stands behind a closing quote; double a quote that is part of a value"
    except csv.Error:
        longest = f"{LONGEST_FIELD >> 20} MiB"
        return number + text.count("\n"), f"a field is longer than {longest}; is a quote opened and not closed?"
    return None


def row_note(path: Path, number: int, layout: str, separator: str, width: int) -> str:
    """Return what explains a value that is missing from line ``number``: its fields, or the keys of its object."""
    line = next(islice(_lines(path), number - 1, None), "")
    if layout == "json":
        try:
            return f" (keys: {', '.join(list(parse_json(line))[:20])})"
        except ValueError:
            return ""
    fields = line.count(separator) + 1
    return f" ({fields} fields, expected {width})" if layout != "quoted" and fields != width else ""


def _lines(path: Path) -> Iterator[str]:
    # Only "\n" ends a line here: U+2028 and a lone "\r" inside a value must not shift the numbers.
    with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
        yield from file


def _records(path: Path, separator: str) -> Iterator[tuple[int, list[str], str]]:
    """Yield start line, fields and raw text of each CSV record."""
    text: list[str] = []

    def remembered() -> Iterator[str]:
        for line in _lines(path):
            text.append(line)
            yield line

    start = 1
    # What Polars takes for part of a value and Python's reader refuses.
    plain = (re.sub(r"\r(?!\n)|\0", " ", line) for line in remembered())
    for fields in csv_rows(plain, separator):
        yield start, fields, "".join(text)
        start += len(text)
        text.clear()


def _is_strict(record: str, separator: str) -> bool:
    """Whether quotes stand only where Polars takes them."""
    try:
        return bool(list(csv_rows([record], separator, strict=True)))
    except csv.Error as error:
        return "expected after" not in str(error)
