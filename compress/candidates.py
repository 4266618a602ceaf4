"""Candidates of a search: what may be combined, and a file of records that survives an interruption."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from adrec.config import StrictModel, explanations
from adrec.data.json_text import parse_json
from adrec.errors import ConfigError, DataError
from compress.budget import Timing
from compress.technique import Accuracy, Receipt, Technique

SCHEMA_VERSION = 1


class Candidate(StrictModel):
    """One combination, by the labels of its options. steps: reverse steps; 0 for a model that has none."""

    student: str
    precision: str
    steps: int = Field(ge=0)
    engine: str

    def __str__(self) -> str:
        steps = f"{self.steps} step{'s' if self.steps != 1 else ''}, " if self.steps else ""
        return f"{self.student}, {steps}{self.precision}, {self.engine}"


@dataclass(frozen=True)
class Option:
    """One value of an axis: the stages that make it, and the options of the axis that reduce strictly less.

    steps: the reverse steps that a student fixes by itself, 0 for one without any; None: those of the space.
    """

    label: str
    stages: tuple[Technique, ...] = ()
    less: frozenset[str] = frozenset()
    steps: int | None = None


@dataclass(frozen=True)
class Space:
    """What is combined: students x precisions x reverse steps x engines.

    ``step_stages`` are the stages that make a step count. Candidates come cheapest to find first: students in their
    order, each precision after those that reduce less, steps upwards.
    """

    students: tuple[Option, ...]
    precisions: tuple[Option, ...]
    step_stages: dict[int, tuple[Technique, ...]]
    engines: tuple[str, ...]

    def __post_init__(self) -> None:
        for axis, options in (("students", self.students), ("precisions", self.precisions)):
            seen: set[str] = set()
            for option in options:
                if option.label in seen:
                    raise ConfigError(f"{axis}: '{option.label}' is there twice; name each option once")
                # What reduces less must have been judged before, or nothing could be concluded from it.
                if not option.less & {each.label for each in options} <= seen:
                    raise ConfigError(f"{axis}: '{option.label}' must come after {', '.join(sorted(option.less))}")
                seen.add(option.label)
        for axis, values in (("steps", self.step_stages), ("engines", self.engines)):
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"{axis} are {list(values)}; name one or more, each once")

    def candidates(self) -> Iterator[Candidate]:
        """Every combination, in the order in which it is looked at."""
        for student in self.students:
            for precision in self.precisions:
                for steps in sorted(self.step_stages) if student.steps is None else (student.steps,):
                    for engine in self.engines:
                        yield Candidate(student=student.label, precision=precision.label, steps=steps, engine=engine)

    def stages(self, candidate: Candidate) -> tuple[Technique, ...]:
        """The recipe of a candidate: the student first, quantisation last."""
        student, precision = self._option(self.students, candidate.student), self._precision(candidate)
        steps = self.step_stages[candidate.steps] if student.steps is None else ()
        return (*student.stages, *steps, *precision.stages)

    def reduces_as_much(self, candidate: Candidate, other: Candidate) -> bool:
        """Whether a candidate takes away all that another one does, in the same engine."""
        student, precision = self._option(self.students, candidate.student), self._precision(candidate)
        return (
            candidate.engine == other.engine
            and candidate.steps <= other.steps
            and other.student in {student.label, *student.less}
            and other.precision in {precision.label, *precision.less}
        )

    def _precision(self, candidate: Candidate) -> Option:
        return self._option(self.precisions, candidate.precision)

    @staticmethod
    def _option(options: tuple[Option, ...], label: str) -> Option:
        return next(option for option in options if option.label == label)


class CandidateRecord(StrictModel):
    """One line of ``candidates.jsonl``: what became of a candidate.

    fingerprint: of everything that the result depends on; a record of another one is not used. detail: why it was
    pruned, what failed, or why it was chosen or not. timings: by batch size.
    """

    schema_version: Literal[1] = 1
    kind: Literal["candidate"] = "candidate"
    fingerprint: str
    candidate: Candidate
    status: Literal["measured", "pruned", "failed"]
    detail: str = ""
    receipts: tuple[Receipt, ...] = ()
    bytes: int = 0
    parameters: int = 0
    timings: dict[int, Timing] = Field(default_factory=dict)

    @property
    def accuracy(self) -> Accuracy | None:
        """Accuracy after the last stage."""
        return self.receipts[-1].accuracy if self.receipts else None

    @property
    def loss(self) -> float:
        """NDCG@20 lost against the run handed in, percent."""
        return 0.0 if self.accuracy is None else self.accuracy.loss

    @property
    def least_loss(self) -> float:
        """The lower end of the loss's interval, percent."""
        kept = None if self.accuracy is None else self.accuracy.kept
        return 0.0 if kept is None else 100.0 - kept.high


def fingerprint_of(context: dict[str, Any], stages: tuple[Technique, ...], engine: str) -> str:
    """SHA-256 over the run, the data, the machine and how it measures, and one candidate, in hexadecimal."""
    content = [context, [stage.model_dump(mode="json") for stage in stages], engine]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass
class CandidateBook:
    """The records of a file, the last of each fingerprint; `write` appends and flushes.

    A half-written last line, as an interruption leaves, is cut off and said in ``notes``. Raises DataError for any
    other line that is not a record of this version.
    """

    path: Path
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._found: dict[str, CandidateRecord] = {}
        # Apart, so that a candidate pruned under one bound keeps what was measured under another.
        self._measured: dict[str, CandidateRecord] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with self.path.open("r+b") as stream:
                stream.truncate(len(whole))
            self.notes.append(f"{self.path}: a half-written last line ({len(content) - len(whole)} bytes) was dropped")
        for number, line in enumerate(whole.decode("utf-8", errors="replace").splitlines(), 1):
            self._keep(_record(line, f"{self.path}, line {number}"))

    def measured(self, fingerprint: str) -> CandidateRecord | None:
        """The record of a candidate that was measured; a pruned or failed one is judged anew."""
        return self._measured.get(fingerprint)

    def write(self, record: CandidateRecord) -> None:
        """Append one record, unless it says what the file says already."""
        if self._found.get(record.fingerprint) == record:
            return
        line = json.dumps(record.model_dump(mode="json", exclude_none=True), allow_nan=False, separators=(",", ":"))
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._keep(record)

    def _keep(self, record: CandidateRecord) -> None:
        self._found[record.fingerprint] = record
        if record.status == "measured":
            self._measured[record.fingerprint] = record


def _record(line: str, where: str) -> CandidateRecord:
    way_out = "delete the line, or the file to search anew"
    try:
        content = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error}); {way_out}") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(f"{where}: schema version {version!r}, this adrec reads {SCHEMA_VERSION}; {way_out}")
    try:
        return CandidateRecord.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{where}: {explanations(CandidateRecord, error)[0]}; {way_out}") from None
