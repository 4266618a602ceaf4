"""Fewer reverse steps by training: a copy of the model learns to reach in a few steps what it reaches in many.

progressive: one step of the copy does two of its teacher's, then it is the next teacher (Salimans & Ho, arXiv
2202.00512, x0-prediction). consistency: neighbouring noise levels of one trajectory of the teacher get one answer
(Song et al., arXiv 2303.01469). temporal: neighbouring levels of one item get one answer (TA-Rec, arXiv 2510.17245).
The teacher and the item table stay as they are; every position is taught as the last of a request (`every_prefix`).
Inputs are the item's row noised to a level drawn anew for each position. A distillation cannot be resumed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from adrec.config import ModelConfig, OptimiserConfig, ServingConfig
from adrec.losses import catalogue_cross_entropy
from adrec.models import ADRec, build_model
from adrec.models.base import SequenceModel, TokenBatch
from adrec.respacing import ddim_table, kept_times
from adrec.schedule import DiffusionTable
from compress.distillation import Fitted, Lessons, Objective, TaughtBatch, fit
from compress.distillation_losses import ddim_step, halving_target, level_weight, weighted_error
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


class StepDistillConfig(Technique):
    """Method, steps before and after, and training; ``optimiser.epochs`` bounds each halving of ``progressive``."""

    technique: Literal["distill"] = "distill"
    method: Literal["progressive", "consistency", "temporal"] = "progressive"
    steps: int = Field(1, ge=1, description="reverse steps of the result")
    teacher_steps: int | None = Field(
        None, ge=1, description="steps of the teacher: progressive takes steps times a power of 2; null: as many as fit"
    )
    start: Literal["noise", "zero"] | None = Field(
        None, description="x_T when served; zero is its mean and draws nothing; null: as the run is served"
    )
    temporal: float = Field(0.5, gt=0.0, description="weight of the temporal consistency; TA-Rec: 0.4 to 0.8")
    hard: float = Field(0.0, ge=0.0, description="weight of the cross-entropy with the real next item")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="while distilling, everywhere in the network")
    batch_size: int = Field(128, ge=1, description="users a step")
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=2e-4, average_decay=0.99, epochs=20, patience=3)

    @model_validator(mode="after")
    def _consistent(self) -> StepDistillConfig:
        if self.method == "consistency" and self.optimiser.average_decay == 0.0:
            raise ValueError("consistency needs the moving average as its target; set optimiser.average_decay above 0")
        if self.teacher_steps is not None and self.teacher_steps <= self.steps:
            raise ValueError(f"teacher_steps is {self.teacher_steps}; allowed: above steps, which is {self.steps}")
        ratio = (self.teacher_steps or 1) // self.steps
        if self.method == "progressive" and self.teacher_steps and self.teacher_steps != self.steps * _power(ratio):
            raise ValueError(
                f"teacher_steps is {self.teacher_steps}; allowed for progressive: {self.steps} times 2, 4, 8, ..."
            )
        return self


def apply(draft: Draft, config: StepDistillConfig) -> Receipt:
    """Distil the draft's model to fewer reverse steps and serve it with them; skipped for one without diffusion.

    It is served by deterministic DDIM, which it is taught; start, if not said, and early_stop stay as they were.
    Raises CompressionError for a model whose steps cannot be distilled, RunError without data or where training
    diverges.
    """
    teacher = draft.model
    before, parameters = stored_bytes(teacher), parameter_count(teacher)
    receipt = Receipt(
        settings=config.model_dump(mode="json"),
        bytes_before=before,
        bytes_after=before,
        parameters_before=parameters,
        parameters_after=parameters,
    )
    if not isinstance(teacher, ADRec):
        why = f"a '{teacher.config.model}' model has none"
        return receipt.model_copy(update={"skipped": (Skip(what="reverse steps", why=why),)})
    dataset = draft.require_dataset(config.technique)
    require_trainable(draft.model, config.technique)
    plans = step_plans(teacher.config, config)
    lessons = Lessons(dataset.training_sequences(), teacher.config.max_length)
    student: SequenceModel = teacher
    changes = []
    for plan in plans:
        taught_by = copy.deepcopy(student).eval()
        student = _copy_for_training(taught_by, config.dropout)
        fitted = fit(
            student,
            dataset,
            lessons,
            _objective(taught_by, plan, config),
            seed=draft.seed,
            batch_size=config.batch_size,
            optimiser=config.optimiser,
            stage=f"{config.technique}-{len(plan.student_times)}",
            frozen_epochs=ALWAYS,
            steps=_serving(draft, plan, config),
            report=partial(_report, draft, plan),
        )
        changes.append(_change(plan, fitted))
    served = build_model(_unguided(teacher.config))
    served.load_state_dict(student.state_dict())
    draft.model = served.eval()
    serving = _serving(draft, plans[-1], config)
    draft.settings = draft.settings.model_copy(update={"model": served.config, "serving": serving})
    return receipt.model_copy(update={"changed": tuple(changes)})


@dataclass(frozen=True)
class StepPlan:
    """One training: trained steps the teacher takes, rising, and those the result is served with."""

    teacher_times: tuple[int, ...]
    student_times: tuple[int, ...]


def step_plans(model: ModelConfig, config: StepDistillConfig) -> tuple[StepPlan, ...]:
    """The trainings of a distillation in order; raises CompressionError for a model or steps that do not fit."""
    trained = model.timesteps
    if model.geodesic:
        raise CompressionError(
            "a geodesic model's noise walks on the unit sphere, where a deterministic step is no weighted sum; its"
            " steps cannot be distilled"
        )
    fewest = 2 * config.steps if config.method == "progressive" else config.steps + 1
    if fewest > trained:
        raise CompressionError(
            f"steps is {config.steps}; allowed for {config.method}: 1 to"
            f" {trained // 2 if config.method == 'progressive' else trained - 1} (the model was trained with {trained})"
        )
    if config.teacher_steps is not None and config.teacher_steps > trained:
        raise CompressionError(f"teacher_steps is {config.teacher_steps}; allowed: up to {trained}, the steps trained")
    if config.method != "progressive":
        teacher = _times(trained, config.teacher_steps or trained)
        return (StepPlan(teacher, _times(trained, config.steps)),)
    times = _times(trained, config.teacher_steps or config.steps * _power(trained // config.steps))
    plans = []
    while len(times) > config.steps:
        # The noisier of each two steps starts the one that replaces both.
        plans.append(StepPlan(times, times[1::2]))
        times = times[1::2]
    return tuple(plans)


class Levels:
    """Noise levels of a table above a clean one.

    signal, noise: `[S + 1]`, sqrt(abar) and sqrt(1 - abar), 1 and 0 first. Row i of the table is level i + 1, and one
    step of row i leads to level i.
    """

    def __init__(self, table: DiffusionTable) -> None:
        self.time = table.time
        self.signal = torch.cat([torch.ones(1), table.signal])
        self.noise = torch.cat([torch.zeros(1), table.noise])

    def at(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise `[M, 1]` of levels `[M]` int64."""
        return self.signal[level, None], self.noise[level, None]

    def noised(self, clean: Tensor, gaussian: Tensor, level: Tensor) -> Tensor:
        """Rows `[M, D]` noised to levels `[M]`."""
        signal, noise = self.at(level)
        return signal * clean + noise * gaussian

    def step(self, x_t: Tensor, x0_hat: Tensor, level: Tensor, to: Tensor) -> Tensor:
        """Deterministic step of rows `[M, D]` between levels `[M]`."""
        return ddim_step(x_t, x0_hat, *self.at(level), *self.at(to))


def progressive_loss(teacher: ADRec, table: DiffusionTable, hard: float = 0.0) -> Objective:
    """One step of the student against two of the teacher, which takes the 2 S rows of ``table``."""
    levels = Levels(table)

    def loss(student: SequenceModel, average: SequenceModel, batch: TaughtBatch) -> Tensor:
        tokens = batch.tokens
        clean = teacher.clean_target(tokens.targets).detach()
        start = 2 * torch.randint(table.steps // 2, tokens.targets.shape) + 2
        x_t = levels.noised(clean, torch.randn_like(clean), start)
        with torch.no_grad():
            denoise = every_prefix(teacher, tokens)
            x_middle = levels.step(x_t, denoise(x_t, levels.time[start - 1]), start, start - 1)
            x_end = levels.step(x_middle, denoise(x_middle, levels.time[start - 2]), start - 1, start - 2)
            goal = halving_target(x_t, x_end, *levels.at(start), *levels.at(start - 2))
        x0_hat = _denoise(student, tokens, x_t, levels.time[start - 1])
        return weighted_error(x0_hat, goal, level_weight(*levels.at(start))) + _hard(x0_hat, student, tokens, hard)

    return loss


def consistency_loss(teacher: ADRec, table: DiffusionTable, hard: float = 0.0) -> Objective:
    """The student at one level against its moving average one step of the teacher further down.

    At the lowest level that step ends at a clean row, the teacher's x0_hat, which is the boundary condition: no output
    is mixed with its input.
    """
    levels = Levels(table)

    def loss(student: SequenceModel, average: SequenceModel, batch: TaughtBatch) -> Tensor:
        tokens = batch.tokens
        clean = teacher.clean_target(tokens.targets).detach()
        start = torch.randint(table.steps, tokens.targets.shape) + 1
        x_t = levels.noised(clean, torch.randn_like(clean), start)
        with torch.no_grad():
            x_below = levels.step(x_t, every_prefix(teacher, tokens)(x_t, levels.time[start - 1]), start, start - 1)
            below = _denoise(average.eval(), tokens, x_below, levels.time[(start - 2).clamp(min=0)])
            goal = torch.where((start == 1)[:, None], x_below, below)
        x0_hat = _denoise(student, tokens, x_t, levels.time[start - 1])
        return weighted_error(x0_hat, goal) + _hard(x0_hat, student, tokens, hard)

    return loss


def temporal_loss(teacher: ADRec, table: DiffusionTable, weight: float, hard: float = 0.0) -> Objective:
    """``MSE(f(x_t, t), teacher's x0_hat at x_t) + weight MSE(f(x_t, t), f(x_s, s))``, s the level below t.

    Both inputs are one item's row with one noise. TA-Rec's first term is the error to that row itself, for a model
    trained from scratch; with a frozen teacher it is the error to the teacher's answer. Gradients reach both answers.
    """
    levels = Levels(table)

    def loss(student: SequenceModel, average: SequenceModel, batch: TaughtBatch) -> Tensor:
        tokens = batch.tokens
        clean = teacher.clean_target(tokens.targets).detach()
        start = torch.randint(table.steps - 1, tokens.targets.shape) + 2
        gaussian = torch.randn_like(clean)
        x_t, x_below = levels.noised(clean, gaussian, start), levels.noised(clean, gaussian, start - 1)
        with torch.no_grad():
            goal = every_prefix(teacher, tokens)(x_t, levels.time[start - 1])
        assert isinstance(student, ADRec)
        denoise = every_prefix(student, tokens)
        x0_hat, below = denoise(x_t, levels.time[start - 1]), denoise(x_below, levels.time[start - 2])
        parts = weighted_error(x0_hat, goal) + weight * weighted_error(x0_hat, below)
        return parts + _hard(x0_hat, student, tokens, hard)

    return loss


def _denoise(model: SequenceModel, tokens: TokenBatch, x_t: Tensor, time: Tensor) -> Tensor:
    assert isinstance(model, ADRec)
    return every_prefix(model, tokens)(x_t, time)


def _hard(x0_hat: Tensor, student: SequenceModel, tokens: TokenBatch, weight: float) -> Tensor | float:
    return weight * catalogue_cross_entropy(x0_hat, student.table, tokens.targets) if weight else 0.0


def _objective(teacher: SequenceModel, plan: StepPlan, config: StepDistillConfig) -> Objective:
    assert isinstance(teacher, ADRec)
    table = ddim_table(teacher.betas, plan.teacher_times)
    if config.method == "progressive":
        return progressive_loss(teacher, table, config.hard)
    if config.method == "consistency":
        return consistency_loss(teacher, table, config.hard)
    return temporal_loss(teacher, table, config.temporal, config.hard)


def _copy_for_training(model: SequenceModel, dropout: float) -> SequenceModel:
    """The same weights in a network with other dropout; guidance, if any, is left to the teacher."""
    shape = _unguided(model.config).model_copy(update={"dropout": dropout, "embedding_dropout": dropout})
    student = build_model(shape)
    student.load_state_dict(model.state_dict())
    return student


def _unguided(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"guidance_scale": 1.0})


def _serving(draft: Draft, plan: StepPlan, config: StepDistillConfig) -> ServingConfig:
    before = draft.settings.serving or ServingConfig()
    return ServingConfig(
        sampler="ddim",
        times=plan.student_times,
        start=config.start or before.start,
        early_stop=before.early_stop,
    )


def _times(trained: int, steps: int) -> tuple[int, ...]:
    return tuple(int(time) for time in kept_times(trained, steps, "uniform"))


def _power(ratio: int) -> int:
    """The largest power of 2 up to ratio, at least 2."""
    return max(2, 1 << (max(1, ratio).bit_length() - 1))


def _report(draft: Draft, plan: StepPlan, line: str) -> None:
    draft.report(f"distill to {len(plan.student_times)}: {line}")


def _change(plan: StepPlan, fitted: Fitted) -> Change:
    return Change(
        what="reverse steps",
        before=f"{len(plan.teacher_times)}",
        after=f"{len(plan.student_times)} (trained steps {', '.join(map(str, plan.student_times))})",
        detail={
            "epochs": fitted.epochs,
            "best_epoch": fitted.epoch,
            "validation_ndcg_20_before": fitted.before,
            "validation_ndcg_20": fitted.reached,
        },
    )
