"""Saved runs to serve: integer ids, text ids, and the baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from adrec.checkpoint import save_run
from adrec.config import RunConfig
from adrec.data.dataset import Dataset

RunFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def text_dataset(tiny_dataset: Dataset) -> Dataset:
    """The tiny data set with text ids ``item-1`` to ``item-40``."""
    raw = pa.array([f"item-{item}" for item in range(1, tiny_dataset.item_count + 1)])
    return replace(tiny_dataset, item_ids=raw)


@pytest.fixture(scope="session")
def make_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_dataset: Dataset, text_dataset: Dataset
) -> RunFactory:
    """Saves a model with random weights as a run folder: ``make_run(text=True, model="sasrec")``."""

    def make(*, text: bool = False, **overrides: Any) -> Path:
        # Lambda 1 lets the noise of sampling decide the order, so that a wrong key or seed shows.
        settings = {"timesteps": 4, "schedule": "sqrt", "max_length": 20, "lambda_uncertainty": 1.0, **overrides}
        model = tiny_model(**settings)
        folder = tmp_path_factory.mktemp("run") / "run"
        dataset = text_dataset if text else tiny_dataset
        save_run(folder, RunConfig(model=model.config), model, dataset, "data", {})
        return folder

    return make


@pytest.fixture(scope="session")
def integer_run(make_run: RunFactory) -> Path:
    """A run whose raw ids are the integers 1 to 40."""
    return make_run()


@pytest.fixture(scope="session")
def text_run(make_run: RunFactory) -> Path:
    """A run whose raw ids are ``item-1`` to ``item-40``."""
    return make_run(text=True)
