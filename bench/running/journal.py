"""Which units are done, so that a run that was stopped goes on without counting anything twice.

Records of a unit are appended together; then one line of the journal says how long the file is now. What a crash left
behind that line belongs to no finished unit and is cut off when the run goes on. So is what failed, to be tried again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from adrec.data.json_text import parse_json
from adrec.environment import Frozen
from adrec.errors import ConfigError, DataError
from adrec.files import write_text
from bench.json_lines import json_line

NAME = "journal.jsonl"


class Settings(Frozen):
    """What must be equal for a run to go on where another stopped."""

    kind: Literal["settings"] = "settings"
    schema_version: Literal[1] = 1
    smoke: bool
    run_fingerprint: str
    dataset_fingerprint: str
    users: int | None
    seconds: float
    engines: list[str]
    networks: list[str] = Field(default_factory=list)
    device: str
    threads: int
    processor: str
    adrec: str


class Done(Frozen):
    """A unit that is measured; ``bytes``: length of its suite's file after it. ``error``: of the unit as a whole.

    ``failed``: records with an error or with figures that do not count, and 1 for the unit's own error.
    """

    kind: Literal["done"] = "done"
    unit: str
    suite: str
    records: int
    failed: int
    bytes: int
    seconds: float
    error: str | None


class Journal:
    """The journal of a folder. Raises ConfigError for one that exists, unless resumed with the same settings.

    suites: names of all suites, whose files in the folder are the journal's to write and to cut.
    """

    def __init__(self, folder: Path, settings: Settings, suites: Sequence[str], *, resume: bool) -> None:
        self.folder, self.path, self.suites = folder, folder / NAME, suites
        self.done: dict[str, Done] = {}
        if not self._begun():
            if resume:
                raise ConfigError(f"--resume: {folder} holds no journal of an earlier run; leave --resume out")
            for suite in suites:
                if self.file_of(suite).exists():
                    raise ConfigError(f"{self.file_of(suite)}: is not of a run of this kind; choose another --out")
            folder.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            self._append(self.path, json_line(settings))
            return
        if not resume:
            raise ConfigError(f"{folder}: already holds results; pass --resume to go on, or choose another --out")
        earlier, done = self._read()
        differences = [
            f"{name}: {getattr(earlier, name)} -> {getattr(settings, name)}"
            for name in Settings.model_fields
            if getattr(earlier, name) != getattr(settings, name)
        ]
        if differences:
            raise ConfigError(
                f"--resume: {folder} was measured with other settings ({'; '.join(differences)}), which do not belong"
                " in one file; choose another --out"
            )
        self._cut(done)
        self.done = self._without_failed(settings, done)

    def _begun(self) -> bool:
        """Whether a journal is there; one whose first line a crash cut short is none, since nothing was measured."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error}); choose another --out") from None
        return b"\n" in content or not content.startswith(b'{"kind":"settings"')

    def file_of(self, suite: str) -> Path:
        """Records of a suite."""
        return self.folder / f"{suite}.jsonl"

    def keep(self, unit: str, suite: str, records: Sequence[BaseModel], seconds: float, error: str | None) -> Done:
        """Append a finished unit's records, then its line."""
        length = self._append(self.file_of(suite), "".join(json_line(record) for record in records))
        failed = sum(map(_is_failed, records)) + (error is not None)
        done = Done(
            unit=unit,
            suite=suite,
            records=len(records),
            failed=failed,
            bytes=length,
            seconds=round(seconds, 3),
            error=error,
        )
        self._append(self.path, json_line(done))
        self.done[unit] = done
        return done

    def _append(self, path: Path, text: str) -> int:
        with path.open("ab") as stream:
            stream.write(text.encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())
            return stream.tell()

    def _read(self) -> tuple[Settings, list[Done]]:
        try:
            text = self.path.read_bytes().decode("utf-8")
            *lines, unfinished = text.split("\n")
            settings = Settings.model_validate(parse_json(lines[0]))
            done = [Done.model_validate(parse_json(line)) for line in lines[1:]]
        except (OSError, ValueError, IndexError, ValidationError) as error:
            reason = str(error).splitlines()[0] if str(error) else "empty"
            raise DataError(
                f"{self.path}: not a journal of `adrec bench run`, or damaged ({reason}); choose another --out"
            ) from None
        if unfinished:
            # The line of a unit that a crash cut short: the unit is measured again.
            self._truncate(self.path, len(text.encode("utf-8")) - len(unfinished.encode("utf-8")))
        return settings, done

    def _cut(self, done: Sequence[Done]) -> None:
        """Cut off what lies behind the last finished unit of each file; raises DataError for one that is too short."""
        for suite in {*self.suites, *(each.suite for each in done)}:
            path, parts = self.file_of(suite), _parts(done, suite)
            kept, good = sum(size for _, _, size in parts), sum(size for each, _, size in parts if not each.failed)
            size = path.stat().st_size if path.exists() else 0
            # A crash between the two files of `_without_failed` leaves the one without the other.
            if size < kept and size != good:
                raise DataError(f"{path}: is gone or shorter than the journal beside it says; choose another --out")
            if path.exists():
                self._truncate(path, kept)

    def _without_failed(self, settings: Settings, done: Sequence[Done]) -> dict[str, Done]:
        """Drop failed units and their records, so that they are measured again; first from their files."""
        kept: dict[str, Done] = {}
        for suite in dict.fromkeys(each.suite for each in done):
            path, parts, length = self.file_of(suite), _parts(done, suite), 0
            content = path.read_bytes() if path.exists() else b""
            good = [content[start : start + size] for each, start, size in parts if not each.failed]
            for each, _, size in parts:
                if not each.failed:
                    length += size
                    kept[each.unit] = each.model_copy(update={"bytes": length})
            if len(content) > length:
                write_text(path, b"".join(good).decode("utf-8"))
        if len(kept) < len(done):
            write_text(self.path, "".join(map(json_line, (settings, *kept.values()))))
        return kept

    @staticmethod
    def _truncate(path: Path, length: int) -> None:
        if path.stat().st_size > length:
            os.truncate(path, length)


def _is_failed(record: BaseModel) -> bool:
    """Whether a record has an error, or a summary that does not count."""
    return getattr(record, "error", None) is not None or not getattr(getattr(record, "summary", None), "valid", True)


def _parts(done: Sequence[Done], suite: str) -> list[tuple[Done, int, int]]:
    """Units of a suite with the first byte of their records in its file, and how many bytes they are."""
    found, start = [], 0
    for each in done:
        if each.suite == suite:
            found.append((each, start, each.bytes - start))
            start = each.bytes
    return found
