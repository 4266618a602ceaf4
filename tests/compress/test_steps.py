"""Step reduction: what is kept, what the searches find against trying everything, and receipts of what was seen."""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from adrec import Recommender
from adrec.checkpoint import load_run, save_run
from adrec.config import EarlyStop, RunConfig, ServingConfig, parse
from adrec.data.dataset import Dataset
from adrec.engines import CachedEngine
from adrec.errors import ConfigError, RunError
from adrec.evaluation import evaluate
from adrec.models.adrec import ADRec
from compress.api import apply_recipe
from compress.recipe import Recipe
from compress.step_search import StepSearch
from compress.steps import StepsConfig, apply
from compress.technique import Draft

TRAINED = 7
EVERY = tuple(range(TRAINED))


def model_of(factory: Any, **overrides: Any) -> Any:
    return factory(
        **{"timesteps": TRAINED, "schedule": "sqrt", "max_length": 20, "lambda_uncertainty": 1.0} | overrides
    )


@pytest.fixture
def draft(tiny_model: Any, tiny_dataset: Dataset) -> Draft:
    return Draft.of(model_of(tiny_model), tiny_dataset, seed=5)


@pytest.fixture(scope="module")
def search(tiny_model: Any, tiny_dataset: Dataset) -> StepSearch:
    plan = ServingConfig(sampler="ddim", times=EVERY)
    return StepSearch(model_of(tiny_model), tiny_dataset.examples("validation"), plan, seed=5)


def test_uniform_steps_are_those_that_a_count_takes(draft: Draft) -> None:
    state = {name: value.clone() for name, value in draft.model.state_dict().items()}
    receipt = apply(draft, StepsConfig(steps=3))
    assert draft.settings.serving == ServingConfig(times=(0, 3, 6))
    (change,) = receipt.changed
    assert (change.before, change.after) == ("7 (ddpm)", "3 (ddpm): trained steps 0, 3, 6")
    assert receipt.settings["technique"] == receipt.technique == "steps"
    assert receipt.bytes_before == receipt.bytes_after == sum(4 * value.numel() for value in state.values())
    assert receipt.accuracy is None
    assert all(torch.equal(value, state[name]) for name, value in draft.model.state_dict().items())
    expected = evaluate(CachedEngine(draft.model), draft.validation("test"), steps=3, seed=draft.seed)
    assert torch.equal(draft.evaluate().ranks, expected.ranks)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": 3, "spacing": "quadratic", "sampler": "ddim", "eta": 0.5}, (0, 2, 6)),
        ({"steps": 7, "sampler": "dpm++2m"}, EVERY),
        ({"steps": 1, "start": "zero"}, (6,)),
        ({"steps": 2, "early_stop": {"top": 3, "patience": 1}}, (0, 6)),
    ],
)
def test_the_settings_say_how_the_run_is_sampled(
    draft: Draft, options: dict[str, Any], expected: tuple[int, ...]
) -> None:
    apply(draft, parse(StepsConfig, options, "recipe"))
    kept = {name: value for name, value in options.items() if name not in ("steps", "spacing")}
    assert draft.settings.serving == ServingConfig.model_validate({"times": expected, **kept})


SERVED = ServingConfig(sampler="ddim", eta=0.5, start="zero", early_stop=EarlyStop(top=3))


@pytest.mark.parametrize(
    ("said", "changed"),
    [
        ({}, {}),
        ({"spacing": "greedy"}, {}),
        ({"start": "noise"}, {"start": "noise"}),
        ({"eta": 0.0}, {"eta": 0.0}),
        ({"sampler": "ddim"}, {}),
        ({"sampler": "dpm++2m"}, {"sampler": "dpm++2m", "eta": 0.0}),
        ({"early_stop": "never"}, {"early_stop": None}),
        ({"early_stop": {"top": 5}}, {"early_stop": EarlyStop(top=5)}),
    ],
)
def test_what_a_stage_does_not_say_stays_as_the_run_is_served(
    draft: Draft, said: dict[str, Any], changed: dict[str, Any]
) -> None:
    draft.settings = draft.settings.model_copy(update={"serving": SERVED})
    receipt = apply(draft, parse(StepsConfig, {"steps": 1} | said, "recipe"))
    assert draft.settings.serving == SERVED.model_copy(update={"times": (6,)} | changed)
    assert receipt.changed[0].before == "7 (ddim, eta 0.5, from zero, until the top 3 stays for 1)"


def test_stages_that_do_not_sample_leave_the_serving_settings(draft: Draft) -> None:
    """Recipes of every order: only `steps` writes how a run is sampled."""
    pytest.importorskip("torchao", reason="quantising layers needs torchao")
    for stages in (["quantize", "item_table"], ["item_table", "quantize"], ["steps", "quantize", "item_table"]):
        fresh = Draft.of(draft.model, draft.dataset, settings=draft.settings.model_copy(update={"serving": SERVED}))
        receipts = apply_recipe(fresh, Recipe(stages=stages, max_loss=90))
        expected = SERVED.model_copy(update={"times": (6,)}) if "steps" in stages else SERVED
        assert fresh.settings.serving == expected
        sampled = evaluate(CachedEngine(fresh.model), fresh.validation("test"), steps=expected, seed=fresh.seed)
        assert receipts[-1].accuracy is not None
        assert receipts[-1].accuracy.metrics["NDCG@20"].value == sampled.metrics["NDCG@20"].value


def test_an_eta_that_the_runs_sampler_has_not_is_refused(draft: Draft) -> None:
    with pytest.raises(ConfigError, match=r"'steps': .*eta is 0\.5, but only sampler 'ddim' has one"):
        apply(draft, StepsConfig(eta=0.5))
    assert draft.settings.serving is None


def test_without_data_only_searches_are_refused(tiny_model: Any) -> None:
    draft = Draft.of(model_of(tiny_model))
    receipt = apply(draft, StepsConfig(steps=2, spacing="quadratic"))
    assert receipt.changed[0].detail == {}
    assert receipt.notes == ()
    for spacing in ("greedy", "dynamic"):
        with pytest.raises(RunError, match="'steps' needs the data the run was trained on"):
            apply(draft, StepsConfig.model_validate({"steps": 2, "spacing": spacing}))
    assert draft.settings.serving == ServingConfig(times=(0, 6))


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).square().sum() / exact.square().sum())


def test_a_distance_is_that_of_the_engines_results(search: StepSearch, tiny_dataset: Dataset) -> None:
    examples = tiny_dataset.examples("validation")
    exact, found = (
        search.engine.represent(examples.histories, plan, 5, row_keys=examples.users)
        for plan in (ServingConfig(sampler="ddim"), ServingConfig(sampler="ddim", times=(1, 4, 6)))
    )
    assert search.distance((1, 4, 6)) == pytest.approx(relative(found, exact), rel=1e-4)
    assert search.distance(EVERY) == 0.0
    assert search.overlap(EVERY) == 1.0
    tops = [search.engine.top_k(rows, 20).items.tolist() for rows in (found, exact)]
    common = [len(set(one) & set(other)) / 20 for one, other in zip(*tops, strict=True)]
    assert search.overlap((1, 4, 6)) == pytest.approx(sum(common) / len(common))


def test_greedy_adds_the_best_step_each_time(search: StepSearch) -> None:
    choice = search.greedy(4, EVERY)
    kept: tuple[int, ...] = (6,)
    for _ in range(3):
        kept = min((tuple(sorted((*kept, time))) for time in EVERY if time not in kept), key=search.distance)
    assert choice.times == kept
    assert next(iter(choice.seen)) == "distance with 6 and"
    first = dict(pair.split(": ") for pair in choice.seen["distance with 6 and"].split("; "))
    assert {int(time): float(value) for time, value in first.items()} == pytest.approx(
        {time: search.distance((time, 6)) for time in EVERY[:-1]}, rel=1e-2
    )
    assert len(choice.seen) == 3


@pytest.mark.parametrize("grid", [EVERY, (1, 3, 4, 6)])
def test_dynamic_programming_finds_the_least_sum_of_jumps(search: StepSearch, grid: tuple[int, ...]) -> None:
    """Against every subset that holds the last step, with errors measured here, jump by jump."""
    exact = search.result(grid)

    @cache
    def error(plan: tuple[int, ...]) -> float:
        return math.sqrt(relative(search.result(plan), exact))

    def bound(kept: tuple[int, ...]) -> float:
        places = [grid.index(time) for time in kept]
        jumps = [error((*grid[: s + 1], *grid[t:])) for s, t in pairwise(places)]
        return sum(jumps) + error(grid[places[0] :])

    for steps in range(1, len(grid) + 1):
        choice = search.dynamic(steps, grid)
        subsets = [(*some, grid[-1]) for some in combinations(grid[:-1], steps - 1)]
        best = min(subsets, key=bound)
        assert bound(choice.times) == pytest.approx(bound(best), rel=1e-5, abs=1e-9)
        name = "bound on the error with 1 step" if steps == 1 else f"bound on the error with {steps} steps"
        assert float(choice.seen[name]) == pytest.approx(bound(best), rel=1e-2, abs=1e-9)


@pytest.mark.parametrize("spacing", ["greedy", "dynamic"])
def test_a_search_is_reported_with_what_it_saw(draft: Draft, spacing: str) -> None:
    lines: list[str] = []
    draft.report = lines.append
    receipt = apply(draft, StepsConfig.model_validate({"steps": 3, "spacing": spacing, "sampler": "ddim"}))
    serving = draft.settings.serving
    assert serving is not None
    assert serving.times is not None
    assert (len(serving.times), serving.times[-1]) == (3, 6)
    detail = receipt.changed[0].detail
    assert {"distance", "distance of uniform", "distance of quadratic", "top-20 overlap"} <= set(detail)
    assert any(name.startswith({"greedy": "distance with", "dynamic": "bound"}[spacing]) for name in detail)
    assert float(detail["distance"]) <= float(detail["distance of uniform"])
    assert lines == [f"searching 3 of 7 trained steps ({spacing})"]


def test_candidates_thin_the_grid_that_is_searched(draft: Draft) -> None:
    apply(draft, StepsConfig(steps=2, spacing="greedy", candidates=3))
    assert draft.settings.serving is not None
    assert set(draft.settings.serving.times or ()) <= {0, 3, 6}
    with pytest.raises(ConfigError, match="candidates is 2, but steps is 3; allowed: 3 or more"):
        apply(Draft.of(draft.model, draft.dataset), StepsConfig(steps=3, spacing="dynamic", candidates=2))


def test_what_an_earlier_reduction_left_out_stays_out(draft: Draft) -> None:
    """A model distilled for some steps knows no others."""
    draft.settings = draft.settings.model_copy(update={"serving": ServingConfig(times=(1, 2, 4, 5))})
    receipt = apply(draft, StepsConfig(steps=2))
    assert receipt.changed[0].before == "4 (ddpm)"
    assert draft.settings.serving == ServingConfig(times=(1, 5))
    with pytest.raises(ConfigError, match=r"steps is 3; allowed: 1 to 2, the steps the run is sampled with.*before it"):
        apply(draft, StepsConfig(steps=3))
    assert draft.settings.serving == ServingConfig(times=(1, 5))


def test_more_steps_than_were_trained_are_refused(draft: Draft) -> None:
    with pytest.raises(ConfigError, match="steps is 8; allowed: 1 to 7"):
        apply(draft, StepsConfig(steps=8))
    assert draft.settings.serving is None


def test_a_model_without_steps_is_skipped(tiny_model: Any, tiny_dataset: Dataset) -> None:
    draft = Draft.of(model_of(tiny_model, model="sasrec"), tiny_dataset)
    receipt = apply(draft, StepsConfig(steps=1))
    assert receipt.changed == ()
    assert receipt.skipped[0].why == "a 'sasrec' model has none: it is served in one pass"
    assert draft.settings.serving is None


def test_notes_say_when_steps_are_useless_and_when_one_is_too_few(tiny_model: Any, tiny_dataset: Dataset) -> None:
    indifferent = model_of(tiny_model, lambda_uncertainty=1e-6)
    (note,) = apply(Draft.of(indifferent, tiny_dataset), StepsConfig(steps=3)).notes
    assert note == (
        "at lambda 1e-06 one step gives 1.0000 of the top 20 of 7 steps:"
        " 3 steps cost more and buy next to nothing; use 1"
    )
    assert apply(Draft.of(indifferent, tiny_dataset), StepsConfig(steps=1)).notes == ()
    (note,) = apply(Draft.of(model_of(tiny_model), tiny_dataset), StepsConfig(steps=1)).notes
    assert note.startswith("at lambda 1 one step gives 0.")
    assert note.endswith("look at the accuracy, and start from zero, take more steps or distil them if it matters")
    stops = StepsConfig(steps=2, early_stop=EarlyStop(top=3))
    notes = apply(Draft.of(model_of(tiny_model), tiny_dataset), stops).notes
    assert [note.split(":")[0] for note in notes] == ["early stop ranks the catalogue after every step"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps is 0; allowed: greater than or equal to 1"),
        ({"spacing": "cubic"}, "spacing is 'cubic'; allowed: 'uniform', 'quadratic', 'greedy' or 'dynamic'"),
        ({"eta": 0.5, "sampler": "ddpm"}, "eta is 0.5, but only sampler 'ddim' has one; leave it out of 'ddpm'"),
        ({"early_stop": "soon"}, "early_stop is 'soon'"),
        ({"sampler": "heun"}, "sampler is 'heun'"),
        ({"candidates": 1}, "candidates is 1; allowed: greater than or equal to 2"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(StepsConfig, values, "recipe")


def test_a_reduced_run_is_served_as_its_settings_say(tmp_path: Path, tiny_model: Any, tiny_dataset: Dataset) -> None:
    """Saved, loaded, recommended from: the plan's lists, unless the caller asks for something else."""
    draft = Draft.of(model_of(tiny_model), tiny_dataset)
    apply(draft, StepsConfig(steps=3, spacing="quadratic", sampler="dpm++2m"))
    save_run(tmp_path / "run", draft.settings, draft.model, tiny_dataset, "data", {})
    run = load_run(tmp_path / "run")
    assert run.settings == draft.settings
    assert isinstance(run.model, ADRec)
    recommender = Recommender.load(tmp_path / "run")
    histories = [[1, 2, 3], [9], [4, 8, 15, 16]]
    served = recommender.recommend(histories, 40, seed=2)
    asked = Recommender(load_run(tmp_path / "run"), CachedEngine(run.model))
    plan = ServingConfig(sampler="dpm++2m", times=(0, 2, 6))
    assert served == asked.recommend(histories, 40, steps=plan, seed=2) == asked.recommend(histories, 40, seed=2)
    for other in (1, 3, None, ServingConfig(sampler="ddim", times=(0, 2, 5))):
        assert asked.recommend(histories, 40, steps=other, seed=2) != served
    old = RunConfig(model=run.model.config)
    save_run(tmp_path / "old", old, run.model, tiny_dataset, "data", {})
    before = Recommender.load(tmp_path / "old")
    assert before.recommend(histories, 40, seed=2) == before.recommend(histories, 40, steps=1, seed=2)
