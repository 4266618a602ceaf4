"""A smaller network taught by the run's own: fewer blocks, a narrower width, another item table.

A student without denoiser blocks is a SASRec-shaped network, and serving it costs one pass of that. One with them stays
an ADRec and is served with one reverse step; 1 + 1 blocks then cost what SASRec's two cost. Distillation of rankings:
Hinton et al. (arXiv 1503.02531). A distillation is short and cannot be resumed.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from adrec.config import ModelConfig, OptimiserConfig, Positions, RunConfig, ServingConfig
from adrec.losses import catalogue_cross_entropy
from adrec.models import ADRec, build_model
from adrec.models.base import SequenceModel
from adrec.models.layers import Block, CausalTransformer
from adrec.respacing import kept_times, sampling_table
from adrec.training.batches import derive_seed
from compress.distillation import Lessons, Objective, TaughtBatch, fit
from compress.distillation_losses import catalogue_sample, listwise_loss, ranking_divergence, weighted_error
from compress.every_prefix import every_prefix
from compress.technique import (
    Change,
    CompressionError,
    Draft,
    Receipt,
    Skip,
    Technique,
    parameter_count,
    require_trainable,
    stored_bytes,
)

ALWAYS = 2**31
_OVERRIDES = ("heads", "positions", "dropout", "embedding_dropout")
_TABLES = {"kept": "kept", "projected": "projected onto its principal axes", "relearned": "relearned"}


class StudentConfig(Technique):
    """Shape of the student, its item table, its losses and its training.

    The loss is ``reconstruction MSE(x0_hat, teacher's) + ranking (KL or listwise) + hard CE``. By default the student
    only matches its teacher, on histories altered at random, without dropout and for many epochs (function matching,
    Beyer et al., arXiv 2106.05237): taught on the users' own histories it fits those within a few epochs and then
    drifts from the teacher on others.
    """

    technique: Literal["student"] = "student"
    encoder_blocks: int = Field(2, ge=1)
    denoiser_blocks: int = Field(0, ge=0, description="0: no diffusion is left, the student is a SASRec-shaped network")
    width: int | None = Field(None, ge=2, description="null: the teacher's")
    heads: int | None = Field(None, ge=1, description="null: the teacher's")
    positions: Positions | None = Field(None, description="null: the teacher's")
    dropout: float | None = Field(
        0.0, ge=0.0, lt=1.0, description="altered histories regularise instead; null: the teacher's"
    )
    embedding_dropout: float | None = Field(0.0, ge=0.0, lt=1.0, description="likewise")
    table: Literal["kept", "projected", "relearned"] = Field(
        "kept", description="projected: onto its principal axes, for a narrower student; relearned: from random rows"
    )
    frozen_epochs: int | None = Field(
        None, ge=0, description="epochs in which a kept or projected table does not change; null: all"
    )
    initial_blocks: Literal["teacher", "random"] = Field(
        "teacher", description="teacher: evenly spaced ones of its blocks, where the width is the same"
    )
    reconstruction: float = Field(1.0, ge=0.0, description="weight of the squared error to the teacher's x0_hat")
    ranking: float = Field(1.0, ge=0.0, description="weight of the distance between rankings")
    ranking_loss: Literal["divergence", "listwise"] = "divergence"
    temperature: float = Field(1.0, gt=0.0, description="of the divergence")
    places: int = Field(20, ge=1, description="first places that the listwise loss orders")
    hard: float = Field(0.0, ge=0.0, description="weight of the cross-entropy with the real next item")
    catalogue_sample: int | None = Field(
        4096, ge=1, description="items, besides a batch's targets, that rankings are compared on; null: all"
    )
    teacher_steps: int = Field(1, ge=1, description="reverse steps the teacher answers with: DDIM from zero noise")
    answers: Literal["auto", "stored", "computed"] = Field(
        "auto", description="stored: once, tokens x D x 4 bytes; computed: for every batch; auto: stored up to 2 GiB"
    )
    left_out: float = Field(
        0.2, ge=0.0, lt=1.0, description="share of a history's items that a batch leaves out; answers are computed then"
    )
    replaced: float = Field(
        0.2, ge=0.0, lt=1.0, description="share of those that stay which give way to items of random interactions"
    )
    weights: Literal["last", "best"] = Field(
        "last", description="best: by validation NDCG@20, stopping when it no longer rises, as overfitting asks for"
    )
    batch_size: int = Field(128, ge=1, description="users a step")
    optimiser: OptimiserConfig = OptimiserConfig(epochs=60, cosine_epochs=60, validate_every=3)

    @model_validator(mode="after")
    def _consistent(self) -> StudentConfig:
        if self.reconstruction == self.ranking == self.hard == 0.0:
            raise ValueError("reconstruction, ranking and hard are all 0; give one of them a weight above 0")
        if self.width is not None and self.width % 2:
            raise ValueError(f"width is {self.width}; allowed: even numbers from 2 on")
        if self.answers == "stored" and (self.left_out or self.replaced):
            raise ValueError(
                f"answers are stored, but left_out is {self.left_out} and replaced is {self.replaced}: such histories"
                " are new in every batch; set answers to auto or computed, or both to 0"
            )
        if self.hard and self.replaced:
            raise ValueError(
                f"hard is {self.hard}, but replaced is {self.replaced}: what comes next in such a history is"
                " no user's choice; set one of them to 0"
            )
        if self.table == "relearned" and self.frozen_epochs is not None:
            raise ValueError("frozen_epochs is set, but a relearned table must change; leave it out")
        return self


def apply(draft: Draft, config: StudentConfig) -> Receipt:
    """Train a student of the draft's model and put it in its place.

    Raises CompressionError where the shape is no reduction, a loss cannot be computed for it or an earlier stage has
    changed the network; RunError without data or where training diverges.
    """
    dataset = draft.require_dataset(config.technique)
    require_trainable(draft.model, config.technique)
    if not same_weights(draft.model, draft.teacher):
        raise CompressionError(
            "'student' is taught by the run's own network, but an earlier stage has changed that network or its item"
            " table; put 'student' first in the recipe"
        )
    teacher = draft.teacher
    shape = student_config(teacher.config, config)
    axes = principal_axes(teacher.table.detach(), shape.width) if config.table == "projected" else None
    student = initial_student(teacher, shape, config, axes, draft.seed)
    plan = None
    if isinstance(teacher, ADRec):
        times = kept_times(teacher.config.timesteps, config.teacher_steps, "uniform")
        plan = sampling_table(teacher.betas, ServingConfig(sampler="ddim", times=tuple(times), start="zero"))
    stored = {"auto": None, "stored": True, "computed": False}[config.answers]
    sequences, longest = dataset.training_sequences(), teacher.config.max_length
    altered = {"left_out": config.left_out, "replaced": config.replaced}
    lessons = Lessons(sequences, longest, teacher, plan, draft.seed, stored=stored, **altered)
    where = "computed for every batch" if lessons.answers is None else "stored"
    prefixes = lessons.prefixes.values.numel()
    draft.report(f"student: {prefixes:,} answers of the teacher, {lessons.bytes / 2**20:.1f} MiB, {where}")
    serving = ServingConfig(sampler="ddim", times=(shape.timesteps - 1,)) if isinstance(student, ADRec) else None
    frozen = 0 if config.table == "relearned" else ALWAYS if config.frozen_epochs is None else config.frozen_epochs
    fitted = fit(
        student,
        dataset,
        lessons,
        taught_loss(teacher.table.detach(), axes, config),
        seed=draft.seed,
        batch_size=config.batch_size,
        optimiser=config.optimiser,
        stage=config.technique,
        frozen_epochs=frozen,
        steps=serving,
        keep=config.weights,
        report=lambda line: draft.report(f"student: {line}"),
    )
    receipt = Receipt(
        settings=config.model_dump(mode="json"),
        changed=(
            Change(
                what="network",
                before=_describe(teacher.config),
                after=_describe(shape),
                detail={"epochs": fitted.epochs, "kept_epoch": fitted.epoch, "validation_ndcg_20": fitted.reached},
            ),
            Change(what="item table", before="the run's", after=_TABLES[config.table] + _tuned(frozen)),
        ),
        skipped=_skipped(teacher.config, shape, config),
        bytes_before=stored_bytes(draft.model),
        bytes_after=stored_bytes(student),
        parameters_before=parameter_count(draft.model),
        parameters_after=parameter_count(student),
    )
    draft.model = student
    draft.settings = RunConfig(model=shape, train=draft.settings.train, serving=serving)
    return receipt


def same_weights(first: SequenceModel, second: SequenceModel) -> bool:
    """Whether two models have equal configurations and bit-equal weights."""
    ours, theirs = first.state_dict(), second.state_dict()
    return (
        first.config == second.config
        and ours.keys() == theirs.keys()
        and all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)
    )


def student_config(teacher: ModelConfig, config: StudentConfig) -> ModelConfig:
    """The student's configuration; raises CompressionError for a shape that is no reduction of the teacher's."""
    blocks = blocks_of(teacher)
    wanted = config.encoder_blocks + config.denoiser_blocks
    if wanted > blocks:
        raise CompressionError(
            f"a student of {config.encoder_blocks} + {config.denoiser_blocks} blocks has more than its teacher;"
            f" allowed: {blocks} in all"
        )
    if config.denoiser_blocks and teacher.model != "adrec":
        raise CompressionError(
            f"denoiser_blocks is {config.denoiser_blocks}, but the teacher is a '{teacher.model}' model and has no"
            " denoiser; set denoiser_blocks 0"
        )
    width = teacher.width if config.width is None else config.width
    if width > teacher.width:
        raise CompressionError(f"width is {width}; allowed: up to the teacher's {teacher.width}")
    if config.table == "kept" and width != teacher.width:
        raise CompressionError(
            f"width is {width}, but the teacher's table, {teacher.width} wide, is kept; set table to projected or"
            " relearned"
        )
    if config.table == "projected" and width == teacher.width:
        raise CompressionError(f"table is projected, but width is the teacher's {width}; set a smaller width, or kept")
    if config.table == "relearned" and width != teacher.width and config.reconstruction:
        raise CompressionError(
            f"reconstruction is {config.reconstruction}, but a relearned table of width {width} shares no space with"
            f" the teacher's of {teacher.width}; set reconstruction 0, or table projected"
        )
    changed: dict[str, Any] = {"encoder_blocks": config.encoder_blocks, "width": width}
    changed |= {name: getattr(config, name) for name in _OVERRIDES if getattr(config, name) is not None}
    if config.denoiser_blocks:
        changed["denoiser_blocks"] = config.denoiser_blocks
    else:
        changed |= {"model": "sasrec", "condition_dropout": 0.0, "guidance_scale": 1.0}
    try:
        return ModelConfig.model_validate(teacher.model_dump() | changed)
    except ValidationError as error:
        reasons = "; ".join(issue["msg"].removeprefix("Value error, ") for issue in error.errors())
        raise CompressionError(f"no such student: {reasons}") from None


def blocks_of(config: ModelConfig) -> int:
    """Transformer blocks of a model in all."""
    return config.encoder_blocks + (config.denoiser_blocks if _has_attention(config) else 0)


def principal_axes(table: Tensor, width: int) -> Tensor:
    """Orthonormal directions `[D, width]` in which the rows 1..N of a table vary most.

    Rows are centred: their mean adds the same to the score of every item, and so ranks none.
    """
    rows = table[1:].double()
    _, _, axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    if axes.shape[0] < width:
        raise CompressionError(f"width is {width}; a table of {rows.shape[0]} items has {axes.shape[0]} axes at most")
    # A singular vector's sign is arbitrary: its largest element is made positive.
    axes = axes[:width]
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return (axes * signs).T.to(table.dtype).contiguous()


def initial_student(
    teacher: SequenceModel, shape: ModelConfig, config: StudentConfig, axes: Tensor | None, seed: int
) -> SequenceModel:
    """A student before training: random, but for the item table and what it takes over from the teacher."""
    torch.manual_seed(derive_seed(seed, config.technique, "weights"))
    student = build_model(shape)
    with torch.no_grad():
        if axes is not None:
            rows = teacher.table[1:]
            student.table[1:] = (rows - rows.mean(0)) @ axes
        elif config.table == "kept":
            student.table.copy_(teacher.table)
        if config.initial_blocks == "teacher" and _same_shape(teacher.config, shape):
            _take_over(student, teacher)
    return student


def taught_loss(table: Tensor, axes: Tensor | None, config: StudentConfig) -> Objective:
    """The loss of a student on a `TaughtBatch`. table: the teacher's `[N + 1, D]`. axes: see `principal_axes`."""

    def loss(student: SequenceModel, average: SequenceModel, batch: TaughtBatch) -> Tensor:
        answers = batch.answers
        assert answers is not None
        targets = batch.tokens.targets
        rows = answer(student, batch)
        parts = []
        if config.reconstruction:
            goal = answers if axes is None else answers @ axes
            parts.append(config.reconstruction * weighted_error(rows, goal))
        if config.ranking:
            sample = catalogue_sample(targets, table.shape[0] - 1, config.catalogue_sample)
            own, theirs = (each[1:] if sample is None else each[sample] for each in (student.table, table))
            parts.append(config.ranking * _between(rows @ own.T, answers @ theirs.T, config))
        if config.hard:
            parts.append(config.hard * catalogue_cross_entropy(rows, student.table, targets))
        return torch.stack(parts).sum()

    return loss


def answer(student: SequenceModel, batch: TaughtBatch) -> Tensor:
    """A student's representation of every prefix `[M, D]`, as it is served: in one step from noise, or none."""
    if not isinstance(student, ADRec):
        return student(batch.tokens)
    time = batch.tokens.targets.new_tensor(student.config.timesteps - 1)
    x_t = torch.randn(batch.tokens.layout.tokens, student.config.width, device=student.table.device)
    return every_prefix(student, batch.tokens)(x_t, time)


def _between(student_scores: Tensor, teacher_scores: Tensor, config: StudentConfig) -> Tensor:
    if config.ranking_loss == "listwise":
        return listwise_loss(student_scores, teacher_scores, config.places)
    return ranking_divergence(student_scores, teacher_scores, config.temperature)


def _take_over(student: SequenceModel, teacher: SequenceModel) -> None:
    """Copy evenly spaced blocks of the teacher, first and last among them, and everything else of the same shape."""
    ours, theirs = _blocks(student), _blocks(teacher)
    places = torch.linspace(0, len(theirs) - 1, len(ours)).round().int().tolist()
    for block, place in zip(ours, places, strict=True):
        block.load_state_dict(theirs[place].state_dict())
    own = student.state_dict()
    for name, value in teacher.state_dict().items():
        elsewhere = ".blocks." in name or name == "item_embedding.weight"
        if not elsewhere and name in own and own[name].shape == value.shape:
            own[name].copy_(value)


def _blocks(model: SequenceModel) -> list[Block]:
    blocks = list(model.encoder)
    if isinstance(model, ADRec) and isinstance(model.denoiser, CausalTransformer):
        blocks += list(model.denoiser)
    return blocks


def _has_attention(config: ModelConfig) -> bool:
    return config.model == "adrec" and config.denoiser == "att"


def _same_shape(teacher: ModelConfig, shape: ModelConfig) -> bool:
    return (teacher.width, teacher.heads) == (shape.width, shape.heads)


def _skipped(teacher: ModelConfig, shape: ModelConfig, config: StudentConfig) -> tuple[Skip, ...]:
    if config.initial_blocks == "random" or _same_shape(teacher, shape):
        return ()
    why = f"they are {teacher.width} wide with {teacher.heads} heads, the student's {shape.width} with {shape.heads}"
    return (Skip(what="starting from the teacher's blocks", why=why),)


def _describe(config: ModelConfig) -> str:
    denoiser = str(config.denoiser_blocks if _has_attention(config) else "mlp") if config.model == "adrec" else "0"
    return f"{config.model}, {config.encoder_blocks} + {denoiser} blocks, {config.width} wide"


def _tuned(frozen: int) -> str:
    return "" if frozen == ALWAYS else f", trained from epoch {frozen} on"
