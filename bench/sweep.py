"""A sweep in progress: engines, accuracy measured so far, and the rows as they complete."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial

import torch

from adrec.engines import Engine, make_engine
from adrec.environment import Environment, read_environment
from adrec.evaluation import Evaluation, popularity_evaluation, top_overlap
from adrec.models.base import SequenceModel
from bench.accuracy import RESULTS, AccuracyBook, estimates
from bench.cells import Cell, GroupTimer
from bench.compression.networks import FLOAT
from bench.guest import Guest
from bench.places import pack_places
from bench.plan import Plan
from bench.profiling.floors import machine_rates, request_cost_of
from bench.progress import StageProgress
from bench.record import (
    BASELINE_MODEL,
    POPULARITY,
    Accuracy,
    MeasuringProtocol,
    RequestRoof,
    TimingSummary,
    TradeoffRecord,
)
from bench.subject import Subject, draw_batches, served_precision
from bench.timing import Clock, TimingProtocol, clock_for, describe_error

ACCURACY_STAGE = "accuracy"

AccuracyKey = tuple[str, str, int | None, int]
"""Model, engine, steps, seed."""


@dataclass
class Sweep:
    """Measures a subject, and guests beside it, by a plan; ``rows`` yields every record once."""

    subject: Subject
    plan: Plan
    protocol: TimingProtocol
    device: torch.device
    command: str
    progress: StageProgress
    guests: Sequence[Guest] = ()
    _books: dict[str, AccuracyBook] = field(default_factory=dict)
    _measured: dict[AccuracyKey, Accuracy | str] | None = None

    def __post_init__(self) -> None:
        self._clock: Clock = clock_for(self.device)
        self._environment: Environment = read_environment()
        self._model: str = self.subject.run.config.model
        self._guests = {guest.model: guest for guest in self.guests}
        self._results = min(RESULTS, self.subject.run.config.items)
        self._engines: dict[tuple[str, str], Engine | str] = {}
        for name in dict.fromkeys((*self.plan.engines, self.plan.accuracy_engine)):
            self._engines[self._model, name] = self._make(name, self.subject.run.model)
            if self.subject.baseline is not None:
                self._engines[BASELINE_MODEL, name] = self._make(name, self.subject.baseline.model)

    def rows(self) -> Iterator[TradeoffRecord]:
        """Measure accuracy, then one group of cells a batch size; yield each row when it is complete."""
        for size in self.plan.batch_sizes:
            self.progress.update(_stage(size), 0.0, len(self._cells(size)) * self.protocol.seconds)
        yield self.popularity_row()
        for size in self.plan.batch_sizes:
            yield from self.group(size)

    def group(self, size: int) -> Iterator[TradeoffRecord]:
        """Measure all settings of one batch size against each other; accuracy comes first, once for all sizes."""
        accuracies = self._accuracies()
        timer = GroupTimer(
            engine=lambda cell: self._engine(cell.model, cell.engine),
            protocol=self.protocol,
            clock=self._clock,
            device=self.device,
            seed=self.plan.seeds[0],
            longest=self.subject.run.config.max_length,
            results=self._results,
            guests=self._guests,
        )
        batches = draw_batches(self.subject.examples.histories, size)
        baseline = Cell(self._model, self.plan.baseline_engine, self.plan.baseline_steps, size)
        report = partial(self.progress.update, _stage(size))
        for cell, timing in timer.measure(self._cells(size), baseline, batches, report).items():
            # A model without steps draws no noise, so that its rows do not depend on the seed.
            for seed in self.plan.seeds if cell.steps is not None else self.plan.seeds[:1]:
                yield self._row(cell, seed, timing, accuracies[_key(cell, seed)], len(batches))

    def _cells(self, size: int) -> list[Cell]:
        cells = [Cell(self._model, engine, steps, size) for engine in self.plan.engines for steps in self.plan.steps]
        if self.subject.baseline is not None:
            cells += [Cell(BASELINE_MODEL, engine, None, size) for engine in self.plan.engines]
        return cells + [Cell(guest.model, guest.engine, None, size) for guest in self.guests]

    def _accuracies(self) -> dict[AccuracyKey, Accuracy | str]:
        if self._measured is None:
            self._measured = self._measure_accuracies()
        return self._measured

    def _measure_accuracies(self) -> dict[AccuracyKey, Accuracy | str]:
        # The exact step count comes first: every other row is compared with it.
        cells = sorted(self._cells(0), key=lambda cell: -(cell.steps or 0))
        keys = [_key(cell, seed) for cell in cells for seed in self.plan.seeds]
        found: dict[AccuracyKey, Accuracy | str] = {}
        started = time.perf_counter()
        self.progress.update(ACCURACY_STAGE, 0.0, len(keys) * self.protocol.seconds)
        for done, key in enumerate(keys, 1):
            try:
                found[key] = self._accuracy(key)
            except Exception as error:
                found[key] = f"accuracy: {describe_error(error)}"
            seconds = time.perf_counter() - started
            self.progress.update(ACCURACY_STAGE, seconds, seconds * len(keys) / done)
        return found

    def _accuracy(self, key: AccuracyKey) -> Accuracy:
        model, engine, steps, seed = key
        if guest := self._guests.get(model):
            return self._accuracy_of(guest.evaluation(self.subject.examples), guest.measured_with)
        return self._book(model).accuracy(steps, seed, self._engine(model, engine), self._book(self._model))

    def _book(self, model: str) -> AccuracyBook:
        if model not in self._books:
            exact_steps = self.plan.exact_steps if model == self._model else None
            engine = self._engine(model, self.plan.accuracy_engine)
            self._books[model] = AccuracyBook(engine, self.subject.examples, exact_steps)
        return self._books[model]

    def _make(self, name: str, model: SequenceModel) -> Engine | str:
        try:
            return make_engine(name, model.eval().to(self.device))
        except Exception as error:
            return describe_error(error)

    def _engine(self, model: str, name: str) -> Engine:
        engine = self._engines[model, name]
        if isinstance(engine, str):
            raise RuntimeError(f"engine {name!r} could not be made: {engine}")
        return engine

    def popularity_row(self) -> TradeoffRecord:
        """The accuracy of recommending the most popular items, which takes no time worth measuring."""
        cell = Cell(POPULARITY, "", None, 0)
        try:
            found = popularity_evaluation(self.subject.dataset.item_counts(), self.subject.examples)
            accuracy: Accuracy | str = self._accuracy_of(found, POPULARITY)
        except Exception as error:
            accuracy = f"accuracy: {describe_error(error)}"
        return self._row(cell, self.plan.seeds[0], None, accuracy, 0)

    def _accuracy_of(self, found: Evaluation, measured_with: str) -> Accuracy:
        """What no engine of ours computed, beside the exact result."""
        exact = self._book(self._model).evaluation(self.plan.exact_steps, self.plan.seeds[0])
        return Accuracy(
            metrics_percent=estimates(found),
            users=found.users,
            measured_with=measured_with,
            ndcg20_kept_percent=None,
            top20_overlap_fraction=float(top_overlap(found.top_items, exact.top_items).mean()),
            top20_overlap_against=self._book(self._model).exact_name(self.plan.seeds[0]),
            engine_agreement_fraction=None,
            engine_agreement_users=0,
            places_base64=pack_places(found.ranks),
        )

    def _row(
        self,
        cell: Cell,
        seed: int,
        timing: TimingSummary | str | None,
        accuracy: Accuracy | str,
        distinct_batches: int,
    ) -> TradeoffRecord:
        problems = [each for each in (timing, accuracy) if isinstance(each, str)]
        protocol, subject = self.protocol, self.subject
        measured = timing if isinstance(timing, TimingSummary) else None
        slow = measured is not None and measured.rounds < protocol.rounds
        run = subject.baseline if cell.model == BASELINE_MODEL and subject.baseline else subject.run
        environment = self._environment
        if cell.model == POPULARITY:
            fingerprint, precision = subject.dataset.fingerprint, FLOAT
        elif (guest := self._guests.get(cell.model)) is None:
            fingerprint, precision = run.fingerprint, served_precision(run, cell.engine)
        else:
            fingerprint, precision = guest.fingerprint, guest.precision
            environment = environment.model_copy(update={"versions": {**environment.versions, **guest.versions}})
        return TradeoffRecord(
            measured_at_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            model=cell.model,
            engine=cell.engine or None,
            steps=cell.steps,
            exact_steps=self.plan.exact_steps,
            batch_size_users=cell.batch_size or None,
            seed=seed,
            precision=precision,
            split=subject.split,
            timing=measured,
            accuracy=accuracy if isinstance(accuracy, Accuracy) else None,
            roof=None if measured is None else self._roof(cell, measured),
            error="; ".join(problems) or None,
            protocol=MeasuringProtocol(
                clock=self._clock.name,
                interleaved=True,
                seconds_per_cell=protocol.seconds,
                rounds_minimum=protocol.rounds_slow if slow else protocol.rounds,
                warmup_calls=protocol.warmup_calls,
                threads=self._environment.machine.threads,
                device=str(self.device),
                distinct_batches=distinct_batches,
                results_per_user=self._results,
            ),
            dataset_name=subject.dataset.name,
            dataset_fingerprint=subject.dataset.fingerprint,
            dataset_users=len(subject.examples.histories),
            dataset_items=subject.dataset.item_count,
            model_fingerprint=fingerprint,
            run_fingerprint=subject.run.fingerprint,
            environment=environment,
            command=self.command,
        )

    def _roof(self, cell: Cell, timing: TimingSummary) -> RequestRoof | None:
        if cell.model != self._model or cell.steps is None:
            return None
        dtype = self._engine(cell.model, cell.engine).dtype
        tokens = round(timing.history_tokens_per_batch_mean)
        cost = request_cost_of(self.subject.run.config, tokens, cell.batch_size, cell.steps, dtype.itemsize)
        if cost is None:
            return None
        rates = machine_rates(self.device, dtype, self._environment.machine.threads, self.protocol.seconds)
        return RequestRoof(
            least_flops=cost.flops,
            least_bytes=cost.bytes,
            gflops=rates.gflops,
            gigabytes_per_second=rates.gigabytes_per_second,
        )


def _stage(size: int) -> str:
    return f"latency, batch {size}"


def _key(cell: Cell, seed: int) -> AccuracyKey:
    return (cell.model, cell.engine, cell.steps, seed)
