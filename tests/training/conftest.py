"""Tiny training jobs: 60 users, width 16, a fraction of a second for an epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adrec.checkpoint import Run
from adrec.config import ModelConfig, OptimiserConfig, RunConfig, TrainConfig
from adrec.data.dataset import Dataset
from adrec.training.stages import train_run

Trainer = Callable[..., Run]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Sums over threads have no fixed order; runs that must be equal to the last bit use one.
    torch.set_num_threads(1)


def tiny_settings(*, model: dict[str, Any] | None = None, epochs: int = 2, **train: Any) -> RunConfig:
    """Settings of a tiny job. Keywords: ``pretrain`` and ``main`` as dictionaries, other fields of `TrainConfig`."""
    body = {"items": 40, "width": 16, "heads": 2, "max_length": 12, "timesteps": 8, "schedule": "sqrt", **(model or {})}
    stages = {
        name: OptimiserConfig(**{"epochs": epochs, "learning_rate": 0.01, "validate_every": 1, **train.pop(name, {})})
        for name in ("pretrain", "main")
    }
    return RunConfig(
        model=ModelConfig(**body), train=TrainConfig(**{"batch_size": 16, "warmup_epochs": 1, **stages, **train})
    )


@pytest.fixture(scope="session")
def train_tiny(tiny_dataset: Dataset) -> Trainer:
    """Trains in this process on one CPU thread: ``train_tiny(folder, epochs=3, pcgrad=True)``."""

    def train(out: Path, *, dataset: Dataset = tiny_dataset, resume: bool = False, **settings: Any) -> Run:
        return train_run(
            dataset,
            "data",
            out,
            tiny_settings(**settings),
            resume=resume,
            accelerator="cpu",
            devices=1,
            progress=False,
            report=lambda line: None,
        )

    return train
