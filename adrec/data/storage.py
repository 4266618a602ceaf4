"""The files of a prepared data set.

``dataset.json`` (see `DatasetInfo`), ``items.parquet`` (id, raw), ``users.parquet`` (id, raw; id is the row
from 0) and ``sequences.parquet`` (user, items: list<int32>, train_length, validation_position,
test_position), one row a user.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import ValidationError
from torch import Tensor

from adrec.data.checksum import content_fingerprint
from adrec.data.dataset import SCHEMA_VERSION, Dataset, DatasetInfo
from adrec.data.jagged import Jagged
from adrec.data.staging import staged_directory
from adrec.errors import DataError

METADATA_FILE = "dataset.json"
ROWS_PER_GROUP = 1 << 16
SEQUENCE_SCHEMA = pa.schema(
    [
        ("user", pa.int64()),
        ("items", pa.list_(pa.int32())),
        ("train_length", pa.int64()),
        ("validation_position", pa.int64()),
        ("test_position", pa.int64()),
    ]
)


def save_directory(dataset: Dataset, out: Path, overwrite: bool = False) -> None:
    """Write ``dataset`` to the directory ``out``, everything or nothing (see `staged_directory`)."""
    with staged_directory(out, overwrite) as staged:
        try:
            _write_ids(staged / "items.parquet", dataset.item_ids, first=1)
            _write_ids(staged / "users.parquet", dataset.user_ids, first=0)
            _write_sequences(staged / "sequences.parquet", dataset)
            text = json.dumps(dataset.info.model_dump(), indent=2, ensure_ascii=False)
            (staged / METADATA_FILE).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise DataError(f"{out}: cannot be written ({error.strerror or error}); choose another --out") from None


def load_directory(directory: Path) -> Dataset:
    """Read a data set back and check it against its fingerprint. Raises: `DataError`."""
    info = _read_info(directory / METADATA_FILE)
    try:
        item_ids = _read_ids(directory / "items.parquet")
        user_ids = _read_ids(directory / "users.parquet")
        table = _read_parquet(directory / "sequences.parquet").cast(SEQUENCE_SCHEMA)
        sequences = _jagged(table["items"])
        splits = [_tensor(table[name]) for name in SEQUENCE_SCHEMA.names[2:]]
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{directory}: damaged or incomplete ({str(error).splitlines()[0]}); prepare it again"
        ) from None
    found = content_fingerprint((sequences.values, sequences.offsets, *splits), (item_ids, user_ids))
    if found != info.fingerprint:
        raise DataError(
            f"{directory}: the content has fingerprint {found[:12]}, {METADATA_FILE} states "
            f"{info.fingerprint[:12]}; a file was changed or mixed with another data set: prepare it again"
        )
    stated = (info.users, info.items, info.interactions)
    counted = (len(user_ids), len(item_ids), sequences.values.numel())
    if stated != counted:
        raise DataError(
            f"{directory}: {METADATA_FILE} states {stated} users, items and interactions, found {counted}; "
            "prepare it again"
        )
    train_lengths, validation_positions, test_positions = splits
    return Dataset(info, sequences, train_lengths, validation_positions, test_positions, item_ids, user_ids)


def _read_info(path: Path) -> DatasetInfo:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path.parent}: no {path.name} in it, so it is no prepared data set; run `adrec prepare`"
        ) from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); prepare the data set again") from None
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema version {found!r}, this adrec reads {SCHEMA_VERSION}; prepare the data set again"
        )
    try:
        return DatasetInfo.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: {place}: {first['msg']}; prepare the data set again") from None


def _write_ids(path: Path, raw: pa.Array, first: int) -> None:
    ids = pa.array(np.arange(first, first + len(raw)))
    pq.write_table(pa.table({"id": ids, "raw": raw}), path, compression="zstd")


def _read_ids(path: Path) -> pa.Array:
    raw = _read_parquet(path)["raw"].combine_chunks()
    if isinstance(raw, pa.ChunkedArray):
        raw = pa.concat_arrays(raw.chunks)
    return raw.cast(pa.large_string()) if pa.types.is_string(raw.type) else raw


def _read_parquet(path: Path) -> pa.Table:
    # Not `pq.read_table`: it reads a folder named "a=b" anywhere in the path as a further column.
    with pq.ParquetFile(path) as file:
        return file.read()


def _write_sequences(path: Path, dataset: Dataset) -> None:
    values = dataset.sequences.values.numpy()
    offsets = dataset.sequences.offsets.numpy()
    splits = [dataset.train_lengths, dataset.validation_positions, dataset.test_positions]
    with pq.ParquetWriter(path, SEQUENCE_SCHEMA, compression="zstd") as writer:
        # A row group at a time: 32-bit offsets of a list array then never overflow.
        for start in range(0, dataset.user_count, ROWS_PER_GROUP):
            end = min(start + ROWS_PER_GROUP, dataset.user_count)
            group = values[offsets[start] : offsets[end]].astype(np.int32)
            inner = (offsets[start : end + 1] - offsets[start]).astype(np.int32)
            columns = [
                pa.array(np.arange(start, end)),
                pa.ListArray.from_arrays(pa.array(inner), pa.array(group)),
                *(pa.array(split[start:end].numpy()) for split in splits),
            ]
            writer.write_table(pa.table(columns, schema=SEQUENCE_SCHEMA))


def _jagged(column: pa.ChunkedArray) -> Jagged:
    lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    offsets = np.concatenate([[0], *lengths]).astype(np.int64).cumsum()
    values = np.empty(offsets[-1], dtype=np.int64)
    start = 0
    for chunk in column.chunks:
        flat = chunk.flatten().to_numpy()
        values[start : start + len(flat)] = flat
        start += len(flat)
    return Jagged(torch.from_numpy(values), torch.from_numpy(offsets))


def _tensor(column: pa.ChunkedArray) -> Tensor:
    return torch.from_numpy(np.array(column.to_numpy(), dtype=np.int64))
