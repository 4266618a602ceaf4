"""Committed records name no place of the machine that made them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

RECORDS = Path(__file__).resolve().parents[2] / "bench" / "records"


@pytest.mark.parametrize("path", sorted(RECORDS.iterdir()), ids=lambda path: path.name)
def test_a_record_holds_no_absolute_path(path: Path) -> None:
    found = re.findall(r"""(?<=[\s"'=])[/~]+[A-Za-z][\w.-]*/[^\s"']*""", path.read_text(encoding="utf-8"))
    assert found == []
