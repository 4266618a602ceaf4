"""Every input format gives the same interactions, and ids keep their type and spelling."""

from __future__ import annotations

import datetime
import gzip
import json
import pickle
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adrec.data.dataset import Dataset
from adrec.data.prepare import PrepareOptions, prepare

ROWS = [(1, 20, 5, 100), (2, 10, 4, 50), (1, 10, 3, 99), (1, 30, 1, 101), (2, 30, 5, 50)]
SEQUENCES = [[1, 2, 3], [1, 3]]


def prepare_all(source: Path, out: Path, **options: object) -> Dataset:
    return prepare(source, out, PrepareOptions(core=0, **options))


def rows_of(dataset: Dataset) -> list[list[int]]:
    return [row.tolist() for row in map(dataset.sequences.__getitem__, range(dataset.user_count))]


def text(separator: str, header: str = "", end: str = "\n") -> str:
    lines = [header] if header else []
    return "".join(line + end for line in lines + [separator.join(map(str, row)) for row in ROWS])


CASES = {
    "ratings.csv": text(",", "userId,movieId,rating,timestamp"),
    "log.tsv": text("\t", "user_id\titem_id\trating\ttimestamp"),
    "semicolon.csv": text(";", "user;item;score;time"),
    "u.data": text("\t"),
    "ratings.dat": text("::"),
    "set.inter": text("\t", "user_id:token\titem_id:token\trating:float\ttimestamp:float"),
    "crlf.csv": text(",", "user_id,item_id,rating,timestamp", "\r\n"),
    "crlf.dat": text("::", end="\r\n"),
    "marked.csv": "\ufeff" + text(",", "user_id,item_id,rating,timestamp"),
    "blank.csv": text(",", "\nuser_id,item_id,rating,timestamp", "\n\n"),
    "brackets[1].csv": text(",", "user_id,item_id,rating,timestamp"),
    "no end.csv": text(",", "user_id,item_id,rating,timestamp").rstrip("\n"),
    "reviews14[x].json": "".join(
        json.dumps({"reviewerID": u, "asin": i, "overall": r, "unixReviewTime": t, "helpful": [0, 0]}) + "\n"
        for u, i, r, t in ROWS
    ),
    "reviews23.jsonl": "\ufeff"
    + "\n".join(
        json.dumps({"rating": r, "asin": "x", "parent_asin": i, "user_id": u, "timestamp": t * 10**10})
        for u, i, r, t in ROWS
    ),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_text_formats_agree(tmp_path: Path, name: str, compressed: bool) -> None:
    content = CASES[name].encode()
    source = tmp_path / (name + ".gz" if compressed else name)
    source.write_bytes(gzip.compress(content) if compressed else content)
    dataset = prepare_all(source, tmp_path / "out")
    assert rows_of(dataset) == SEQUENCES
    assert dataset.item_ids.to_pylist() == [10, 20, 30]
    assert dataset.user_ids.to_pylist() == [1, 2]
    assert dataset.info.source == source.name
    assert dataset.info.protocol["time_unit"] == ("ms" if "23" in name else "s")
    assert {path.name for path in tmp_path.iterdir()} == {source.name, "out"}


def test_all_text_formats_have_one_fingerprint(tmp_path: Path) -> None:
    found = set()
    for name, content in CASES.items():
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        found.add(prepare_all(tmp_path / name, tmp_path / f"out {name}").fingerprint)
    assert len(found) == 1


@pytest.mark.parametrize("times", ["integer", "datetime", "date"])
def test_parquet(tmp_path: Path, times: str) -> None:
    frame = pl.DataFrame(ROWS, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    start = datetime.datetime(2020, 1, 1)
    if times != "integer":
        moments = [start + datetime.timedelta(days=row[3]) for row in ROWS]
        frame = frame.with_columns(timestamp=pl.Series(moments if times == "datetime" else [m.date() for m in moments]))
    frame.with_columns(pl.col("item_id").cast(pl.UInt16)).write_parquet(tmp_path / "log.parquet")
    dataset = prepare_all(tmp_path / "log.parquet", tmp_path / "out")
    assert rows_of(dataset) == SEQUENCES
    assert dataset.item_ids.to_pylist() == [10, 20, 30]
    assert dataset.info.protocol["time_unit"] == ("s" if times == "integer" else "us")


def test_parquet_keeps_strings_of_digits_and_large_unsigned(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"user": ["7", "8"], "item": [2**64 - 1, 5], "time": [2.5, 1.5]}, schema_overrides={"item": pl.UInt64}
    )
    frame.write_parquet(tmp_path / "log.parquet")
    dataset = prepare_all(tmp_path / "log.parquet", tmp_path / "out")
    assert dataset.user_ids.to_pylist() == ["7", "8"]
    assert Dataset.load(tmp_path / "out").item_ids.to_pylist() == [5, 2**64 - 1]


def test_json_keeps_strings_of_digits(tmp_path: Path) -> None:
    row = {"reviewerID": "12", "asin": "34", "overall": 5.0, "unixReviewTime": 1}
    (tmp_path / "reviews.json").write_text(json.dumps(row) + "\n")
    dataset = prepare_all(tmp_path / "reviews.json", tmp_path / "out")
    assert (dataset.user_ids.to_pylist(), dataset.item_ids.to_pylist()) == (["12"], ["34"])


def test_four_numbers_are_u_data_by_their_values_or_when_told(tmp_path: Path) -> None:
    rows = [("1\t20\t5\t881250949", "1\t30\t1\t881250950"), ("1\t20\t50\t8", "1\t30\t10\t9")]
    for (first, second), format in zip(rows, (None, "movielens"), strict=True):
        (tmp_path / "log.tsv").write_text(f"{second}\n{first}\n")
        dataset = prepare_all(tmp_path / "log.tsv", tmp_path / f"out {format}", format=format)
        assert (rows_of(dataset), dataset.item_ids.to_pylist()) == ([[1, 2]], [20, 30])


def test_one_of_two_spellings_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("userId,user_id,item_id,time\na,b,3,4\n")
    for name, user in (("userId", "a"), ("user_id", "b")):
        dataset = prepare_all(tmp_path / "log.csv", tmp_path / name, user_column=name)
        assert dataset.user_ids.to_pylist() == [user]


def test_fields_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(f'user_id,text,item_id,time\n1,"{"x," * 100_000}",2,3\n')
    assert rows_of(prepare_all(tmp_path / "log.csv", tmp_path / "out")) == [[1]]


def test_named_columns_win_over_known_ones(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,who,what,when,timestamp\n1,1,a,b,3,9\n1,1,a,c,2,9\n")
    dataset = prepare_all(
        tmp_path / "log.csv", tmp_path / "out", user_column="who", item_column="what", time_column="when"
    )
    assert dataset.user_ids.to_pylist() == ["a"]
    assert rows_of(dataset) == [[2, 1]]


def test_format_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("user_id:token\titem_id:token\ttime:float\n1\t2\t3\n")
    dataset = prepare_all(
        tmp_path / "log.txt",
        tmp_path / "out",
        format="csv",
        user_column="user_id:token",
        item_column="item_id:token",
        time_column="time:float",
    )
    assert dataset.info.format == "csv"


def test_directory_with_one_known_file(tmp_path: Path) -> None:
    source = tmp_path / "ml-100k"
    source.mkdir()
    (source / "u.data").write_text(CASES["u.data"])
    (source / "README").write_text("about")
    assert rows_of(prepare_all(source, tmp_path / "out")) == SEQUENCES


def test_authors_lists_are_taken_as_they_are(tmp_path: Path) -> None:
    content = {"train": [[3, 1, 3], [2]], "val": [[1], []], "test": [[5], []]}
    (tmp_path / "dataset.pkl").write_bytes(pickle.dumps(content))
    dataset = prepare(tmp_path / "dataset.pkl", tmp_path / "out")
    assert rows_of(dataset) == [[3, 1, 3, 1, 5], [2]]
    assert dataset.item_count == 5
    assert dataset.train_lengths.tolist() == [3, 1]
    assert dataset.validation_positions.tolist() == [3, -1]
    assert dataset.test_positions.tolist() == [4, -1]
    for path in (tmp_path, tmp_path / "dataset.pkl", tmp_path / "out", tmp_path / "out" / "dataset.json"):
        assert Dataset.load(path).fingerprint == dataset.fingerprint


IDS = st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=["Cs"]), min_size=1, max_size=8)


@given(ids=st.lists(IDS | st.integers(-(2**63), 2**63 - 1).map(str), min_size=1, max_size=8, unique=True))
def test_ids_survive_csv_and_disk(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    folder = tmp_path_factory.mktemp("ids")
    frame = pl.DataFrame({"user_id": ids, "item_id": ids[::-1], "timestamp": range(len(ids))})
    frame.write_csv(folder / "log.csv", quote_style="always")
    prepare_all(folder / "log.csv", folder / "out")
    dataset = Dataset.load(folder / "out")
    whole = all(is_usual_integer(raw) for raw in ids)
    expected = sorted(int(raw) if whole else raw for raw in ids)
    assert dataset.item_ids.to_pylist() == expected
    assert dataset.user_ids.to_pylist() == expected
    assert dataset.encode_items(expected) == list(range(1, len(ids) + 1))


def is_usual_integer(raw: str) -> bool:
    try:
        return str(int(raw)) == raw and -(2**63) <= int(raw) < 2**63
    except ValueError:
        return False
