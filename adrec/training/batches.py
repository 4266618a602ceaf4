"""Random batches of users, the same for a given seed and epoch whatever was run before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from adrec.data.jagged import Jagged
from adrec.models.base import TokenBatch


def derive_seed(*parts: int | str) -> int:
    """Mix a seed with what it is used for into an independent 63-bit seed."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class UserRows(Dataset[int]):
    """Rows of the users that can be trained on (2 interactions or more)."""

    def __init__(self, sequences: Jagged) -> None:
        self.sequences = sequences
        self.rows = (sequences.lengths >= 2).nonzero().squeeze(1)

    def __len__(self) -> int:
        return self.rows.numel()

    def __getitem__(self, index: int) -> int:
        return int(self.rows[index])


class RandomBatches(Sampler[list[int]]):
    """A fresh permutation of users each epoch, cut into batches; every process takes its share of each batch.

    A batch is a random sample of users, never sorted by length: sorting changes the weight of a token in the loss and
    costs accuracy. Padding is saved inside the batch instead (`adrec.models.layout`).
    """

    def __init__(self, users: int, batch_size: int, seed: int, epoch: int, rank: int = 0, processes: int = 1) -> None:
        self.users, self.batch_size = users, batch_size
        self.seed, self.epoch, self.rank, self.processes = seed, epoch, rank, processes

    def __len__(self) -> int:
        # A last batch with fewer users than processes would leave one without work.
        whole, rest = divmod(self.users, self.batch_size)
        return whole + (rest >= self.processes)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "batches", self.epoch))
        order = torch.randperm(self.users, generator=generator)
        for index in range(len(self)):
            batch = order[index * self.batch_size : (index + 1) * self.batch_size]
            yield batch[self.rank :: self.processes].tolist()


def training_loader(
    sequences: Jagged, max_length: int, batch_size: int, seed: int, epoch: int, rank: int = 0, processes: int = 1
) -> DataLoader[TokenBatch]:
    """One epoch of `TokenBatch`; deterministic in (seed, epoch)."""
    rows = UserRows(sequences)

    def collate(users: list[int]) -> TokenBatch:
        return TokenBatch.from_sequences(sequences.select(torch.tensor(users)), max_length)

    sampler = RandomBatches(len(rows), batch_size, seed, epoch, rank, processes)
    return DataLoader(rows, batch_sampler=sampler, collate_fn=collate, num_workers=0)  # type: ignore[arg-type]


def useful_tokens(sequences: Jagged, max_length: int, batch_size: int, seed: int) -> dict[str, float]:
    """Share of computed positions that hold a real token, in percent, for one epoch.

    linear: in linear layers, norms and losses. attention: in the attention rectangles. padded: what padding every
    history to ``max_length``, as the released code does, would reach.
    """
    tokens = rectangles = users = 0
    for batch in training_loader(sequences, max_length, batch_size, seed, epoch=0):
        tokens += batch.layout.tokens
        rectangles += sum(group.size * group.length for group in batch.layout.groups)
        users += batch.layout.lengths.numel()
    return {
        "linear": 100.0,
        "attention": 100.0 * tokens / max(1, rectangles),
        "padded": 100.0 * tokens / max(1, users * max_length),
    }


def validation_rows(examples: int, rank: int = 0, processes: int = 1) -> Tensor:
    """The share of validation examples one process evaluates."""
    return torch.arange(examples)[rank::processes]
