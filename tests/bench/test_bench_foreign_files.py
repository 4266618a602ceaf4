"""Files that hold no records, given to compare and convert: the message names the file, what it is, and the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from adrec.errors import AdrecError, DataError
from bench.cli import register
from bench.conversion.pytest_json import UNTIMED, pytest_json, records_of
from bench.json_lines import json_line
from bench.record import TradeoffRecord


def invoke(*arguments: object) -> Any:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


RUN_JSON = json.dumps({"format": 1, "model": "adrec", "dataset": "beauty"}, indent=2)
FILES: dict[str, tuple[str, str]] = {
    "page.html": ("<!doctype html>\n<html></html>\n", "an HTML or XML page; give the .jsonl file"),
    "run.json": (RUN_JSON, "one JSON object with the keys format, model, dataset; records are JSON lines"),
    "cut.json": (RUN_JSON[:-9], "a JSON document over several lines, damaged or cut short"),
    "line.json": ('{"a": 1}', "one JSON object with the keys a; records are JSON lines"),
    "list.json": ("[\n1\n]\n", "one JSON list; records are JSON lines"),
    "table.md": ("| network | run |\n|---|---|\n", r"not JSON: it starts with '\| network"),
    "bench.json": ('{"benchmarks": [],\n "version": "5"}\n', "pytest-benchmark; `adrec bench convert FILE"),
    "users.jsonl": ('{"user": "u", "history": []}\n', "not a record of .* but one JSON object with the keys user"),
    "journal.jsonl": ('{"kind":"settings","schema_version":1}\n', "kind 'settings'; allowed here: tradeoff, kernel"),
    "old.jsonl": ('{"kind":"tradeoff","schema_version":0}\n', "schema version 0, this adrec reads 1; .* measure again"),
    "empty.jsonl": ("", "is empty, as after a run that measured nothing; `adrec bench run` writes"),
    "half.jsonl": ('{"schema_version":1,"kind":"trade', "line 1: the last line is half-written"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_record_is_named(tiny_records: list[TradeoffRecord], tmp_path: Path, name: str) -> None:
    content, message = FILES[name]
    good, bad = tmp_path / "good.jsonl", tmp_path / name
    good.write_text("".join(map(json_line, tiny_records)))
    bad.write_text(content)
    for arguments in ((good, bad), (bad, good)):
        with pytest.raises(DataError, match=rf"{name}.*{message}"):
            raise invoke("compare", *arguments).exception
    if bad.suffix == ".jsonl":
        with pytest.raises(DataError, match=rf"{name}.*{message}"):
            raise invoke("convert", bad, tmp_path / "out.json").exception
    assert not (tmp_path / "out.json").exists()


def test_a_report_of_all_files_of_a_folder_leaves_the_journal_out(
    tiny_records: list[TradeoffRecord], tmp_path: Path
) -> None:
    journal, records = tmp_path / "journal.jsonl", tmp_path / "tradeoff.jsonl"
    journal.write_text('{"kind":"settings","schema_version":1}\n')
    with pytest.raises(DataError, match=r"journal\.jsonl, line 1: a record of kind 'settings'"):
        raise invoke("report", journal).exception
    records.write_text("".join(map(json_line, tiny_records)))
    done = invoke("report", journal, records)
    assert done.exit_code == 0, done.output
    assert done.stderr == f"{journal}: left out; it is the journal of `adrec bench run` and holds no records\n"
    page = tmp_path / "tradeoff.html"
    assert done.stdout == f"{page}\n"
    assert "journal.jsonl" not in page.with_suffix(".md").read_text()
    alone = invoke("report", records, "--out", tmp_path / "alone.html")
    assert alone.stderr == ""


def test_a_folder_says_what_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(DataError, match=r"out: a folder; it holds no \.jsonl file of records"):
        raise invoke("compare", folder, folder).exception
    for name in ("tradeoff.jsonl", "engines.jsonl", "journal.jsonl"):
        (folder / name).touch()
    with pytest.raises(DataError, match=r"out: a folder; give a file in it: engines\.jsonl, tradeoff\.jsonl$"):
        raise invoke("compare", folder, folder).exception
    (tmp_path / "x.json").mkdir()
    with pytest.raises(AdrecError, match=r"x\.json: cannot be read as a JSON file of pytest-benchmark"):
        raise invoke("convert", tmp_path / "x.json", tmp_path / "y.jsonl").exception


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is empty"),
        ("<html>", "an HTML or XML page"),
        (RUN_JSON, "but one JSON object with the keys format, .* `pytest bench/suites --benchmark-json=FILE.json`"),
        ('{"benchmarks": [{"name": ', "damaged or cut short: write it again"),
        ('{"schema_version":1}\n{"schema_version":1}\n', "JSON lines, as records do; give it a name that"),
        ('{"benchmarks": [{"name": "other"}]}', "'row 0' holds no record of adrec"),
        ('{"benchmarks": [], "adrec_untimed": {"a": 1}}', "'adrec_untimed' is one JSON object with the keys a, not a"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_pytest_benchmark_is_named(tmp_path: Path, content: str, message: str) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(content)
    with pytest.raises(DataError, match=rf"bad\.json.*{message}"):
        raise invoke("convert", bad, tmp_path / "out.jsonl").exception
    assert not (tmp_path / "out.jsonl").exists()


def test_records_of_another_kind_are_refused_where_one_kind_is_read(tmp_path: Path) -> None:
    other = tmp_path / "serving.jsonl"
    other.write_text('{"schema_version":1,"kind":"serving"}\n')
    with pytest.raises(
        DataError, match=r"serving\.jsonl, line 1: a record of kind 'serving'; allowed here: calibration"
    ):
        raise invoke("calibrate", "--out", other, "--quiet").exception


def test_a_benchmark_beside_a_record_must_name_it(tiny_records: list[TradeoffRecord]) -> None:
    content = pytest_json(tiny_records[:2])
    assert [each["adrec_position"] for each in content[UNTIMED]] == [0]
    del content["benchmarks"][0]["extra_info"]["adrec_record"]
    with pytest.raises(DataError, match="holds no record of adrec"):
        records_of(content, "x.json")
    content["benchmarks"][0]["extra_info"]["adrec_position"] = 0
    assert records_of(content, "x.json") == tiny_records[:1]
