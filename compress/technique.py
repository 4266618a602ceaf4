"""What all techniques share: settings, the draft they change, and the receipt they give.

A technique is a frozen `Technique` subclass (its settings) and one function that changes a `Draft`. It changes the
draft only when it succeeds, and says in a `Receipt` what it changed, what it skipped and why.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from adrec.config import RunConfig, StrictModel
from adrec.data.dataset import Dataset, Examples
from adrec.engines import CachedEngine
from adrec.errors import AdrecError, ConfigError, RunError
from adrec.evaluation import Evaluation, Interval, evaluate, kept_percent
from adrec.models import quantization_of
from adrec.models.base import SequenceModel

METRIC = "NDCG@20"


class CompressionError(AdrecError):
    """A technique cannot be applied, lost more accuracy than was allowed, or nothing meets a budget.

    receipts: of the stages that were done before.
    """

    exit_code = 3

    def __init__(self, message: str, receipts: tuple[Receipt, ...] = ()) -> None:
        super().__init__(message)
        self.receipts = receipts


def _percent(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a percentage such as 1% or 1.0 is expected")
    if not isinstance(value, str):
        return value
    try:
        return float(value.strip().removesuffix("%"))
    except ValueError:
        raise ValueError("a percentage such as 1% or 1.0 is expected") from None


Percent = Annotated[float, BeforeValidator(_percent), Field(ge=0.0, lt=100.0)]
"""A share in percent: 1.0, "1%" and "1 %" are the same."""


def percent(text: str, option: str) -> float:
    """Read a percentage below 100, as recipes do; ConfigError names the option."""
    try:
        return TypeAdapter(Percent).validate_python(text)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{option} is '{text}'; allowed: 0% to below 100%, such as 1% or 0.5 ({reason})") from None


class Technique(StrictModel):
    """Settings of one technique; subclasses set ``technique`` to a `Literal` name, which recipes and receipts use."""

    technique: str
    max_loss: Percent | None = Field(
        None, description="largest loss of NDCG@20 against the run handed in, percent; none: the recipe's"
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

    metrics: percent by name (NDCG@20 among them). kept: NDCG@20 in percent of the teacher's; kept_of_before: in
    percent of what it was before the stage; users resampled in pairs, None where the denominator is zero.
    """

    users: int
    metrics: dict[str, Reading]
    kept: Reading | None
    kept_of_before: Reading | None = None

    @property
    def loss(self) -> float:
        """NDCG@20 lost against the teacher, percent; nothing can be lost where the teacher has none."""
        return 0.0 if self.kept is None else 100.0 - self.kept.value


class Change(StrictModel):
    """One thing a technique changed. detail: numbers that justify it, such as ``{"sqnr_db": 41.2}``."""

    what: str
    before: str
    after: str
    detail: dict[str, float | int | str] = Field(default_factory=dict)


def decibels(sqnr: float) -> float | str:
    """A signal-to-noise ratio as a receipt holds it: two digits, or ``exact`` where there is no noise."""
    return "exact" if sqnr == math.inf else round(sqnr, 2)


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
    _evaluated: tuple[SequenceModel, RunConfig, Evaluation] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._start = (self.model, self.settings)
        self._teacher_serving = self.settings.serving

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
        """Rank the catalogue for the validation split, sampled as the draft's settings say; once for each state."""
        # Until the first stage the draft is its teacher, which need not be ranked twice.
        as_taught = self.settings.serving == self._teacher_serving
        if as_taught and self.model is self._start[0] and self.settings == self._start[1]:
            return self.teacher_evaluation()
        known = self._evaluated
        if known is None or known[0] is not self.model or known[1] != self.settings:
            examples = self.validation("evaluate")
            found = evaluate(CachedEngine(self.model), examples, steps=self.settings.serving, seed=self.seed)
            known = self._evaluated = (self.model, self.settings, found)
        return known[2]

    def changed(self) -> None:
        """Forget what is known of the state before, though a technique may have changed the same model in place."""
        self._evaluated, self._start = None, (self.teacher, self.settings)

    def teacher_evaluation(self) -> Evaluation:
        """The teacher's, sampled as the run handed in says, else with every trained step; computed once."""
        if self._teacher_evaluation is None:
            examples = self.validation("evaluate")
            engine = CachedEngine(self.teacher)
            self._teacher_evaluation = evaluate(engine, examples, steps=self._teacher_serving, seed=self.seed)
        return self._teacher_evaluation

    def accuracy(self, before: Evaluation | None = None) -> Accuracy:
        """Accuracy of the draft as it is now, beside the teacher's and that before a stage."""
        found = self.evaluate()
        return Accuracy(
            users=found.users,
            metrics={name: Reading.of(interval) for name, interval in found.metrics.items()},
            kept=_kept(found, self.teacher_evaluation()),
            kept_of_before=None if before is None else _kept(found, before),
        )


def _kept(found: Evaluation, of: Evaluation) -> Reading | None:
    interval = kept_percent(found.ranks, of.ranks)
    return None if interval is None else Reading.of(interval)


def stored_bytes(model: SequenceModel) -> int:
    """Bytes of a model's weights as a run stores them."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def parameter_count(model: SequenceModel) -> int:
    """Stored numbers of a model, quantised ones included."""
    return sum(value.numel() for value in model.state_dict().values() if value.dtype != torch.bool)


def require_trainable(model: SequenceModel, technique: str) -> None:
    """Raise CompressionError for a quantised model, whose stored integers cannot be trained."""
    if quantization_of(model) is not None:
        raise CompressionError(
            f"'{technique}' trains, and the model is quantised already; start from the run it was made of, and quantise"
            f" after '{technique}'"
        )
