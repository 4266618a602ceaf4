"""`compress_` and `compress_run`: receipts that tell the truth, drafts as they were and nothing written on failure."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_techniques import BreakConfig, ForgetConfig, IdleConfig, ScaleConfig, ServeConfig, break_

from adrec import Recommender
from adrec.checkpoint import load_run
from adrec.config import ServingConfig
from adrec.data.dataset import Dataset
from adrec.engines import CachedEngine
from adrec.errors import ConfigError, RunError
from adrec.evaluation import evaluate, kept_percent
from compress.api import COMPRESSION_FILE, apply_recipe, compress_, compress_run, read_compression
from compress.recipe import Recipe
from compress.technique import CompressionError, Draft, Receipt, Technique

pytestmark = pytest.mark.usefixtures("toys")


@pytest.fixture
def draft(tiny_model: Any, tiny_dataset: Dataset) -> Draft:
    model = tiny_model(timesteps=4, schedule="cosine", max_length=20, lambda_uncertainty=1.0)
    return Draft.of(model, tiny_dataset, seed=5)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def ranks(draft: Draft, steps: ServingConfig | None = None) -> torch.Tensor:
    examples = draft.validation("test")
    return evaluate(CachedEngine(draft.model), examples, steps=steps, seed=draft.seed).ranks


def test_a_receipt_holds_the_accuracy_of_the_changed_draft(draft: Draft) -> None:
    exact = ranks(draft)
    first = compress_(draft, ForgetConfig(keep=30))
    between = ranks(draft)
    second = compress_(draft, ForgetConfig(keep=20))
    after = ranks(draft)
    assert first.accuracy is not None
    assert second.accuracy is not None
    for receipt, now, before in ((first, between, exact), (second, after, between)):
        assert receipt.accuracy is not None
        for reading, expected in (
            (receipt.accuracy.kept, kept_percent(now, exact)),
            (receipt.accuracy.kept_of_before, kept_percent(now, before)),
        ):
            assert reading is not None
            assert expected is not None
            assert (reading.value, reading.low, reading.high) == (expected.value, expected.low, expected.high)
        assert receipt.accuracy.users == 60
    assert second.accuracy.kept != second.accuracy.kept_of_before
    assert second.technique == "forget"


def test_settings_of_the_run_decide_how_accuracy_is_sampled(draft: Draft) -> None:
    exact, fewer = ranks(draft), ranks(draft, ServingConfig(times=(2,)))
    assert not torch.equal(exact, fewer), "lambda 1 makes the step count matter"
    receipt = compress_(draft, ServeConfig(times=(2,)))
    expected = kept_percent(fewer, exact)
    assert receipt.accuracy is not None
    assert receipt.accuracy.kept is not None
    assert expected is not None
    assert receipt.accuracy.kept.value == expected.value
    assert draft.settings.serving == ServingConfig(times=(2,))


def test_a_run_with_settings_of_its_own_is_the_teacher_as_it_is_served(draft: Draft) -> None:
    few = ServingConfig(times=(2,))
    served = Draft.of(draft.model, draft.dataset, settings=draft.settings.model_copy(update={"serving": few}), seed=5)
    before = ranks(served, few)
    assert not torch.equal(before, ranks(served)), "lambda 1 makes the step count matter"
    receipt = compress_(served, ForgetConfig(keep=20))
    expected = kept_percent(ranks(served, few), before)
    assert receipt.accuracy is not None
    assert receipt.accuracy.kept is not None
    assert expected is not None
    assert receipt.accuracy.kept.value == expected.value
    assert receipt.accuracy.kept_of_before == receipt.accuracy.kept


def test_what_was_skipped_reaches_the_receipt_and_costs_nothing(draft: Draft) -> None:
    receipt = compress_(draft, IdleConfig())
    assert (receipt.changed, [skip.what for skip in receipt.skipped]) == ((), ["encoder.0"])
    assert receipt.accuracy is not None
    assert receipt.accuracy.loss == 0.0
    assert receipt.notes == ("nothing was worth it",)


def test_a_technique_that_raises_leaves_the_draft_as_it_was(draft: Draft) -> None:
    model, settings = draft.model, draft.settings
    with pytest.raises(CompressionError, match="quantised already"):
        compress_(draft, BreakConfig())
    assert draft.model is model
    assert draft.settings is settings
    # The toy really did change the draft.
    with pytest.raises(CompressionError):
        break_(draft, BreakConfig())
    assert draft.model is not model


def test_too_much_loss_raises_and_restores(draft: Draft) -> None:
    model = draft.model
    with pytest.raises(CompressionError, match=r"loses \d+\.\d\d % .*by this stage itself.*allowed: 5 % \(max_loss\)"):
        compress_(draft, ForgetConfig(max_loss="5%"))
    assert draft.model is model
    assert compress_(draft, IdleConfig(max_loss=0.0)).accuracy is not None


def test_a_bound_needs_data_to_be_held_to(tiny_model: Any) -> None:
    with pytest.raises(CompressionError, match="without a data set no loss can be measured"):
        compress_(Draft.of(tiny_model()), ScaleConfig(max_loss=1.0))
    assert compress_(Draft.of(tiny_model()), ScaleConfig()).accuracy is None


def test_a_bare_model_is_changed_in_place(tiny_model: Any) -> None:
    model = tiny_model()
    twin, table = copy.deepcopy(model), model.table.detach().clone()
    receipt = compress_(model, ScaleConfig(factor=4.0))
    assert receipt.accuracy is None
    assert torch.equal(model.table, 4.0 * table)
    first = next(iter(twin.encoder)).attention.qkv.weight
    assert torch.equal(next(iter(model.encoder)).attention.qkv.weight, first)
    assert set(dict(model.named_parameters())) == set(dict(twin.named_parameters()))


@pytest.mark.parametrize(
    ("config", "message"),
    [(ServeConfig(), "settings of the run, which a bare model cannot hold; pass a Draft"), (BreakConfig(), "already")],
)
def test_a_bare_model_is_as_it_was_after_an_error(tiny_model: Any, config: Technique, message: str) -> None:
    model = tiny_model(timesteps=4, schedule="cosine")
    before = weights(model)
    with pytest.raises(CompressionError, match=message):
        compress_(model, config)
    assert same(weights(model), before)


def test_settings_of_no_registered_technique_are_refused(tiny_model: Any) -> None:
    class ScalingConfig(Technique):
        technique: str = "scales"

    with pytest.raises(
        CompressionError, match=r"ScalingConfig belongs to no .*did you mean 'scale'.*registered: scale"
    ):
        compress_(tiny_model(), ScalingConfig())


def test_a_recipe_stops_at_the_stage_that_loses_too_much(draft: Draft) -> None:
    recipe = Recipe(stages=["scale", "idle", {"technique": "forget"}, "serve"], max_loss="50%")
    seen: list[tuple[int, str]] = []
    with pytest.raises(CompressionError, match=r"^stage 3 of 4, 'forget': loses .*allowed: 50 %") as caught:
        apply_recipe(draft, recipe, lambda number, receipt: seen.append((number, receipt.technique)))
    assert seen == [(1, "scale"), (2, "idle")]
    assert [receipt.technique for receipt in caught.value.receipts] == ["scale", "idle"]
    assert caught.value.exit_code == 3


def test_a_stage_may_have_a_bound_of_its_own(draft: Draft) -> None:
    recipe = Recipe(stages=[{"technique": "forget", "max_loss": 99.9, "keep": 5}], max_loss=0)
    (receipt,) = apply_recipe(draft, recipe)
    assert receipt.accuracy is not None
    assert receipt.accuracy.loss > 0.0


def test_a_compressed_run_loads_serves_and_says_how_it_was_made(compressible_run: Path, tmp_path: Path) -> None:
    recipe = Recipe(stages=[{"technique": "scale", "factor": 4.0}, {"technique": "serve", "times": [0]}], max_loss=90)
    made = compress_run(compressible_run, recipe, tmp_path / "out", seed=7)
    teacher, run = load_run(compressible_run), load_run(tmp_path / "out")
    assert torch.equal(run.model.table, 4.0 * teacher.model.table)
    assert run.settings.serving == ServingConfig(times=(0,))
    assert len(Recommender.load(tmp_path / "out").recommend([[1, 2, 3]], k=5)[0].items) == 5
    found = read_compression(tmp_path / "out")
    assert found == made
    assert (found.teacher_fingerprint, found.seed, found.teacher) == (teacher.fingerprint, 7, None)
    assert Recipe.model_validate(found.recipe) == recipe
    assert [receipt.technique for receipt in found.receipts] == ["scale", "serve"]
    accuracy = found.receipts[-1].accuracy
    assert accuracy is not None
    assert run.metrics["validation"]["NDCG@20"] == accuracy.metrics["NDCG@20"].value
    before, after = teacher.baseline(), run.baseline()
    assert before is not None
    assert after is not None
    assert after.fingerprint == before.fingerprint
    assert not list((tmp_path / "out").glob(".*")), "nothing staged is left"


def test_a_run_without_a_stage_for_steps_is_served_as_it_was_measured(compressible_run: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    compress_run(compressible_run, Recipe(stages=["scale"]), tmp_path / "out", report=lines.append)
    serving = load_run(tmp_path / "out").settings.serving
    assert serving is not None
    assert serving.count(4) == 4
    assert "so the result takes all 4 reverse steps, as measured; add `- technique: steps` for fewer" in lines[-1]
    compress_run(tmp_path / "out", Recipe(stages=["idle"]), tmp_path / "again", report=lines.append)
    assert lines[-1] == "stage 1 of 1, 'idle'"


def test_compressing_twice_keeps_the_first_story(compressible_run: Path, tmp_path: Path) -> None:
    first = compress_run(compressible_run, Recipe(stages=["scale"]), tmp_path / "first")
    second = compress_run(tmp_path / "first", Recipe(stages=["idle"]), tmp_path / "second")
    assert second.teacher == first
    assert second.teacher_fingerprint == load_run(tmp_path / "first").fingerprint


@pytest.mark.parametrize("stage", ["break", "forget"])
def test_nothing_is_written_when_a_stage_fails(compressible_run: Path, tmp_path: Path, stage: str) -> None:
    with pytest.raises(CompressionError, match=f"stage 2 of 2, '{stage}'"):
        compress_run(compressible_run, Recipe(stages=["scale", stage]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_writing_fails(
    compressible_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compress.api.save_run", full)
    with pytest.raises(OSError, match="No space"):
        compress_run(compressible_run, Recipe(stages=["scale"]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_destination_is_refused_before_any_work(compressible_run: Path, tmp_path: Path) -> None:
    recipe = Recipe(stages=["break"])
    with pytest.raises(ConfigError, match="already holds a run"):
        compress_run(compressible_run, recipe, compressible_run)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        compress_run(compressible_run, recipe, tmp_path)


def test_a_run_of_another_version_is_refused(compressible_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(compressible_run, run)
    (run / COMPRESSION_FILE).write_text('{"schema_version": 2}')
    with pytest.raises(RunError, match="schema version 2, this adrec reads 1; compress the original run again"):
        compress_run(run, Recipe(stages=["scale"]), tmp_path / "out")
    (run / COMPRESSION_FILE).write_text("{")
    with pytest.raises(RunError, match=r"compression\.json: the run cannot be read"):
        compress_run(run, Recipe(stages=["scale"]), tmp_path / "out")
    (run / COMPRESSION_FILE).unlink()
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"schema_version": 9}))
    with pytest.raises(RunError, match=r"schema_version is 9; allowed: 1"):
        compress_run(run, Recipe(stages=["scale"]), tmp_path / "out")


def test_receipts_survive_json(draft: Draft) -> None:
    receipt = compress_(draft, ScaleConfig())
    assert Receipt.model_validate_json(receipt.model_dump_json()) == receipt
