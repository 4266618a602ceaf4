"""Commands under serving settings: what a run is sampled with when nothing is said, and samplers beside each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adrec import Recommender
from adrec.checkpoint import load_run, save_run
from adrec.cli import build_app
from adrec.config import EarlyStop, RunConfig, ServingConfig
from adrec.data.dataset import Dataset
from adrec.engines import make_engine
from adrec.errors import ConfigError, NotSupportedError
from adrec.evaluation import evaluate, kept_percent

PLAN = ServingConfig(sampler="ddim", times=(1, 3), early_stop=EarlyStop(top=3))


def adrec(*arguments: object) -> str:
    result = CliRunner().invoke(build_app(), [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    tiny_dataset.save(folder)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, integer_run: Path, tiny_dataset: Dataset, data: Path) -> Path:
    """A run of 4 trained steps that is sampled as PLAN says."""
    run, folder = load_run(integer_run), tmp_path_factory.mktemp("served") / "run"
    save_run(folder, RunConfig(model=run.config, serving=PLAN), run.model, tiny_dataset, str(data), {})
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for row in json.loads(path.read_text("utf-8"))["rows"] if row["system"] == "adrec"]


def test_a_run_is_evaluated_as_it_is_served(served: Path, tiny_dataset: Dataset, tmp_path: Path) -> None:
    shown = adrec("evaluate", served, "--history", "keep", "--json", tmp_path / "rows.json")
    (row,) = rows_of(tmp_path / "rows.json")
    engine = make_engine("cached", load_run(served).model)
    expected = evaluate(engine, tiny_dataset.examples("test"), steps=PLAN)
    assert (row["steps"], row["times"], row["mean steps"]) == (2, [1, 3], expected.mean_steps)
    assert row["sampler"] == "ddim, until the top 3 stays for 1"
    assert row["NDCG@20"]["value"] == expected.metrics["NDCG@20"].value
    assert "NDCG@20 kept" not in row
    assert "until the top 3 stays for 1" in shown


def test_samplers_stand_beside_each_other_with_what_they_keep(
    served: Path, tiny_dataset: Dataset, tmp_path: Path
) -> None:
    shown = adrec(
        "evaluate", served, "--steps", "2,4", "--sampler", "ddpm,ddim,dpm++2m", "--eta", "0.5", "--history", "keep",
        "--strata", "--json", tmp_path / "rows.json",
    )  # fmt: skip
    rows = rows_of(tmp_path / "rows.json")
    whole = [row for row in rows if row["group"] == "all"]
    names = ["ddpm", "ddim, eta 0.5", "dpm++2m"]
    assert [(row["steps"], row["sampler"]) for row in whole] == [(count, name) for count in (2, 4) for name in names]
    assert "NDCG@20 kept" in shown
    engine, examples = make_engine("cached", load_run(served).model), tiny_dataset.examples("test")
    exact = evaluate(engine, examples, steps=None).ranks
    plans = [2, ServingConfig(sampler="ddim", eta=0.5, times=(0, 3)), ServingConfig(sampler="dpm++2m", times=(0, 3))]
    for row, plan in zip(whole, plans, strict=False):
        found = evaluate(engine, examples, steps=plan)
        kept = kept_percent(found.ranks, exact)
        assert kept is not None
        assert row["NDCG@20 kept"] == {"value": kept.value, "low": kept.low, "high": kept.high}
        assert row["mean steps"] == 2.0
    assert whole[3]["NDCG@20 kept"] == pytest.approx({"value": 100.0, "low": 100.0, "high": 100.0})
    groups = [row for row in rows if row["sampler"] == "ddpm" and row["steps"] == 4 and row["group"] != "all"]
    assert groups
    assert all(row["NDCG@20 kept"] is None or row["NDCG@20 kept"]["value"] == pytest.approx(100.0) for row in groups)


def test_starts_stand_beside_each_other(served: Path, tiny_dataset: Dataset, tmp_path: Path) -> None:
    adrec(
        "evaluate", served, "--steps", "1,4", "--start", "zero,noise", "--history", "keep",
        "--json", tmp_path / "rows.json",
    )  # fmt: skip
    rows = rows_of(tmp_path / "rows.json")
    assert [(row["steps"], row["sampler"]) for row in rows] == [
        (1, "ddpm, from zero"), (1, "ddpm"), (4, "ddpm, from zero"), (4, "ddpm"),
    ]  # fmt: skip
    engine, examples = make_engine("cached", load_run(served).model), tiny_dataset.examples("test")
    plan = ServingConfig(times=(3,), start="zero")
    assert rows[0]["NDCG@20"]["value"] == evaluate(engine, examples, steps=plan, seed=9).metrics["NDCG@20"].value
    assert [row["NDCG@20 kept"]["value"] == pytest.approx(100.0) for row in rows] == [False, False, False, True]


def test_recommend_follows_the_run_unless_steps_are_given(served: Path, tmp_path: Path) -> None:
    (tmp_path / "users.jsonl").write_text('{"user": "a", "history": [1, 2, 3]}\n{"user": "b", "history": [40]}\n')
    recommender = Recommender.load(served)
    histories = [[1, 2, 3], [40]]
    for options, steps in ([], PLAN), (["--steps", "3"], 3):
        out = tmp_path / "out.jsonl"
        adrec("recommend", served, "--input", tmp_path / "users.jsonl", "--out", out, "--k", "7", *options)
        found = [json.loads(line)["items"] for line in out.read_text("utf-8").splitlines()]
        assert found == [each.items for each in recommender.recommend(histories, 7, steps=steps)]
    one, plan = (recommender.recommend(histories, 40, steps=steps) for steps in (1, "run"))
    assert one != plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sampler", "dim", "--steps", "2"], r"--sampler is 'dim' \(did you mean 'ddim'\?\); allowed: ddpm, ddim"),
        (["--sampler", "ddim"], "--sampler ddim --start noise need --steps"),
        (["--start", "zeros", "--steps", "2"], r"--start is 'zeros' \(did you mean 'zero'\?\); allowed: noise, zero"),
        (["--start", "zero"], "--sampler ddpm --start zero need --steps"),
        (["--eta", "0.5", "--steps", "2"], "--eta is 0.5, but only --sampler ddim has one"),
        (["--sampler", "ddim,", "--steps", "2"], "--sampler is ''"),
    ],
)
def test_evaluate_refuses_samplers(served: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adrec("evaluate", served, *options)


def test_a_run_without_steps_has_no_samplers(make_run: Callable[..., Path], data: Path) -> None:
    run = make_run(model="sasrec")
    with pytest.raises(ConfigError, match="--sampler ddim --start noise: a 'sasrec' run has no reverse steps"):
        adrec("evaluate", run, "--data", data, "--sampler", "ddim", "--steps", "1")


def test_an_engine_that_cannot_serve_a_run_says_so_at_once(served: Path) -> None:
    with pytest.raises(
        NotSupportedError, match="engine 'reference' cannot sample with early stop; use engine 'cached'"
    ):
        Recommender.load(served, engine="reference")
    recommender = Recommender.load(served)
    with pytest.raises(ConfigError, match="times hold 4; allowed: 0 to 3"):
        recommender.recommend([[1]], 3, steps=ServingConfig(times=(4,)))


def test_a_run_without_steps_stands_beside_its_baseline(
    tmp_path: Path, tiny_model: Any, tiny_dataset: Dataset, data: Path
) -> None:
    for folder, seed in ((tmp_path / "run", 1), (tmp_path / "run" / "baseline", 2)):
        model = tiny_model(seed=seed, model="sasrec", max_length=20)
        save_run(folder, RunConfig(model=model.config), model, tiny_dataset, str(data), {})
    adrec("evaluate", tmp_path / "run", "--history", "keep", "--json", tmp_path / "rows.json")
    rows = {row["system"]: row for row in json.loads((tmp_path / "rows.json").read_text("utf-8"))["rows"]}
    assert list(rows) == ["popularity", "sasrec+", "this run"]
    for name, folder in (("sasrec+", tmp_path / "run" / "baseline"), ("this run", tmp_path / "run")):
        found = evaluate(make_engine("cached", load_run(folder).model), tiny_dataset.examples("test"))
        assert rows[name]["NDCG@20"]["value"] == found.metrics["NDCG@20"].value


def test_bench_measures_a_run_as_it_is_served(served: Path, make_run: Callable[..., Path], data: Path) -> None:
    bare = make_run(model="sasrec")
    for folder, steps, sampler in ((served, 2, "ddim, until the top 3 stays for 1"), (bare, None, None)):
        options = ("--data", data, "--seconds", "0", "--queries", "3", "--batch-most", "2", "--quiet")
        adrec("bench", "serving", folder, "--scenarios", "offline", *options)
        (line,) = (folder / "bench" / "serving.jsonl").read_text("utf-8").splitlines()
        record = json.loads(line)
        assert (record["steps"], record["sampler"], record["error"]) == (steps, sampler, None)
        assert record["accuracy"]["users"] == 60
