"""What the engines' suite measures: a random model and drawn histories, or a trained run with its data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from adrec.checkpoint import model_fingerprint
from adrec.data.jagged import Jagged
from adrec.engines import Engine, make_engine
from adrec.errors import NotSupportedError
from adrec.evaluation import top_overlap
from adrec.models.base import SequenceModel
from bench.accuracy import RESULTS, AccuracyBook
from bench.environment import printable_command, read_environment
from bench.kernels.engine_sweep import random_histories, random_model, request_cost
from bench.kernels.measure import now_utc
from bench.kernels.records import EngineRecord, Measuring, Roof
from bench.record import Accuracy, MeasuringProtocol, TradeoffRecord
from bench.subject import Subject, draw_batches, load_subject

ITEMS, WIDTH, TIMESTEPS = 4000, 128, 32
OVERLAP_USERS = 16
CLOCK = "pytest-benchmark's timer"
CPU = torch.device("cpu")


@dataclass
class Measured:
    """``histories(n)``: the same n histories in each call. ``subject``: None for a random model."""

    model: SequenceModel
    histories: Callable[[int], Jagged]
    subject: Subject | None = None
    _engines: dict[str, Engine] = field(default_factory=dict)
    _accuracies: dict[tuple[str, int], Accuracy] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights."""
        return self.subject.run.fingerprint if self.subject else model_fingerprint(self.model.state_dict())

    def engine(self, name: str) -> Engine:
        """An engine of the model, made once."""
        if name not in self._engines:
            self._engines[name] = make_engine(name, self.model)
        return self._engines[name]

    def accuracy(self, name: str, steps: int) -> Accuracy | None:
        """Accuracy of the run at a step count; None for a random model, whose accuracy means nothing."""
        if self.subject is None:
            return None
        if (name, steps) not in self._accuracies:
            if not hasattr(self, "_book"):
                self._book = AccuracyBook(self.engine("cached"), self.subject.examples, self.model.config.timesteps)
            self._accuracies[name, steps] = self._book.accuracy(steps, 0, self.engine(name), self._book)
        return self._accuracies[name, steps]

    def overlap(self, name: str, steps: int) -> float:
        """Mean overlap of the top 20 with the cached engine's exact result, over a few users and the same noise."""
        sample, k = self.histories(OVERLAP_USERS), min(RESULTS, self.model.config.items)
        exact = self.engine("cached").recommend(sample, k)
        return float(top_overlap(self.engine(name).recommend(sample, k, steps=steps).items, exact.items).mean())

    def record(self, name: str, steps: int, batch: Jagged) -> EngineRecord | TradeoffRecord:
        """The row of a setting without its timing, which pytest-benchmark measures."""
        if self.subject is not None:
            return self._tradeoff(self.subject, name, steps, batch)
        config, dtype = self.model.config, self.engine(name).dtype
        cost = request_cost(batch.values.numel(), len(batch), steps, config.items, config.width, dtype)
        return EngineRecord(
            measured_at_utc=now_utc(),
            path=name,
            baseline=name,
            timing=None,
            roof=Roof(
                least_bytes=cost.bytes, least_flops=cost.flops, gpu=None, floor_us=None, bound=None,
                floor_fraction=None, gigabytes_per_second=None,
            ),
            error=None,
            protocol=measuring(),
            environment=read_environment(),
            command=printable_command(sys.argv),
            precision=str(dtype).removeprefix("torch."),
            batch_size_users=len(batch),
            history_tokens=batch.values.numel(),
            steps=steps,
            items=config.items,
            width=config.width,
            top20_overlap_fraction=self.overlap(name, steps),
            overlap_with=f"cached, {config.timesteps} steps",
            noise="drawn",
        )  # fmt: skip

    def _tradeoff(self, subject: Subject, name: str, steps: int, batch: Jagged) -> TradeoffRecord:
        environment = read_environment()
        return TradeoffRecord(
            measured_at_utc=now_utc(),
            model=self.model.config.model,
            engine=name,
            steps=steps,
            exact_steps=self.model.config.timesteps,
            batch_size_users=len(batch),
            seed=0,
            precision=str(self.engine(name).dtype).removeprefix("torch."),
            split=subject.split,
            timing=None,
            accuracy=self.accuracy(name, steps),
            error=None,
            protocol=MeasuringProtocol(
                clock=CLOCK, interleaved=False, seconds_per_cell=0.0, rounds_minimum=1, warmup_calls=1,
                threads=environment.machine.threads, device="cpu", distinct_batches=1, results_per_user=RESULTS,
            ),
            dataset_name=subject.dataset.name,
            dataset_fingerprint=subject.dataset.fingerprint,
            dataset_users=len(subject.examples.histories),
            dataset_items=subject.dataset.item_count,
            model_fingerprint=self.fingerprint,
            run_fingerprint=self.fingerprint,
            environment=environment,
            command=printable_command(sys.argv),
        )  # fmt: skip


def random_subject() -> Measured:
    """ADRec of the paper's size with random weights, and histories of the Amazon sets' mean length."""
    return Measured(random_model(ITEMS, WIDTH, TIMESTEPS, CPU), lambda users: random_histories(users, ITEMS))


def subject_of_run(run: Path, data: Path | None, users: int | None) -> Measured:
    """A trained run and real histories of its test split; raises NotSupportedError for one without reverse steps."""
    subject = load_subject(run, data, "test", users)
    if subject.run.config.model != "adrec":
        raise NotSupportedError(
            f"a run of {subject.run.config.model!r} has no steps; give the folder of an 'adrec' run"
        )
    return Measured(subject.run.model.eval(), lambda count: draw_batches(subject.examples.histories, count)[0], subject)


def measuring(device: str = "cpu", device_name: str = "") -> Measuring:
    """How pytest-benchmark measures; its rounds are in the timing."""
    machine = read_environment().machine
    return Measuring(
        clock=CLOCK,
        device=device,
        device_name=device_name or machine.processor,
        seconds_per_path=0.0,
        rounds_minimum=1,
        warmup_calls=1,
        threads=machine.threads,
    )
