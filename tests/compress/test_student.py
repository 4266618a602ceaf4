"""Students of a tiny trained teacher: what they learn, what they cost, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from distillation_cases import draft_of, same, short, weights
from pydantic import ValidationError

from adrec.checkpoint import load_run, save_run
from adrec.config import ModelConfig, ServingConfig
from adrec.data.dataset import Dataset
from adrec.data.jagged import Jagged
from adrec.engines import CachedEngine
from adrec.errors import RunError
from adrec.evaluation import evaluate
from adrec.models import ADRec, SASRec, build_model
from adrec.models.base import SequenceModel, TokenBatch
from compress.api import compress_
from compress.distillation import Lessons, TaughtBatch, fit
from compress.item_table import ItemTableConfig
from compress.student import StudentConfig, apply, initial_student, principal_axes, student_config, taught_loss
from compress.technique import CompressionError, Draft

ONE_STEP = ServingConfig(sampler="ddim", times=(7,), start="zero")
HARD = {"hard": 1.0, "replaced": 0.0}
OWN = {"left_out": 0.0, "replaced": 0.0}
TINY = {"max_length": 12, "timesteps": 8, "schedule": "sqrt", "dropout": 0.0, "embedding_dropout": 0.1}


@pytest.fixture(scope="module")
def teacher(tiny_model: Any, tiny_dataset: Dataset) -> SequenceModel:
    """An ADRec of 2 + 2 blocks, trained until it knows what follows what."""
    torch.set_num_threads(1)
    model = tiny_model(**TINY, lambda_uncertainty=0.1)
    body = build_model(model.config)
    lessons = Lessons(tiny_dataset.training_sequences(), 12)

    def hard(student: SequenceModel, average: SequenceModel, batch: TaughtBatch) -> torch.Tensor:
        return taught_loss(student.table, None, StudentConfig(reconstruction=0.0, ranking=0.0, **HARD))(
            student, average, TaughtBatch(batch.tokens, torch.zeros(0))
        )

    fit(body, tiny_dataset, lessons, hard, seed=0, batch_size=16, optimiser=short(10), stage="teacher", steps=1)
    return body.eval()


def answers(model: SequenceModel, dataset: Dataset) -> torch.Tensor:
    plan = ONE_STEP if isinstance(model, ADRec) else None
    return CachedEngine(model).represent(dataset.examples("validation").histories, plan)


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).square().sum(-1).mean() / second.square().sum(-1).mean())


SHAPES = [
    {"encoder_blocks": 2, "denoiser_blocks": 0},
    {"encoder_blocks": 1, "denoiser_blocks": 1},
    {"encoder_blocks": 1, "denoiser_blocks": 0, "initial_blocks": "random", **OWN},
    {"encoder_blocks": 1, "denoiser_blocks": 0, "heads": 4, "answers": "computed", "left_out": 0.1},
    {"encoder_blocks": 2, "denoiser_blocks": 0, "hard": 0.1, "replaced": 0.0},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_a_student_comes_near_its_teacher(shape: dict[str, Any], teacher: SequenceModel, tiny_dataset: Dataset) -> None:
    draft = draft_of(teacher, tiny_dataset)
    light = {"dropout": None, "embedding_dropout": None, "batch_size": 16, "optimiser": short(8)}
    config = StudentConfig(**shape, **light)
    before = weights(draft.teacher)
    untrained = initial_student(teacher, student_config(teacher.config, config), config, None, 0).eval()
    goal = answers(teacher, tiny_dataset)
    receipt = apply(draft, config)
    assert distance(answers(draft.model, tiny_dataset), goal) < 0.3
    assert distance(answers(untrained, tiny_dataset), goal) > 0.3
    assert draft.evaluate().metrics["NDCG@20"].value > 95.0
    assert same(weights(draft.teacher), before)
    assert torch.equal(draft.model.table, teacher.table)
    assert receipt.parameters_after < receipt.parameters_before
    assert receipt.bytes_after == sum(value.numel() * 4 for value in draft.model.state_dict().values())
    assert not draft.model.training
    assert all(parameter.grad is None for parameter in draft.model.parameters())


def test_shape_and_serving_of_the_student(teacher: SequenceModel, tiny_dataset: Dataset, tmp_path: Path) -> None:
    quick = {"batch_size": 32, "optimiser": short(1)}
    with_denoiser = draft_of(teacher, tiny_dataset)
    apply(with_denoiser, StudentConfig(encoder_blocks=1, denoiser_blocks=1, **quick))
    assert with_denoiser.settings.serving is not None
    assert with_denoiser.settings.serving.times == (7,)
    without = draft_of(teacher, tiny_dataset)
    apply(without, StudentConfig(**quick))
    assert isinstance(without.model, SASRec)
    assert without.settings.serving is None
    for draft, name in ((with_denoiser, "adrec"), (without, "sasrec")):
        save_run(tmp_path / name, draft.settings, draft.model, tiny_dataset, "data", {})
        run = load_run(tmp_path / name)
        assert run.config.model == name
        assert same(weights(run.model), weights(draft.model))
        histories = tiny_dataset.examples("test").histories
        plan = draft.settings.serving
        found, expected = (CachedEngine(model).recommend(histories, 5, plan) for model in (run.model, draft.model))
        assert torch.equal(found.items, expected.items)


def test_the_same_seed_gives_the_same_bits(teacher: SequenceModel, tiny_dataset: Dataset) -> None:
    def train(seed: int, **settings: Any) -> dict[str, torch.Tensor]:
        draft = draft_of(teacher, tiny_dataset, seed=seed)
        apply(draft, StudentConfig(dropout=0.2, batch_size=16, optimiser=short(1), **settings))
        return weights(draft.model)

    first = train(1)
    assert same(first, train(1))
    assert not same(first, train(2))
    assert same(train(1, **OWN), train(1, **OWN))
    assert not same(first, train(1, left_out=0.0))
    assert not same(first, train(1, replaced=0.0))


@pytest.mark.parametrize("ranking_loss", ["divergence", "listwise"])
@pytest.mark.parametrize("table", ["projected", "relearned"])
def test_a_narrow_student_learns(table: str, ranking_loss: str, teacher: SequenceModel, tiny_dataset: Dataset) -> None:
    draft = draft_of(teacher, tiny_dataset)
    config = StudentConfig(
        encoder_blocks=1,
        width=8,
        table=table,
        reconstruction=1.0 if table == "projected" else 0.0,
        ranking_loss=ranking_loss,
        catalogue_sample=10,
        batch_size=16,
        optimiser=short(12, learning_rate=0.03),
    )
    receipt = apply(draft, config)
    assert draft.model.table.shape == (41, 8)
    assert torch.equal(draft.model.table[0], torch.zeros(8))
    # A random ranking of 40 items reaches about 25.
    assert draft.evaluate().metrics["NDCG@20"].value > 60.0
    assert "16 wide with 2 heads" in receipt.skipped[0].why


def test_a_kept_table_may_be_trained_later(teacher: SequenceModel, tiny_dataset: Dataset) -> None:
    draft = draft_of(teacher, tiny_dataset)
    receipt = apply(draft, StudentConfig(frozen_epochs=1, batch_size=16, optimiser=short(2)))
    assert not torch.equal(draft.model.table, teacher.table)
    assert torch.equal(draft.model.table[0], torch.zeros(16))
    assert receipt.changed[1].after == "kept, trained from epoch 1 on"


def test_a_sasrec_teacher_teaches_too(tiny_model: Any, tiny_dataset: Dataset) -> None:
    teacher = tiny_model(model="sasrec", max_length=12, dropout=0.0, embedding_dropout=0.0)
    draft = draft_of(teacher, tiny_dataset)
    apply(draft, StudentConfig(encoder_blocks=1, hard=0.0, ranking=0.0, batch_size=16, optimiser=short(8)))
    goal = answers(teacher, tiny_dataset)
    assert distance(answers(draft.model, tiny_dataset), goal) < 0.5


def test_the_start_holds_evenly_spaced_blocks(teacher: SequenceModel) -> None:
    assert isinstance(teacher, ADRec)
    blocks = [*teacher.encoder, *teacher.denoiser]
    for encoder, denoiser, places in [
        (2, 0, (0, 3)),
        (1, 1, (0, 3)),
        (2, 1, (0, 2, 3)),
        (1, 0, (0,)),
        (2, 2, range(4)),
    ]:
        config = StudentConfig(encoder_blocks=encoder, denoiser_blocks=denoiser)
        student = initial_student(teacher, student_config(teacher.config, config), config, None, 0)
        ours = [*student.encoder, *(student.denoiser if denoiser else ())]
        for block, place in zip(ours, places, strict=True):
            assert same(block.state_dict(), blocks[place].state_dict())
        assert torch.equal(student.history_norm.weight, teacher.history_norm.weight)
        if isinstance(student, ADRec):
            assert same(student.time_embedding.state_dict(), teacher.time_embedding.state_dict())


def test_principal_axes_are_orthonormal_and_lose_the_least() -> None:
    torch.manual_seed(0)
    table = torch.randn(41, 16) * torch.linspace(3, 0.1, 16) + 2.0
    axes = principal_axes(table, 4)
    torch.testing.assert_close(axes.T @ axes, torch.eye(4), atol=1e-5, rtol=0)
    rows = table[1:] - table[1:].mean(0)
    values = torch.linalg.svdvals(rows)
    lost = (rows - rows @ axes @ axes.T).square().sum()
    torch.testing.assert_close(lost, values[4:].square().sum(), rtol=1e-4, atol=0)
    assert torch.equal(principal_axes(table, 4), principal_axes(table.clone(), 4))
    with pytest.raises(CompressionError, match="a table of 2 items has 2 axes"):
        principal_axes(table[:3], 4)


def test_loss_of_one_batch_by_hand(tiny_model: Any) -> None:
    torch.manual_seed(0)
    student = tiny_model(model="sasrec", encoder_blocks=1, max_length=12)
    tokens = TokenBatch.from_sequences(Jagged.from_lists([[3, 4, 5], [7, 8]]), 12)
    taught = TaughtBatch(tokens, torch.randn(3, 16))
    table = torch.randn(41, 16)
    rows = student(tokens)
    error = (rows - taught.answers).square().mean()
    theirs, ours = (taught.answers @ table[1:].T / 2).softmax(-1), (rows @ student.table[1:].T / 2).log_softmax(-1)
    divergence = 4 * (theirs * (theirs.log() - ours)).sum(-1).mean()
    hard = torch.nn.functional.cross_entropy(rows @ student.table.T, tokens.targets)
    config = StudentConfig(
        reconstruction=0.3, ranking=0.7, hard=1.9, replaced=0.0, temperature=2.0, catalogue_sample=None
    )
    found = taught_loss(table, None, config)(student, student, taught)
    torch.testing.assert_close(found, 0.3 * error + 0.7 * divergence + 1.9 * hard)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_which_weights_are_kept(keep: Literal["best", "last"], teacher: SequenceModel, tiny_dataset: Dataset) -> None:
    student, lines = copy.deepcopy(teacher), []
    lessons = Lessons(tiny_dataset.training_sequences(), 12)

    def spoil(model: SequenceModel, average: SequenceModel, batch: TaughtBatch) -> torch.Tensor:
        return model.table.square().mean()

    fitted = fit(
        student,
        tiny_dataset,
        lessons,
        spoil,
        seed=0,
        batch_size=16,
        optimiser=short(4, learning_rate=0.1, validate_every=1, patience=1),
        stage="spoilt",
        keep=keep,
        report=lines.append,
    )
    found = evaluate(CachedEngine(student), tiny_dataset.examples("validation"), steps=1, bootstrap=1)
    assert fitted.reached == pytest.approx(found.metrics["NDCG@20"].value)
    if keep == "best":
        assert (fitted.epoch, fitted.reached) == (0, fitted.before)
        assert fitted.epochs < 4
        assert same(weights(student), weights(teacher))
    else:
        assert (fitted.epoch, fitted.epochs, len(lines)) == (4, 4, 4)
        assert fitted.reached < fitted.before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reconstruction": 0, "ranking": 0, "hard": 0}, "are all 0; give one of them a weight above 0"),
        ({"width": 7}, "width is 7; allowed: even numbers"),
        ({"table": "relearned", "frozen_epochs": 1}, "a relearned table must change"),
        ({"answers": "stored"}, "answers are stored, but left_out is 0.2 and replaced is 0.2"),
        ({"left_out": 0.1, "replaced": 0.0, "answers": "stored"}, "set answers to auto or computed, or both to 0"),
        ({"hard": 0.5}, "hard is 0.5, but replaced is 0.2"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"hard": -1.0}, "greater than or equal to 0"),
        ({"encoder_blocks": 0}, "greater than or equal to 1"),
        ({"depth": 1}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StudentConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder_blocks": 3, "denoiser_blocks": 2}, r"3 \+ 2 blocks has more than its teacher; allowed: 4 in all"),
        ({"width": 32, "table": "relearned"}, "width is 32; allowed: up to the teacher's 16"),
        ({"width": 8}, "set table to projected or relearned"),
        ({"table": "projected"}, "width is the teacher's 16; set a smaller width, or kept"),
        ({"table": "relearned", "width": 8}, "set reconstruction 0, or table projected"),
        ({"table": "projected", "width": 8, "heads": 3}, r"even multiples of heads \(3\)"),
        ({"width": 2, "table": "projected", "heads": 4}, r"even multiples of heads \(4\)"),
    ],
)
def test_a_shape_that_is_no_reduction_is_refused(settings: dict[str, Any], message: str) -> None:
    teacher = ModelConfig(items=40, width=16, heads=2)
    with pytest.raises(CompressionError, match=message):
        student_config(teacher, StudentConfig(**settings))


def test_a_sasrec_teacher_has_no_denoiser_to_pass_on() -> None:
    teacher = ModelConfig(items=40, width=16, heads=2, model="sasrec")
    with pytest.raises(CompressionError, match="has no denoiser; set denoiser_blocks 0"):
        student_config(teacher, StudentConfig(encoder_blocks=1, denoiser_blocks=1))


def test_guidance_ends_with_the_denoiser() -> None:
    teacher = ModelConfig(items=40, width=16, heads=2, condition_dropout=0.2, guidance_scale=2.0)
    assert student_config(teacher, StudentConfig()).guidance_scale == 1.0
    # With one it stays part of how the student is served, and costs two passes.
    assert student_config(teacher, StudentConfig(encoder_blocks=1, denoiser_blocks=1)).guidance_scale == 2.0


def test_a_network_that_an_earlier_stage_changed_is_refused(teacher: SequenceModel, tiny_dataset: Dataset) -> None:
    draft = draft_of(teacher, tiny_dataset)
    with torch.no_grad():
        draft.model.table[3] += 1.0
    with pytest.raises(CompressionError, match="put 'student' first in the recipe"):
        apply(draft, StudentConfig())
    smaller = copy.deepcopy(teacher.config).model_copy(update={"encoder_blocks": 1})
    draft = Draft.of(teacher, tiny_dataset)
    draft.model = build_model(smaller)
    with pytest.raises(CompressionError, match="put 'student' first in the recipe"):
        apply(draft, StudentConfig())


def test_data_is_needed_and_a_failure_changes_nothing(teacher: SequenceModel, tiny_dataset: Dataset) -> None:
    draft = draft_of(teacher, None)
    model, settings = draft.model, draft.settings
    with pytest.raises(RunError, match="needs the data"):
        apply(draft, StudentConfig())
    draft.dataset = tiny_dataset
    with pytest.raises(RunError, match="the loss is nan"):
        apply(draft, StudentConfig(optimiser=short(4, learning_rate=1e30), frozen_epochs=0))
    assert draft.model is model
    assert draft.settings is settings


def test_a_quantised_teacher_is_refused(teacher: SequenceModel, tiny_dataset: Dataset) -> None:
    draft = draft_of(copy.deepcopy(teacher), tiny_dataset)
    compress_(draft, ItemTableConfig(), measure=False)
    with pytest.raises(CompressionError, match="'student' trains, and the model is quantised already"):
        apply(draft, StudentConfig())
