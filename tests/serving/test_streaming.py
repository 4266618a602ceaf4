"""Files of histories in, files of recommendations out: every pair of formats, bad lines, interrupted writes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from adrec import Recommender, streaming
from adrec.cli import build_app
from adrec.errors import AdrecError, ConfigError, DataError
from adrec.recommender import Recommendation
from adrec.streaming import SeenUsers, UserHistory, file_format, open_output, read_histories

USERS: list[tuple[str, list[int]]] = [
    ("anna", [1, 2, 3]),
    ("bert", [40]),
    ("ćä 7", [5, 5, 9]),
    ("d", list(range(1, 36))),
]


def write_long(path: Path) -> None:
    path.write_text("user,item\n" + "".join(f"{user},{item}\n" for user, items in USERS for item in items), "utf-8")


def write_joined(path: Path) -> None:
    rows = (f"{user},{' '.join(map(str, items))}\n" for user, items in USERS)
    path.write_text("user,history\n" + "".join(rows), "utf-8")


def write_json_in_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("history", "user"), *((json.dumps(items), user) for user, items in USERS)])


def write_jsonl(path: Path) -> None:
    path.write_text("\n".join(json.dumps({"user": user, "history": items}) for user, items in USERS), "utf-8")


def write_parquet(path: Path) -> None:
    pq.write_table(
        pa.table({"user": [u for u, _ in USERS], "history": [h for _, h in USERS], "other": USERS and [1] * 4}), path
    )


INPUTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "long csv": (".csv", write_long),
    "joined csv": (".csv", write_joined),
    "json csv": (".csv", write_json_in_csv),
    "jsonl": (".jsonl", write_jsonl),
    "parquet": (".parquet", write_parquet),
}


def read_back(path: Path) -> list[dict[str, Any]]:
    """One dictionary a user, whatever the format."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    users: dict[str, dict[str, Any]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            user = users.setdefault(
                row["user"], {"user": row["user"], "items": [], "scores": [], "source": row["source"]}
            )
            assert int(row["rank"]) == len(user["items"]) + 1
            user["items"].append(int(row["item"]))
            user["scores"].append(float(row["score"]))
    return list(users.values())


def recommend(run: Path, source: Path, out: Path, *options: str) -> str:
    arguments = ["recommend", str(run), "--input", str(source), "--out", str(out), *options]
    result = CliRunner().invoke(build_app(), arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("kind", INPUTS)
def test_every_pair_of_formats_equals_recommend(integer_run: Path, tmp_path: Path, kind: str, suffix: str) -> None:
    source, out = tmp_path / f"in{INPUTS[kind][0]}", tmp_path / f"result{suffix}"
    INPUTS[kind][1](source)
    recommend(integer_run, source, out, "--k", "5", "--steps", "2", "--seed", "3", "--batch-size", "3")
    expected = Recommender.load(integer_run).recommend([items for _, items in USERS], 5, steps=2, seed=3)
    rows = read_back(out)
    for (user, _), row, result in zip(USERS, rows, expected, strict=True):
        assert (row["user"], row["items"], row["source"]) == (user, result.items, "model")
        assert row["scores"] == pytest.approx(result.scores, abs=1e-5)
    assert leftovers(tmp_path) == sorted([source.name, out.name])


def test_all_inputs_read_the_same(tmp_path: Path) -> None:
    for suffix, write in INPUTS.values():
        write(tmp_path / f"in{suffix}")
        found = [(each.user, [int(item) for item in each.history]) for each in read_histories(tmp_path / f"in{suffix}")]
        assert found == USERS


def test_text_ids_keep_their_type(text_run: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"user": 7, "history": ["item-1", "item-2"]}\n{"user": 8, "history": ["item-3"]}\n', "utf-8")
    recommend(text_run, source, tmp_path / "out.parquet", "--k", "3")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.field("user").type == pa.int64()
    assert table.schema.field("items").type.value_type == pa.string()
    assert table["user"].to_pylist() == [7, 8]
    assert all(item.startswith("item-") for row in table["items"].to_pylist() for item in row)


def test_options_reach_the_recommender(integer_run: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_text("user,history\na,1|2|77\nb,88\nc,\n", "utf-8")
    shown = recommend(integer_run, source, out, "--separator", "|", "--exclude-history", "--k", "40")
    rows = read_back(out)
    assert [row["unknown"] for row in rows] == [1, 1, 0]
    assert [row["source"] for row in rows] == ["model", "popularity", "popularity"]
    assert len(rows[0]["items"]) == 38
    for line in ("3 users written", "2 unknown items were dropped", "2 users had no known item"):
        assert line in shown


def test_rows_without_a_user_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("history\n1 2\n3\n", "utf-8")
    (tmp_path / "in.jsonl").write_text('{"history": [1, 2]}\n{"history": [3]}\n', "utf-8")
    pq.write_table(pa.table({"history": [[1, 2], [3]]}), tmp_path / "in.parquet")
    for suffix in (".csv", ".jsonl", ".parquet"):
        assert [each.user for each in read_histories(tmp_path / f"in{suffix}")] == [0, 1]


def test_byte_order_mark_and_carriage_returns(tmp_path: Path) -> None:
    for kind, (suffix, write) in INPUTS.items():
        if suffix == ".parquet":
            continue
        path = tmp_path / f"in{suffix}"
        write(path)
        text = path.read_text("utf-8").replace("\r\n", "\n").replace("\n", "\r\n")
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        found = [(each.user, [int(item) for item in each.history]) for each in read_histories(path)]
        assert found == USERS, kind


def test_upper_case_suffix(tmp_path: Path) -> None:
    (tmp_path / "IN.CSV").write_text("history\n1\n", "utf-8")
    assert [each.history for each in read_histories(tmp_path / "IN.CSV")] == [["1"]]


def test_fields_may_be_long_and_hold_commas(tmp_path: Path) -> None:
    items = [str(item) for item in range(30_000)]
    (tmp_path / "a.csv").write_text(f'user,history\nu1,"{",".join(items)}"\n', "utf-8")
    assert list(read_histories(tmp_path / "a.csv", ",")) == [UserHistory("u1", items)]


def test_a_user_who_comes_back_is_found_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SMALLEST_MERGE", 64)
    seen = SeenUsers()
    assert all(seen.add(f"user {number}") for number in range(5_000))
    assert not any(seen.add(f"user {number}") for number in range(0, 5_000, 7))
    assert seen.add("user 5000")
    assert not seen.add("user 5000")


@pytest.mark.parametrize("name", ["a.txt", "a", "a.csv.gz"])
def test_unknown_suffix(integer_run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("history\n1\n", "utf-8")
    with pytest.raises(DataError, match=r"--input is .*unknown format .*allowed: \.csv, \.jsonl, \.parquet"):
        list(read_histories(tmp_path / name))
    with pytest.raises(DataError, match=r"--out is .*unknown format"):
        file_format(tmp_path / name, "--out")
    (tmp_path / "in.csv").write_text("history\n1\n", "utf-8")
    with pytest.raises(DataError, match="--out is"):
        recommend(integer_run, tmp_path / "in.csv", tmp_path / "out.txt")
    with pytest.raises(DataError, match="no such file"):
        list(read_histories(tmp_path / "none.csv"))
    with pytest.raises(AdrecError, match="does not exist"):
        recommend(integer_run, tmp_path / "in.csv", tmp_path / "none" / "out.csv")


@pytest.mark.parametrize("old", [None, b"what was there before"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_failing_half_way_leaves_no_output(integer_run: Path, tmp_path: Path, suffix: str, old: bytes | None) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / f"out{suffix}"
    # Two batches are written before the bad line is met.
    source.write_text('{"history": [1, 2]}\n' * 8 + "bad\n", "utf-8")
    if old is not None:
        out.write_bytes(old)
    with pytest.raises(DataError, match="line 9"):
        recommend(integer_run, source, out, "--batch-size", "4", "--k", "2")
    assert leftovers(tmp_path) == sorted(["in.jsonl", *([out.name] if old else [])])
    if old is not None:
        assert out.read_bytes() == old
    # The same with a reader that is fine and a model that refuses.
    source.write_text('{"history": [1, 2]}\n' * 8 + '{"history": ["gone"]}\n', "utf-8")
    with pytest.raises(AdrecError, match="unknown"):
        recommend(integer_run, source, out, "--batch-size", "4", "--k", "2", "--unknown", "raise")
    assert leftovers(tmp_path) == sorted(["in.jsonl", *([out.name] if old else [])])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_no_users_is_an_empty_file(integer_run: Path, tmp_path: Path, suffix: str) -> None:
    (tmp_path / "in.csv").write_text("user,history\n", "utf-8")
    assert "0 users written" in recommend(integer_run, tmp_path / "in.csv", tmp_path / f"out{suffix}")
    assert read_back(tmp_path / f"out{suffix}") == []


def test_histories_are_not_replaced_by_recommendations(integer_run: Path, tmp_path: Path) -> None:
    users = tmp_path / "users.jsonl"
    write_jsonl(users)
    before = users.read_bytes()
    with pytest.raises(ConfigError, match=r"--out is .*users\.jsonl: the file that is read; give another name"):
        recommend(integer_run, users, users, "--k", "2")
    assert users.read_bytes() == before


def results(count: int, items: list[Any]) -> list[Recommendation]:
    return [Recommendation(items, [1.0] * len(items), 0, "model") for _ in range(count)]


LATER_USERS: list[tuple[list[Any], list[Any]]] = [
    ([1, 2], ["x", "y"]),
    (["x", "y"], [1, 2]),
    ([1, "x"], [2, 3]),
    ([1, 2], [2**70, None]),
]


@pytest.mark.parametrize(("first", "second"), LATER_USERS, ids=["then text", "then integers", "mixed", "odd"])
def test_user_types_may_change_between_batches(tmp_path: Path, first: list[Any], second: list[Any]) -> None:
    # Either it is written or it is refused in words; a batch boundary must not decide with a traceback.
    out = tmp_path / "out.parquet"
    try:
        with open_output(out, pa.int64()) as writer:
            writer.write(first, results(2, [1]))
            writer.write(second, results(2, [1]))
    except AdrecError:
        assert leftovers(tmp_path) == []
    else:
        assert [str(user) for user in pq.read_table(out)["user"].to_pylist()] == [str(user) for user in first + second]


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXT, st.lists(st.one_of(st.integers(-5, 2**40), TEXT), max_size=5)), max_size=6))
def test_what_is_written_as_jsonl_or_json_csv_is_read(
    tmp_path_factory: pytest.TempPathFactory, users: list[tuple[str, list[Any]]]
) -> None:
    folder = tmp_path_factory.mktemp("read")
    wanted = [UserHistory(user, history) for user, history in users]
    lines = (json.dumps({"user": user, "history": history}, ensure_ascii=False) + "\n" for user, history in users)
    (folder / "in.jsonl").write_bytes("".join(lines).encode())
    assert list(read_histories(folder / "in.jsonl")) == wanted
    with (folder / "in.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("user", "history"), *((user, json.dumps(history)) for user, history in users)])
    assert list(read_histories(folder / "in.csv")) == wanted


@pytest.mark.parametrize("kind", INPUTS)
def test_reading_is_lazy(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"in{INPUTS[kind][0]}"
    INPUTS[kind][1](path)
    users = read_histories(path)
    assert isinstance(users, Iterator)
    assert next(users).user == "anna"


PEAK = """
import re, sys
from itertools import islice
from pathlib import Path
import pyarrow as pa
from adrec.recommender import Recommendation
from adrec.streaming import open_output, read_histories
result = Recommendation(list(range(20)), [1.0] * 20, 0, "model")
with open_output(Path(sys.argv[2]), pa.int64()) as writer:
    users = read_histories(Path(sys.argv[1]))
    while batch := list(islice(users, 512)):
        writer.write([each.user for each in batch], [result] * len(batch))
# Of this program alone: `ru_maxrss` is never below that of the process which started it.
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024)
"""


def test_small_batches_share_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adrec.streaming.ROW_GROUP_USERS", 4)
    path = tmp_path / "out.parquet"
    with open_output(path, pa.int64()) as writer:
        for user in range(0, 10, 2):
            results = [Recommendation([user], [0.5], 0, "model"), Recommendation([7, 8], [1.0, 0.5], 1, "model")]
            writer.write([user, user + 1], results)
    metadata = pq.ParquetFile(path).metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [4, 4, 2]
    written = pq.read_table(path).to_pydict()
    assert written["user"] == list(range(10))
    assert written["items"] == [items for user in range(0, 10, 2) for items in ([user], [7, 8])]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    peaks = []
    for users in (50_000, 200_000):
        source = tmp_path / f"in{users}{suffix}"
        if suffix == ".parquet":
            # One row group, of 128 MB where users are many: long histories of numbers that do not compress.
            items = np.random.default_rng(0).integers(1, 2**62, users * 80)
            lists = pa.ListArray.from_arrays(np.arange(0, users * 80 + 1, 80, dtype=np.int32), items)
            pq.write_table(pa.table({"history": lists}), source, use_dictionary=False, row_group_size=users)
        else:
            histories = ([user % 40 + 1, user % 7 + 1, 3, 4] for user in range(users))
            write = (lambda h: " ".join(map(str, h))) if suffix == ".csv" else (lambda h: json.dumps({"history": h}))
            head = ["history"] if suffix == ".csv" else []
            source.write_text("\n".join([*head, *map(write, histories)]) + "\n", "utf-8")
        command = [sys.executable, "-c", PEAK, str(source), str(tmp_path / f"out{suffix}")]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    # 150,000 more lists of 20 items are over 150 MB as Python objects; reading and writing buffers are a few.
    assert peaks[1] - peaks[0] < 60
