"""Bad input ends in one message that names the file, the line and the way out, and leaves nothing behind."""

from __future__ import annotations

import gzip
import os
import pickle
import re
from pathlib import Path

import polars as pl
import pytest

from adrec.data import csv_text
from adrec.data.dataset import Dataset
from adrec.data.prepare import PrepareOptions, prepare
from adrec.errors import DataError

HEADER = "user_id,item_id,timestamp,rating\n"
REVIEW = '{"reviewerID": "A1", "asin": "B", "overall": 5.0, "unixReviewTime": 5}\n'
LONG_TEXT = "x" * 140_000

CASES: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("log.csv", "", r"log\.csv: line 1: the file is empty"),
    "only blanks": ("log.csv", "\n \n", r"log\.csv: line 1: the file is empty"),
    "only a header": ("log.csv", HEADER, r"no interactions in the file"),
    "missing column": (
        "log.csv",
        "user_id,thing,timestamp\n1,2,3\n",
        r"line 1: no item column among 'user_id', 'thing'",
    ),
    "no header": ("log.csv", "1,2,3\n4,5,6\n", r"line 1: no user column among .*--user-column"),
    "time": (
        "log.csv",
        HEADER + "1,2,3,4\n\n1,2,soon,4\n",
        r"log\.csv: line 4: the time 'soon' is not a number",
    ),
    "time infinite": ("log.csv", HEADER + "1,2,inf,4\n", r"line 2: the time 'inf' is not a number"),
    "no time": ("log.csv", HEADER + "1,2,,4\n", r"line 2: no value in the time column"),
    "no user": ("log.csv", HEADER + '"",2,3,4\n', r"line 2: no value in the user column"),
    "too few fields": ("log.csv", HEADER + "1,2\n", r"line 2: no value in the time column"),
    "too many fields": ("log.csv", HEADER + "1,2,3,4\n1,2,3,4,5\n", r"line 3: 5 fields, the header has 4"),
    "open quote": ("log.csv", HEADER + '1,2,3,4\n1,"2,3,4\n', r"line 3: a quote is opened and not closed"),
    "line break in id": (
        "log.csv",
        HEADER + '1,2,3,4\n"a\nb",2,3,4\n',
        r"line 3: the user id 'a\\nb' holds a tab or a line break",
    ),
    "after a line break": (
        "log.csv",
        "note," + HEADER + '"a\nb",1,2,3,4\n,1,2,x,4\n',
        r"line 4: the time 'x'",
    ),
    "tab in id": ("log.csv", HEADER + "1,a\tb,3,4\n", r"line 2: the item id 'a\\tb' holds a tab"),
    "not UTF-8": ("log.csv", HEADER.encode() + b"1,\xff,3,4\n", r"line 2: byte 0xff is not UTF-8"),
    "not UTF-8 json": (
        "log.json",
        REVIEW.encode() + b'{"asin": "\xff"}\n',
        r"line 2: byte 0xff is not UTF-8",
    ),
    "column twice": ("log.csv", "user_id,user_id,item_id,time\n1,2,3,4\n", r"'user_id' stands 2 times"),
    "two spellings": (
        "log.csv",
        "userId,user_id,item_id,time\n1,2,3,4\n",
        r"line 1: columns 'userId' and 'user_id' both name the user; choose one with --user-column",
    ),
    "text behind a quote": (
        "log.csv",
        HEADER + '1,2,3,4\n"1"x,2,3,4\n',
        r"line 3: text stands behind a closing quote; double a quote",
    ),
    "UTF-16": ("log.csv", HEADER.encode("utf-16"), r"log\.csv: line 1: not UTF-8, it looks like UTF-16; convert"),
    "UTF-16 without a mark": ("log.csv", HEADER.encode("utf-16-le"), r"line 1: not UTF-8, it looks like UTF-16"),
    "carriage returns": (
        "log.csv",
        HEADER.replace("\n", "\r") + "1,2,3,4\r",
        r"line 1: a carriage return without a line feed; end lines in LF or CRLF",
    ),
    "carriage return in an id": (
        "log.csv",
        HEADER + "1,2,3,4\na\rb,2,3,4\n",
        r"line 3: the user id 'a\\rb' holds a tab or a line break",
    ),
    "long text, bad time": (
        "log.csv",
        "text," + HEADER + LONG_TEXT + ",1,2,3,4\n,1,2,soon,4\n",
        r"line 3: the time 'soon'",
    ),
    "long text, too many fields": (
        "log.csv",
        "text," + HEADER + LONG_TEXT + ",1,2,3,4\n,1,2,3,4,5\n",
        r"line 3: 6 fields, the header has 5",
    ),
    "four numbers": (
        "log.tsv",
        "1\t10\t1300000000\t5\n1\t11\t1200000000\t1\n",
        r"log\.tsv: line 1: .* is no header.*give --format movielens",
    ),
    "four small numbers": ("log.tsv", "1\t10\t5\t3\n", r"line 1: .* is no header"),
    "json array": ("log.json", "[" + REVIEW.strip() + "]", r"line 1: a JSON array; write one object a line"),
    "json array, long": ("log.csv", "[" + REVIEW.strip() * 3000 + "]", r"line 1: a JSON array; write one object"),
    "json array, indented": ("log.json", "[\n " + REVIEW + "]", r"line 1: a JSON array; write one object a line"),
    "json NaN": (
        "log.json",
        REVIEW + REVIEW.replace("5.0", "NaN"),
        r"line 2: not a JSON object \(NaN is not JSON; write null\)",
    ),
    "json NaN first": ("log.json", REVIEW.replace("5.0", "NaN"), r"line 1: not a JSON object \(NaN is not JSON"),
    "json half pair": (
        "log.json",
        REVIEW + REVIEW.replace("A1", r"A\ud800"),
        r"line 2: the user id 'A\\x00' holds \\u0000 or half of a surrogate pair",
    ),
    "json half pair within": (
        "log.json",
        REVIEW + REVIEW.replace("A1", r"\udc00A"),
        r"line 2: not a JSON object \(\\udc00 is half of a surrogate pair",
    ),
    "json half pair first": ("log.json", REVIEW.replace("A1", r"A\ud800"), r"line 1: .*half of a surrogate pair"),
    "json mixed ids": (
        "log.json",
        REVIEW.replace('"A1"', "7") + REVIEW,
        r"line 2 .*: the user id 'A1' is no 64-bit integer, the first is a number; write all as text",
    ),
    "u.data short": ("u.data", "1\t2\t3\t4\n1\t2\t3\n", r"u\.data: line 2 \(3 fields, expected 4\): no value"),
    "u.data long": ("u.data", "1\t2\t3\t4\n1\t2\t3\t4\t5\n", r"u\.data: line 2: 5 fields, expected 4"),
    "ratings.dat": ("ratings.dat", "1::2::3::4\n1::2::3::x\n", r"ratings\.dat: line 2: the time 'x'"),
    "ratings.dat short": ("ratings.dat", "1::2::3\n", r"ratings\.dat: line 1 \(3 fields, expected 4\): no value"),
    "ratings.dat long": (
        "ratings.dat",
        "1::2::3::4\n1::2::3::4::5\n",
        r"line 2 \(5 fields, expected 4\): the time '4::5'",
    ),
    "json too deep": ("log.json", '{"asin": ' + "[" * 100_000, r"line 1: not a JSON object \(.*nested too deeply"),
    "json too deep later": (
        "log.json",
        REVIEW + '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
        r"line 2: not a JSON",
    ),
    "json huge integer": ("log.json", '{"unixReviewTime": ' + "9" * 5000 + "}\n", r"line 1: .* thousands of digits"),
    "untyped inter": (
        "a.inter",
        "user_id\titem_id:token\n1\t2\n",
        r"a\.inter: line 1: column 'user_id' has no type",
    ),
    "inter time": (
        "a.inter",
        "user_id:token\titem_id:token\ttimestamp:float\n1\t2\t3\n1\t2\tx\n",
        r"a\.inter: line 3: the time 'x'",
    ),
    "broken json": ("log.json", REVIEW + "\n" + REVIEW[:20] + "\n", r"log\.json: line 3: not a JSON object"),
    "json list": ("log.json", REVIEW + "[1]\n", r"log\.json: line 2: expected a JSON object"),
    "json without item": (
        "log.json",
        REVIEW + '{"reviewerID": "A"}\n',
        r"line 2 \(keys: reviewerID\): no value in the item column",
    ),
    "json without time": ("log.json", '{"reviewerID": "A", "asin": "B"}\n', r"line 1: no time column among"),
    "unknown": ("log", "hello\n", r"line 1: 'hello' fits no known format"),
    "parquet": ("log.parquet", b"PAR1 and no more", r"log\.parquet: not a readable Parquet file"),
    "pickle list": (
        "dataset.pkl",
        pickle.dumps([1]),
        r"expected a dict with the lists 'train', 'val' and 'test'",
    ),
    "pickle cut": (
        "dataset.pkl",
        pickle.dumps({"train": [[1]]})[:-6],
        r"dataset\.pkl: not a readable pickle",
    ),
    "pickle padding": (
        "dataset.pkl",
        pickle.dumps({"train": [[1, 0]], "val": [[]], "test": [[]]}),
        r"train\[0\] holds 0, item ids are the integers 1 to N",
    ),
    "pickle strings": (
        "dataset.pkl",
        pickle.dumps({"train": [[1, "2"]], "val": [[]], "test": [[]]}),
        r"train\[0\] holds '2'",
    ),
    "pickle lengths": (
        "dataset.pkl",
        pickle.dumps({"train": [[1]], "val": [], "test": [[]]}),
        r"must list the same users, found 1, 0 and 1",
    ),
    "pickle two targets": (
        "dataset.pkl",
        pickle.dumps({"train": [[1]], "val": [[1, 2]], "test": [[]]}),
        r"val\[0\] holds 2 items, allowed is 0 or 1",
    ),
}


def refused(source: Path, message: str, **options: object) -> None:
    """Prepare, expect ``message``, and expect the folder to look as before."""
    folder = source.parent
    before = sorted(os.listdir(folder))
    with pytest.raises(DataError, match=message) as caught:
        prepare(source, folder / "new" / "out", PrepareOptions(core=options.pop("core", 0), **options))
    assert caught.value.exit_code == 2
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("case", CASES)
def test_bad_file(tmp_path: Path, case: str) -> None:
    name, content, message = CASES[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(tmp_path / name, message)


@pytest.mark.parametrize(("share", "line"), [(0.5, r"\d{4,5}"), (0.999, r"\d{5}"), (0.0002, "1")])
def test_truncated_gzip(tmp_path: Path, share: float, line: str) -> None:
    rows = "".join(f"{k % 7},{k * k % 1001},{k},4\n" for k in range(30_000))
    content = gzip.compress((HEADER + rows).encode())
    (tmp_path / "log.csv.gz").write_bytes(content[: int(len(content) * share)])
    refused(tmp_path / "log.csv.gz", rf"log\.csv\.gz: line {line}: the gzip stream is (truncated|damaged)")


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"train": [[1]], "val": [[1]], "test": [Payload()]}
    (tmp_path / "dataset.pkl").write_bytes(pickle.dumps(content, protocol))
    refused(tmp_path / "dataset.pkl", r"refused, the pickle names the global (posix|nt)\.system")
    with pytest.raises(DataError, match="refused"):
        Dataset.load(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_pickle_with_harmless_global_is_refused(tmp_path: Path) -> None:
    from collections import OrderedDict

    (tmp_path / "dataset.pkl").write_bytes(pickle.dumps(OrderedDict(train=[[1]])))
    refused(tmp_path / "dataset.pkl", r"names the global collections\.OrderedDict")


@pytest.mark.parametrize("item", [2 * 10**9, 10**30, 10**5000], ids=["large", "beyond 64 bits", "beyond text"])
def test_pickle_with_an_absurd_item_id_is_refused(tmp_path: Path, item: int) -> None:
    content = {"train": [[1, 2], [3, item]], "val": [[], []], "test": [[], []]}
    (tmp_path / "dataset.pkl").write_bytes(pickle.dumps(content))
    refused(
        tmp_path / "dataset.pkl", r"train\[1\] holds the item id .*only 4 interactions; allowed here: 1 to 10000000"
    )


def test_pickle_with_outside_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.pkl").write_bytes(b"\x80\x04\x8c\x01xQ.")
    refused(tmp_path / "dataset.pkl", "refers to the outside object 'x'")


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (
            pl.DataFrame({"user": ["a", None], "item": [1, 2], "time": [1, 2]}),
            "row 2: no value in the user column",
        ),
        (pl.DataFrame({"user": ["a", "b\r"], "item": [1, 2], "time": [1, 2]}), "row 2: the user id"),
        (
            pl.DataFrame({"user": [1], "item": [1.0], "time": [1]}),
            "item column has type Float64; it must be integer",
        ),
        (
            pl.DataFrame({"user": [1], "item": [1], "time": [float("nan")]}),
            "row 1: the time nan is not a number",
        ),
        (pl.DataFrame({"user": [1], "item": [1], "time": [[1]]}), "time column has type List"),
        (pl.DataFrame({"user": [1], "item": [1]}), "no time column among 'user', 'item'"),
    ],
)
def test_bad_parquet(tmp_path: Path, frame: pl.DataFrame, message: str) -> None:
    frame.write_parquet(tmp_path / "log.parquet")
    refused(tmp_path / "log.parquet", message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"core": 5},
            r"the 5-core is empty: of 2 users, 2 items and 3 interactions none remain.*smaller --core",
        ),
        (
            {"min_rating": 5.5},
            "none of 3 interactions has a rating of at least 5.5; give a smaller --min-rating",
        ),
        ({"format": "cvs"}, r"--format 'cvs' \(did you mean 'csv'\?\): must be one of csv, movielens"),
        (
            {"user_column": "user"},
            r"no column 'user' \(did you mean 'user_id'\?\); the columns are 'user_id'",
        ),
        ({"user_column": "item_id"}, "column 'item_id' is chosen for two roles"),
        ({"split": "random"}, "--split 'random': must be one of leave-one-out, temporal"),
        ({"test_from": "0.5"}, "add --split temporal"),
        (
            {"split": "temporal", "test_from": "1.5"},
            r"--test-from 1.5: must be a quantile strictly between 0 and 1",
        ),
        ({"split": "temporal", "test_from": "2014-13-01"}, "--test-from '2014-13-01': must be a quantile"),
        (
            {"split": "temporal", "validation_from": "0.9", "test_from": "0.1"},
            "validation must start before the test",
        ),
        (
            {"split": "temporal", "validation_from": "2014-01-01", "test_from": "2015-01-01"},
            "no validation example .*the data spans 1970-01-01",
        ),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, object], message: str) -> None:
    (tmp_path / "log.csv").write_text(HEADER + "1,1,10,5\n1,2,20,5\n2,1,30,4\n")
    refused(tmp_path / "log.csv", message, **options)


def test_bad_rating_matters_only_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(HEADER + "1,1,10,good\n")
    refused(tmp_path / "log.csv", "line 2: the rating 'good' is not a number", min_rating=1.0)
    assert prepare(tmp_path / "log.csv", tmp_path / "out", PrepareOptions(core=0)).info.interactions == 1


def test_options_do_not_apply_to_prepared_lists(tmp_path: Path) -> None:
    (tmp_path / "dataset.pkl").write_bytes(pickle.dumps({"train": [[1]], "val": [[]], "test": [[]]}))
    refused(tmp_path / "dataset.pkl", "--core does not apply", core=5)
    refused(tmp_path / "dataset.pkl", "--min-rating does not apply", min_rating=1.0)


@pytest.mark.parametrize("value", ["true", "1.5", '{"$oid": "a"}', '["a", "b"]'])
def test_json_ids_of_another_type(tmp_path: Path, value: str) -> None:
    (tmp_path / "log.json").write_text(REVIEW.replace('"A1"', value))
    refused(tmp_path / "log.json", r"log\.json: line 1 .*: the user is .*; write text or an integer")


@pytest.mark.parametrize("content", ["[" + REVIEW + "]", "a,b\rc,d\r", "a\0b"])
def test_text_that_no_format_reads_is_refused_for_a_given_format_too(tmp_path: Path, content: str) -> None:
    (tmp_path / "log").write_text(content, newline="")
    for name in ("csv", "movielens", "amazon", "recbole"):
        refused(tmp_path / "log", "line 1: (not UTF-8|a carriage return|a JSON array)", format=name)


def test_a_quote_that_is_never_closed_does_not_take_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_text, "LONGEST_FIELD", 1000)
    (tmp_path / "log.csv").write_text(HEADER + '1,2,3,4\n1,"2,3,4\n' + "1,2,3,4\n" * 1000)
    refused(tmp_path / "log.csv", r"line 3: a field is longer than .*; is a quote opened and not closed\?")


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "log.csv", re.escape("log.csv: no such file"))


def test_directory_with_two_known_files(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "u.data").write_text("1\t2\t3\t4\n")
    (source / "ratings.dat").write_text("1::2::3::4\n")
    refused(source, "is a directory with u.data, ratings.dat of the known file names; name one file in it")


def test_damaged_parquet_page(tmp_path: Path) -> None:
    source = tmp_path / "log.parquet"
    frame = pl.DataFrame({"user": [f"user {k}" for k in range(2000)], "item": 1, "time": 1})
    frame.write_parquet(source, compression="zstd")
    content = bytearray(source.read_bytes())
    content[60:400] = bytes(340)
    source.write_bytes(content)
    refused(source, r"log\.parquet: cannot be read .*; check the file")
