"""What suite engines measures on: random models of any catalogue size, or a trained run with its test users."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from adrec.config import ModelConfig, TrainConfig
from adrec.data.jagged import Jagged
from adrec.engines import Engine, make_engine
from adrec.models import build_model
from adrec.models.base import WEIGHT_STD, SequenceModel
from bench.accuracy import AccuracyBook
from bench.kernels.records import COMPILED, TrainedOn
from bench.plan import ACCURACY_ENGINE
from bench.record import Accuracy
from bench.subject import Subject

MEAN_LENGTH = 8
SEED = 0


class Catalogue(Protocol):
    """What a suite measures engines on: models of ``items`` items, and histories. trained: the run, if it is one."""

    @property
    def name(self) -> str: ...

    @property
    def items(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def trained(self) -> TrainedOn | None: ...

    def model(self, device: torch.device) -> SequenceModel:
        """ADRec, ready to be served."""

    def baseline(self, model: SequenceModel) -> SequenceModel:
        """SASRec+ beside it; raises ValueError where there is none."""

    def histories(self, users: int, variant: int) -> Jagged:
        """A batch; other variants hold other items, and the same lengths, for which a graph or an engine is made."""

    def accuracy(self, path: str, engine: Engine, steps: int | None) -> Accuracy | None:
        """Accuracy of a path at a step count (None: SASRec+), measured once; None for a model that learned nothing."""

    def lists(self, histories: Jagged, steps: int | None, k: int, device: torch.device) -> Tensor | None:
        """Top items of a batch, `[B, k]`, by the engine that accuracies are measured with; None like ``accuracy``."""


@dataclass(frozen=True)
class RandomCatalogue:
    """Models with random weights: times mean something, lists and accuracies do not."""

    items: int
    width: int = 128
    timesteps: int = 32
    trained: None = None

    @property
    def name(self) -> str:
        return f"{self.items} items"

    def model(self, device: torch.device) -> SequenceModel:
        return random_model(self.items, self.width, self.timesteps, device)

    def baseline(self, model: SequenceModel) -> SequenceModel:
        return random_baseline(model)

    def histories(self, users: int, variant: int) -> Jagged:
        return random_histories(users, self.items, variant)

    def accuracy(self, path: str, engine: Engine, steps: int | None) -> Accuracy | None:
        return None

    def lists(self, histories: Jagged, steps: int | None, k: int, device: torch.device) -> Tensor | None:
        return None


@dataclass
class TrainedCatalogue:
    """A run on its own catalogue, with the histories of its test users and what each path makes of their targets."""

    subject: Subject
    _books: dict[bool, AccuracyBook] = field(default_factory=dict)
    _found: dict[tuple[str, int | None], Accuracy] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.subject.dataset.name

    @property
    def items(self) -> int:
        return self.subject.run.config.items

    @property
    def width(self) -> int:
        return self.subject.run.config.width

    @property
    def trained(self) -> TrainedOn:
        subject = self.subject
        return TrainedOn(
            run_fingerprint=subject.run.fingerprint,
            baseline_fingerprint=None if subject.baseline is None else subject.baseline.fingerprint,
            dataset_name=subject.dataset.name,
            dataset_fingerprint=subject.dataset.fingerprint,
            split=subject.split,
            users=len(subject.examples.histories),
            exact_steps=subject.run.config.timesteps,
        )

    def model(self, device: torch.device) -> SequenceModel:
        return self.subject.run.model.to(device).eval()

    def baseline(self, model: SequenceModel) -> SequenceModel:
        if self.subject.baseline is None:
            raise ValueError(f"{self.subject.run.path} holds no SASRec+, which its first training stage makes")
        return self.subject.baseline.model.to(model.device).eval()

    def histories(self, users: int, variant: int) -> Jagged:
        """Users at evenly spaced quantiles of the history length: a batch is as the data are, one user is the median.

        Variants draw other users of the same lengths, and some again where there are no others.
        """
        histories = self.subject.examples.histories.tail(self.subject.run.config.max_length)
        lengths = histories.lengths.numpy()
        quantiles = (np.arange(users) + 0.5) / users * len(lengths)
        wanted = np.sort(lengths)[quantiles.astype(np.int64)]
        drawn = np.random.default_rng([SEED, users, variant])
        rows = np.empty(users, dtype=np.int64)
        for length in np.unique(wanted):
            places, able = np.flatnonzero(wanted == length), np.flatnonzero(lengths == length)
            rows[places] = drawn.choice(able, len(places), replace=len(places) > len(able))
        order = np.random.default_rng([SEED, users]).permutation(users)
        return histories.select(torch.from_numpy(rows[order]))

    def accuracy(self, path: str, engine: Engine, steps: int | None) -> Accuracy | None:
        if (path, steps) not in self._found:
            exact = self._book(engine.device, baseline=False)
            book = exact if steps is not None else self._book(engine.device, baseline=True)
            # A compiled path is compared on each batch that it was compiled for: another takes it minutes.
            compared = book.engine if COMPILED in path else engine
            self._found[path, steps] = book.accuracy(steps, SEED, compared, exact)
        return self._found[path, steps]

    def lists(self, histories: Jagged, steps: int | None, k: int, device: torch.device) -> Tensor:
        return self._book(device, baseline=steps is None).engine.recommend(histories, k, steps=steps, seed=SEED).items

    def _book(self, device: torch.device, *, baseline: bool) -> AccuracyBook:
        """Evaluates the run (or its SASRec+) in `cached`: other float32 paths are compared with it on a few users."""
        if baseline not in self._books:
            model = self.model(device)
            engine = make_engine(ACCURACY_ENGINE, self.baseline(model) if baseline else model)
            exact_steps = None if baseline else self.subject.run.config.timesteps
            self._books[baseline] = AccuracyBook(engine, self.subject.examples, exact_steps)
        return self._books[baseline]


def random_model(items: int, width: int, timesteps: int, device: torch.device) -> SequenceModel:
    """ADRec of the paper's size with random weights; its table is made on the device, whatever its size."""
    config = ModelConfig(items=items, width=width, timesteps=max(32, timesteps))
    torch.manual_seed(0)
    model = build_model(config.model_copy(update={"items": 1})).to(device)
    model.config = config
    table = torch.empty(items + 1, width, device=device).normal_(0.0, WEIGHT_STD)
    table[0] = 0.0
    model.item_embedding = nn.Embedding.from_pretrained(table, freeze=False, padding_idx=0)
    return model.eval().requires_grad_(False)


def random_baseline(model: SequenceModel) -> SequenceModel:
    """SASRec+ of the same size with random weights and the same item table."""
    config = model.config.baseline(TrainConfig())
    torch.manual_seed(0)
    baseline = build_model(config.model_copy(update={"items": 1})).to(model.device)
    baseline.config, baseline.item_embedding = config, model.item_embedding
    return baseline.eval().requires_grad_(False)


def random_histories(users: int, items: int, variant: int = 0) -> Jagged:
    """Histories with the mean length of the Amazon sets and a long tail, up to 50 items; the same for each call.

    variant: other items, and the same lengths, for which a graph or a compiled engine is made.
    """
    generator = np.random.default_rng(users)
    lengths = np.clip(generator.geometric(1 / MEAN_LENGTH, users), 1, 50)
    generator = np.random.default_rng([users, variant]) if variant else generator
    return Jagged.from_lists(generator.integers(1, items + 1, length).tolist() for length in lengths)
