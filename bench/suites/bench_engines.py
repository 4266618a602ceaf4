"""Engines by steps and batch size: `pytest bench/suites --benchmark-only [--adrec-run RUN]`.

Without a run a small model is trained on synthetic data first, in seconds: such figures compare builds of this code.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from bench.accuracy import RESULTS
from bench.conversion.pytest_json import describe_benchmark
from bench.suites.measured import Measured


@pytest.mark.parametrize("batch_size_users", [1, 32], ids=lambda size: f"batch{size}")
@pytest.mark.parametrize("steps", [1, 4, 32], ids=lambda steps: f"steps{steps}")
def test_recommend(benchmark: Any, measured: Measured, engine_name: str, steps: int, batch_size_users: int) -> None:
    """Time `Engine.recommend`; ``extra_info`` holds the setting, the accuracy, and the row that `convert` completes."""
    measured.check_steps(steps, engine_name)
    engine, batch = measured.engine(engine_name), measured.histories(batch_size_users)
    results = min(RESULTS, measured.model.config.items)
    describe_benchmark(benchmark, measured.record(engine_name, steps, batch_size_users))

    def call() -> Tensor:
        # To the host: the clock is the host's too.
        return engine.recommend(batch, results, steps=steps).items.cpu()

    rounds = 5 if batch_size_users == 1 or steps < 32 else 3
    found = benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
    assert found.shape == (batch_size_users, results)
