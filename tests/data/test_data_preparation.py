"""Laws of filtering, ordering and splitting, checked against a plain Python reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adrec.data.dataset import Dataset
from adrec.data.interactions import Interactions, deduplicate, k_core
from adrec.data.prepare import PrepareOptions, prepare
from adrec.data.split import leave_one_out
from adrec.errors import DataError

Row = tuple[int, int, int, int]
ROW = st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 5), st.integers(0, 9))
ROWS = st.lists(ROW, min_size=1, max_size=60)


def interactions_of(rows: list[Row]) -> Interactions:
    """Encode by hand, sorted as `encode` sorts."""
    ordered = sorted(rows, key=lambda row: (row[0], row[3]))
    user_ids, users = np.unique([row[0] for row in ordered], return_inverse=True)
    item_ids, items = np.unique([row[1] for row in ordered], return_inverse=True)
    times = np.array([row[3] for row in ordered])
    return Interactions(users.astype(np.int32), items.astype(np.int32), times, pa.array(user_ids), pa.array(item_ids))


def raw_pairs(interactions: Interactions) -> list[tuple[int, int]]:
    users, items = interactions.user_ids.to_pylist(), interactions.item_ids.to_pylist()
    return [(users[u], items[i]) for u, i in zip(interactions.users, interactions.items, strict=True)]


def reference(rows: list[Row], core: int, min_rating: int, once: bool) -> dict[int, list[tuple[int, int]]]:
    """User -> (item, time) in order, by the stated rules, in plain Python."""
    kept = sorted((row for row in rows if row[2] >= min_rating), key=lambda row: row[3])
    if once:
        seen: set[tuple[int, int]] = set()
        kept = [row for row in kept if not (row[:2] in seen or seen.add(row[:2]))]
    while core > 1:
        smaller = [
            row
            for row in kept
            if sum(r[0] == row[0] for r in kept) >= core and sum(r[1] == row[1] for r in kept) >= core
        ]
        if len(smaller) == len(kept):
            break
        kept = smaller
    found: dict[int, list[tuple[int, int]]] = {}
    for user, item, _, time in kept:
        found.setdefault(user, []).append((item, time))
    return dict(sorted(found.items()))


def prepare_rows(folder: Path, rows: list[Row], **options: Any) -> Dataset:
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "rating", "timestamp"], orient="row")
    frame.write_csv(folder / "log.csv")
    return prepare(folder / "log.csv", folder / "out", PrepareOptions(**options), overwrite=True)


def raw_sequences(dataset: Dataset) -> dict[int, list[int]]:
    items = dataset.item_ids.to_pylist()
    return {
        user: [items[item - 1] for item in dataset.sequences[row].tolist()]
        for row, user in enumerate(dataset.user_ids.to_pylist())
    }


@given(rows=ROWS, core=st.integers(0, 4), min_rating=st.integers(1, 4), once=st.booleans())
@settings(max_examples=60, deadline=None)
def test_prepare_agrees_with_the_reference(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], core: int, min_rating: int, once: bool
) -> None:
    expected = reference(rows, core, min_rating, once)
    folder = tmp_path_factory.mktemp("law")
    options = {"core": core, "min_rating": float(min_rating), "deduplicate": once}
    if not expected:
        with pytest.raises(DataError, match=r"core is empty|has a rating of at least"):
            prepare_rows(folder, rows, **options)
        assert [path.name for path in folder.iterdir()] == ["log.csv"]
        return
    dataset = prepare_rows(folder, rows, **options)
    assert raw_sequences(dataset) == {user: [item for item, _ in row] for user, row in expected.items()}
    assert raw_sequences(Dataset.load(folder / "out")) == raw_sequences(dataset)
    for row, length in enumerate(dataset.sequences.lengths.tolist()):
        places = [column[row].item() for column in (dataset.train_lengths, dataset.validation_positions)]
        places.append(dataset.test_positions[row].item())
        assert places == ([length - 2, length - 2, length - 1] if length >= 3 else [length, -1, -1])


@given(rows=ROWS, core=st.integers(2, 5))
def test_k_core_is_a_fixed_point(rows: list[Row], core: int) -> None:
    try:
        once = k_core(interactions_of(rows), core)
    except DataError:
        return
    assert min(np.bincount(once.users)) >= core
    assert min(np.bincount(once.items)) >= core
    assert len(np.bincount(once.users)) == len(once.user_ids)
    assert len(np.bincount(once.items)) == len(once.item_ids)
    assert raw_pairs(k_core(once, core)) == raw_pairs(once)


@given(rows=ROWS)
def test_deduplicate_keeps_first_of_each_pair(rows: list[Row]) -> None:
    interactions = interactions_of(rows)
    once = deduplicate(interactions)
    assert raw_pairs(once) == list(dict.fromkeys(raw_pairs(interactions)))
    assert raw_pairs(deduplicate(once)) == raw_pairs(once)


def test_ties_keep_input_order(tmp_path: Path) -> None:
    rows = [(1, item, 5, 7) for item in (4, 2, 9, 1, 3)] + [(1, 8, 5, 6)]
    assert raw_sequences(prepare_rows(tmp_path, rows, core=0)) == {1: [8, 4, 2, 9, 1, 3]}


@given(rows=ROWS, first=st.integers(1, 8), second=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_temporal_split_never_leaks(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], first: int, second: int
) -> None:
    # Days after 1970, so that bounds can be dates and the truth is read off the rows.
    days = [(user, item, rating, time * 86_400) for user, item, rating, time in rows]
    bounds = {"validation_from": f"1970-01-{first + 1:02}", "test_from": f"1970-01-{second + 1:02}T00:00:00Z"}
    folder = tmp_path_factory.mktemp("temporal")
    try:
        dataset = prepare_rows(folder, days, core=0, split="temporal", **bounds)
    except DataError:
        # Bounds that leave a part empty; the messages are tested elsewhere.
        assert [path.name for path in folder.iterdir()] == ["log.csv"]
        return
    by_user = reference(rows, 0, 1, False)
    for row, times in enumerate([time for _, time in pairs] for pairs in by_user.values()):
        assert dataset.train_lengths[row] == sum(time < first for time in times)
        validation, test = dataset.validation_positions[row].item(), dataset.test_positions[row].item()
        inside = [place for place, time in enumerate(times) if first <= time < second]
        later = [place for place, time in enumerate(times) if time >= second]
        assert validation == (inside[0] if inside and inside[0] > 0 else -1)
        assert test == (later[0] if later and later[0] > 0 else -1)


@pytest.mark.parametrize(("quantile", "start"), [("0.5", 5), ("0.51", 6), ("0.85", 9)])
def test_quantile_bound(tmp_path: Path, quantile: str, start: int) -> None:
    rows = [(1, item, 5, item) for item in range(1, 11)]
    dataset = prepare_rows(tmp_path, rows, core=0, split="temporal", validation_from=quantile, test_from="0.99")
    assert dataset.info.protocol["validation_start"] == start
    assert dataset.train_lengths.tolist() == [start - 1]


@given(lengths=st.lists(st.integers(1, 9), min_size=1))
def test_leave_one_out_uses_every_interaction_once(lengths: list[int]) -> None:
    split = leave_one_out(np.array(lengths))
    evaluated = (split.validation_positions >= 0).astype(int) + (split.test_positions >= 0)
    assert (split.train_lengths + evaluated).tolist() == lengths


def test_dataset_json_states_the_protocol(tmp_path: Path) -> None:
    import hashlib

    prepare_rows(tmp_path, [(1, item, 5, item) for item in range(4)], core=1, name="tiny")
    info = Dataset.load(tmp_path / "out").info
    assert (info.name, info.users, info.items, info.interactions, info.format) == ("tiny", 1, 4, 4, "csv")
    assert info.source_sha256 == hashlib.sha256((tmp_path / "log.csv").read_bytes()).hexdigest()
    assert info.protocol["order"] == "time ascending within a user; ties keep the order of the input"
    assert (info.protocol["core"], info.protocol["rows_read"], info.protocol["split"]) == (
        1,
        4,
        "leave-one-out",
    )
