"""The record of a run by how it is sampled: the rows of `adrec evaluate` on both splits, and how to make it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from adrec.checkpoint import save_run
from adrec.cli import build_app
from adrec.config import RunConfig, TrainConfig
from adrec.data.dataset import Dataset
from adrec.errors import ConfigError
from adrec.models import build_model
from bench.sampled import SampledRecord, main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_dataset: Dataset) -> Path:
    folder = tmp_path_factory.mktemp("sampled")
    tiny_dataset.save(folder / "data")
    model = tiny_model(timesteps=5, schedule="cosine", max_length=20, lambda_uncertainty=1.0)
    save_run(folder / "run", RunConfig(model=model.config), model, tiny_dataset, str(folder / "data"), {})
    body = model.config.baseline(TrainConfig())
    save_run(folder / "run" / "baseline", RunConfig(model=body), build_model(body), tiny_dataset, "data", {})
    return folder / "run"


def adrec(app: typer.Typer, *arguments: object) -> None:
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_the_record_holds_the_rows_of_evaluate(run: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "new" / "record.json", tmp_path / "rows.json"
    app = typer.Typer()
    app.command()(main)
    adrec(app, run, "--out", out, "--sampler", "ddpm,ddim", "--start", "noise,zero", "--until-stable", "3")
    record = SampledRecord.model_validate_json(out.read_text(encoding="utf-8"))
    assert (record.run, record.dataset, record.lambda_uncertainty) == ("run", "tiny", 1.0)
    assert record.command.startswith("python -m bench.sampled")
    options = ["--steps", "1,2,4,5", "--sampler", "ddpm,ddim", "--start", "noise,zero", "--history", "keep"]
    for each in record.evaluations:
        adrec(build_app(), "evaluate", run, *options, "--until-stable", "3", "--split", each.split, "--json", rows)
        assert (
            json.loads(rows.read_text())["rows"]
            == json.loads(out.read_text())["evaluations"][
                [other.split for other in record.evaluations].index(each.split)
            ]["rows"]
        )
    assert [each.split for each in record.evaluations] == ["test", "validation"]
    found = [row for row in record.evaluations[0].rows if row["system"] == "adrec"]
    assert len(found) == 4 * 4 + 2 * 4, "early stop is added where there are 3 steps or more"
    assert all(row["NDCG@20 kept"]["value"] > 0.0 for row in found)
    for row in found:
        stops = "until the top 3 stays" in row["sampler"]
        assert (row["mean steps"] <= row["steps"]) if stops else (row["mean steps"] == row["steps"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--until-stable", "99"], "--until-stable is 99; allowed: 1 to 40, the size of the catalogue"),
        (["--steps", "9"], "--steps holds 9; allowed: 1 to 5"),
        (["--sampler", "heun"], "--sampler"),
    ],
)
def test_bad_options_are_named(run: Path, tmp_path: Path, options: list[str], message: str) -> None:
    app = typer.Typer()
    app.command()(main)
    with pytest.raises(ConfigError, match=message):
        adrec(app, run, "--out", tmp_path / "record.json", *options)
    with pytest.raises(ConfigError, match="has no reverse steps; give a run of adrec"):
        adrec(app, run / "baseline", "--out", tmp_path / "record.json")


def test_an_early_stop_needs_to_be_told_how_many_steps(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"--until-stable 3 need --steps: say how many"):
        adrec(build_app(), "evaluate", run, "--until-stable", "3")
