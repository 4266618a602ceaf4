"""Compressed models beside their teacher, `reference` and SASRec+: accuracy, overlap, size and interleaved speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property, partial
from typing import Literal

import torch

from adrec.checkpoint import Run, model_fingerprint
from adrec.data.dataset import Dataset, Examples
from adrec.engines import ENGINES, CachedEngine, make_engine
from adrec.engines.exported_engine import ExportedEngine
from adrec.environment import Environment, read_environment
from adrec.evaluation import Evaluation, evaluate, kept_percent, top_overlap
from adrec.models.base import SequenceModel
from adrec.respacing import Steps, step_count
from bench.accuracy import RESULTS, estimates
from bench.compression.networks import FLOAT, file_bytes, network_name, state_of, stored_precision
from bench.compression.record import CompressAccuracy, CompressRecord, CompressTiming
from bench.compression.stopwatch import Served, recommend
from bench.places import pack_places
from bench.record import BASELINE_MODEL, Estimate, MeasuringProtocol
from bench.subject import batch_count, draw_batches
from bench.timing import (
    Call,
    Clock,
    Report,
    Series,
    TimingProtocol,
    WallClock,
    describe_error,
    measure_interleaved,
    paired_ratio,
    quantiles_ms,
)
from compress.api import compress_, draft_of
from compress.recipe import read_stages
from compress.technique import METRIC
from compress.workshop import PRECISIONS

Role = Literal["teacher", "baseline", "candidate"]
REFERENCE = "reference"
CPU = torch.device("cpu")


@dataclass
class Row:
    """One row before it is measured. model: made at the start, or the error that came instead."""

    role: Role
    network: str
    run: Run
    precision: str
    engine: str
    steps: Steps
    model: SequenceModel | str
    skipped: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The row in words, unique in a table."""
        return f"{self.network}, {self.run.path.name}, {self.steps}, {self.precision}, {self.engine}"

    @property
    def step_count(self) -> int | None:
        """Reverse steps at most; None for a model without any."""
        return step_count(self.steps, self.run.config)


@dataclass
class HeldAgainst:
    """Measures runs made from ``teacher``, and precisions of all of them, against the teacher at every trained step.

    networks: compressed runs of the same data set. steps: of the teacher's own rows. engines: of every row but the
    `reference` one, which is the denominator of throughput. examples: of whom accuracy and latency are measured, by
    default all of ``split``. report: progress of timing, in seconds.
    """

    teacher: Run
    networks: Sequence[Run]
    dataset: Dataset
    split: Literal["validation", "test"]
    steps: Sequence[int]
    precisions: Sequence[str]
    engines: Sequence[str]
    batch_sizes: Sequence[int]
    protocol: TimingProtocol
    command: str
    seed: int = 0
    clock: Clock = field(default_factory=WallClock)
    progress: Callable[[str], None] = lambda line: None
    examples: Examples | None = None
    report: Report | None = None

    def records(self, sizes: Sequence[int] | None = None) -> list[CompressRecord]:
        """One record a row; a row that fails keeps its error. sizes: some of the batch sizes instead of all."""
        environment, sizes = read_environment(), self.batch_sizes if sizes is None else sizes
        rows, accuracies = self.rows, self.accuracies
        timings = [self._timings(size) for size in sizes]
        return [
            self._record(row, accuracies[row.name], sizes, [each[row.name] for each in timings], environment)
            for row in rows
        ]

    @cached_property
    def accuracies(self) -> dict[str, CompressAccuracy | str]:
        """Accuracy of each row by name, or the error that came instead; measured once."""
        exact = self._evaluate(self.teacher.model, CachedEngine.name, None)
        teacher, every = id(self.teacher.model), self.teacher.config.timesteps
        known: dict[tuple[int, str, Steps], Evaluation] = {
            (teacher, CachedEngine.name, steps): exact for steps in (None, every)
        }
        found: dict[str, CompressAccuracy | str] = {}
        for place, row in enumerate(self.rows, 1):
            self.progress(f"accuracy, row {place} of {len(self.rows)}: {row.name}")
            if isinstance(row.model, str):
                found[row.name] = row.model
                continue
            try:
                found[row.name] = self._accuracy(row, row.model, exact, known)
            except Exception as error:
                found[row.name] = describe_error(error)
        return found

    @cached_property
    def rows(self) -> list[Row]:
        """What is measured: `reference`, SASRec+, the teacher by steps, then every network by precision."""
        teacher, trained = self.teacher, None
        model = teacher.model
        rows = [Row("teacher", network_name(teacher), teacher, FLOAT, REFERENCE, trained, model)]
        baseline = teacher.baseline()
        for engine in self.engines:
            if baseline is not None:
                rows.append(Row("baseline", BASELINE_MODEL, baseline, FLOAT, engine, None, baseline.model))
            rows += [
                Row("teacher", network_name(teacher), teacher, FLOAT, engine, steps, model)
                for steps in sorted(self._teacher_steps(), reverse=True)
            ]
        for run in (teacher, *self.networks):
            stored = stored_precision(run)
            # What is stored rounded cannot be rounded again: it is measured as it is.
            for precision in self.precisions if stored == FLOAT else [stored]:
                if run is teacher and precision == FLOAT:
                    continue
                self.progress(f"{run.path.name}: {precision}")
                made, skipped = (run.model, []) if precision == stored else self._in_precision(run, precision)
                steps = min(self._teacher_steps()) if run is teacher else _served(run)
                rows += [
                    Row("candidate", network_name(run), run, precision, engine, steps, made, skipped)
                    for engine in self.engines
                    # Exported, rounded numbers are a float32 graph, which would repeat the float32 row.
                    if precision == FLOAT or not ENGINES[engine].exports
                ]
        return rows

    @cached_property
    def _examples(self) -> Examples:
        return self.dataset.examples(self.split) if self.examples is None else self.examples

    def _teacher_steps(self) -> set[int]:
        return {*self.steps, self.teacher.config.timesteps} if self.teacher.config.model == "adrec" else {1}

    def _in_precision(self, run: Run, precision: str) -> tuple[SequenceModel | str, list[str]]:
        draft = draft_of(run, self.dataset, seed=self.seed)
        if run is self.teacher:
            draft.settings = draft.settings.model_copy(update={"serving": None})
        skipped = []
        try:
            for stage in read_stages(PRECISIONS[precision]):
                receipt = compress_(draft, stage, measure=False)
                skipped += [f"{skip.what}: {skip.why}" for skip in receipt.skipped]
        except Exception as error:
            return describe_error(error), skipped
        return draft.model, skipped

    def _evaluate(self, model: SequenceModel, engine: str, steps: Steps) -> Evaluation:
        return evaluate(make_engine(engine, model), self._examples, steps=steps, seed=self.seed)

    def _accuracy(
        self,
        row: Row,
        model: SequenceModel,
        exact: Evaluation,
        known: dict[tuple[int, str, Steps], Evaluation],
    ) -> CompressAccuracy:
        # `reference` agrees with it up to rounding, and would take minutes.
        engine = CachedEngine.name if row.engine == REFERENCE else row.engine
        key = (id(model), engine, row.steps)
        if key not in known:
            known[key] = self._evaluate(model, engine, row.steps)
        found = known[key]
        kept = kept_percent(found.ranks, exact.ranks)
        values = estimates(found)
        return CompressAccuracy(
            ndcg20_percent=values[METRIC],
            hr20_percent=values["HR@20"],
            ndcg20_kept_percent=None if kept is None else Estimate(value=kept.value, low=kept.low, high=kept.high),
            top20_overlap_fraction=float(top_overlap(found.top_items, exact.top_items).mean()),
            users=found.users,
            measured_with=engine,
            places_base64=pack_places(found.ranks),
        )

    def _timings(self, size: int) -> dict[str, CompressTiming | str]:
        rows, batches = self.rows, draw_batches(self._examples.histories, size)
        self.progress(f"latency of {len(rows)} rows, batch {size}")
        calls: dict[str, Call] = {}
        found: dict[str, CompressTiming | str] = {}
        for row in rows:
            if isinstance(row.model, str):
                found[row.name] = row.model
                continue
            try:
                served: Served = (make_engine(row.engine, row.model), row.steps)
                calls[row.name] = partial(recommend, served, batches, self.seed)
            except Exception as error:
                found[row.name] = describe_error(error)
        series = measure_interleaved(calls, self.protocol, self.clock, self.report)
        reference = next(row.name for row in rows if row.engine == REFERENCE)
        baselines = {row.engine: row.name for row in rows if row.role == "baseline"}
        for row in rows:
            if row.name in series:
                own = series[row.name]
                beside = series.get(baselines.get(row.engine, ""))
                found[row.name] = own.error or _timing(own, series.get(reference), beside, size)
        return found

    def _record(
        self,
        row: Row,
        accuracy: CompressAccuracy | str,
        sizes: Sequence[int],
        timings: Sequence[CompressTiming | str],
        environment: Environment,
    ) -> CompressRecord:
        problems = dict.fromkeys(each for each in (accuracy, *timings) if isinstance(each, str))
        model = row.model if isinstance(row.model, SequenceModel) else None
        measured = accuracy if isinstance(accuracy, CompressAccuracy) else None
        return CompressRecord(
            measured_at_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            role=row.role,
            network=row.network,
            run_name=row.run.path.resolve().name,
            steps=row.step_count,
            precision=row.precision,
            engine=row.engine,
            split=self.split,
            accuracy=measured,
            batch_sizes_users=list(sizes),
            timings=[timing for timing in timings if isinstance(timing, CompressTiming)],
            file_bytes=None if model is None or measured is None else _file_bytes(row, model),
            teacher_file_bytes=file_bytes(self.teacher.model),
            skipped=row.skipped,
            error="; ".join(problems) or None,
            protocol=MeasuringProtocol(
                clock=self.clock.name,
                interleaved=True,
                seconds_per_cell=self.protocol.seconds,
                rounds_minimum=self.protocol.rounds_slow,
                warmup_calls=self.protocol.warmup_calls,
                threads=environment.machine.threads,
                device=str(CPU),
                distinct_batches=batch_count(max(sizes)),
                results_per_user=min(RESULTS, self.teacher.config.items),
            ),
            dataset_name=self.dataset.name,
            dataset_fingerprint=self.dataset.fingerprint,
            model_fingerprint="" if model is None else model_fingerprint(state_of(model)),
            run_fingerprint=self.teacher.fingerprint,
            environment=environment,
            command=self.command,
        )


def _served(run: Run) -> Steps:
    if run.config.model != "adrec":
        return None
    return 1 if run.settings.serving is None else run.settings.serving


def _file_bytes(row: Row, model: SequenceModel) -> int:
    """Bytes of the file that the row's engine reads."""
    if not ENGINES[row.engine].exports:
        return file_bytes(model)
    engine = make_engine(row.engine, model)
    assert isinstance(engine, ExportedEngine)
    return engine.file_bytes(row.steps)


def _timing(own: Series, reference: Series | None, baseline: Series | None, size: int) -> CompressTiming:
    p50, p95, p99 = quantiles_ms(own.samples_ms)
    return CompressTiming(
        batch_size_users=size,
        latency_ms_p50=p50,
        latency_ms_p95=p95,
        latency_ms_p99=p99,
        throughput_users_per_second=1e3 * size / p50,
        times_reference=_ratio(reference, own),
        latency_to_sasrec=_ratio(own, baseline),
        calls=len(own.samples_ms),
        rounds=len(own.rounds_ms),
        round_medians_ms=[round(float(each), 6) for each in own.medians_ms],
    )


def _ratio(numerator: Series | None, denominator: Series | None) -> Estimate | None:
    if numerator is None or denominator is None or numerator.error or denominator.error:
        return None
    value, low, high = paired_ratio(numerator.medians_ms, denominator.medians_ms)
    return Estimate(value=value, low=low, high=high)
