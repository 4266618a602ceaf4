"""Training a student on a teacher's answers: the batches, the Lightning module and the loop both distillations share.

A distillation is short and is not resumable: weights are kept in memory until it ends.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor
from torch.utils.data import DataLoader

from adrec.config import OptimiserConfig, TrainConfig
from adrec.data.dataset import Dataset
from adrec.data.jagged import Jagged
from adrec.engines import CachedEngine
from adrec.evaluation import evaluate
from adrec.models.adrec import ADRec
from adrec.models.base import SequenceModel, TokenBatch
from adrec.noise import PhiloxNoise
from adrec.respacing import Steps
from adrec.schedule import DiffusionTable
from adrec.training.batches import RandomBatches, UserRows, derive_seed
from adrec.training.module import MONITOR, StageModule
from adrec.training.stages import quiet_lightning
from compress.every_prefix import represent_prefixes
from compress.technique import METRIC, CompressionError

STORED_LIMIT = 2**31
"""Most bytes of the teacher's answers that are kept in memory instead of being computed anew for every batch."""
_USERS_AT_A_TIME = 256


@dataclass(frozen=True)
class TaughtBatch:
    """A training batch and the teacher's answer to each of its prefixes `[M, D]`; None where none is asked for."""

    tokens: TokenBatch
    answers: Tensor | None

    def to(self, device: torch.device) -> TaughtBatch:
        """Move to a device."""
        return TaughtBatch(self.tokens.to(device), None if self.answers is None else self.answers.to(device))


class Lessons:
    """Training batches, with the teacher's answers where there is one to give them.

    Answers depend on the data, the teacher and the seed alone. longest: the ``max_length`` of the model. table: reverse
    steps the teacher answers with; None for a model without diffusion. stored: answer all prefixes once and keep the
    answers, ``tokens * D * 4`` bytes, instead of answering each batch; None: where that is at most 2 GiB.

    left_out: share of the items that each batch leaves out of its sequences. replaced: share of those that stay which
    give way to items of random interactions. Either makes histories that nobody had, which the teacher answers
    nonetheless; long sequences are windows from anywhere then instead of ends, and nothing is stored.
    """

    def __init__(
        self,
        sequences: Jagged,
        longest: int,
        teacher: SequenceModel | None = None,
        table: DiffusionTable | None = None,
        seed: int = 0,
        *,
        stored: bool | None = None,
        left_out: float = 0.0,
        replaced: float = 0.0,
    ) -> None:
        self.longest, self.teacher, self.table, self.seed = longest, teacher, table, seed
        self.whole, self.left_out, self.replaced = sequences, left_out, replaced
        self.sequences = sequences.tail(longest + 1)
        lengths = (self.sequences.lengths - 1).clamp(min=0)
        offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=offsets[1:])
        # The number of each prefix is its key in the noise and its place among the stored answers.
        self.prefixes = Jagged(torch.arange(int(offsets[-1])), offsets)
        self.answers: Tensor | None = None
        self.bytes = 0
        if teacher is not None:
            teacher.eval()
            self.bytes = self.prefixes.values.numel() * teacher.config.width * 4
            if not self.altered and (stored or (stored is None and self.bytes <= STORED_LIMIT)):
                self.answers = self._answer_all(teacher)

    @property
    def altered(self) -> bool:
        """Whether batches are of histories that nobody had."""
        return bool(self.left_out or self.replaced)

    def batch(self, users: Tensor, epoch: int = 0) -> TaughtBatch:
        """The sequences of some users (2 items or more each), sorted by length, with the answers."""
        if self.altered:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "altered", epoch, *users.tolist()))
            sequences = thinned(self.whole.select(users), self.longest + 1, self.left_out, generator)
            sequences = with_replacements(sequences, self.whole.values, self.replaced, generator)
            tokens = TokenBatch.from_sequences(sequences, self.longest)
            prefixes = torch.arange(tokens.layout.tokens)
            return TaughtBatch(tokens, None if self.teacher is None else self._answer(self.teacher, tokens, prefixes))
        users = users[torch.argsort(self.sequences.lengths[users], stable=True)]
        tokens = TokenBatch.from_sequences(self.sequences.select(users), self.longest)
        if self.teacher is None:
            return TaughtBatch(tokens, None)
        prefixes = self.prefixes.select(users).values
        kept = self.answers
        return TaughtBatch(tokens, self._answer(self.teacher, tokens, prefixes) if kept is None else kept[prefixes])

    def _answer_all(self, teacher: SequenceModel) -> Tensor:
        answers = torch.empty(self.prefixes.values.numel(), teacher.config.width)
        rows = UserRows(self.sequences).rows
        # Similar lengths together fill the attention's rectangles; the answers do not depend on the batch.
        rows = rows[torch.argsort(self.sequences.lengths[rows], stable=True)]
        for part in rows.split(_USERS_AT_A_TIME):
            tokens = TokenBatch.from_sequences(self.sequences.select(part), self.longest)
            prefixes = self.prefixes.select(part).values
            answers[prefixes] = self._answer(teacher, tokens, prefixes)
        return answers

    @torch.no_grad()
    def _answer(self, teacher: SequenceModel, tokens: TokenBatch, prefixes: Tensor) -> Tensor:
        noise = PhiloxNoise(self.seed, prefixes, teacher.config.width)
        return represent_prefixes(teacher, tokens, self.table, noise)


def thinned(sequences: Jagged, longest: int, left_out: float, generator: torch.Generator) -> Jagged:
    """A window of at most ``longest`` items from anywhere in each sequence, without a share of its items.

    The order of items stays. Each sequence needs 2 items or more and keeps 2 at least.
    """
    lengths = sequences.lengths
    spare = (lengths - longest).clamp(min=0)
    first = (torch.rand(len(sequences), generator=generator) * (spare + 1)).long()
    rows = sequences.rows
    place = torch.arange(rows.numel()) - sequences.offsets[:-1][rows] - first[rows]
    inside = (place >= 0) & (place < longest)
    draws = torch.rand(rows.numel(), generator=generator).masked_fill(~inside, -1.0)
    # The rank of a draw among those of its sequence: the two highest stay whatever is left out.
    order = torch.argsort(rows - draws.double() / 4.0, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel()) - sequences.offsets[:-1][rows]
    keep = inside & ((draws >= left_out) | (rank < 2))
    offsets = torch.zeros(len(sequences) + 1, dtype=torch.int64)
    torch.cumsum(torch.zeros_like(lengths).index_add_(0, rows, keep.long()), 0, out=offsets[1:])
    return Jagged(sequences.values[keep], offsets)


def with_replacements(sequences: Jagged, pool: Tensor, share: float, generator: torch.Generator) -> Jagged:
    """Sequences in which each item gives way, with probability ``share``, to a random one of ``pool`` `[P]` int64."""
    count = sequences.values.numel()
    chosen = torch.rand(count, generator=generator) < share
    drawn = pool[torch.randint(pool.numel(), (count,), generator=generator)]
    return Jagged(torch.where(chosen, drawn, sequences.values), sequences.offsets)


Objective = Callable[[SequenceModel, SequenceModel, TaughtBatch], Tensor]
"""Loss of a student on a batch, a scalar; the second model is the moving average of the student."""


class DistillationModule(StageModule):
    """Minimises an objective; validation, moving average, schedule and seeds are those of ordinary training."""

    def __init__(self, student: SequenceModel, lessons: Lessons, objective: Objective, **options: Any) -> None:
        super().__init__(student, **options)
        self.objective, self.lessons = objective, lessons

    def train_dataloader(self) -> Any:
        lessons = self.lessons
        rows = UserRows(lessons.sequences)
        seed, epoch = derive_seed(self.train_config.seed, self.stage), self.current_epoch
        batches = RandomBatches(len(rows), self.train_config.batch_size, seed, epoch)
        return DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=lambda users: lessons.batch(torch.tensor(users), epoch),
            num_workers=0,
        )

    def training_step(self, batch: Any, index: int) -> None:
        super().training_step(batch, index)

    def _losses(self, batch: Any) -> list[Tensor]:
        return [self.objective(self.model, self.kept_model, batch)]


class _Kept(Callback):
    """Keeps the weights with the best validation NDCG@20, those before training among them; or the last ones."""

    def __init__(self, model: SequenceModel, reached: float, last: bool, report: Callable[[str], None]) -> None:
        self.reached, self.last, self.report, self.epoch = reached, last, report, 0
        self.weights = copy.deepcopy(model.state_dict())

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, StageModule)
        found = float(trainer.callback_metrics[MONITOR])
        self.report(f"epoch {trainer.current_epoch + 1}: validation {METRIC} {found:.3f} %")
        if self.last or found > self.reached:
            self.reached, self.epoch = found, trainer.current_epoch + 1
            self.weights = copy.deepcopy(module.kept_model.state_dict())


class Fitted(NamedTuple):
    """What training reached. reached, before: validation NDCG@20 in percent, of the kept weights and before training.

    epoch: in which the kept weights were found, 0 for those before training. epochs: trained in all.
    """

    reached: float
    before: float
    epoch: int
    epochs: int


def fit(
    student: SequenceModel,
    dataset: Dataset,
    lessons: Lessons,
    objective: Objective,
    *,
    seed: int,
    batch_size: int,
    optimiser: OptimiserConfig,
    stage: str,
    frozen_epochs: int = 0,
    steps: Steps = 1,
    keep: Literal["best", "last"] = "best",
    report: Callable[[str], None] = lambda line: None,
) -> Fitted:
    """Train a student and leave the kept weights in it, in eval mode.

    keep: the best weights by validation NDCG@20, and stop when it no longer rises; or the last that were validated.
    frozen_epochs: epochs in which the item table stays as it is. steps: how validation samples a student with
    diffusion. Bit-reproducible on a CPU for a given seed and number of threads. Raises CompressionError
    where there is nothing to train or validate on, RunError when the loss stops being a number.
    """
    if not UserRows(lessons.sequences).rows.numel() or not len(dataset.examples("validation")):
        raise CompressionError(
            f"'{stage}' needs a user with 2 training interactions or more and a validation example; data set"
            f" '{dataset.name}' lacks one of them"
        )
    before = _validated(student, dataset, steps)
    module = DistillationModule(
        student.train(),
        lessons,
        objective,
        dataset=dataset,
        train=TrainConfig(seed=seed, batch_size=batch_size),
        optimiser=optimiser,
        stage=stage,
        frozen_epochs=frozen_epochs,
        validation_steps=steps,
    )
    kept = _Kept(student, before, keep == "last", report)
    callbacks: list[Callback] = [kept]
    if keep == "best":
        patience = optimiser.patience
        callbacks.append(EarlyStopping(MONITOR, mode="max", patience=patience, check_on_train_epoch_end=False))
    with quiet_lightning():
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=optimiser.epochs,
            check_val_every_n_epoch=min(optimiser.validate_every, optimiser.epochs),
            num_sanity_val_steps=0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            reload_dataloaders_every_n_epochs=1,
        )
        trainer.fit(module)
    student.load_state_dict(kept.weights)
    student.eval()
    student.zero_grad()
    return Fitted(kept.reached, before, kept.epoch, trainer.current_epoch)


def _validated(student: SequenceModel, dataset: Dataset, steps: Steps) -> float:
    engine = CachedEngine(student)
    taken = steps if isinstance(student, ADRec) else None
    return evaluate(engine, dataset.examples("validation"), steps=taken, bootstrap=1).metrics[METRIC].value
