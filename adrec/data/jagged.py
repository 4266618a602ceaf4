"""Sequences of different lengths, stored back to back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Jagged:
    """``B`` integer sequences as one flat tensor and its row offsets.

    values: `[M]` int64, the sequences back to back. offsets: `[B + 1]` int64, starts at 0, ends at `M`.
    Row `i` is ``values[offsets[i]:offsets[i + 1]]``; a row may be empty.
    """

    values: Tensor
    offsets: Tensor

    @classmethod
    def from_lists(cls, rows: Iterable[Sequence[int]]) -> Jagged:
        """Build from Python lists (or arrays) of ids."""
        arrays = [np.asarray(row, dtype=np.int64).reshape(-1) for row in rows]
        offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in arrays], out=offsets[1:])
        values = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)
        return cls(torch.from_numpy(values), torch.from_numpy(offsets))

    @classmethod
    def from_padded(cls, padded: Tensor) -> Jagged:
        """Build from left-padded rows `[B, L]` where id 0 is padding."""
        mask = padded != 0
        offsets = torch.zeros(padded.shape[0] + 1, dtype=torch.int64, device=padded.device)
        torch.cumsum(mask.sum(1), 0, out=offsets[1:])
        return cls(padded[mask].to(torch.int64), offsets)

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def __getitem__(self, row: int) -> Tensor:
        return self.values[int(self.offsets[row]) : int(self.offsets[row + 1])]

    @cached_property
    def lengths(self) -> Tensor:
        """Row lengths, `[B]` int64."""
        return self.offsets[1:] - self.offsets[:-1]

    @cached_property
    def longest(self) -> int:
        """Length of the longest row, 0 without rows."""
        return int(self.lengths.max()) if len(self) else 0

    @property
    def rows(self) -> Tensor:
        """Row of each value, `[M]` int64."""
        return torch.arange(len(self), device=self.offsets.device).repeat_interleave(self.lengths)

    def tail(self, longest: int) -> Jagged:
        """Keep the last ``longest`` values of every row (the most recent part of a history)."""
        if self.longest <= longest:
            return self
        kept = self.lengths.clamp(max=longest)
        return self._gather(self.offsets[1:] - kept, kept)

    def select(self, rows: Tensor) -> Jagged:
        """Return the rows with the given indices `[R]` int64, in that order."""
        return self._gather(self.offsets[rows], self.lengths[rows])

    def padded(self, width: int) -> Tensor:
        """Left-pad to `[B, width]` with 0; every row must fit."""
        if len(self) * width == self.values.numel():
            return self.values.view(len(self), width)
        lengths = self.lengths
        out = self.values.new_zeros(len(self), width)
        out[torch.arange(width, device=out.device) >= width - lengths[:, None]] = self.values
        return out

    def to(self, device: torch.device | str) -> Jagged:
        """Move to a device; itself where it is there."""
        if self.values.device == torch.device(device):
            return self
        return Jagged(self.values.to(device), self.offsets.to(device))

    def _gather(self, starts: Tensor, lengths: Tensor) -> Jagged:
        offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64, device=lengths.device)
        torch.cumsum(lengths, 0, out=offsets[1:])
        within = torch.arange(int(offsets[-1]), device=lengths.device) - offsets[:-1].repeat_interleave(lengths)
        return Jagged(self.values[starts.repeat_interleave(lengths) + within], offsets)
