"""The prepared data set: every user's sequence, what of it is trained on, and the evaluation examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from adrec.data.authors_pickle import read_authors_pickle
from adrec.data.checksum import content_fingerprint, file_sha256
from adrec.data.item_index import ItemIndex
from adrec.data.jagged import Jagged
from adrec.errors import DataError

SCHEMA_VERSION = 1
AUTHORS_FILE = "dataset.pkl"


class DatasetInfo(BaseModel):
    """What ``dataset.json`` says about a prepared data set.

    users, items, interactions: counts. source: file name only. protocol: the options and rules that made it.
    synthetic: for generated data the law's parameters and what it implies, ``popularity_hr20`` and
    ``bayes_hr20`` in percent. fingerprint: SHA-256 of the content, independent of how files are encoded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    schema_version: int
    tool_version: str
    source: str
    source_sha256: str
    format: str
    protocol: dict[str, Any]
    users: int
    items: int
    interactions: int
    fingerprint: str
    synthetic: dict[str, Any] | None = None


@dataclass(frozen=True)
class Examples:
    """``n`` evaluation examples: histories (`n` rows of ids), targets `[n]` int64, users `[n]` int64 rows."""

    histories: Jagged
    targets: Tensor
    users: Tensor

    def __len__(self) -> int:
        return self.targets.numel()


@dataclass(frozen=True, eq=False)
class Dataset:
    """A prepared data set of ``U`` users and items ``1..N`` (0 is padding).

    sequences: all interactions of each user in time order. train_lengths: `[U]` int64, the first
    ``train_lengths[u]`` interactions of user ``u`` may be trained on. validation_positions, test_positions:
    `[U]` int64, place of the target in the user's sequence or -1. item_ids: raw id of item ``i`` is
    ``item_ids[i - 1]``. user_ids: raw id of row ``u`` is ``user_ids[u]``.
    """

    info: DatasetInfo
    sequences: Jagged
    train_lengths: Tensor
    validation_positions: Tensor
    test_positions: Tensor
    item_ids: pa.Array
    user_ids: pa.Array

    @property
    def name(self) -> str:
        """The name given when it was prepared."""
        return self.info.name

    @property
    def item_count(self) -> int:
        """Number of items ``N``; ids run from 1 to N."""
        return len(self.item_ids)

    @property
    def user_count(self) -> int:
        """Number of users ``U``."""
        return len(self.user_ids)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content, in hexadecimal."""
        return self.info.fingerprint

    @classmethod
    def load(cls, path: str | Path) -> Dataset:
        """Read a directory written by `save`, or the ADRec authors' ``dataset.pkl`` (or its directory).

        Raises: `DataError` for a path that is none of these, a damaged or incomplete data set, content that
        does not match its fingerprint, or another schema version.
        """
        from adrec.data.storage import METADATA_FILE, load_directory

        path = Path(path)
        if not path.exists():
            raise DataError(f"{path}: no such data set; make one with `adrec prepare` or `adrec synthesize`")
        if path.suffix in (".pkl", ".pickle") and path.is_file():
            return cls.from_authors(path)
        if path.is_file() and path.name != METADATA_FILE:
            raise DataError(f"{path}: is no prepared data set; run `adrec prepare` on it and give its --out directory")
        directory = path.parent if path.is_file() else path
        if not (directory / METADATA_FILE).is_file() and (directory / AUTHORS_FILE).is_file():
            return cls.from_authors(directory / AUTHORS_FILE)
        return load_directory(directory)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write to the directory ``path``: everything or nothing.

        Raises: `DataError` when it exists and is not empty, unless it is a data set and ``overwrite`` is set.
        """
        from adrec.data.storage import save_directory

        save_directory(self, Path(path), overwrite)

    @classmethod
    def from_lists(
        cls,
        train: Sequence[Sequence[int]],
        validation: Sequence[Sequence[int]],
        test: Sequence[Sequence[int]],
        name: str = "lists",
    ) -> Dataset:
        """Build from item ids 1..N, one row a user; ``validation`` and ``test`` rows hold at most one id.

        N is the largest id. Raw item ids are the ids themselves, the raw user id is the row.
        """
        return _from_lists(train, validation, test, name, "in memory", "", "lists")

    @classmethod
    def from_authors(cls, path: Path, name: str | None = None) -> Dataset:
        """Convert the authors' ``dataset.pkl`` in memory; its lists are taken as they are (no k-core).

        Raises: `DataError` for a file that is not one, see `read_authors_pickle`.
        """
        train, validation, test = read_authors_pickle(path)
        return _from_lists(
            train,
            validation,
            test,
            name or path.resolve().parent.name,
            path.name,
            file_sha256(path),
            "authors",
        )

    def training_sequences(self) -> Jagged:
        """Each user's sequence cut to what may be trained on: `U` rows, of which some may be empty."""
        return self._prefixes(torch.arange(self.user_count), self.train_lengths)

    def examples(self, split: Literal["validation", "test"]) -> Examples:
        """The evaluation examples of a split, in the order of users.

        A history is everything of the user before the target, so under leave-one-out the test history
        includes the validation item.
        """
        if split not in ("validation", "test"):
            raise DataError(f"split {split!r}: must be 'validation' or 'test'")
        positions = self.validation_positions if split == "validation" else self.test_positions
        users = torch.nonzero(positions >= 0).flatten()
        positions = positions[users]
        targets = self.sequences.values[self.sequences.offsets[users] + positions]
        return Examples(self._prefixes(users, positions), targets, users)

    def item_counts(self) -> Tensor:
        """Training interactions of each item, `[N + 1]` int64; entry 0 is padding and is 0."""
        return torch.bincount(self.training_sequences().values, minlength=self.item_count + 1)

    def encode_items(self, raw: Sequence[Any]) -> list[int]:
        """Turn raw ids into item ids, see `ItemIndex`; an unknown one becomes 0."""
        return [self._item_index[value] for value in raw]

    @cached_property
    def _item_index(self) -> ItemIndex:
        return ItemIndex(self.item_ids)

    def _prefixes(self, users: Tensor, lengths: Tensor) -> Jagged:
        """The first ``lengths[r]`` values of each row ``users[r]``."""
        offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=offsets[1:])
        shift = self.sequences.offsets[users] - offsets[:-1]
        places = torch.arange(int(offsets[-1])) + shift.repeat_interleave(lengths)
        return Jagged(self.sequences.values[places], offsets)


def tool_version() -> str:
    """Version of the installed adrec, or ``"source"`` when it runs from a checkout that is not installed."""
    try:
        return version("adrec")
    except PackageNotFoundError:
        return "source"


def build_dataset(
    *,
    sequences: Jagged,
    train_lengths: Tensor,
    validation_positions: Tensor,
    test_positions: Tensor,
    item_ids: pa.Array,
    user_ids: pa.Array,
    name: str,
    source: str,
    source_sha256: str,
    format: str,
    protocol: dict[str, Any],
    synthetic: dict[str, Any] | None = None,
) -> Dataset:
    """Assemble a data set and its `DatasetInfo`, with counts and fingerprint computed from the content."""
    arrays = (sequences.values, sequences.offsets, train_lengths, validation_positions, test_positions)
    info = DatasetInfo(
        name=name,
        schema_version=SCHEMA_VERSION,
        tool_version=tool_version(),
        source=source,
        source_sha256=source_sha256,
        format=format,
        protocol=protocol,
        users=len(user_ids),
        items=len(item_ids),
        interactions=sequences.values.numel(),
        fingerprint=content_fingerprint(arrays, (item_ids, user_ids)),
        synthetic=synthetic,
    )
    return Dataset(info, sequences, train_lengths, validation_positions, test_positions, item_ids, user_ids)


def _from_lists(
    train: Sequence[Sequence[int]],
    validation: Sequence[Sequence[int]],
    test: Sequence[Sequence[int]],
    name: str,
    source: str,
    source_sha256: str,
    format: str,
) -> Dataset:
    if not len(train) == len(validation) == len(test):
        raise DataError(f"train, validation and test list {len(train)}, {len(validation)} and {len(test)} users")
    held_out = [_row_lengths(validation), _row_lengths(test)]
    if any(bool((lengths > 1).any()) for lengths in held_out):
        raise DataError("validation and test hold at most one item for a user")
    train_lengths = _row_lengths(train)
    rows: Iterable[list[int]] = (
        [*kept, *chosen, *last] for kept, chosen, last in zip(train, validation, test, strict=True)
    )
    sequences = Jagged.from_lists(rows)
    if sequences.values.numel() == 0 or int(sequences.values.min()) < 1:
        raise DataError("item ids must be the integers 1 to N (0 is padding), and there must be at least one")
    return build_dataset(
        sequences=sequences,
        train_lengths=train_lengths,
        # A target without history is no example, as in every split.
        validation_positions=_position(held_out[0], train_lengths),
        test_positions=_position(held_out[1], train_lengths + held_out[0]),
        item_ids=pa.array(np.arange(1, int(sequences.values.max()) + 1)),
        user_ids=pa.array(np.arange(len(train))),
        name=name,
        source=source,
        source_sha256=source_sha256,
        format=format,
        protocol={
            "split": "leave-one-out",
            "lists": "taken as they are, no k-core; item ids 1 to the largest, user id is the row from 0",
        },
    )


def _row_lengths(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.int64)


def _position(present: Tensor, history: Tensor) -> Tensor:
    return torch.where((present > 0) & (history > 0), history, -1)
