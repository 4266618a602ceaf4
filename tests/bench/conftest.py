"""A tiny saved run with its stage-1 baseline and data set, and records measured from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from adrec.checkpoint import save_run
from adrec.config import ModelConfig, RunConfig, TrainConfig
from adrec.data.dataset import Dataset
from adrec.models import build_model
from bench.record import TradeoffRecord
from bench.timing import TimingProtocol
from bench.tradeoff import run_tradeoff

ITEMS, USERS, STEPS = 40, 60, 4


class CountingClock:
    """A clock that calls, and then reports 1 ms plus whatever the call returns as a number."""

    name = "counting clock"

    def time_ms(self, call: Callable[[int], object], number: int) -> float:
        found = call(number)
        return 1.0 + float(found) if isinstance(found, int | float) else 1.0


@pytest.fixture(scope="session")
def counting_clock() -> CountingClock:
    return CountingClock()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained run of 4 steps, with a baseline, over 40 items and 60 users."""
    folder = tmp_path_factory.mktemp("bench")
    generator = np.random.default_rng(0)
    rows = [generator.integers(1, ITEMS + 1, generator.integers(3, 14)).tolist() for _ in range(USERS)]
    rows[0][0] = ITEMS
    dataset = Dataset.from_lists(
        [row[:-2] for row in rows], [[row[-2]] for row in rows], [[row[-1]] for row in rows], name="tiny"
    )
    dataset.save(folder / "data")
    config = ModelConfig(items=ITEMS, width=16, heads=2, max_length=10, timesteps=STEPS, schedule="cosine")
    torch.manual_seed(0)
    run, data = folder / "run", str(folder / "data")
    save_run(run, RunConfig(model=config), build_model(config), dataset, data, {})
    baseline = config.baseline(TrainConfig())
    save_run(run / "baseline", RunConfig(model=baseline), build_model(baseline), dataset, data, {})
    return run


@pytest.fixture(scope="session")
def tiny_protocol() -> TimingProtocol:
    """The shortest protocol: two rounds of next to no time."""
    return TimingProtocol(seconds=1e-6, rounds=2, rounds_slow=2, rounds_most=2, warmup_calls=1)


@pytest.fixture(scope="session")
def tiny_records(tiny_run: Path, tiny_protocol: TimingProtocol) -> list[TradeoffRecord]:
    """Records of the tiny run: 2 engines x 2 step counts x 2 batch sizes, the baseline in both engines, popularity."""
    result = run_tradeoff(
        tiny_run,
        steps=[1, STEPS],
        batch_sizes=[1, 8],
        protocol=tiny_protocol,
        quiet=True,
        command="adrec bench",
    )
    return result.records
