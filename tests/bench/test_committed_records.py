"""Committed records say which command made them, and name no place of the machine that did."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

RECORDS = Path(__file__).resolve().parents[2] / "bench" / "records"
NOTES = RECORDS / "README.md"


@pytest.mark.parametrize("path", sorted(RECORDS.iterdir()), ids=lambda path: path.name)
def test_a_record_holds_no_absolute_path(path: Path) -> None:
    found = re.findall(r"""(?<=[\s"'=])[/~]+[A-Za-z][\w.-]*/[^\s"']*""", path.read_text(encoding="utf-8"))
    assert found == []


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*.*")), ids=lambda path: path.name)
def test_a_record_says_what_made_it(path: Path) -> None:
    listed = re.findall(r"`([^`]*)`", "\n".join(re.findall(r"^\| (.*?) \|", NOTES.read_text("utf-8"), re.MULTILINE)))
    inside = re.search(r'"command": ?"\w', path.read_text(encoding="utf-8")) and path.suffix in (".json", ".jsonl")
    assert inside or path == NOTES or any(path.match(pattern) for pattern in listed)
