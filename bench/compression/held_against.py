"""Compressed models beside their teacher, `reference` and SASRec+: accuracy, overlap, size and interleaved speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import Literal

import torch
from safetensors.torch import save

from adrec.checkpoint import Run, model_fingerprint
from adrec.data.dataset import Dataset, Examples
from adrec.engines import ENGINES, CachedEngine, make_engine
from adrec.evaluation import Evaluation, evaluate, kept_percent, top_overlap
from adrec.models.base import SequenceModel
from adrec.respacing import Steps, step_count
from bench.accuracy import RESULTS, estimates
from bench.compression.record import CompressAccuracy, CompressRecord, CompressTiming
from bench.compression.stopwatch import Served, recommend
from bench.environment import Environment, read_environment
from bench.record import BASELINE_MODEL, Estimate, MeasuringProtocol
from bench.subject import draw_batches
from bench.timing import (
    Call,
    Clock,
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
FLOAT = "float32"
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
    `reference` one, which is the denominator of throughput.
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

    def records(self) -> list[CompressRecord]:
        """One record a row; a row that fails keeps its error."""
        examples, environment = self.dataset.examples(self.split), read_environment()
        rows = self.rows()
        exact = self._evaluate(self.teacher.model, CachedEngine.name, None, examples)
        teacher, every = id(self.teacher.model), self.teacher.config.timesteps
        known: dict[tuple[int, str, Steps], Evaluation] = {
            (teacher, CachedEngine.name, steps): exact for steps in (None, every)
        }
        accuracies: dict[str, CompressAccuracy | str] = {}
        for place, row in enumerate(rows, 1):
            self.progress(f"accuracy, row {place} of {len(rows)}: {row.name}")
            if isinstance(row.model, str):
                accuracies[row.name] = row.model
                continue
            try:
                accuracies[row.name] = self._accuracy(row, row.model, examples, exact, known)
            except Exception as error:
                accuracies[row.name] = describe_error(error)
        timings: dict[str, list[CompressTiming | str]] = {row.name: [] for row in rows}
        for size in self.batch_sizes:
            self.progress(f"latency of {len(rows)} rows, batch {size}")
            for name, timing in self._timings(rows, examples, size).items():
                timings[name].append(timing)
        return [self._record(row, accuracies[row.name], timings[row.name], environment) for row in rows]

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
            for precision in self.precisions:
                if run is teacher and precision == FLOAT:
                    continue
                self.progress(f"{run.path.name}: {precision}")
                made, skipped = self._in_precision(run, precision)
                steps = min(self._teacher_steps()) if run is teacher else _served(run)
                rows += [
                    Row("candidate", network_name(run), run, precision, engine, steps, made, skipped)
                    for engine in self.engines
                    # Those quantise their own files, from float32.
                    if precision == FLOAT or not ENGINES[engine].exports
                ]
        return rows

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

    def _evaluate(self, model: SequenceModel, engine: str, steps: Steps, examples: Examples) -> Evaluation:
        return evaluate(make_engine(engine, model), examples, steps=steps, seed=self.seed)

    def _accuracy(
        self,
        row: Row,
        model: SequenceModel,
        examples: Examples,
        exact: Evaluation,
        known: dict[tuple[int, str, Steps], Evaluation],
    ) -> CompressAccuracy:
        # `reference` agrees with it up to rounding, and would take minutes.
        engine = CachedEngine.name if row.engine == REFERENCE else row.engine
        key = (id(model), engine, row.steps)
        if key not in known:
            known[key] = self._evaluate(model, engine, row.steps, examples)
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
        )

    def _timings(self, rows: Sequence[Row], examples: Examples, size: int) -> dict[str, CompressTiming | str]:
        batches = draw_batches(examples.histories, size)
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
        series = measure_interleaved(calls, self.protocol, self.clock)
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
        timings: Sequence[CompressTiming | str],
        environment: Environment,
    ) -> CompressRecord:
        problems = dict.fromkeys(each for each in (accuracy, *timings) if isinstance(each, str))
        model = row.model if isinstance(row.model, SequenceModel) else None
        return CompressRecord(
            measured_at_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            role=row.role,
            network=row.network,
            run_name=row.run.path.resolve().name,
            steps=row.step_count,
            precision=row.precision,
            engine=row.engine,
            split=self.split,
            accuracy=accuracy if isinstance(accuracy, CompressAccuracy) else None,
            timings=[timing for timing in timings if isinstance(timing, CompressTiming)],
            file_bytes=None if model is None or ENGINES[row.engine].exports else file_bytes(model),
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
                distinct_batches=len(draw_batches(self.dataset.examples(self.split).histories, max(self.batch_sizes))),
                results_per_user=min(RESULTS, self.teacher.config.items),
            ),
            dataset_name=self.dataset.name,
            dataset_fingerprint=self.dataset.fingerprint,
            model_fingerprint="" if model is None else model_fingerprint(_state(model)),
            run_fingerprint=self.teacher.fingerprint,
            environment=environment,
            command=self.command,
        )


def network_name(run: Run) -> str:
    """Blocks of encoder and denoiser, and the width, such as ``2+2 x 128``."""
    config = run.config
    denoiser = config.denoiser_blocks if config.model == "adrec" else 0
    kind = " mlp" if denoiser and config.denoiser == "mlp" else ""
    return f"{config.encoder_blocks}+{denoiser}{kind} x {config.width}"


def file_bytes(model: SequenceModel) -> int:
    """Bytes of the file that a run stores a model's weights in."""
    return len(save(_state(model)))


def _state(model: SequenceModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().contiguous() for name, value in model.state_dict().items()}


def _served(run: Run) -> Steps:
    if run.config.model != "adrec":
        return None
    return 1 if run.settings.serving is None else run.settings.serving


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
    )


def _ratio(numerator: Series | None, denominator: Series | None) -> Estimate | None:
    if numerator is None or denominator is None or numerator.error or denominator.error:
        return None
    value, low, high = paired_ratio(numerator.medians_ms, denominator.medians_ms)
    return Estimate(value=value, low=low, high=high)
