"""The evaluation protocol on tiny models: batches do not matter, lists agree with ranks, strata partition the users."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adrec.data.dataset import Dataset
from adrec.engines import CachedEngine, make_engine
from adrec.engines.base import TopK
from adrec.evaluation import (
    METRICS,
    Evaluation,
    evaluate,
    head_items,
    length_groups,
    point_metrics,
    popularity_evaluation,
    popularity_groups,
    stratify,
    top_overlap,
)

SYSTEMS = [
    {},
    {"padding": "masked", "positions": "learned"},
    {"model": "sasrec", "positions": "released"},
    {"lambda_uncertainty": 1.0},
]


@pytest.fixture(params=SYSTEMS, ids=lambda overrides: "-".join(map(str, overrides.values())) or "paper")
def engine(request: pytest.FixtureRequest, tiny_model: Any) -> Any:
    return make_engine("cached", tiny_model(schedule="sqrt", timesteps=4, **request.param))


def same(first: Evaluation, second: Evaluation) -> bool:
    return torch.equal(first.ranks, second.ranks) and torch.equal(first.top_items, second.top_items)


@pytest.mark.parametrize("exclude", [False, True])
def test_batches_do_not_matter(engine: Any, tiny_dataset: Dataset, exclude: bool) -> None:
    examples = tiny_dataset.examples("test")
    whole = evaluate(engine, examples, exclude_history=exclude)
    assert whole.users == len(examples) == 60
    # 7 leaves a short last batch; the mean must be over users, not over batches.
    for size in (1, 7, 59):
        parts = evaluate(engine, examples, batch_size=size, exclude_history=exclude)
        assert same(parts, whole)
        assert parts.metrics == whole.metrics
    assert {name: value.value for name, value in whole.metrics.items()} == point_metrics(whole.ranks)


@pytest.mark.parametrize("exclude", [False, True])
def test_lists_agree_with_ranks(engine: Any, tiny_dataset: Dataset, exclude: bool) -> None:
    examples = tiny_dataset.examples("test")
    found = evaluate(engine, examples, exclude_history=exclude)
    assert found.top_items.shape == (60, 20)
    for user in range(60):
        place = (found.top_items[user] == examples.targets[user]).nonzero().flatten().tolist()
        rank = int(found.ranks[user])
        assert place == ([rank] if rank < 20 else []), f"user {user}"
        listed = found.top_items[user].tolist()
        assert len(set(listed)) == 20
        assert min(listed) >= 1
        if exclude:
            assert not set(listed) & set(examples.histories[user].tolist())


def test_excluding_history_moves_targets_up_by_the_items_above(tiny_model: Any, tiny_dataset: Dataset) -> None:
    engine, examples = make_engine("cached", tiny_model(schedule="sqrt", timesteps=4)), tiny_dataset.examples("test")
    kept = evaluate(engine, examples)
    left_out = evaluate(engine, examples, exclude_history=True)
    rows = engine.represent(examples.histories, row_keys=examples.users)
    scores = engine.score(rows)
    for user in range(60):
        own = scores[user, examples.targets[user]]
        above = {item for item in examples.histories[user].tolist() if scores[user, item] >= own}
        assert int(examples.targets[user]) not in above
        assert int(kept.ranks[user]) - int(left_out.ranks[user]) == len(above)


def test_row_keys_are_the_users_rows(tiny_model: Any, tiny_dataset: Dataset) -> None:
    # At lambda 1 noise decides: a part of the examples must see the noise that it sees in the whole.
    engine = make_engine("cached", tiny_model(schedule="sqrt", timesteps=4, lambda_uncertainty=1.0))
    examples = tiny_dataset.examples("test")
    rows = torch.tensor([41, 3, 17])
    part = type(examples)(examples.histories.select(rows), examples.targets[rows], examples.users[rows])
    whole, few = evaluate(engine, examples, seed=5), evaluate(engine, part, seed=5)
    assert torch.equal(few.ranks, whole.ranks[rows])
    assert not torch.equal(evaluate(engine, examples, seed=6).ranks, whole.ranks)


def test_progress_counts_users_and_nobody_is_no_error(tiny_model: Any, tiny_dataset: Dataset) -> None:
    engine, examples = (
        make_engine("cached", tiny_model(schedule="sqrt", timesteps=4)),
        tiny_dataset.examples("validation"),
    )
    done: list[int] = []
    evaluate(engine, examples, batch_size=25, progress=done.append)
    assert done == [25, 25, 10]
    none = torch.zeros(0, dtype=torch.int64)
    empty = evaluate(engine, type(examples)(examples.histories.select(none), none, none))
    assert empty.users == 0
    assert all(interval.value != interval.value for interval in empty.metrics.values())


def test_both_engines_agree(tiny_model: Any, tiny_dataset: Dataset) -> None:
    model, examples = tiny_model(schedule="sqrt", timesteps=4), tiny_dataset.examples("test")
    reference = evaluate(make_engine("reference", model), examples, steps=2)
    assert same(evaluate(make_engine("cached", model), examples, steps=2), reference)


def hand_made() -> Dataset:
    """Training counts: item 1 three, item 2 two, item 3 two, item 4 one, item 5 none."""
    return Dataset.from_lists([[1, 2, 3], [1, 2, 4], [1, 3]], [[4], [3], [2]], [[5], [1], [4]])


def test_of_an_engine_that_rounds_its_own_lists_count(tiny_model: Any, tiny_dataset: Dataset) -> None:
    """It serves the list of float32 backwards: places are those of its list, ranks beyond stay behind it."""

    class Backwards(CachedEngine):
        dtype = torch.int8

        def recommend(self, *arguments: Any, **more: Any) -> TopK:
            found = super().recommend(*arguments, **more)
            return TopK(found.items.flip(1), found.scores.flip(1))

    examples = tiny_dataset.examples("test")
    exact = evaluate(CachedEngine(tiny_model()), examples, steps=1, bootstrap=10)
    found = evaluate(Backwards(tiny_model()), examples, steps=1, bootstrap=10)
    listed = exact.top_items.shape[1]
    inside = exact.ranks < listed
    assert inside.any()
    assert torch.equal(found.top_items, exact.top_items.flip(1))
    assert torch.equal(found.ranks, torch.where(inside, listed - 1 - exact.ranks, exact.ranks))


def test_popularity_by_hand() -> None:
    dataset = hand_made()
    counts = dataset.item_counts()
    assert counts.tolist() == [0, 3, 2, 2, 1, 0]
    found = popularity_evaluation(counts, dataset.examples("test"))
    # Item 5 is behind all four; item 1 is first; item 4 is behind 1, 2 and 3.
    assert found.ranks.tolist() == [4, 0, 3]
    assert found.top_items.shape == (3, 5)
    assert found.top_items[:, 0].tolist() == [1, 1, 1]
    # Item 3 ties with 2, so both are the third place: behind item 1 and behind the other.
    assert popularity_evaluation(counts, dataset.examples("validation")).ranks.tolist() == [3, 2, 2]


def test_popularity_without_own_items_by_hand() -> None:
    dataset = hand_made()
    found = popularity_evaluation(dataset.item_counts(), dataset.examples("test"), exclude_history=True)
    # User 0 has seen 1, 2, 3, 4: only 5 is left. User 1's target is in its history: last. User 2 has seen 1, 3, 2.
    # Without its own item the second user's target cannot be found: a miss at every cutoff.
    assert found.ranks.tolist() == [0, 20, 0]
    assert found.top_items[0, 0] == 5
    assert found.top_items[2, :2].tolist() == [4, 5]


def test_lists_never_name_an_excluded_item() -> None:
    dataset = hand_made()
    examples = dataset.examples("test")
    found = popularity_evaluation(dataset.item_counts(), examples, exclude_history=True)
    for user in range(3):
        assert not set(found.top_items[user].tolist()) & set(examples.histories[user].tolist())


def test_head_is_a_fifth_of_the_items() -> None:
    counts = torch.tensor([0, 5, 9, 1, 9, 0, 3, 2, 2, 9, 1])
    head = head_items(counts)
    # Of ten items two, and of equal counts the smaller id.
    assert head.nonzero().flatten().tolist() == [2, 4]
    assert head.dtype == torch.bool
    groups = popularity_groups(torch.tensor([2, 4, 9, 1]), counts)
    assert [mask.tolist() for mask in groups.values()] == [[True, True, False, False], [False, False, True, True]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=80))
def test_length_groups_partition_and_keep_equal_lengths_together(lengths: list[int]) -> None:
    tensor = torch.tensor(lengths)
    groups = length_groups(tensor)
    assert 1 <= len(groups) <= 5
    assert torch.stack(list(groups.values())).sum(0).tolist() == [1] * len(lengths)
    of_length: dict[int, set[str]] = {}
    for name, mask in groups.items():
        assert bool(mask.any())
        for length in tensor[mask].tolist():
            of_length.setdefault(length, set()).add(name)
    assert all(len(names) == 1 for names in of_length.values())
    # Groups are in rising order and do not interleave.
    bounds = [(int(tensor[mask].min()), int(tensor[mask].max())) for mask in groups.values()]
    assert all(before[1] < after[0] for before, after in itertools.pairwise(bounds))


def test_length_groups_by_hand() -> None:
    groups = length_groups(torch.arange(1, 11))
    assert list(groups) == [f"history {low} to {low + 1}" for low in (1, 3, 5, 7, 9)]
    assert list(length_groups(torch.tensor([6, 6, 6]))) == ["history 6"]


def test_strata_partition_the_users(tiny_model: Any, tiny_dataset: Dataset) -> None:
    examples = tiny_dataset.examples("test")
    found = evaluate(make_engine("cached", tiny_model(schedule="sqrt", timesteps=4)), examples)
    for groups in (
        popularity_groups(examples.targets, tiny_dataset.item_counts()),
        length_groups(examples.histories.lengths),
    ):
        strata = stratify(found.ranks, groups)
        assert sum(users for users, _ in strata.values()) == 60
        for name in METRICS:
            total = sum(users * metrics[name].value for users, metrics in strata.values() if users)
            assert total / 60 == pytest.approx(found.metrics[name].value, abs=1e-9)


def overlap_by_sets(first: Tensor, second: Tensor) -> list[float]:
    pairs = zip(first.tolist(), second.tolist(), strict=True)
    return [len((set(a) & set(b)) - {0}) / len(a) for a, b in pairs]


def test_overlap_by_value() -> None:
    first = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 0, 0], [0, 0, 0, 0]])
    second = torch.tensor([[4, 3, 2, 1], [5, 6, 7, 8], [9, 3, 8, 1], [6, 9, 0, 0], [0, 0, 0, 0]])
    # Id 0 is an empty place: two short lists have nothing in common there.
    assert top_overlap(first, second).tolist() == [1.0, 0.0, 0.5, 0.25, 0.0]
    assert top_overlap(first, second).tolist() == overlap_by_sets(first, second)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.permutations(range(1, 13))] * 2), min_size=1, max_size=6), st.integers(1, 12))
def test_overlap_equals_sets(pairs: list[tuple[list[int], list[int]]], k: int) -> None:
    first = torch.tensor([pair[0][:k] for pair in pairs])
    second = torch.tensor([pair[1][:k] for pair in pairs])
    assert top_overlap(first, second).tolist() == pytest.approx(overlap_by_sets(first, second))
