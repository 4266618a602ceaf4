"""Records of `bench/records`, chosen by what they hold, for the check of README's figures."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).resolve().parents[1] / "bench" / "records"
Values = tuple[float, ...]


class NoSuchRecordError(Exception):
    """Words of a page that choose no record, or several."""


@cache
def records(name: str) -> list[dict[str, Any]]:
    """All records of the files of a glob, in the order of their names."""
    found: list[dict[str, Any]] = []
    for path in sorted(RECORDS.glob(name)):
        text = path.read_text(encoding="utf-8")
        found.extend(json.loads(line) for line in (text.splitlines() if path.suffix == ".jsonl" else [text]))
    if not found:
        raise NoSuchRecordError(f"no record {name}")
    return found


def one(rows: list[dict[str, Any]], **wanted: object) -> dict[str, Any]:
    """The one row with these values; a name may be `a__b` for a value within a value."""

    def value(row: Any, name: str) -> object:
        for part in name.split("__"):
            row = row[part]
        return row

    found = [row for row in rows if all(value(row, name) == each for name, each in wanted.items())]
    if len(found) != 1:
        raise NoSuchRecordError(f"{len(found)} records of {wanted}")
    return found[0]


def triple(interval: dict[str, float]) -> Values:
    return interval["value"], interval["low"], interval["high"]


def words(pattern: str, text: str) -> re.Match[str]:
    """The parts of a label, which holds nothing else."""
    if (found := re.fullmatch(pattern, text.replace("*", ""))) is None:
        raise NoSuchRecordError(f"{text!r} is not of the form {pattern!r}")
    return found
