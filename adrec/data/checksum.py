"""SHA-256 of input files and of a data set's content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from adrec.errors import DataError

CHUNK_BYTES = 1 << 22


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes (as stored, so compressed where it is), in hexadecimal."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def content_fingerprint(arrays: Iterable[Tensor], raw_ids: Iterable[pa.Array]) -> str:
    """Return the SHA-256 over integer tensors and raw ids, in hexadecimal.

    Every part is preceded by its type and length, so that no two contents share a byte string. It does not
    depend on compression, chunking or library versions.
    """
    digest = hashlib.sha256()
    for array in arrays:
        numbers = np.ascontiguousarray(array.numpy(), dtype="<i8")
        digest.update(f"int64 {numbers.size}\n".encode())
        digest.update(numbers.data)
    for ids in raw_ids:
        _add_ids(digest, ids)
    return digest.hexdigest()


def _add_ids(digest: hashlib._Hash, ids: pa.Array) -> None:
    digest.update(f"ids {ids.type} {len(ids)}\n".encode())
    if not pa.types.is_large_string(ids.type):
        digest.update(np.ascontiguousarray(ids.to_numpy(zero_copy_only=False)).data)
        return
    # A slice shares its parent's buffers: offsets are taken relative to its own start.
    _, offset_buffer, text = ids.buffers()
    offsets = np.frombuffer(offset_buffer, dtype="<i8")[ids.offset : ids.offset + len(ids) + 1]
    digest.update((offsets - offsets[0]).data)
    if text is not None:
        digest.update(memoryview(text)[int(offsets[0]) : int(offsets[-1])])
