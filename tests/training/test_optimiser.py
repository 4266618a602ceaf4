"""The learning rate that the optimiser follows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from adrec.config import OptimiserConfig, TrainConfig
from adrec.data.dataset import Dataset
from adrec.training.module import StageModule


@pytest.fixture
def schedule(tiny_dataset: Dataset, tiny_model: Any) -> Iterator[float]:
    optimiser_config = OptimiserConfig(learning_rate=0.02, cosine_epochs=8, weight_decay=0.3)
    module = StageModule(tiny_model(model="sasrec"), tiny_dataset, TrainConfig(), optimiser_config, "pretrain")
    (optimiser,), (scheduler,) = module.configure_optimizers()
    assert isinstance(optimiser, torch.optim.Adam)
    assert optimiser.param_groups[0]["weight_decay"] == 0.3
    assert sum(p.numel() for p in optimiser.param_groups[0]["params"]) == sum(
        p.numel() for p in module.model.parameters()
    )

    def rates() -> Iterator[float]:
        while True:
            yield scheduler.get_last_lr()[0]
            optimiser.step()
            scheduler.step()

    return rates()


def test_cosine_schedule_by_value(schedule: Iterator[float]) -> None:
    found = [next(schedule) for _ in range(12)]
    half = math.sqrt(0.5)
    expected = {0: 0.02, 2: 0.01 * (1 + half), 4: 0.01, 6: 0.01 * (1 - half), 8: 0.0, 9: 0.0, 11: 0.0}
    for epoch, value in expected.items():
        assert found[epoch] == pytest.approx(value, abs=1e-15), f"epoch {epoch}"
