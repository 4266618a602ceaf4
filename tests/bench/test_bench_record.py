"""Records survive a round trip, and whatever is wrong with a file is named with its line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from adrec.errors import DataError
from bench.record import RecordWriter, TradeoffRecord, latest_records, read_records


@pytest.fixture
def written(tmp_path: Path, tiny_records: list[TradeoffRecord]) -> Path:
    path = tmp_path / "deep" / "records.jsonl"
    with RecordWriter(path) as writer:
        for record in tiny_records:
            writer.write(record)
    return path


def test_round_trip(written: Path, tiny_records: list[TradeoffRecord]) -> None:
    assert read_records(written) == tiny_records
    assert os.listdir(written.parent) == [written.name]


def test_append_flushes_each_record(tmp_path: Path, tiny_records: list[TradeoffRecord]) -> None:
    path = tmp_path / "records.jsonl"
    with RecordWriter(path) as writer:
        for count, record in enumerate(tiny_records[:3], 1):
            writer.write(record)
            assert len(read_records(path)) == count
    with RecordWriter(path) as writer:
        writer.write(tiny_records[3])
    assert read_records(path) == tiny_records[:4]


def test_half_written_last_line(written: Path) -> None:
    lines = written.read_text().splitlines()
    written.write_text("\n".join([*lines[:2], lines[2][:50]]))
    with pytest.raises(DataError, match=r"records\.jsonl, line 3: the last line is half-written.*delete that line"):
        read_records(written)
    with pytest.raises(DataError, match="half-written"):
        RecordWriter(written)


def _replace_second_line(path: Path, line: str) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schema_version": 2},
            "schema version 2, this adrec reads 1; it was written by a newer adrec: upgrade",
        ),
        ({"schema_version": 0}, "schema version 0, .* older adrec: measure again"),
        ({"schema_version": None}, "not a record of `adrec bench`"),
        ({"surprise": 1}, "field 'surprise'"),
        ({"seed": "many"}, "field 'seed'"),
    ],
)
def test_wrong_content_names_file_line_and_way_out(written: Path, change: dict[str, object], message: str) -> None:
    content = json.loads(written.read_text().splitlines()[1])
    _replace_second_line(written, json.dumps(content | change))
    with pytest.raises(DataError, match=rf"records\.jsonl, line 2: .*{message}"):
        read_records(written)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        (
            "timing",
            "round_medians_ms",
            [1.0, 0.0],
            r"field 'timing\.round_medians_ms\.1': .* greater than 0",
        ),
        ("timing", "round_medians_ms", [-1.0], r"field 'timing\.round_medians_ms\.0': .* greater than 0"),
        ("timing", "round_medians_ms", [math.nan], r"field 'timing\.round_medians_ms\.0'"),
        ("timing", "round_medians_ms", [math.inf], r"field 'timing\.round_medians_ms\.0': .* finite number"),
        ("accuracy", "places_base64", "AAAA", r"field 'accuracy\.places_base64': .*not packed places"),
        ("accuracy", "places_base64", "é", r"field 'accuracy\.places_base64': "),
    ],
)
def test_damaged_measurements_are_named(written: Path, part: str, field: str, value: object, message: str) -> None:
    content = json.loads(written.read_text().splitlines()[1])
    content[part][field] = value
    _replace_second_line(written, json.dumps(content))
    with pytest.raises(DataError, match=rf"records\.jsonl, line 2: {message}"):
        read_records(written)


@pytest.mark.parametrize(("line", "message"), [("{broken", "not valid JSON"), ("[1]", "this is a list")])
def test_corrupt_lines(written: Path, line: str, message: str) -> None:
    _replace_second_line(written, line)
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        read_records(written)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file of records"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        read_records(tmp_path / "binary.jsonl")


def test_latest_records_keep_the_last_of_a_cell(tiny_records: list[TradeoffRecord]) -> None:
    again = tiny_records[1].model_copy(update={"measured_at_utc": "later"})
    kept = latest_records([*tiny_records, again])
    assert len(kept) == len(tiny_records)
    assert kept[1] is again


def test_records_without_the_overlap_of_their_own_engine_are_read(written: Path) -> None:
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    for row in rows:
        for name in ("fraction", "users"):
            del row["accuracy"][f"engine_top20_overlap_{name}"]
    written.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {row.accuracy.engine_top20_overlap_fraction for row in read_records(written) if row.accuracy} == {None}


@pytest.mark.parametrize("line", ["[" * 100_000, '{"seed": ' + "9" * 5000 + "}"], ids=["deep", "digits"])
def test_json_beyond_pythons_limits_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "odd.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"odd\.jsonl, line 1: not valid JSON"):
        read_records(tmp_path / "odd.jsonl")


def test_units_are_in_the_names(tiny_records: list[TradeoffRecord]) -> None:
    timing = next(record.timing for record in tiny_records if record.timing)
    assert {"latency_ms_p50", "latency_ms_p95", "latency_ms_p99", "peak_memory_mib"} <= set(timing.model_dump())
