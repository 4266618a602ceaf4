"""Files of records: one JSON object a line with a schema version, flushed line by line, validated on reading."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from adrec.data.json_text import parse_json
from adrec.errors import DataError
from bench.foreign_files import described, folder_in_words, foreign

SCHEMA_VERSION = 1

Record = TypeVar("Record", bound=BaseModel)
Validate = Callable[[Any], Record]


def json_line(record: BaseModel) -> str:
    """One line with its end. Raises ValueError for NaN or infinity, which JSON does not have."""
    return json.dumps(record.model_dump(mode="json"), allow_nan=False, separators=(",", ":")) + "\n"


class LineWriter(Generic[Record]):
    """Appends records to a file, one flushed line each, so that an interrupted run keeps what it measured."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record and flush it to the disk."""
        self._stream.write(json_line(record))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def __enter__(self) -> LineWriter[Record]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def read_json_lines(path: Path, validate: Validate[Record], made_by: str, kinds: Sequence[str] = ()) -> list[Record]:
    """Read and validate every line; DataError names the file, the line, what was found and the way out.

    made_by: the command that writes such files. kinds: of records that it writes, empty where they have none.
    """
    if path.is_dir():
        raise DataError(f"{path}: {folder_in_words(path)}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file of records; `{made_by}` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read as UTF-8 JSON lines ({error}); give a .jsonl file that `{made_by}` wrote"
        ) from error
    if (found := foreign(text)) is not None:
        raise DataError(f"{path}: no file of records but {found}; `{made_by}` writes them")
    lines = text.split("\n")
    # A complete file ends with a newline, so that what follows the last one is a line cut short.
    unfinished = lines.pop()
    records = [
        _parse(f"{path}, line {number}", line, validate, made_by, kinds)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if unfinished:
        raise DataError(
            f"{path}, line {len(lines) + 1}: the last line is half-written ({len(unfinished)} characters, no "
            "line end), as after an interrupted run; delete that line to keep the records before it"
        )
    return records


def _parse(where: str, line: str, validate: Validate[Record], made_by: str, kinds: Sequence[str]) -> Record:
    try:
        content = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}); delete the line") from None
    if not isinstance(content, dict):
        raise DataError(f"{where}: a record is a JSON object, this is a {type(content).__name__}; delete the line")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        if isinstance(version, int) and version > SCHEMA_VERSION:
            way_out = "it was written by a newer adrec: upgrade this one"
        elif isinstance(version, int):
            way_out = "it was written by an older adrec: measure again with this one"
        else:
            way_out = f"it is not a record of `adrec bench` but {described(content)}"
        raise DataError(f"{where}: schema version {version!r}, this adrec reads {SCHEMA_VERSION}; {way_out}")
    if kinds and content.get("kind") not in kinds:
        raise DataError(
            f"{where}: a record of kind {content.get('kind')!r}; allowed here: {', '.join(kinds)}, which `{made_by}`"
            " writes; leave this file out"
        )
    try:
        return validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "record"
        raise DataError(
            f"{where}: field {field!r}: {first['msg']} ({error.error_count()} problem(s) in the line); the file is"
            f" not one of `{made_by}`, or the line is damaged: correct or delete it"
        ) from None
