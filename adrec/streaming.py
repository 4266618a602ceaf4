"""Histories read, and recommendations written, batch by batch: files may be larger than memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from adrec.data.csv_text import csv_rows
from adrec.data.json_text import parse_json
from adrec.errors import DataError
from adrec.files import check_output, replacing
from adrec.recommender import Recommendation

FORMATS = (".csv", ".jsonl", ".parquet")
SMALLEST_MERGE = 2**16
READ_BYTES = 2**20
ROW_GROUP_USERS = 2**14


@dataclass(frozen=True)
class UserHistory:
    """user: the file's user id, text or an integer, or the row number where it has none.

    history: raw item ids, oldest first.
    """

    user: Any
    history: list[Any]


def read_histories(path: Path, separator: str = " ") -> Iterator[UserHistory]:
    """Yield the users of a ``.csv``, ``.jsonl`` or ``.parquet`` file in order.

    jsonl and parquet: ``history`` (a list of ids) and optionally ``user``. csv: either those columns, with the history
    as a JSON list or ids joined by ``separator``, or one interaction a row in columns ``user`` and ``item``, a user's
    rows together and oldest first. Raises DataError naming the file and line.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    readers = {
        ".csv": lambda: _read_csv(path, separator),
        ".jsonl": lambda: _read_jsonl(path),
        ".parquet": lambda: _read_parquet(path),
    }
    yield from readers[file_format(path, "--input")]()


def file_format(path: Path, option: str) -> str:
    """The suffix of a supported file; raises DataError otherwise."""
    if path.suffix.lower() not in FORMATS:
        raise DataError(f"{option} is {path}: unknown format '{path.suffix}'; allowed: {', '.join(FORMATS)}")
    return path.suffix.lower()


class _Lines:
    """Text lines of a UTF-8 file, decoded one by one so that an error names its line; a byte-order mark is dropped."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file, self.number = path, file, 0

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            self.number += 1
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{self.path}, line {self.number}: not UTF-8: {error}") from None
            yield text.removeprefix("\ufeff") if self.number == 1 else text


class SeenUsers:
    """Remembers users in about 12 bytes each, 30 while it merges, by a 64-bit digest of their id.

    Two ids with one digest would raise a false error: the chance is 3 in 10^8 among a million users, and 3 in 10^4
    among a hundred million.
    """

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._recent: set[int] = set()

    def add(self, user: str) -> bool:
        """Note a user; False when it was noted before."""
        digest = int.from_bytes(blake2b(user.encode(), digest_size=8).digest(), "little")
        place = int(np.searchsorted(self._sorted, np.uint64(digest)))
        if digest in self._recent or (place < len(self._sorted) and int(self._sorted[place]) == digest):
            return False
        self._recent.add(digest)
        # A share of what is sorted already, so that merging costs a constant time a user.
        if len(self._recent) >= max(SMALLEST_MERGE, len(self._sorted) // 16):
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent.clear()
        return True


def _read_csv(path: Path, separator: str) -> Iterator[UserHistory]:
    with path.open("rb") as file:
        lines = _Lines(path, file)
        rows = (row for row in csv_rows(lines, strict=True) if row)
        try:
            columns = next(rows, [])
            _refuse_repeated(columns, path)
            if "history" in columns:
                for number, row in enumerate(rows):
                    names = ("user", "history") if "user" in columns else ("history",)
                    *user, text = _cells(row, columns, names, path, lines.number)
                    # An empty cell is how CSV writes that there is no user.
                    yield UserHistory("".join(user) or number, _split(text, separator, path, lines.number))
            elif {"user", "item"} <= set(columns):
                pairs = (_cells(row, columns, ("user", "item"), path, lines.number) for row in rows)
                seen = SeenUsers()
                for user, group in groupby(pairs, key=lambda pair: pair[0]):
                    if not seen.add(user):
                        raise DataError(f"{path}, line {lines.number}: user '{user}' comes back; sort the file by user")
                    yield UserHistory(user, [item for _, item in group])
            else:
                found = ", ".join(columns) or "none"
                raise DataError(f"{path}: columns are {found}; expected 'history', or 'user' and 'item'")
        except csv.Error as error:
            lone = "a carriage return without a line feed; end lines in LF or CRLF"
            detail = lone if "new-line" in str(error) else error
            raise DataError(f"{path}, line {lines.number}: not readable as CSV: {detail}") from None


def _refuse_repeated(columns: Sequence[str], path: Path) -> None:
    for name in ("user", "item", "history"):
        if columns.count(name) > 1:
            raise DataError(f"{path}: column '{name}' stands {columns.count(name)} times; keep one of them")


def _cells(row: list[str], columns: list[str], names: Sequence[str], path: Path, line: int) -> tuple[str, ...]:
    """The values of the columns ``names``; raises DataError for a row that lacks one or is longer than the header."""
    if len(row) > len(columns):
        raise DataError(
            f"{path}, line {line}: {len(row)} fields, the header has {len(columns)}; quote a history that holds a comma"
        )
    places = [columns.index(name) for name in names]
    for name, place in zip(names, places, strict=True):
        if place >= len(row):
            raise DataError(f"{path}, line {line}: no value for column '{name}'")
    return tuple(row[place] for place in places)


def _split(text: str, separator: str, path: Path, line: int) -> list[Any]:
    if not text.startswith("["):
        return [part for part in text.split(separator) if part]
    try:
        return _checked(parse_json(text), path, line)
    except ValueError as error:
        raise DataError(f"{path}, line {line}: 'history' starts with '[' but is not a JSON list: {error}") from None


def _read_jsonl(path: Path) -> Iterator[UserHistory]:
    with path.open("rb") as file:
        lines = _Lines(path, file)
        for text in lines:
            if not text.strip():
                continue
            try:
                row = parse_json(text)
            except ValueError as error:
                raise DataError(f"{path}, line {lines.number}: not JSON: {error}") from None
            if not isinstance(row, dict) or "history" not in row:
                keys = isinstance(row, dict) and ", ".join(list(row)[:20])
                found = f"the keys {keys}" if keys else text.strip()[:40]
                raise DataError(
                    f"{path}, line {lines.number}: expected an object with 'history' (and 'user'), found {found}"
                )
            user = _user(row.get("user", lines.number - 1), path, lines.number)
            yield UserHistory(user, _checked(row["history"], path, lines.number))


def _read_parquet(path: Path) -> Iterator[UserHistory]:
    try:
        # Otherwise whole row groups are read ahead, and a file may be one row group.
        source = pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from None
    names = source.schema_arrow.names
    _refuse_repeated(names, path)
    if "history" not in names:
        raise DataError(
            f"{path}: columns are {', '.join(names)}; expected 'history' (a list of ids) and optionally 'user'"
        )
    number = 0
    try:
        for batch in source.iter_batches(4096, columns=[name for name in ("user", "history") if name in names]):
            histories = batch.column("history").to_pylist()
            users = batch.column("user").to_pylist() if "user" in names else range(number, number + len(histories))
            for user, history in zip(users, histories, strict=True):
                number += 1
                yield UserHistory(_user(user, path, number), _checked(history, path, number))
    except (pa.ArrowException, OSError, ValueError) as error:
        # A page that does not decode, bytes that are no text.
        detail = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read after row {number} ({detail}); write the file again") from None


def _user(user: Any, path: Path, line: int) -> Any:
    if not _is_id(user):
        raise DataError(
            f"{path}, line {line}: 'user' is {str(user)[:80]!r}; expected text or an integer, or no 'user' at all"
        )
    return user


def _checked(history: Any, path: Path, line: int) -> list[Any]:
    if not isinstance(history, list) or not all(map(_is_id, history)):
        raise DataError(
            f"{path}, line {line}: 'history' is {str(history)[:80]!r}; expected a list of text or integer ids,"
            " which is empty for a user without any"
        )
    return history


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


class Writer(Protocol):
    """Takes finished recommendations in order."""

    def write(self, users: list[Any], results: list[Recommendation]) -> None: ...


class _JsonLines:
    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, users: list[Any], results: list[Recommendation]) -> None:
        for user, result in zip(users, results, strict=True):
            self.file.write(json.dumps({"user": user, **vars(result)}, ensure_ascii=False) + "\n")


class _Csv:
    """One row a recommended item."""

    def __init__(self, file: IO[str]) -> None:
        self.rows = csv.writer(file, lineterminator="\n")
        self.rows.writerow(["user", "rank", "item", "score", "source"])

    def write(self, users: list[Any], results: list[Recommendation]) -> None:
        for user, result in zip(users, results, strict=True):
            for rank, (item, score) in enumerate(zip(result.items, result.scores, strict=True), start=1):
                self.rows.writerow([user, rank, item, f"{score:.9g}", result.source])


class _Parquet:
    """One row a user; items have the type of the catalogue's raw ids, users are integers or else text.

    The first batch decides which, since a column has one type; a later user that does not fit is an error. Batches wait
    for others until they make a row group, since each costs every reader something.
    """

    def __init__(self, path: Path, item_type: pa.DataType) -> None:
        self.path, self.item_type = path, item_type
        self.writer: pq.ParquetWriter | None = None
        self.waiting: list[pa.RecordBatch] = []

    def write(self, users: list[Any], results: list[Recommendation]) -> None:
        if self.writer is None:
            self._open(pa.int64() if all(_fits_int64(user) for user in users) else pa.string())
        assert self.writer is not None
        if self.schema.field("user").type == pa.string():
            users = [str(user) for user in users]
        else:
            for user in users:
                if not _fits_int64(user):
                    raise DataError(f"user {user!r} comes after integers; a Parquet column has one type, use .jsonl")
        columns = [users, *([getattr(r, name) for r in results] for name in ("items", "scores", "unknown", "source"))]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self.schema, strict=True)]
        self.waiting.append(pa.record_batch(arrays, schema=self.schema))
        if sum(map(len, self.waiting)) >= ROW_GROUP_USERS:
            self._write_group()

    def _write_group(self) -> None:
        assert self.writer is not None
        self.writer.write_table(pa.Table.from_batches(self.waiting))
        self.waiting = []

    def _open(self, user_type: pa.DataType) -> None:
        lists = [("items", pa.list_(self.item_type)), ("scores", pa.list_(pa.float32()))]
        self.schema = pa.schema([("user", user_type), *lists, ("unknown", pa.int32()), ("source", pa.string())])
        self.writer = pq.ParquetWriter(self.path, self.schema)

    def __enter__(self) -> _Parquet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writer is None and kind is None:
            self._open(pa.string())
        if self.writer is not None:
            if self.waiting and kind is None:
                self._write_group()
            self.writer.close()


def _fits_int64(user: Any) -> bool:
    return isinstance(user, int) and not isinstance(user, bool) and -(2**63) <= user < 2**63


@contextmanager
def open_output(path: Path, item_type: pa.DataType) -> Iterator[Writer]:
    """Open a ``.jsonl``, ``.csv`` or ``.parquet`` output; it appears under its name only when everything is written."""
    kind = file_format(path, "--out")
    check_output(path, "--out")
    with replacing(path) as temporary:
        if kind == ".parquet":
            with _Parquet(temporary, item_type) as writer:
                yield writer
        else:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                yield _JsonLines(file) if kind == ".jsonl" else _Csv(file)
