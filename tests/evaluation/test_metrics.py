"""Ranks and metrics against a user-by-user twin, the authors' printed values and a brute-force bootstrap."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adrec.data.jagged import Jagged
from adrec.evaluation import CUTOFFS, METRICS, interval_table, metrics, point_metrics, target_ranks

GOLDEN = Path(__file__).with_name("metrics_golden.npz")


def identity_table(items: int) -> Tensor:
    """Table whose product with `[B, items]` rows is those rows, exactly: rows are then scores chosen by the test."""
    return torch.cat([torch.zeros(1, items), torch.eye(items)])


def naive_rank(scores: list[float], target: int, excluded: set[int]) -> int:
    """Rank of one user's target, item by item; scores[i - 1] belongs to item i."""
    if target in excluded:
        # A miss at every cutoff, also where the catalogue is smaller than the largest of them.
        return max(len(scores), *CUTOFFS)
    own = scores[target - 1]
    return sum(
        1 for item, score in enumerate(scores, start=1) if item != target and item not in excluded and score >= own
    )


def naive_metrics(ranks: list[int]) -> dict[str, float]:
    totals = dict.fromkeys(METRICS, 0.0)
    for rank in ranks:
        for k in CUTOFFS:
            if rank < k:
                totals[f"HR@{k}"] += 1.0
                totals[f"NDCG@{k}"] += 1.0 / math.log2(rank + 2)
                totals[f"MRR@{k}"] += 1.0 / (rank + 1)
    return {name: 100.0 * total / len(ranks) for name, total in totals.items()}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_ranks_equal_a_user_by_user_count(data: st.DataObject) -> None:
    users, items = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 30))
    # Few distinct scores, so that most examples hold ties.
    whole = st.lists(st.integers(-3, 3), min_size=items, max_size=items)
    scores = data.draw(st.lists(whole, min_size=users, max_size=users))
    targets = data.draw(st.lists(st.integers(1, items), min_size=users, max_size=users))
    excluded = data.draw(st.lists(st.lists(st.integers(1, items), max_size=8), min_size=users, max_size=users))
    rows = torch.tensor(scores, dtype=torch.float32)
    ranks = target_ranks(rows, identity_table(items), torch.tensor(targets), Jagged.from_lists(excluded))
    assert ranks.tolist() == [naive_rank(*each) for each in zip(scores, targets, map(set, excluded), strict=True)]
    plain = target_ranks(rows, identity_table(items), torch.tensor(targets))
    assert plain.tolist() == [naive_rank(s, t, set()) for s, t in zip(scores, targets, strict=True)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=50))
def test_metrics_equal_a_user_by_user_sum(ranks: list[int]) -> None:
    found = point_metrics(torch.tensor(ranks))
    assert found == pytest.approx(naive_metrics(ranks), rel=1e-12, abs=1e-12)


def test_the_authors_values() -> None:
    golden = np.load(GOLDEN)
    scores, labels = torch.from_numpy(golden["scores"]), torch.from_numpy(golden["labels"])[:, 0]
    # Their label is a column of their scores, counted from 0; our item ids count from 1.
    found = point_metrics(target_ranks(scores, identity_table(200), labels + 1))
    for k in CUTOFFS:
        for name in (f"HR@{k}", f"NDCG@{k}"):
            assert found[name] / 100.0 == pytest.approx(float(golden[name]), abs=1e-8), name


@pytest.mark.parametrize(("users", "items", "width"), [(64, 299, 32), (1, 50, 16), (3, 1009, 33), (37, 4731, 128)])
def test_equal_embeddings_count_against_the_target(users: int, items: int, width: int) -> None:
    torch.manual_seed(0)
    table, rows = torch.randn(items + 1, width), torch.randn(users, width)
    table[0] = 0.0
    # Far apart and at the ragged end of the table, where a product runs through other code: still equal scores.
    twins = [1, 7, items // 2, items - 1, items]
    table[twins] = table[20].clone()
    ranks = [target_ranks(rows, table, torch.full((users,), item)) for item in twins]
    alone = torch.cat([table[:1], *(table[item : item + 1] for item in range(1, items + 1) if item not in twins)])
    place = 1 + sum(item not in twins for item in range(1, 20))
    expected = target_ranks(rows, alone, torch.full((users,), place)) + len(twins)
    for found in ranks:
        assert torch.equal(found, expected)


def test_a_constant_model_is_worth_nothing() -> None:
    ranks = target_ranks(torch.ones(8, 4), torch.ones(51, 4), torch.arange(1, 9))
    assert ranks.tolist() == [49] * 8
    assert set(point_metrics(ranks).values()) == {0.0}


@pytest.mark.parametrize("items", [30, 400])
def test_a_model_of_nans_is_worth_nothing(items: int) -> None:
    # A diverged model must not look perfect: nothing compares with nan, so no item would stand above the target.
    rows, table, targets = torch.randn(4, 8), torch.randn(items + 1, 8), torch.tensor([1, 2, 3, 4])
    rows[1:] = torch.nan
    ranks = target_ranks(rows, table, targets)
    assert bool((ranks[1:] >= 20).all())
    table[5:] = torch.nan
    # An item without a score cannot push a target out of its place for certain; it must not crown it either.
    assert bool((target_ranks(rows[:1], table, torch.tensor([5])) >= 20).all())


def test_the_padding_row_takes_no_part() -> None:
    torch.manual_seed(0)
    table, rows, targets = torch.randn(20, 4), torch.randn(5, 4), torch.tensor([1, 19, 3, 3, 8])
    before = target_ranks(rows, table, targets)
    table[0] = 1e6
    assert torch.equal(target_ranks(rows, table, targets), before)


def test_excluded_items_never_stand_above_and_an_excluded_target_is_last() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0]] * 4)
    targets = torch.tensor([3, 3, 3, 5])
    exclude = Jagged.from_lists([[], [1, 2], [3], [1, 1, 2, 4, 3]])
    ranks = target_ranks(scores, identity_table(5), targets, exclude)
    assert ranks.tolist() == [2, 0, 20, 0]


@pytest.mark.parametrize("items", [4, 19, 20, 50])
def test_an_excluded_target_is_a_miss_at_every_cutoff(items: int) -> None:
    # Also in a catalogue smaller than the cutoff: what may not be recommended cannot be hit.
    target = torch.tensor([1])
    ranks = target_ranks(torch.ones(1, items), identity_table(items), target, Jagged.from_lists([[1]]))
    assert set(point_metrics(ranks).values()) == {0.0}


@pytest.mark.parametrize("budget", [1, 64, 640, 64 * 199, 64 * 200])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    golden = np.load(GOLDEN)
    scores, labels = torch.from_numpy(golden["scores"]), torch.from_numpy(golden["labels"])[:, 0] + 1
    exclude = Jagged.from_lists([[(user * 31 + step * 17) % 200 + 1 for step in range(user % 9)] for user in range(64)])
    whole = [target_ranks(scores, identity_table(200), labels, given) for given in (None, exclude)]
    monkeypatch.setattr(metrics, "SCORES_BUDGET", budget)
    parts = [target_ranks(scores, identity_table(200), labels, given) for given in (None, exclude)]
    for first, second in zip(whole, parts, strict=True):
        assert torch.equal(first, second)


def test_chunks_keep_ties_of_a_real_product(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    table = torch.randn(301, 32)
    table[151:] = table[1:151]
    rows, targets = torch.randn(16, 32), torch.randint(1, 301, (16,))
    monkeypatch.setattr(metrics, "SCORES_BUDGET", 16 * 150)
    # Every item has its twin in the other chunk of the same shape: a target ties with its own, so it is never first.
    twins = (targets - 1 + 150) % 300 + 1
    ranks = target_ranks(rows, table, targets)
    assert torch.equal(ranks, target_ranks(rows, table, twins))
    assert bool((ranks % 2 == 1).all())


def bootstrap_by_resampling(ranks: np.ndarray, draws: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    resampled = ranks[generator.integers(0, len(ranks), size=(draws, len(ranks)))]
    values = {}
    for k in CUTOFFS:
        inside = resampled < k
        values[f"HR@{k}"] = 100.0 * inside.mean(1)
        values[f"NDCG@{k}"] = 100.0 * (inside / np.log2(resampled + 2.0)).mean(1)
        values[f"MRR@{k}"] = 100.0 * (inside / (resampled + 1.0)).mean(1)
    return values


def test_interval_agrees_with_resampling_users() -> None:
    draws = 4000
    ranks = np.random.default_rng(0).geometric(0.05, size=400) - 1
    table = interval_table(torch.from_numpy(ranks), bootstrap=draws)
    for name, values in bootstrap_by_resampling(ranks, draws).items():
        # A 2.5 % quantile of 4000 normal draws has a standard error of 4.2 % of their deviation; two of them 6 %.
        tolerance = 0.25 * values.std()
        low, high = np.percentile(values, [2.5, 97.5])
        assert table[name].low == pytest.approx(low, abs=tolerance), name
        assert table[name].high == pytest.approx(high, abs=tolerance), name
        assert table[name].low < table[name].value < table[name].high


def test_interval_covers_the_value_of_the_population() -> None:
    # 100 samples of 300 users from a known law: a 95 % interval misses it in about 5, in more than 14 once in 10^4.
    generator = np.random.default_rng(2)
    chance = 0.04
    truth = 100.0 * (1.0 - (1.0 - chance) ** 10)
    missed = 0
    for sample in range(100):
        ranks = torch.from_numpy(generator.geometric(chance, size=300) - 1)
        interval = interval_table(ranks, bootstrap=400, seed=sample)["HR@10"]
        missed += not interval.low <= truth <= interval.high
    assert missed <= 14


def test_intervals_are_repeatable_and_follow_the_seed() -> None:
    ranks = torch.arange(60)
    assert interval_table(ranks) == interval_table(ranks)
    assert interval_table(ranks, seed=1) != interval_table(ranks)


def test_no_user_and_one_user() -> None:
    nobody = torch.zeros(0, dtype=torch.int64)
    assert all(math.isnan(value) for value in point_metrics(nobody).values())
    assert all(
        math.isnan(i.value) and math.isnan(i.low) and math.isnan(i.high) for i in interval_table(nobody).values()
    )
    one = interval_table(torch.tensor([3]))
    assert one["MRR@5"].value == one["MRR@5"].low == one["MRR@5"].high == pytest.approx(25.0)
    assert target_ranks(torch.zeros(0, 4), torch.randn(9, 4), nobody).tolist() == []
    # A catalogue of one item: nothing can stand above it.
    assert target_ranks(torch.randn(2, 4), torch.randn(2, 4), torch.tensor([1, 1])).tolist() == [0, 0]


def test_the_mean_is_over_users_not_over_batches() -> None:
    # The released code would average 1.0 (three users) and 0.0 (one user) to 50 %.
    ranks = torch.tensor([0, 0, 0, 99])
    assert point_metrics(ranks)["HR@5"] == pytest.approx(75.0)


def test_interval_prints_value_and_bounds() -> None:
    assert str(metrics.Interval(1.234, 0.5, 2.0)) == "1.23 [0.50, 2.00]"
