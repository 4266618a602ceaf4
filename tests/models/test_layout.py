"""Packing of jagged batches: nothing lost, nothing moved, rectangles almost full."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adrec.data.jagged import Jagged
from adrec.models.base import TokenBatch
from adrec.models.layout import Layout

lengths_lists = st.lists(st.integers(0, 60), max_size=40).map(sorted)
relaxed = settings(max_examples=120, deadline=None)


def layout_of(lengths: list[int]) -> Layout:
    return Layout.from_sorted_lengths(torch.tensor(lengths, dtype=torch.int64))


@given(lengths=lengths_lists)
@relaxed
def test_groups_cover_every_user_and_token_exactly_once(lengths: list[int]) -> None:
    layout = layout_of(lengths)
    users = [user for group in layout.groups for user in range(group.users.start, group.users.stop)]
    tokens = [token for group in layout.groups for token in range(group.tokens.start, group.tokens.stop)]
    assert users == list(range(len(lengths)))
    assert tokens == list(range(sum(lengths)))
    assert layout.tokens == sum(lengths)
    for group in layout.groups:
        assert group.tokens.stop - group.tokens.start == sum(lengths[group.users])


@given(lengths=lengths_lists)
@relaxed
def test_lengths_in_a_group_differ_by_a_quarter_at_most(lengths: list[int]) -> None:
    for group in layout_of(lengths).groups:
        own = lengths[group.users]
        assert group.length == max(own) <= 1.25 * min(own)
        assert group.size == len(own)
        assert (group.slots is None) == (min(own) == max(own))


@given(lengths=lengths_lists, trailing=st.sampled_from([(), (3,), (2, 5)]))
@relaxed
def test_unpack_puts_each_token_in_its_place_and_pack_takes_it_back(
    lengths: list[int], trailing: tuple[int, ...]
) -> None:
    layout = layout_of(lengths)
    packed = torch.randn(sum(lengths), *trailing)
    for group in layout.groups:
        rectangle = group.unpack(packed[group.tokens])
        assert rectangle.shape == (group.size, group.length, *trailing)
        expected = torch.zeros(group.size, group.length, *trailing)
        start = group.tokens.start
        for row, length in enumerate(lengths[group.users]):
            expected[row, :length] = packed[start : start + length]
            start += length
        assert torch.equal(rectangle, expected)
        assert torch.equal(group.pack(rectangle), packed[group.tokens])
        # What lies beyond a user's own tokens is never taken back.
        beyond = torch.arange(group.length) >= torch.tensor(lengths[group.users])[:, None]
        rectangle = rectangle.clone()
        rectangle[beyond] = float("nan")
        assert torch.equal(group.pack(rectangle), packed[group.tokens])


@given(lengths=lengths_lists)
@relaxed
def test_users_positions_and_last(lengths: list[int]) -> None:
    layout = layout_of(lengths)
    assert layout.users.tolist() == [user for user, length in enumerate(lengths) for _ in range(length)]
    assert layout.positions.tolist() == [place for length in lengths for place in range(length)]
    assert layout.offsets.tolist() == [sum(lengths[:user]) for user in range(len(lengths) + 1)]
    if lengths and lengths[0]:
        last = layout.last
        assert layout.users[last].tolist() == list(range(len(lengths)))
        assert (layout.positions[last] + 1).tolist() == lengths


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [0, 0, 1], [1]])
def test_users_without_tokens(lengths: list[int]) -> None:
    layout = layout_of(lengths)
    assert layout.tokens == sum(lengths)
    assert layout.users.numel() == layout.positions.numel() == sum(lengths)
    if lengths and not lengths[0]:
        first = layout.groups[0]
        assert (first.length, first.size) == (0, lengths.count(0))
        empty = torch.zeros(0, 3)
        assert first.unpack(empty).shape == (lengths.count(0), 0, 3)
        assert first.pack(first.unpack(empty)).shape == (0, 3)


@given(
    rows=st.lists(st.lists(st.integers(1, 99), min_size=2, max_size=20), min_size=1, max_size=12),
    max_length=st.integers(1, 12),
)
@relaxed
def test_a_training_batch_is_each_sequence_cut_and_shifted_by_one(rows: list[list[int]], max_length: int) -> None:
    batch = TokenBatch.from_sequences(Jagged.from_lists(rows), max_length)
    # Sorting by length is stable, so equal lengths stay in the order given.
    cut = sorted((row[-(max_length + 1) :] for row in rows), key=len)
    assert batch.inputs.tolist() == [item for row in cut for item in row[:-1]]
    assert batch.targets.tolist() == [item for row in cut for item in row[1:]]
    assert batch.layout.lengths.tolist() == [len(row) - 1 for row in cut]
