"""The prepared data set: examples, identifiers, storage, and the authors' files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adrec.data.checksum import content_fingerprint
from adrec.data.dataset import Dataset
from adrec.errors import DataError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
COUNTS = {
    "baby": (11_761, 4_731, 92_823),
    "beauty": (10_553, 6_086, 94_148),
    "ml-100k": (938, 1_008, 54_413),
}


@pytest.fixture
def small() -> Dataset:
    return Dataset.from_lists([[1, 2, 3], [2], [4, 2]], [[4], [], [1]], [[2], [], [1]], name="small")


def test_examples_and_training(small: Dataset) -> None:
    assert (small.name, small.item_count, small.user_count) == ("small", 4, 3)
    training = small.training_sequences()
    assert [training[row].tolist() for row in range(3)] == [[1, 2, 3], [2], [4, 2]]
    validation, test = small.examples("validation"), small.examples("test")
    assert validation.users.tolist() == test.users.tolist() == [0, 2]
    assert (validation.targets.tolist(), test.targets.tolist()) == ([4, 1], [2, 1])
    assert [validation.histories[row].tolist() for row in range(2)] == [[1, 2, 3], [4, 2]]
    assert [test.histories[row].tolist() for row in range(2)] == [[1, 2, 3, 4], [4, 2, 1]]
    assert small.item_counts().tolist() == [0, 1, 3, 1, 1]
    assert validation.targets.dtype == validation.users.dtype == small.item_counts().dtype == torch.int64
    assert len(test) == 2


def test_unknown_split(small: Dataset) -> None:
    with pytest.raises(DataError, match="split 'train': must be 'validation' or 'test'"):
        small.examples("train")  # type: ignore[arg-type]


SEQUENCE = st.lists(st.integers(1, 9), max_size=6)
USER = st.tuples(SEQUENCE, st.lists(st.integers(1, 9), max_size=1), st.lists(st.integers(1, 9), max_size=1))


@given(users=st.lists(USER, min_size=1, max_size=6).filter(lambda users: any(any(part) for part in users)))
@settings(max_examples=40, deadline=None)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, users: list[tuple[list[int], ...]]) -> None:
    dataset = Dataset.from_lists(*([user[part] for user in users] for part in range(3)))
    dataset.save(tmp_path_factory.mktemp("set") / "out")
    out = tmp_path_factory.getbasetemp()
    dataset.save(out / "again", overwrite=True)
    loaded = Dataset.load(out / "again")
    assert loaded.info == dataset.info
    for name in ("train_lengths", "validation_positions", "test_positions"):
        assert torch.equal(getattr(loaded, name), getattr(dataset, name))
    assert torch.equal(loaded.sequences.values, dataset.sequences.values)
    assert torch.equal(loaded.sequences.offsets, dataset.sequences.offsets)
    assert loaded.item_ids.equals(dataset.item_ids)
    for split in ("validation", "test"):
        examples = loaded.examples(split)
        part = 1 if split == "validation" else 2
        for row, user in enumerate(examples.users.tolist()):
            before = [item for earlier in users[user][:part] for item in earlier]
            assert examples.histories[row].tolist() == before
            assert [examples.targets[row].item()] == users[user][part]


def test_more_users_than_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adrec.data.storage.ROWS_PER_GROUP", 3)
    dataset = Dataset.from_lists([[k + 1] * (k % 4) for k in range(10)], [[]] * 10, [[]] * 10)
    dataset.save(tmp_path / "out")
    loaded = Dataset.load(tmp_path / "out")
    assert pq.ParquetFile(tmp_path / "out" / "sequences.parquet").num_row_groups == 4
    assert torch.equal(loaded.sequences.values, dataset.sequences.values)
    assert torch.equal(loaded.sequences.offsets, dataset.sequences.offsets)


def test_files_have_the_stated_columns(tmp_path: Path, small: Dataset) -> None:
    small.save(tmp_path / "out")
    schema = {path.name: pq.read_schema(path).names for path in (tmp_path / "out").glob("*.parquet")}
    assert schema == {
        "items.parquet": ["id", "raw"],
        "users.parquet": ["id", "raw"],
        "sequences.parquet": ["user", "items", "train_length", "validation_position", "test_position"],
    }
    assert pq.read_table(tmp_path / "out" / "items.parquet")["id"].to_pylist() == [1, 2, 3, 4]
    assert pq.read_schema(tmp_path / "out" / "sequences.parquet").field("items").type.value_type == pa.int32()


def with_items(dataset: Dataset, raw: pa.Array) -> Dataset:
    from dataclasses import replace

    return replace(dataset, item_ids=raw)


def test_encode_items(small: Dataset) -> None:
    numbers = with_items(small, pa.array([5, 12, 123, 7]))
    assert numbers.encode_items([123, "123", "0123", "x", 6, "12 ", None, True, 12.0]) == [
        3,
        3,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ]
    texts = with_items(small, pa.array(["a,b", "007", "é", "7"], pa.large_string()))
    assert texts.encode_items(["a,b", "007", "é", 7, "7", 8, ""]) == [1, 2, 3, 4, 4, 0, 0]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (([[1]], [], [[]]), "list 1, 0 and 1 users"),
        (([[1]], [[1, 2]], [[]]), "at most one item"),
        (([[0]], [[]], [[]]), "item ids must be the integers 1 to N"),
        (([[]], [[]], [[]]), "at least one"),
    ],
)
def test_from_lists_refuses(lists: tuple[list[list[int]], ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Dataset.from_lists(*lists)


def change_json(out: Path, **changes: object) -> None:
    path = out / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "items.parquet").unlink(), "damaged or incomplete"),
        (lambda out: (out / "sequences.parquet").write_bytes(b"PAR1"), "damaged or incomplete"),
        (lambda out: (out / "dataset.json").unlink(), "no dataset.json in it"),
        (lambda out: (out / "dataset.json").write_text("{"), "cannot be read"),
        (lambda out: change_json(out, schema_version=99), "schema version 99, this adrec reads 1"),
        (lambda out: change_json(out, users="many"), "users: Input should be a valid integer"),
        (
            lambda out: change_json(out, users=2),
            r"states \(2, 4, 10\) users, items and interactions, found \(3, 4, 10\)",
        ),
        (lambda out: change_json(out, fingerprint="0" * 64), "a file was changed or mixed"),
        (
            lambda out: pq.write_table(pa.table({"id": [1, 2, 3, 4], "raw": [1, 2, 3, 5]}), out / "items.parquet"),
            "a file was changed or mixed",
        ),
    ],
)
def test_damage_is_found(tmp_path: Path, small: Dataset, damage: object, message: str) -> None:
    small.save(tmp_path / "out")
    damage(tmp_path / "out")  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        Dataset.load(tmp_path / "out")


def test_load_refuses_other_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data set"):
        Dataset.load(tmp_path / "none")
    (tmp_path / "log.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="is no prepared data set"):
        Dataset.load(tmp_path / "log.csv")


def test_destination_rules(tmp_path: Path, small: Dataset) -> None:
    out = tmp_path / "deep" / "out"
    small.save(out)
    assert out.stat().st_mode & 0o777 == out.parent.stat().st_mode & 0o777
    with pytest.raises(DataError, match="pass --overwrite"):
        small.save(out)
    small.save(out, overwrite=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds 'notes\.txt', which adrec did not write"):
        small.save(out, overwrite=True)
    with pytest.raises(DataError, match="is a file; --out must be"):
        small.save(out / "notes.txt")
    (tmp_path / "empty").mkdir()
    small.save(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_failed_save_leaves_the_old_data_set(tmp_path: Path, small: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    small.save(tmp_path / "out")

    def fail(path: Path, dataset: Dataset) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("adrec.data.storage._write_sequences", fail)
    for out in (tmp_path / "out", tmp_path / "new" / "out"):
        with pytest.raises(KeyboardInterrupt):
            small.save(out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert Dataset.load(tmp_path / "out").fingerprint == small.fingerprint


def test_fingerprint_ignores_slicing_and_tells_ids_apart() -> None:
    whole = pa.array(["x", "ab", "c"], pa.large_string())
    parts = [pa.array(["ab", "c"], pa.large_string()), whole[1:], pa.array(["a", "bc"], pa.large_string())]
    found = [content_fingerprint([], [part]) for part in parts]
    assert found[0] == found[1] != found[2]
    assert content_fingerprint([], [pa.array([1])]) != content_fingerprint([torch.tensor([1])], [])


@pytest.mark.parametrize("name", COUNTS)
def test_authors_files(name: str, tmp_path: Path) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip("the authors' files are not beside this checkout")
    dataset = Dataset.load(SHARED / name)
    assert dataset.name == name
    assert (dataset.user_count, dataset.item_count, dataset.info.interactions) == COUNTS[name]
    assert len(dataset.examples("validation")) == len(dataset.examples("test")) == dataset.user_count
    test = dataset.examples("test")
    # A fact about these files: a target never occurs in its own history.
    repeated = test.targets.repeat_interleave(test.histories.lengths) == test.histories.values
    assert not repeated.any()
    dataset.save(tmp_path / "out")
    assert Dataset.load(tmp_path / "out").fingerprint == dataset.fingerprint
