"""Writing synthetic data, as a prepared `Dataset` or as raw interactions to feed `adrec prepare`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from numpy.typing import NDArray

from adrec.data.dataset import Dataset, build_dataset
from adrec.data.jagged import Jagged
from adrec.data.split import leave_one_out
from adrec.data.synthetic import RingLaw, draw_sequences, sequence_lengths
from adrec.errors import DataError
from adrec.files import check_output, replacing

FIRST_TIME = 1_600_000_000
SECONDS_PER_YEAR = 31_536_000
RAW_SUFFIXES = (".csv", ".parquet")


def synthetic_dataset(
    users: int,
    items: int,
    mean_length: float,
    seed: int = 0,
    name: str = "synthetic",
    law: RingLaw | None = None,
) -> Dataset:
    """Draw a data set from `RingLaw`, split leave-one-out; the same arguments give the same data.

    Every sequence has at least 3 interactions, and no item is dropped, seen or not, so the popularity and
    Bayes-optimal HR@20 in ``info.synthetic`` hold for it exactly, in expectation over draws.
    Raises: `DataError` for arguments out of range.
    """
    law = law or RingLaw(items)
    values, offsets = _draw(users, mean_length, seed, law)
    positions = leave_one_out(np.diff(offsets))
    return build_dataset(
        sequences=Jagged(torch.from_numpy(values), torch.from_numpy(offsets)),
        train_lengths=torch.from_numpy(positions.train_lengths),
        validation_positions=torch.from_numpy(positions.validation_positions),
        test_positions=torch.from_numpy(positions.test_positions),
        item_ids=pa.array(np.arange(1, law.items + 1)),
        user_ids=pa.array(np.arange(1, users + 1)),
        name=name,
        source="synthetic",
        source_sha256="",
        format="synthetic",
        protocol=positions.protocol,
        synthetic={
            **law.describe(),
            "users": users,
            "items": items,
            "mean_length": mean_length,
            "seed": seed,
        },
    )


def write_raw(path: Path, users: int, items: int, mean_length: float, seed: int = 0, law: RingLaw | None = None) -> int:
    """Write what `synthetic_dataset` draws as rows ``user_id, item_id, timestamp``, sorted by time.

    Users start at a random second of one year and wait one minute to a day between interactions. Only items
    that occur are in a raw file, and a k-core changes the distribution further, so the stated HR@20 then hold
    approximately. Returns the number of rows. Raises: `DataError` for another suffix than .csv or .parquet, a
    file that exists or cannot be written, or arguments out of range.
    """
    check_output(path, "--raw")
    if path.suffix not in RAW_SUFFIXES:
        raise DataError(f"--raw {path}: must end in {' or '.join(RAW_SUFFIXES)}")
    if path.exists():
        raise DataError(f"--raw {path}: exists; choose a new file or remove it")
    values, offsets = _draw(users, mean_length, seed, law or RingLaw(items))
    lengths = np.diff(offsets)
    generator = np.random.default_rng([seed, 1])
    waits = generator.integers(60, 86_400, size=len(values))
    waits[offsets[:-1]] = generator.integers(0, SECONDS_PER_YEAR, size=users)
    elapsed = np.cumsum(waits)
    elapsed -= np.repeat(elapsed[offsets[:-1]] - waits[offsets[:-1]], lengths)
    frame = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(1, users + 1, dtype=np.int32), lengths),
            "item_id": values.astype(np.int32),
            "timestamp": FIRST_TIME + elapsed,
        }
    ).sort("timestamp", maintain_order=True)
    with replacing(path) as partial:
        frame.write_csv(partial) if path.suffix == ".csv" else frame.write_parquet(partial)
    return len(values)


def _draw(users: int, mean_length: float, seed: int, law: RingLaw) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    for option, value, allowed, text in (
        ("--users", users, users >= 1, "at least 1"),
        ("--mean-length", mean_length, 3 <= mean_length <= 10_000, "from 3 to 10000"),
        ("--seed", seed, seed >= 0, "at least 0"),
    ):
        if not allowed:
            raise DataError(f"{option} must be {text}, got {value}")
    generator = np.random.default_rng(seed)
    return draw_sequences(law, sequence_lengths(users, mean_length, generator), generator)
