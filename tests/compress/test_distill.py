"""Step distillation: plans, losses with known answers, tiny trainings, and what is refused or skipped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation_cases import batch_of, constant_denoiser, draft_of, same, short, weights
from pydantic import ValidationError

from adrec.checkpoint import load_run, save_run
from adrec.config import EarlyStop, ModelConfig, ServingConfig
from adrec.data.dataset import Dataset
from adrec.errors import RunError
from adrec.models import ADRec
from adrec.models.base import SequenceModel
from adrec.noise import ExplicitNoise
from adrec.respacing import ddim_table
from compress.api import compress_
from compress.distill import (
    Levels,
    StepDistillConfig,
    apply,
    consistency_loss,
    progressive_loss,
    step_plans,
    temporal_loss,
)
from compress.distillation import Objective, TaughtBatch
from compress.every_prefix import every_prefix, represent_prefixes
from compress.item_table import ItemTableConfig
from compress.technique import CompressionError

METHODS = ("progressive", "consistency", "temporal")
TINY = {"max_length": 12, "timesteps": 8, "schedule": "sqrt", "lambda_uncertainty": 1.0, "dropout": 0.1}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def teacher(tiny_model: Any) -> SequenceModel:
    """An ADRec whose answer depends much on its noisy input: random weights, lambda 1, 8 steps."""
    return tiny_model(**TINY)


def test_plans_halve_and_keep_the_noisier_of_each_two_steps() -> None:
    model = ModelConfig(items=40, width=16, heads=2)
    plans = step_plans(model, StepDistillConfig(steps=1))
    assert [len(plan.student_times) for plan in plans] == [16, 8, 4, 2, 1]
    assert plans[0].teacher_times == tuple(range(32))
    assert plans[-2].student_times == (15, 31)
    assert plans[-1].student_times == (31,)
    for before, after in pairwise(plans):
        assert after.teacher_times == before.student_times
    # 3 steps come from 24 of 32; 4 asked of 2 is one halving.
    assert [len(plan.teacher_times) for plan in step_plans(model, StepDistillConfig(steps=3))] == [24, 12, 6]
    assert len(step_plans(model, StepDistillConfig(steps=2, teacher_steps=4))) == 1
    (plan,) = step_plans(model, StepDistillConfig(steps=2, method="consistency"))
    assert (len(plan.teacher_times), plan.student_times) == (32, (0, 31))


def test_levels_start_clean(teacher: ADRec) -> None:
    table = ddim_table(teacher.betas, (1, 5))
    levels = Levels(table)
    assert levels.signal.tolist() == [1.0, *table.signal.tolist()]
    assert levels.noise.tolist() == [0.0, *table.noise.tolist()]
    clean, gaussian = torch.randn(3, 16), torch.randn(3, 16)
    level = torch.tensor([0, 1, 2])
    noised = levels.noised(clean, gaussian, level)
    torch.testing.assert_close(noised[0], clean[0])
    torch.testing.assert_close(noised[2], table.signal[1] * clean[2] + table.noise[1] * gaussian[2])
    # A step with the true row follows the same noise down, as DDIM's own coefficients do.
    lower = levels.step(noised[2:], clean[2:], level[2:], level[1:2])
    torch.testing.assert_close(lower, levels.noised(clean[2:], gaussian[2:], level[1:2]))
    torch.testing.assert_close(lower, table.from_x0[1] * clean[2:] + table.from_xt[1] * noised[2:])


@torch.no_grad()
def test_losses_of_models_that_always_answer_the_same(tiny_model: Any) -> None:
    """A teacher of a, a student of b and an average of c: every loss is known whatever is drawn."""
    base = tiny_model(**TINY, denoiser="mlp")
    teacher, student, average = (constant_denoiser(base, value) for value in (1.0, 1.5, 3.5))
    batch = TaughtBatch(batch_of(), None)
    two = ddim_table(teacher.betas, (2, 6))
    weight = max(1.0, float(two.signal[1] / two.noise[1]) ** 2)
    assert float(progressive_loss(teacher, two)(student, average, batch)) == pytest.approx(weight * 0.25, rel=1e-4)
    assert float(progressive_loss(teacher, two)(teacher, average, batch)) == pytest.approx(0.0, abs=1e-8)
    one = ddim_table(teacher.betas, (6,))
    assert float(consistency_loss(teacher, one)(student, average, batch)) == pytest.approx(0.25, rel=1e-5)
    torch.manual_seed(3)
    tokens = batch.tokens.layout.tokens
    lowest = int((torch.randint(2, (tokens,)) == 0).sum())
    torch.manual_seed(3)
    clean_drawn_after = consistency_loss(teacher, two)(student, average, batch)
    expected = (0.25 * lowest + 4.0 * (tokens - lowest)) / tokens
    assert float(clean_drawn_after) == pytest.approx(expected, rel=1e-4)
    assert float(temporal_loss(teacher, two, 0.5)(student, average, batch)) == pytest.approx(0.25, rel=1e-5)
    hard = torch.nn.functional.cross_entropy(torch.full((tokens, 16), 1.5) @ student.table.T, batch.tokens.targets)
    with_hard = temporal_loss(teacher, two, 0.5, hard=2.0)(student, average, batch)
    assert float(with_hard) == pytest.approx(0.25 + 2.0 * float(hard), rel=1e-5)


@torch.no_grad()
def test_temporal_loss_weighs_the_distance_between_neighbouring_levels(teacher: ADRec) -> None:
    table = ddim_table(teacher.betas, range(8))
    batch = TaughtBatch(batch_of(), None)
    found = []
    for weight in (1e-9, 1.0, 3.0):
        torch.manual_seed(0)
        found.append(float(temporal_loss(teacher, table, weight)(teacher, teacher, batch)))
    # The teacher agrees with itself, so that only the second term is left.
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert found[2] == pytest.approx(3 * found[1], rel=1e-5)
    assert found[1] > 1e-3


def test_gradients_reach_the_student_only(teacher: ADRec, tiny_model: Any) -> None:
    student, average = tiny_model(**TINY, seed=1), tiny_model(**TINY, seed=2)
    table = ddim_table(teacher.betas, range(8))
    for loss in (
        progressive_loss(teacher, table),
        consistency_loss(teacher, table),
        temporal_loss(teacher, table, 0.5),
    ):
        loss(student, average, TaughtBatch(batch_of(), None)).backward()
        assert float(student.denoiser.blocks[0].attention.qkv.weight.grad.abs().max()) > 0.0
        student.zero_grad()
        assert all(parameter.grad is None for model in (teacher, average) for parameter in model.parameters())


def trained_on(loss: Objective, teacher: ADRec, batch: TaughtBatch) -> ADRec:
    """A copy of the teacher after some steps on one batch, its item table as it was."""
    student = copy.deepcopy(teacher)
    trained = [parameter for parameter in student.parameters() if parameter is not student.table]
    optimiser = torch.optim.Adam(trained, lr=3e-3)
    torch.manual_seed(0)
    for _ in range(80):
        optimiser.zero_grad()
        loss(student, copy.deepcopy(student), batch).backward()
        optimiser.step()
    return student


@pytest.mark.parametrize("objective", [progressive_loss, consistency_loss])
def test_one_step_comes_nearer_to_two(objective: Callable[..., Objective], teacher: ADRec) -> None:
    """Of the deterministic two-step answer from the same noise, the copy's one step misses less than the teacher's."""
    batch = TaughtBatch(batch_of(), None)
    one, two = (ddim_table(teacher.betas, times) for times in ((7,), (4, 7)))
    student = trained_on(objective(teacher, two), teacher, batch)
    noise = ExplicitNoise(torch.randn(3, batch.tokens.layout.tokens, 16))
    with torch.no_grad():
        many = represent_prefixes(teacher, batch.tokens, two, noise)
        taught, untaught = (represent_prefixes(model, batch.tokens, one, noise) for model in (student, teacher))
    assert float((taught - many).square().mean()) < 0.8 * float((untaught - many).square().mean())


def test_temporal_consistency_brings_neighbouring_levels_together(teacher: ADRec) -> None:
    batch, table = TaughtBatch(batch_of(), None), ddim_table(teacher.betas, (1, 4, 7))
    student = trained_on(temporal_loss(teacher, table, 2.0), teacher, batch)
    clean, gaussian = teacher.clean_target(batch.tokens.targets).detach(), torch.randn(batch.tokens.layout.tokens, 16)
    apart = []
    for model in (student, teacher):
        with torch.no_grad():
            denoise = every_prefix(model, batch.tokens)
            answers = [
                denoise(table.signal[row] * clean + table.noise[row] * gaussian, table.time[row]) for row in (2, 1)
            ]
        apart.append(float((answers[0] - answers[1]).square().mean()))
    assert apart[0] < 0.5 * apart[1]


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_a_run_served_with_fewer_steps(
    method: str, teacher: ADRec, tiny_dataset: Dataset, tmp_path: Path
) -> None:
    draft = draft_of(teacher, tiny_dataset)
    before = weights(draft.teacher)
    receipt = apply(draft, StepDistillConfig(method=method, batch_size=32, optimiser=short(1)))
    assert same(weights(draft.teacher), before)
    assert torch.equal(draft.model.table, teacher.table)
    assert draft.model.config == teacher.config
    assert draft.settings.serving == ServingConfig(sampler="ddim", times=(7,))
    assert [change.before for change in receipt.changed] == (["8", "4", "2"] if method == "progressive" else ["8"])
    save_run(tmp_path, draft.settings, draft.model, tiny_dataset, "data", {})
    run = load_run(tmp_path)
    assert run.settings == draft.settings
    assert same(weights(run.model), weights(draft.model))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(method: str, teacher: ADRec, tiny_dataset: Dataset) -> None:
    def train(seed: int) -> dict[str, torch.Tensor]:
        draft = draft_of(teacher, tiny_dataset, seed=seed)
        settings = {"teacher_steps": 4, "batch_size": 32, "optimiser": short(1)}
        apply(draft, StepDistillConfig(method=method, steps=2, **settings))
        return weights(draft.model)

    first = train(1)
    assert same(first, train(1))


def test_guidance_is_distilled_away(tiny_model: Any, tiny_dataset: Dataset) -> None:
    guided = tiny_model(**TINY, condition_dropout=0.3, guidance_scale=2.0)
    draft = draft_of(guided, tiny_dataset)
    apply(draft, StepDistillConfig(start="zero", teacher_steps=2, batch_size=32, optimiser=short(1)))
    assert draft.settings.serving == ServingConfig(sampler="ddim", times=(7,), start="zero")
    assert draft.model.config.guidance_scale == 1.0
    assert draft.settings.model == draft.model.config


def test_a_start_that_is_not_said_stays_as_the_run_is_served(teacher: ADRec, tiny_dataset: Dataset) -> None:
    draft = draft_of(teacher, tiny_dataset)
    served = ServingConfig(sampler="ddim", eta=0.5, start="zero", early_stop=EarlyStop(top=3))
    draft.settings = draft.settings.model_copy(update={"serving": served})
    apply(draft, StepDistillConfig(steps=2, teacher_steps=4, batch_size=32, optimiser=short(1)))
    kept = ServingConfig(sampler="ddim", times=(2, 7), start="zero", early_stop=EarlyStop(top=3))
    assert draft.settings.serving == kept


def test_a_model_without_diffusion_is_skipped(tiny_model: Any, tiny_dataset: Dataset) -> None:
    draft = draft_of(tiny_model(model="sasrec"), tiny_dataset)
    model, settings = draft.model, draft.settings
    receipt = apply(draft, StepDistillConfig())
    assert receipt.skipped[0].why == "a 'sasrec' model has none"
    assert not receipt.changed
    assert draft.model is model
    assert draft.settings is settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 17}, r"steps is 17; allowed for progressive: 1 to 16 \(the model was trained with 32\)"),
        ({"steps": 32, "method": "consistency"}, "allowed for consistency: 1 to 31"),
        ({"steps": 1, "teacher_steps": 64}, "teacher_steps is 64; allowed: up to 32"),
    ],
)
def test_steps_that_do_not_fit_the_model_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        step_plans(ModelConfig(items=40, width=16, heads=2), StepDistillConfig(**settings))


def test_a_geodesic_model_is_refused() -> None:
    with pytest.raises(CompressionError, match="unit sphere"):
        step_plans(ModelConfig(items=40, width=16, heads=2, geodesic=True), StepDistillConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_steps": 6, "steps": 2}, "teacher_steps is 6; allowed for progressive: 2 times 2, 4, 8"),
        ({"teacher_steps": 2, "steps": 2}, "allowed: above steps, which is 2"),
        ({"method": "consistency", "optimiser": {"average_decay": 0.0}}, "set optimiser.average_decay above 0"),
        ({"method": "reflow"}, "'progressive', 'consistency' or 'temporal'"),
        ({"temporal": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StepDistillConfig(**settings)


def test_data_is_needed(teacher: ADRec) -> None:
    with pytest.raises(RunError, match="'distill' needs the data"):
        apply(draft_of(teacher, None), StepDistillConfig())


def test_a_quantised_model_is_refused(teacher: ADRec, tiny_dataset: Dataset) -> None:
    draft = draft_of(copy.deepcopy(teacher), tiny_dataset)
    compress_(draft, ItemTableConfig(), measure=False)
    with pytest.raises(CompressionError, match="'distill' trains, and the model is quantised already"):
        apply(draft, StepDistillConfig())
