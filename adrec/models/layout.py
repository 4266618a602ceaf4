"""How a batch of jagged histories is laid out: tokens back to back, attention in groups of similar length.

Linear layers, norms and losses run over the packed tokens, so padding costs nothing there. Only attention needs a
rectangle; users are sorted by length inside the batch and cut into groups whose lengths differ by a quarter at most
(exactly one length up to three tokens), so the rectangle is almost full. Sorting inside a batch changes neither who is
in it nor any sum over it: a batch stays a random sample of users.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GROWTH = 1.25


@dataclass(frozen=True)
class Group:
    """Users ``users`` (a slice) of the sorted batch, padded on the right to ``length`` tokens for attention.

    tokens: slice of the packed tokens. slots: `[tokens]` int64 place of each token in the flattened rectangle, or None
    when every user has exactly ``length`` tokens.
    """

    users: slice
    tokens: slice
    length: int
    slots: Tensor | None

    @property
    def size(self) -> int:
        return self.users.stop - self.users.start

    def pack(self, rectangle: Tensor) -> Tensor:
        """`[users, length, ...]` -> `[tokens, ...]`."""
        flat = rectangle.reshape(self.size * self.length, *rectangle.shape[2:])
        return flat if self.slots is None else flat[self.slots]

    def unpack(self, packed: Tensor) -> Tensor:
        """`[tokens, ...]` -> `[users, length, ...]`, zero where a user has no token."""
        if self.slots is not None:
            empty = packed.new_zeros(self.size * self.length, *packed.shape[1:])
            packed = empty.index_copy(0, self.slots, packed)
        return packed.view(self.size, self.length, *packed.shape[1:])


@dataclass(frozen=True)
class Layout:
    """Lengths of a batch sorted by length, and the groups that attention works on.

    lengths: `[B]` int64, ascending. offsets: `[B + 1]` int64 into the packed tokens. users: `[tokens]` int64, row of
    the user each packed token belongs to; every attention of a batch on a GPU reads it.
    """

    lengths: Tensor
    offsets: Tensor
    users: Tensor
    groups: tuple[Group, ...]

    @classmethod
    def from_sorted_lengths(cls, lengths: Tensor) -> Layout:
        """Build from ascending lengths `[B]`; users without a token form a group of length 0."""
        offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64, device=lengths.device)
        torch.cumsum(lengths, 0, out=offsets[1:])
        sizes, starts = lengths.tolist(), offsets.tolist()
        groups: list[Group] = []
        first = 0
        while first < len(sizes):
            longest = int(sizes[first] * _GROWTH)
            last = first
            while last < len(sizes) and sizes[last] <= longest:
                last += 1
            groups.append(_group(first, last, starts, sizes, lengths))
            first = last
        rows = torch.arange(len(sizes), device=lengths.device)
        users = rows.repeat_interleave(lengths, output_size=starts[-1])
        return cls(lengths, offsets, users, tuple(groups))

    @property
    def tokens(self) -> int:
        return self.groups[-1].tokens.stop if self.groups else 0

    @property
    def positions(self) -> Tensor:
        """Place of each packed token in its own history, counted from its start, `[tokens]` int64."""
        count = torch.arange(self.tokens, device=self.lengths.device)
        return count - self.offsets[:-1].repeat_interleave(self.lengths)

    @property
    def last(self) -> Tensor:
        """Packed index of each user's last token, `[B]` int64 (every length must be 1 or more)."""
        return self.offsets[1:] - 1


def _group(first: int, last: int, starts: list[int], sizes: list[int], lengths: Tensor) -> Group:
    length, tokens = sizes[last - 1], slice(starts[first], starts[last])
    if sizes[first] == length:
        return Group(slice(first, last), tokens, length, None)
    columns = torch.arange(length, device=lengths.device)
    slots = (columns < lengths[first:last, None]).view(-1).nonzero().squeeze(1)
    return Group(slice(first, last), tokens, length, slots)
