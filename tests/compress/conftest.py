"""A saved run to compress, and toy techniques in place of the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toy_techniques import TOYS

from adrec.checkpoint import save_run
from adrec.config import RunConfig, TrainConfig
from adrec.data.dataset import Dataset
from adrec.models import build_model


@pytest.fixture(scope="session")
def compressible_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_dataset: Dataset) -> Path:
    """A run of 4 steps with random weights and its baseline, beside its data set."""
    folder = tmp_path_factory.mktemp("compressible")
    tiny_dataset.save(folder / "data")
    model = tiny_model(timesteps=4, schedule="cosine", max_length=20, lambda_uncertainty=1.0)
    run, data = folder / "run", str(folder / "data")
    save_run(run, RunConfig(model=model.config), model, tiny_dataset, data, {})
    baseline = model.config.baseline(TrainConfig())
    save_run(run / "baseline", RunConfig(model=baseline), build_model(baseline), tiny_dataset, data, {})
    return run


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry holds the toy techniques only."""
    monkeypatch.setattr("compress.recipe._registry", lambda: dict(TOYS))
