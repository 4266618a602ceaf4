"""Batches are random samples of users, the same for a seed and an epoch."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adrec.data.jagged import Jagged
from adrec.training.batches import RandomBatches, derive_seed, training_loader, useful_tokens, validation_rows


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 40), st.integers(0, 5), st.integers(0, 50), st.integers(1, 4))
def test_every_user_is_met_once_an_epoch(users: int, size: int, seed: int, epoch: int, processes: int) -> None:
    shares = [list(RandomBatches(users, size, seed, epoch, rank, processes)) for rank in range(processes)]
    whole = list(RandomBatches(users, size, seed, epoch))
    assert sorted(user for batch in whole for user in batch) == list(range(users))
    assert all(len(batch) == size for batch in whole[:-1])
    assert list(RandomBatches(users, size, seed, epoch)) == whole
    assert [len(share) for share in shares] == [len(RandomBatches(users, size, seed, epoch, 0, processes))] * processes
    # The processes partition each batch, as evenly as it goes; only a last batch with too few users is left out.
    for index, batch in enumerate(whole[: len(shares[0])]):
        assert Counter(user for share in shares for user in share[index]) == Counter(batch)
        sizes = [len(share[index]) for share in shares]
        if size >= processes:
            assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
    left_out = whole[len(shares[0]) :]
    assert len(left_out) <= 1
    assert all(len(batch) < processes for batch in left_out)


def test_epochs_and_seeds_shuffle_anew() -> None:
    orders = {str(list(RandomBatches(50, 8, seed, epoch))) for seed in range(3) for epoch in range(10)}
    assert len(orders) == 30
    # A batch is a random sample: over epochs a user's neighbours change.
    firsts = [set(next(iter(RandomBatches(50, 8, 0, epoch)))) for epoch in range(40)]
    met = Counter(user for batch in firsts for user in batch)
    assert len(met) == 50


def test_seeds_derived_for_different_uses_differ() -> None:
    parts: list[tuple[int | str, ...]] = [(0,), (1,), (0, 0), (0, "a"), ("a", 0), (0, "a", 0), ("0", "a")]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Fixed for good: another value would silently change every run that is resumed after an update.
    assert derive_seed(0, "main") == derive_seed(0, "main")


def test_loader_skips_users_without_a_target_and_cuts_long_ones() -> None:
    sequences = Jagged.from_lists([[1], [2, 3], [], [4, 5, 6, 7, 8, 9], [10, 11, 12]])
    batches = list(training_loader(sequences, 3, 2, seed=0, epoch=0))
    assert [batch.layout.lengths.numel() for batch in batches] == [2, 1]
    found = sorted(
        (tuple(batch.inputs[start:end].tolist()), tuple(batch.targets[start:end].tolist()))
        for batch in batches
        for start, end in zip(batch.layout.offsets, batch.layout.offsets[1:], strict=False)
    )
    # Three inputs at most, and the most recent ones.
    assert found == [((2,), (3,)), ((6, 7, 8), (7, 8, 9)), ((10, 11), (11, 12))]


def test_validation_rows_partition() -> None:
    parts = [validation_rows(11, rank, 3).tolist() for rank in range(3)]
    assert sorted(row for part in parts for row in part) == list(range(11))
    assert parts[1] == [1, 4, 7, 10]


def test_useful_tokens_by_hand() -> None:
    # Tokens are interactions less one: 5 and 6 share a rectangle of 2 x 6, both 2s fill theirs, 1 cannot be trained on.
    sequences = Jagged.from_lists([[1] * 6, [1] * 7, [1] * 3, [1] * 3, [1]])
    found = useful_tokens(sequences, max_length=10, batch_size=8, seed=0)
    assert found == {
        "linear": 100.0,
        "attention": pytest.approx(100.0 * 15 / 16),
        "padded": pytest.approx(100.0 * 15 / 40),
    }
    one = useful_tokens(sequences, max_length=10, batch_size=1, seed=0)
    assert one["attention"] == 100.0
    # Cut to 4 inputs: 4, 4, 2, 2.
    assert useful_tokens(sequences, max_length=4, batch_size=8, seed=0)["padded"] == pytest.approx(75.0)
    nobody = useful_tokens(Jagged.from_lists([[1]]), max_length=4, batch_size=8, seed=0)
    assert nobody["padded"] == 0.0
