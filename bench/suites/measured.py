"""What the suites measure: a trained run with its data, one's own or a small one trained on synthetic data."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest
import torch

from adrec.data.jagged import Jagged
from adrec.engines import ENGINES, Engine, make_engine
from adrec.environment import printable_command, read_environment
from adrec.errors import NotSupportedError
from adrec.models.base import SequenceModel
from bench.accuracy import RESULTS, AccuracyBook
from bench.kernels.measure import now_utc
from bench.kernels.records import Measuring
from bench.kernels.selection import dtype_name
from bench.record import Accuracy, MeasuringProtocol, TradeoffRecord
from bench.subject import Subject, draw_batches, load_subject
from kernels import _runtime

USERS, ITEMS, MEAN_LENGTH = 400, 200, 8.0
# Seconds of training, whose accuracy tells one step count from another; 32 steps as in the paper.
MODEL = {"items": ITEMS, "width": 32, "timesteps": 32}
STAGE = {"epochs": 4, "cosine_epochs": 4, "validate_every": 4, "learning_rate": 5e-3}
TRAIN = {"batch_size": 64, "warmup_epochs": 1, "pretrain": STAGE, "main": STAGE}
MOST_EXPORTED_STEPS = 4
CPU = torch.device("cpu")
CLOCK = "pytest-benchmark's timer"


@dataclass
class Measured:
    """A run, its engines and their accuracies, each made or measured once. small: no run was given."""

    subject: Subject
    device: torch.device
    small: bool = False
    _engines: dict[str, Engine] = field(default_factory=dict)
    _accuracies: dict[tuple[str, int], Accuracy] = field(default_factory=dict)

    def check_steps(self, steps: int, engine_name: str) -> None:
        """Skip the test of a step count that the run does not have, or whose export takes longer than all the rest."""
        if steps > self.model.config.timesteps:
            pytest.skip(f"the run was trained with {self.model.config.timesteps} steps")
        if self.small and steps > MOST_EXPORTED_STEPS and ENGINES[engine_name].exports:
            pytest.skip(f"exporting {steps} steps can take a minute; give a run with --adrec-run to have it measured")

    @property
    def model(self) -> SequenceModel:
        """The trained model."""
        return self.subject.run.model

    def histories(self, count: int) -> Jagged:
        """The same histories in each call."""
        return draw_batches(self.subject.examples.histories, count)[0]

    def engine(self, name: str) -> Engine:
        """An engine of the model."""
        if name not in self._engines:
            self._engines[name] = make_engine(name, self.model)
        return self._engines[name]

    @cached_property
    def _book(self) -> AccuracyBook:
        return AccuracyBook(self.engine("cached"), self.subject.examples, self.model.config.timesteps)

    def accuracy(self, name: str, steps: int) -> Accuracy:
        """Accuracy of the run at a step count, and how far an engine agrees with it."""
        if (name, steps) not in self._accuracies:
            self._accuracies[name, steps] = self._book.accuracy(steps, 0, self.engine(name), self._book)
        return self._accuracies[name, steps]

    def record(self, name: str, steps: int, batch_size_users: int) -> TradeoffRecord:
        """The row of a setting without its timing, which pytest-benchmark measures."""
        environment, subject = read_environment(), self.subject
        return TradeoffRecord(
            measured_at_utc=now_utc(),
            model=self.model.config.model,
            engine=name,
            steps=steps,
            exact_steps=self.model.config.timesteps,
            batch_size_users=batch_size_users,
            seed=0,
            precision=dtype_name(self.engine(name).dtype),
            split=subject.split,
            timing=None,
            accuracy=self.accuracy(name, steps),
            error=None,
            protocol=MeasuringProtocol(
                clock=CLOCK, interleaved=False, seconds_per_cell=0.0, rounds_minimum=1, warmup_calls=1,
                threads=environment.machine.threads, device=str(self.device), distinct_batches=1,
                results_per_user=RESULTS,
            ),
            dataset_name=subject.dataset.name,
            dataset_fingerprint=subject.dataset.fingerprint,
            dataset_users=len(subject.examples.histories),
            dataset_items=subject.dataset.item_count,
            model_fingerprint=subject.run.fingerprint,
            run_fingerprint=subject.run.fingerprint,
            environment=environment,
            command=printable_command(sys.argv),
        )  # fmt: skip


def trained_run(folder: Path) -> Path:
    """Train a small run on synthetic data in ``folder``, in seconds; returns the run's folder."""
    from adrec.config import RunConfig, parse
    from adrec.data.synthesize import synthetic_dataset
    from adrec.training.stages import train_run

    dataset = synthetic_dataset(USERS, ITEMS, MEAN_LENGTH, 0, name="synthetic")
    dataset.save(folder / "data")
    settings = parse(RunConfig, {"model": MODEL, "train": TRAIN}, "settings of bench/suites")
    run = folder / "run"
    train_run(
        dataset, str(folder / "data"), run, settings, accelerator="cpu", devices=1, progress=False, report=_silent
    )  # fmt: skip
    return run


def subject_of_run(
    run: Path, data: Path | None, users: int | None, device: torch.device = CPU, *, small: bool = False
) -> Measured:
    """A trained run and real histories of its test split; raises NotSupportedError for one without reverse steps."""
    subject = load_subject(run, data, "test", users)
    if subject.run.config.model != "adrec":
        raise NotSupportedError(
            f"a run of {subject.run.config.model!r} has no steps; give the folder of an 'adrec' run"
        )
    subject.run.model.eval().to(device)
    return Measured(subject, device, small)


def kernel_paths(device: torch.device) -> list[str]:
    """The paths of a kernel that run on a device at their own speed."""
    native = device.type == "cuda" and _runtime.AVAILABLE and not _runtime.INTERPRETED
    return ["kernel", "eager twin"] if native else ["eager twin"]


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


def _silent(message: str) -> None:
    """Nothing is said of the training."""
