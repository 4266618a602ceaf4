"""What all techniques share: settings, the draft they change, and the receipt they give.

A technique is a frozen `Technique` subclass (its settings) and one function that changes a `Draft`. It changes the
draft only when it succeeds, and says in a `Receipt` what it changed, what it skipped and why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field

from adrec.config import RunConfig, StrictModel
from adrec.data.dataset import Dataset, Examples
from adrec.engines import CachedEngine
from adrec.errors import AdrecError, RunError
from adrec.evaluation import Evaluation, Interval, evaluate, kept_percent
from adrec.models.base import SequenceModel

METRIC = "NDCG@20"


class CompressionError(AdrecError):
    """A technique cannot be applied, or lost more accuracy than was allowed."""

    exit_code = 1


class Technique(StrictModel):
    """Settings of one technique; subclasses set ``technique`` to a `Literal` name, which recipes and receipts use."""

    technique: str
    max_loss: float | None = Field(
        None, ge=0.0, lt=100.0, description="largest loss of NDCG@20 against the teacher, percent; None: the recipe's"
    )


class Reading(StrictModel):
    """A percentage with its 95 % bootstrap interval over users."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, interval: Interval) -> Reading:
        return cls(value=interval.value, low=interval.low, high=interval.high)


class Accuracy(StrictModel):
    """Accuracy on the validation split after a stage.

    metrics: percent by name (NDCG@20 among them). kept: NDCG@20 in percent of the teacher's, users resampled in pairs;
    None where the teacher's is zero.
    """

    users: int
    metrics: dict[str, Reading]
    kept: Reading | None


class Change(StrictModel):
    """One thing a technique changed. detail: numbers that justify it, such as ``{"sqnr_db": 41.2}``."""

    what: str
    before: str
    after: str
    detail: dict[str, float | int | str] = Field(default_factory=dict)


class Skip(StrictModel):
    """One thing a technique left as it was, and why."""

    what: str
    why: str


class Receipt(StrictModel):
    """What one technique did. Sizes in bytes are those of the weights as stored; accuracy is None if not measured."""

    schema_version: int = 1
    settings: dict[str, Any]
    changed: tuple[Change, ...] = ()
    skipped: tuple[Skip, ...] = ()
    bytes_before: int
    bytes_after: int
    parameters_before: int
    parameters_after: int
    accuracy: Accuracy | None = None
    notes: tuple[str, ...] = ()

    @property
    def technique(self) -> str:
        return str(self.settings["technique"])


@dataclass
class Draft:
    """A run being compressed. Techniques replace ``model`` and ``settings``; the teacher never changes.

    model, teacher: in eval mode on the CPU. dataset: None where only techniques without data are used. seed: of
    everything random. report: called with a line of text at each milestone.
    """

    model: SequenceModel
    settings: RunConfig
    teacher: SequenceModel
    dataset: Dataset | None = None
    seed: int = 0
    report: Callable[[str], None] = lambda line: None
    _teacher_evaluation: Evaluation | None = field(default=None, repr=False)

    @classmethod
    def of(cls, model: SequenceModel, dataset: Dataset | None = None, **options: Any) -> Draft:
        """A draft of a model; the teacher is a copy of it."""
        settings = options.pop("settings", None) or RunConfig(model=model.config)
        return cls(model.eval(), settings, copy.deepcopy(model).eval(), dataset, **options)

    def require_dataset(self, technique: str) -> Dataset:
        """The data set; raises RunError saying which technique needs it."""
        if self.dataset is None:
            raise RunError(f"'{technique}' needs the data the run was trained on; name its folder with --data")
        return self.dataset

    def validation(self, technique: str) -> Examples:
        """Examples of the validation split; raises RunError without data or without an example."""
        examples = self.require_dataset(technique).examples("validation")
        if len(examples) == 0:
            raise RunError(f"'{technique}' needs validation examples, and the data set has none")
        return examples

    def evaluate(self) -> Evaluation:
        """Rank the catalogue for the validation split, sampled as the draft's settings say."""
        return evaluate(CachedEngine(self.model), self.validation("evaluate"), steps=None, seed=self.seed)

    def teacher_evaluation(self) -> Evaluation:
        """The teacher's, with every step it was trained with; computed once."""
        if self._teacher_evaluation is None:
            examples = self.validation("evaluate")
            self._teacher_evaluation = evaluate(CachedEngine(self.teacher), examples, steps=None, seed=self.seed)
        return self._teacher_evaluation

    def accuracy(self) -> Accuracy:
        """Accuracy of the draft as it is now, beside the teacher's."""
        found = self.evaluate()
        kept = kept_percent(found.ranks, self.teacher_evaluation().ranks)
        metrics = {name: Reading.of(interval) for name, interval in found.metrics.items()}
        return Accuracy(users=found.users, metrics=metrics, kept=None if kept is None else Reading.of(kept))


def stored_bytes(model: SequenceModel) -> int:
    """Bytes of a model's weights as a run stores them."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def parameter_count(model: SequenceModel) -> int:
    """Stored numbers of a model, quantised ones included."""
    return sum(value.numel() for value in model.state_dict().values() if value.dtype != torch.bool)
