"""CSV from a user's file, cut into fields."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator

LONGEST_FIELD = 2**26
"""Characters; a quote that is never closed must not take in a whole file, as it would without a limit."""


def csv_rows(lines: Iterable[str], separator: str = ",", strict: bool = False) -> Iterator[list[str]]:
    """Yield the fields of each record of ``lines``; a blank line is an empty list.

    strict: also refuse text behind a closing quote. Raises csv.Error, in any case for a field beyond `LONGEST_FIELD`.
    """
    # Python's own limit, 128 KiB, is one for the whole process; a long history or review exceeds it.
    csv.field_size_limit(LONGEST_FIELD)
    return csv.reader(lines, delimiter=separator, strict=strict)
