"""Histories that cannot be read: a message that names the file, the line and the way out."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from adrec.cli import build_app
from adrec.errors import DataError
from adrec.streaming import read_histories


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "user,item\na,1\nb,2\na,3\n", r"a\.csv, line 4: user 'a' comes back; sort the file by user"),
        ("a.csv", "user,item\na,1\nb\n", r"a\.csv, line 3: no value for column 'item'"),
        ("a.csv", "user,history\na,[1\n", r"a\.csv, line 2: 'history' starts with '\['"),
        ("a.csv", 'user,history\na,"[1, null]"\n', r"a\.csv, line 2: 'history' is '\[1, None\]'"),
        ("a.csv", "user,history\na,1 2\n\"b,1\n", r"a\.csv, line 3: not readable as CSV"),
        ("a.csv", "user,history\nu1,1,2,3\n", r"line 2: 4 fields, the header has 2; quote a history that"),
        ("a.csv", "user,item\nu1,1\nu1,1,2\n", r"line 3: 3 fields, the header has 2"),
        ("a.csv", "history,user\n1 2,a\n3\n", r"line 3: no value for column 'user'"),
        ("a.csv", "user,history,history\na,1,2\n", r"a\.csv: column 'history' stands 2 times; keep one of them"),
        ("a.csv", "user,item,user\na,1,b\n", r"a\.csv: column 'user' stands 2 times"),
        ("a.csv", "user,item,item\na,1,2\n", r"a\.csv: column 'item' stands 2 times"),
        ("a.csv", "user,history\ra,1\r", r"line 1: not readable as CSV: a carriage return without a line feed"),
        ("a.csv", 'user,history\na,"[""\\ud800""]"\n', r"line 2: .*half of a surrogate pair"),
        ("a.jsonl", '{"user": "\\ud800", "history": [1]}\n', r"line 1: not JSON: \\ud800 is half of a surrogate pair"),
        ("a.jsonl", '{"history": ["a\\ud800"]}\n', r"line 1: not JSON: .*half of a surrogate pair"),
        ("a.jsonl", '{"history": [true]}\n', r"line 1: 'history' is '\[True\]'"),
        ("a.csv", "name,thing\na,1\n", r"a\.csv: columns are name, thing; expected 'history', or 'user' and 'item'"),
        ("a.csv", "", r"a\.csv: columns are none"),
        ("a.jsonl", '{"history": [1]}\n{"history": [1}\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"history": [1]}\n\n[1]\n', r"a\.jsonl, line 3: expected an object with 'history'"),
        ("a.jsonl", '{"history": "1 2"}\n', r"a\.jsonl, line 1: 'history' is '1 2'; expected a list"),
        ("a.jsonl", '{"history": [1]}\n{"history": [1.5]}\n', r"a\.jsonl, line 2: 'history' is '\[1\.5\]'"),
        ("a.jsonl", '{"history": null}\n', r"a\.jsonl, line 1: 'history' is 'None'"),
        ("a.jsonl", '{"items": [1], "name": 2}\n', r"expected an object with 'history' .*found the keys items, name"),
        ("a.jsonl", '{"history": [1]}\n' + "[" * 100_000, r"a\.jsonl, line 2: not JSON: .*nested too deeply"),
        ("a.jsonl", '{"history": [' + "9" * 5000 + "]}\n", r"a\.jsonl, line 1: not JSON: .*thousands of digits"),
        ("a.jsonl", '{"user": 1.5, "history": [1]}\n', r"line 1: 'user' is '1.5'; expected text or an integer"),
        ("a.jsonl", '{"user": null, "history": [1]}\n', r"line 1: 'user' is 'None'"),
        ("a.jsonl", '{"user": true, "history": [1]}\n', r"line 1: 'user' is 'True'"),
        ("a.jsonl", '{"user": ["a"], "history": [1]}\n', r"line 1: 'user' is "),
        ("a.csv", 'user,history\na,"' + "[" * 100_000 + '"\n', r"a\.csv, line 2: 'history' starts .*nested too deeply"),
        ("a.parquet", "not parquet", r"a\.parquet: not a Parquet file"),
    ],
)  # fmt: skip
def test_malformed_input_names_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(DataError, match=message):
        list(read_histories(tmp_path / name))


@pytest.mark.parametrize("separator", [" ", ","])
def test_a_history_with_bare_commas_is_refused(integer_run: Path, tmp_path: Path, separator: str) -> None:
    (tmp_path / "x.csv").write_text("user,history\nu1,1,2,3\n", "utf-8")
    files = ["--input", str(tmp_path / "x.csv"), "--out", str(tmp_path / "r.jsonl")]
    with pytest.raises(DataError, match="4 fields, the header has 2"):
        CliRunner().invoke(
            build_app(), ["recommend", str(integer_run), *files, "--separator", separator], catch_exceptions=False
        )
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


@pytest.mark.parametrize("user", [None, b"ab", True, 1.5, ["a"], date(2020, 1, 1)])
def test_a_parquet_user_of_another_type_is_refused(tmp_path: Path, user: Any) -> None:
    pq.write_table(pa.table({"user": pa.array([user]), "history": [[1]]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, line 1: 'user' is .*; expected text or an integer"):
        list(read_histories(tmp_path / "a.parquet"))


def test_parquet_without_a_value_for_one_user_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": [7, None], "history": [[1], [2]]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"line 2: 'user' is 'None'"):
        list(read_histories(tmp_path / "a.parquet"))


def test_a_damaged_parquet_page_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"user": [f"user {k}" for k in range(2000)], "history": [[1]] * 2000}), path)
    content = bytearray(path.read_bytes())
    content[60:400] = bytes(340)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read after row 0 \(.*\); write the file again"):
        list(read_histories(path))


@pytest.mark.parametrize(
    ("name", "first", "bad"),
    [("a.csv", b"history\n1\n", b"\xff\xfe\n"), ("a.jsonl", b'{"history": [1]}\n' * 2, b'{"history": ["\xff"]}\n')],
)
def test_a_line_that_is_not_utf8_is_named(tmp_path: Path, name: str, first: bytes, bad: bytes) -> None:
    (tmp_path / name).write_bytes(first + bad)
    with pytest.raises(DataError, match=r"line 3: not"):
        list(read_histories(tmp_path / name))


def test_parquet_problems_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"user": [1], "items": [[1]]}), path)
    with pytest.raises(DataError, match="columns are user, items; expected 'history'"):
        list(read_histories(path))
    pq.write_table(pa.table({"history": [[1], None]}), path)
    with pytest.raises(DataError, match=r"a\.parquet, line 2: 'history' is 'None'"):
        list(read_histories(path))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a Parquet file"):
        list(read_histories(path))
