"""Both engines on an untrained model of the paper's size: `pytest bench/suites --benchmark-only`.

The model is untrained and its histories are drawn, so these figures compare builds of this code, not
models: a row's `top20_overlap` is with the same engine's exact result for the same users and seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from adrec.config import ModelConfig
from adrec.data.jagged import Jagged
from adrec.engines import exact_engines, make_engine
from adrec.evaluation import top_overlap
from adrec.models import build_model
from adrec.models.base import SequenceModel

ITEMS = 4000
RESULTS = 20
OVERLAP_USERS = 16


@pytest.fixture(scope="module")
def model() -> SequenceModel:
    """ADRec of the paper's size with random weights."""
    torch.manual_seed(0)
    return build_model(ModelConfig(items=ITEMS)).eval()


def histories(users: int) -> Jagged:
    """Draw histories with the mean length of the Amazon sets (8) and a long tail, up to 50 items."""
    generator = np.random.default_rng(users)
    lengths = np.clip(generator.geometric(1 / 8, users), 1, 50)
    return Jagged.from_lists(generator.integers(1, ITEMS + 1, length).tolist() for length in lengths)


@pytest.mark.parametrize("batch_size_users", [1, 32])
@pytest.mark.parametrize("steps", [1, 4, 32])
@pytest.mark.parametrize("engine_name", exact_engines(torch.device("cpu")))
def test_recommend(benchmark: Any, model: SequenceModel, engine_name: str, steps: int, batch_size_users: int) -> None:
    """Time `Engine.recommend`; `extra_info` holds the setting and its overlap with the exact result."""
    engine = make_engine(engine_name, model)
    batch = histories(batch_size_users)
    sample = histories(OVERLAP_USERS)
    exact = engine.recommend(sample, RESULTS, steps=model.config.timesteps).items
    overlap = top_overlap(engine.recommend(sample, RESULTS, steps=steps).items, exact)
    benchmark.extra_info.update(
        engine=engine_name,
        steps=steps,
        batch_size_users=batch_size_users,
        threads=torch.get_num_threads(),
        top20_overlap=float(overlap.mean()),
        top20_overlap_users=OVERLAP_USERS,
    )
    found = benchmark.pedantic(
        engine.recommend,
        args=(batch, RESULTS),
        kwargs={"steps": steps},
        rounds=5 if batch_size_users == 1 or steps < 32 else 3,
        warmup_rounds=1,
    )
    assert found.items.shape == (batch_size_users, RESULTS)
