"""Teachers and batches of the distillation tests."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from adrec.config import OptimiserConfig
from adrec.data.dataset import Dataset
from adrec.data.jagged import Jagged
from adrec.models import ADRec
from adrec.models.base import SequenceModel, TokenBatch
from compress.technique import Draft

SEQUENCES = ([5, 9, 2, 31, 7, 7, 1], [3, 40], [12, 8, 33, 2, 19, 4], [1, 2, 3], [20, 6, 11, 13, 25])


def batch_of(max_length: int = 12) -> TokenBatch:
    """Five users with 1 to 6 targets."""
    return TokenBatch.from_sequences(Jagged.from_lists(SEQUENCES), max_length)


def prefixes_of(batch: TokenBatch) -> Jagged:
    """The history of every packed token: what a request for its target holds."""
    rows = []
    for user, start in enumerate(batch.layout.offsets[:-1].tolist()):
        items = batch.inputs[start : start + int(batch.layout.lengths[user])].tolist()
        rows += [items[: place + 1] for place in range(len(items))]
    return Jagged.from_lists(rows)


def constant_denoiser(model: SequenceModel, value: float) -> ADRec:
    """A copy of a model with the MLP denoiser whose every answer is a row of ``value``."""
    model = copy.deepcopy(model)
    assert isinstance(model, ADRec)
    with torch.no_grad():
        model.denoiser.norm.weight.zero_()
        model.denoiser.norm.bias.fill_(value)
    return model


def draft_of(teacher: SequenceModel, dataset: Dataset | None, **options: Any) -> Draft:
    """A fresh draft of a copy of the teacher."""
    return Draft.of(copy.deepcopy(teacher), dataset, **options)


def short(epochs: int, **settings: Any) -> OptimiserConfig:
    """An optimiser for tiny trainings that are never stopped early."""
    values = {"learning_rate": 0.01, "validate_every": epochs, "average_decay": 0.5, **settings}
    return OptimiserConfig(epochs=epochs, **values)


def weights(model: SequenceModel) -> dict[str, Tensor]:
    """A copy of a model's weights."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
