"""One optimiser step, its batch loaded: `pytest bench/suites --benchmark-only [--adrec-run RUN]`.

The model has random weights and the shape of the run's. Lightning runs the steps as in `adrec train`.
"""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import pytest
import torch

from adrec.config import TrainConfig
from adrec.environment import printable_command
from adrec.models.base import TokenBatch
from adrec.training.module import StageModule
from bench.conversion.pytest_json import describe_benchmark
from bench.suites.measured import CLOCK, Measured
from bench.training_speed.measure import WARM_UP, StepTimes, TrainingBench, summarise

BATCH, STEPS, PRECISION = 64, 20, "32-true"


class TimedStage(StageModule):
    """A stage whose first step hands over to pytest-benchmark, which takes all of them; then it stops."""

    benchmark: Any
    times: StepTimes

    def training_step(self, batch: TokenBatch, index: int) -> None:
        """Time steps on batch after batch, epoch after epoch."""
        batches = itertools.chain.from_iterable(self.train_dataloader() for _ in itertools.count())

        def step() -> None:
            loaded = self.transfer_batch_to_device(next(batches), self.device, 0)
            StageModule.training_step(self, loaded, index)
            if loaded.targets.is_cuda:
                torch.cuda.synchronize(self.device)
            self.times.count(loaded)

        self.benchmark.pedantic(step, rounds=STEPS, warmup_rounds=WARM_UP)
        self.trainer.should_stop = True


@pytest.mark.parametrize("model", ["sasrec", "adrec"])
def test_training_step(benchmark: Any, measured: Measured, model: str) -> None:
    """Time steps; ``extra_info`` holds the setting, tokens a second and the whole record."""
    subject = measured.subject
    settings = subject.run.settings
    config = settings.model if model == "adrec" else settings.model.baseline(settings.train or TrainConfig())
    bench = TrainingBench(subject.dataset, measured.device, printable_command(sys.argv), STEPS, clock=CLOCK)
    describe_benchmark(benchmark, bench.row(config, BATCH, PRECISION, None, None))
    stage = bench.stage(TimedStage, config, BATCH, PRECISION)
    stage.benchmark, stage.times = benchmark, StepTimes(STEPS, measured.device, lambda done, expected: None)
    memory = bench.fit(stage, 1, [])
    if benchmark.stats is None:
        return
    stage.times.seconds = [math.nan] * WARM_UP + benchmark.stats.stats.data
    timing = summarise(stage.times, bench.epoch_steps(BATCH), *memory)
    describe_benchmark(benchmark, bench.row(config, BATCH, PRECISION, timing, None))
    benchmark.extra_info["tokens_per_second"] = timing.tokens_per_second
