"""Engines by steps and batch size: `pytest bench/suites --benchmark-only [--adrec-run RUN]`.

Without a run the model is untrained and its histories are drawn: such figures compare builds of this code, not models.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adrec.engines import exact_engines
from bench.accuracy import RESULTS
from bench.conversion.pytest_json import record_without_timing
from bench.suites.measured import OVERLAP_USERS, Measured


@pytest.mark.parametrize("batch_size_users", [1, 32], ids=lambda size: f"batch{size}")
@pytest.mark.parametrize("steps", [1, 4, 32], ids=lambda steps: f"steps{steps}")
@pytest.mark.parametrize("engine_name", exact_engines(torch.device("cpu")))
def test_recommend(benchmark: Any, measured: Measured, engine_name: str, steps: int, batch_size_users: int) -> None:
    """Time `Engine.recommend`; `extra_info` holds the setting, the accuracy, and the row that `convert` completes."""
    if steps > measured.model.config.timesteps:
        pytest.skip(f"the run was trained with {measured.model.config.timesteps} steps")
    engine, batch = measured.engine(engine_name), measured.histories(batch_size_users)
    results = min(RESULTS, measured.model.config.items)
    accuracy = measured.accuracy(engine_name, steps)
    benchmark.group = f"recommend, batch {batch_size_users}, {steps} steps"
    benchmark.extra_info.update(
        engine=engine_name,
        steps=steps,
        batch_size_users=batch_size_users,
        threads=torch.get_num_threads(),
        model_fingerprint=measured.fingerprint,
        accuracy=None if accuracy is None else {name: each.value for name, each in accuracy.metrics_percent.items()},
        accuracy_users=0 if accuracy is None else accuracy.users,
        top20_overlap=measured.overlap(engine_name, steps),
        top20_overlap_users=OVERLAP_USERS,
        **record_without_timing(measured.record(engine_name, steps, batch)),
    )
    found = benchmark.pedantic(
        engine.recommend,
        args=(batch, results),
        kwargs={"steps": steps},
        rounds=5 if batch_size_users == 1 or steps < 32 else 3,
        warmup_rounds=1,
    )
    assert found.items.shape == (batch_size_users, results)
