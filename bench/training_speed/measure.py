"""Time real optimiser steps of `adrec.training`, as Lightning runs them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from adrec.config import ModelConfig, OptimiserConfig, TrainConfig
from adrec.data.dataset import Dataset
from adrec.environment import Environment, read_environment
from adrec.models import build_model
from adrec.models.base import TokenBatch
from adrec.training.module import StageModule
from adrec.training.stages import quiet_lightning
from bench.kernels.measure import now_utc
from bench.memory import peak_memory_mib
from bench.timing import describe_error
from bench.training_speed.record import TrainingRecord, TrainingTiming

WARM_UP, WINDOWS = 3, 20

Report = Callable[[float, float], None]
Stage = TypeVar("Stage", bound=StageModule)


class StepTimes(Callback):
    """Seconds from the end of one step to the end of the next, with the tokens and users of each; then it stops."""

    def __init__(self, steps: int, device: torch.device, report: Report) -> None:
        self.steps, self.device, self.report = steps, device, report
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.users: list[int] = []
        self._ended: float | None = None

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note a step; the very first has no predecessor to count from."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._ended is not None:
            self.seconds.append(now - self._ended)
            self.count(batch)
            self.report(sum(self.seconds), sum(self.seconds) * (self.steps + WARM_UP) / len(self.seconds))
        self._ended = now
        if len(self.seconds) >= self.steps + WARM_UP:
            trainer.should_stop = True

    def count(self, batch: TokenBatch) -> None:
        """Add the tokens and users of a batch."""
        self.tokens.append(batch.targets.numel())
        self.users.append(batch.layout.lengths.numel())

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """What happens between epochs is no part of a step."""
        self._ended = None


@dataclass
class TrainingBench:
    """Measures models on the training sequences of a data set."""

    dataset: Dataset
    device: torch.device
    command: str
    steps: int = 60
    clock: str = "wall clock"
    environment: Environment = field(default_factory=read_environment)

    def record(self, config: ModelConfig, batch_size: int, precision: str, report: Report) -> TrainingRecord:
        """Train for the steps and a few more; an exception is the record's error."""
        timing, error = None, None
        try:
            timing = self._timing(config, batch_size, precision, report)
        except Exception as problem:
            error = describe_error(problem)
        return self.row(config, batch_size, precision, timing, error)

    def row(
        self, config: ModelConfig, batch_size: int, precision: str, timing: TrainingTiming | None, error: str | None
    ) -> TrainingRecord:
        """The record of what was measured here."""
        return TrainingRecord(
            measured_at_utc=now_utc(),
            model=config.model,
            batch_size_users=batch_size,
            precision=precision,
            width=config.width,
            items=config.items,
            timing=timing,
            error=error,
            dataset_name=self.dataset.name,
            dataset_fingerprint=self.dataset.fingerprint,
            device=str(self.device),
            threads=self.environment.machine.threads,
            clock=self.clock,
            environment=self.environment,
            command=self.command,
        )

    def _timing(self, config: ModelConfig, batch_size: int, precision: str, report: Report) -> TrainingTiming:
        module = self.stage(StageModule, config, batch_size, precision)
        epoch_steps = self.epoch_steps(batch_size)
        times = StepTimes(self.steps, self.device, report)
        # An epoch's first step is not timed, so that short epochs need more of them.
        epochs = 2 + (self.steps + WARM_UP) // max(1, epoch_steps - 1)
        return summarise(times, epoch_steps, *self.fit(module, epochs, [times]))

    def epoch_steps(self, batch_size: int) -> int:
        """Optimiser steps of an epoch."""
        return math.ceil(len(self.dataset.training_sequences()) / batch_size)

    def stage(self, kind: type[Stage], config: ModelConfig, batch_size: int, precision: str) -> Stage:
        """A model of random weights with its data, in a class of stages."""
        torch.manual_seed(0)
        train = TrainConfig.model_validate({"batch_size": batch_size, "precision": precision})
        return kind(build_model(config), self.dataset, train, OptimiserConfig(), "main")

    def fit(self, module: StageModule, epochs: int, callbacks: list[Callback]) -> tuple[float | None, str]:
        """Train without validation until the epochs end or something stops it; peak memory in MiB, and its meaning."""
        with quiet_lightning():
            trainer = lightning.Trainer(
                accelerator=self.device.type,
                devices=1,
                precision=module.train_config.precision,
                max_epochs=epochs,
                limit_val_batches=0,
                num_sanity_val_steps=0,
                callbacks=callbacks,
                logger=False,
                enable_checkpointing=False,
                use_distributed_sampler=False,
                reload_dataloaders_every_n_epochs=1,
                enable_model_summary=False,
                enable_progress_bar=False,
            )
            return peak_memory_mib(partial(trainer.fit, module), self.device)


def summarise(times: StepTimes, epoch_steps: int, memory: float | None, meaning: str) -> TrainingTiming:
    """Quantiles of the steps after the warm-up. Raises ValueError when there is none."""
    seconds = np.asarray(times.seconds[WARM_UP:])
    if seconds.size == 0:
        raise ValueError("no step was timed: the data have too few users for this batch size; choose a smaller one")
    windows = np.array_split(1e3 * seconds, min(WINDOWS, seconds.size))
    p50, p95 = np.quantile(seconds, [0.5, 0.95])
    return TrainingTiming(
        step_ms_p50=1e3 * float(p50),
        step_ms_p95=1e3 * float(p95),
        window_medians_ms=[round(float(np.median(window)), 6) for window in windows],
        steps=seconds.size,
        tokens_per_second=sum(times.tokens[WARM_UP:]) / float(seconds.sum()),
        users_per_second=sum(times.users[WARM_UP:]) / float(seconds.sum()),
        epoch_steps=epoch_steps,
        epoch_seconds=float(p50) * epoch_steps,
        peak_memory_mib=memory,
        peak_memory_meaning=meaning,
    )
