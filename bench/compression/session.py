"""A search on this machine: candidates made in a workshop, timed, recorded, and the chosen one written as a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from adrec.checkpoint import RUN_FILE, Run
from adrec.data.dataset import Dataset, tool_version
from adrec.engines import ENGINES, make_engine
from adrec.environment import read_environment
from adrec.errors import ConfigError, nearest
from adrec.evaluation import evaluate, kept_percent
from adrec.files import check_output_folder
from bench.compression.stopwatch import Served, Stopwatch
from bench.timing import Clock, TimingProtocol
from compress.api import Compression, compression_of, read_compression, write_compressed
from compress.budget import Budget, Timing
from compress.candidates import Candidate, CandidateBook, CandidateRecord, Space, fingerprint_of
from compress.recipe import Recipe
from compress.search import Assessment, Search
from compress.technique import (
    Accuracy,
    Change,
    CompressionError,
    Draft,
    Reading,
    Receipt,
    parameter_count,
    stored_bytes,
)
from compress.workshop import Workshop

CANDIDATES, TRAINED = "candidates.jsonl", "trained"
CPU = torch.device("cpu")
MEASURED_ALREADY = ("cached", "reference")
"""Engines that agree up to rounding with the one that receipts are measured with."""


def check_engines(engines: Sequence[str]) -> None:
    """Raise ConfigError for an engine that does not exist, or does not run on a CPU."""
    for name in engines:
        if name not in ENGINES:
            raise ConfigError(f"--engines holds '{name}'{nearest(name, ENGINES)}; allowed: {', '.join(ENGINES)}")
        if not ENGINES[name].runs_on(CPU):
            able = ", ".join(other for other, kind in ENGINES.items() if kind.runs_on(CPU))
            raise ConfigError(f"--engines holds '{name}', which does not run on a CPU; allowed here: {able}")


def check_search_folder(out: Path) -> None:
    """Raise before any work unless ``out`` is new, empty, or the folder of an earlier search, which then goes on."""
    check_output_folder(out, "--out")
    if out.is_dir() and any(out.iterdir()) and not (out / CANDIDATES).is_file():
        what = "already holds a run" if (out / RUN_FILE).exists() else "exists and is not the folder of a search"
        raise ConfigError(f"--out is {out}: {what}; choose another --out or remove the folder")


@dataclass
class SearchSession:
    """One search of a run; ``space`` says what is combined, ``protocol`` how long a candidate is timed."""

    run: Run
    dataset: Dataset
    out: Path
    space: Space
    budget: Budget
    max_loss: float
    console: Console
    seed: int = 0
    prune: bool = True
    protocol: TimingProtocol = field(default_factory=TimingProtocol)
    clock: Clock | None = None
    data_path: str | None = None

    def __post_init__(self) -> None:
        check_search_folder(self.out)
        self.workshop = Workshop(self.run, self.dataset, self.out / TRAINED, seed=self.seed, report=self._say)
        histories = self.dataset.examples("validation").histories
        partner = self._partner
        self._stopwatch = Stopwatch(histories, partner, self.protocol, seed=self.seed, clock=self.clock)
        environment = read_environment()
        self._context = {
            "tool": tool_version(),
            "versions": environment.versions,
            "run": self.run.fingerprint,
            "settings": self.run.settings.model_dump(mode="json"),
            "data": self.run.dataset_fingerprint,
            "seed": self.seed,
            "processor": environment.machine.kind,
            "threads": torch.get_num_threads(),
            "seconds": self.protocol.seconds,
        }

    def search(self) -> Search:
        """The search, with this session's ways to assess and to measure."""
        return Search(
            self.space, self.budget, self.max_loss, self.assess, self.measure, self.fingerprint, self.prune, self._step
        )

    def go(self, quiet: bool = False) -> tuple[Search, list[CandidateRecord]]:
        """Look at every candidate, with progress and the time left; what the folder has is not measured again."""
        book = CandidateBook(self.out / CANDIDATES)
        for note in book.notes:
            self._say(f"note: {note}")
        search = self.search()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = TimeRemainingColumn(compact=True)
        with Progress(*columns, left, console=self.console, disable=quiet, transient=True) as self._progress:
            self._task = self._progress.add_task("searching", total=None)
            return search, search.run(book)

    def write(self, chosen: CandidateRecord) -> Compression:
        """Write the chosen candidate as the run ``out``; returns what its ``compression.json`` says."""
        stages = self.space.stages(chosen.candidate)
        draft, receipts = self.workshop.make(stages)
        if not stages:
            raise CompressionError(
                f"{self.run.path}: as it is, the run meets the budget and nothing else is cheaper; serve it with engine"
                f" '{chosen.candidate.engine}'"
            )
        receipts = (*receipts, *chosen.receipts[len(receipts) :])
        recipe = Recipe(stages=stages, max_loss=self.max_loss)
        made = compression_of(self.run, recipe, receipts, self.seed, read_compression(self.run.path))
        made = made.model_copy(update={"engine": chosen.candidate.engine})
        write_compressed(self.out, draft, self.run, made, data_path=self.data_path or self.run.data_path)
        return made

    def fingerprint(self, candidate: Candidate) -> str:
        """Of everything that decides what a candidate's record says."""
        return fingerprint_of(self._context, self.space.stages(candidate), candidate.engine)

    def assess(self, candidate: Candidate) -> Assessment:
        """Apply the stages; an engine that rounds in its own way has a receipt of its own, with its accuracy."""
        draft, receipts = self.workshop.make(self.space.stages(candidate))
        if candidate.engine not in MEASURED_ALREADY:
            receipts = (*receipts, _measured_with(draft, candidate.engine))
        return Assessment(receipts, stored_bytes(draft.model), parameter_count(draft.model))

    def measure(self, candidate: Candidate, sizes: Sequence[int]) -> dict[int, Timing]:
        """Time a candidate beside the run's own network at its fewest steps."""
        return self._stopwatch.measure(self._served(candidate), sizes)

    def _partner(self) -> Served:
        first = self.space.precisions[0]
        steps = min(self.space.step_stages)
        draft, _ = self.workshop.make((*first.stages, *self.space.step_stages[steps]))
        return make_engine("cached", draft.model), draft.settings.serving

    def _served(self, candidate: Candidate) -> Served:
        draft, _ = self.workshop.make(self.space.stages(candidate))
        return make_engine(candidate.engine, draft.model), draft.settings.serving

    def _step(self, done: int, total: int, candidate: Candidate) -> None:
        self._progress.update(self._task, description=str(candidate), completed=done, total=total)

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False)


def _measured_with(draft: Draft, engine: str) -> Receipt:
    """What serving with another engine changes: its accuracy against the teacher's and the draft's."""
    examples = draft.validation("evaluate")
    found = evaluate(make_engine(engine, draft.model), examples, steps=draft.settings.serving, seed=draft.seed)
    kept, own = (kept_percent(found.ranks, of.ranks) for of in (draft.teacher_evaluation(), draft.evaluate()))
    size, parameters = stored_bytes(draft.model), parameter_count(draft.model)
    return Receipt(
        settings={"technique": "engine", "engine": engine},
        changed=(Change(what="engine", before="cached", after=engine),),
        bytes_before=size,
        bytes_after=size,
        parameters_before=parameters,
        parameters_after=parameters,
        accuracy=Accuracy(
            users=found.users,
            metrics={name: Reading.of(interval) for name, interval in found.metrics.items()},
            kept=None if kept is None else Reading.of(kept),
            kept_of_before=None if own is None else Reading.of(own),
        ),
    )
