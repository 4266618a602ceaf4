"""What `adrec evaluate` says of a compressed run: its share of the run it was made of, measured or as stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adrec.checkpoint import load_run
from adrec.cli import build_app
from adrec.data.dataset import Dataset
from adrec.engines import CachedEngine
from adrec.errors import RunError
from adrec.evaluation import evaluate, kept_percent
from adrec.source import recorded_source
from compress.api import Compression, compress_run
from compress.recipe import Recipe

pytestmark = pytest.mark.usefixtures("toys")


@pytest.fixture
def teacher(compressible_run: Path, tmp_path: Path) -> Path:
    """A run served by settings of its own."""
    recipe = Recipe.model_validate({"stages": [{"technique": "serve", "times": [1, 3]}], "max_loss": 90})
    compress_run(compressible_run, recipe, tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def made(teacher: Path, tmp_path: Path) -> Compression:
    recipe = Recipe.model_validate({"stages": [{"technique": "forget", "keep": 20}], "max_loss": 90})
    return compress_run(teacher, recipe, tmp_path / "small")


def rows_of(tmp_path: Path, *options: object) -> tuple[str, dict[str, Any]]:
    out = tmp_path / "rows.json"
    command = ["evaluate", tmp_path / "small", "--history", "keep", "--json", out, *options]
    result = CliRunner().invoke(build_app(), [str(part) for part in command], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output, json.loads(out.read_text())


def test_the_kept_share_is_paired_with_the_source(made: Compression, tmp_path: Path, tiny_dataset: Dataset) -> None:
    shown, content = rows_of(tmp_path, "--seeds", "0,7")
    source, small = load_run(tmp_path / "teacher"), load_run(tmp_path / "small")
    examples = tiny_dataset.examples("test")
    for seed in (0, 7):
        of, found = (
            evaluate(CachedEngine(run.model), examples, steps=run.settings.serving, seed=seed)
            for run in (source, small)
        )
        expected = kept_percent(found.ranks, of.ranks)
        assert expected is not None
        rows = {row["system"]: row for row in content["rows"] if row["seed"] == seed or row["system"] == "sasrec+"}
        share = rows["adrec"]["NDCG@20 of source"]
        assert share == {"value": expected.value, "low": expected.low, "high": expected.high}
        assert rows["source"]["NDCG@20"]["value"] == of.metrics["NDCG@20"].value
        assert (rows["source"]["steps"], rows["source"]["sampler"]) == (2, "ddpm")
        assert "NDCG@20 of source" not in rows["source"]
        assert "NDCG@20 of source" not in rows["sasrec+"]
    assert f"source: {tmp_path / 'teacher'}, the run that this one was made of" in shown
    assert "NDCG@20 of source" in shown
    assert content["source"]["evaluated"] is True


def test_moved_together_they_still_find_each_other(made: Compression, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name in ("teacher", "small"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    _, content = rows_of(tmp_path / "elsewhere")
    assert any("NDCG@20 of source" in row for row in content["rows"])


@pytest.mark.parametrize("what", ["gone", "another"])
def test_without_its_source_the_stored_figure_is_shown_and_said_to_be(
    made: Compression, compressible_run: Path, tmp_path: Path, what: str
) -> None:
    shutil.rmtree(tmp_path / "teacher")
    if what == "another":
        shutil.copytree(tmp_path / "small", tmp_path / "teacher")
    shown, content = rows_of(tmp_path)
    accuracy = made.receipts[-1].accuracy
    assert accuracy is not None
    kept = accuracy.kept
    assert kept is not None
    figure = f"not measured now, it kept {kept.value:.2f} % [{kept.low:.2f}, {kept.high:.2f}] of that run's validation"
    assert f"source: {tmp_path / 'teacher'}, the run that this one was made of, is not there or has changed" in shown
    assert figure in shown
    assert content["source"]["validation_kept"] == kept.model_dump()
    assert content["source"]["evaluated"] is False
    assert not any("NDCG@20 of source" in row for row in content["rows"])
    # It may be named from anywhere.
    _, content = rows_of(tmp_path, "--source", compressible_run)
    assert content["source"]["evaluated"] is True


def test_a_run_that_was_trained_has_no_source(compressible_run: Path) -> None:
    assert recorded_source(load_run(compressible_run)) is None


def test_a_run_that_is_not_the_source_is_refused(made: Compression, compressible_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"--source .*baseline: is not the run that .*small was made of, which was .*"):
        rows_of(tmp_path, "--source", compressible_run / "baseline")
    metrics = tmp_path / "small" / "metrics.json"
    metrics.write_text(json.dumps({"source": {"run": 3}}))
    with pytest.raises(RunError, match=r"metrics\.json: source: run is 3; allowed: .*\n.*Restore the file from a copy"):
        rows_of(tmp_path)


def test_a_source_of_other_data_is_refused(made: Compression, compressible_run: Path, tmp_path: Path) -> None:
    metrics, other = tmp_path / "small" / "metrics.json", tmp_path / "other"
    metrics.write_text("{}")
    shutil.copytree(compressible_run, other)
    info = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(info | {"dataset_fingerprint": "f" * 64}))
    with pytest.raises(RunError, match=r"--source .*other: was trained on 'tiny' \(ffff.*give a run of the same data"):
        rows_of(tmp_path, "--source", other)
