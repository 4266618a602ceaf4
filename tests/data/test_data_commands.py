"""`adrec prepare` and `adrec synthesize` through the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from adrec.commands.prepare import register
from adrec.data.dataset import Dataset
from adrec.errors import AdrecError, DataError


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    register(app)
    return app


def run(app: typer.Typer, *arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_synthesize_then_prepare(app: typer.Typer, tmp_path: Path) -> None:
    size = ("--users", 200, "--items", 50, "--mean-length", 8, "--seed", 3)
    shown = run(app, "synthesize", "--out", tmp_path / "demo", "--raw", tmp_path / "raw.csv", *size)
    dataset = Dataset.load(tmp_path / "demo")
    assert dataset.name == "demo"
    assert dataset.info.synthetic is not None
    for text in (
        f"{dataset.info.interactions:,}",
        f"{dataset.info.synthetic['bayes_hr20']:.2f} %",
        "popularity HR@20",
    ):
        assert text in shown
    shown = run(app, "prepare", tmp_path / "raw.csv", "--out", tmp_path / "out", "--core", 3, "--deduplicate")
    prepared = Dataset.load(tmp_path / "out")
    for label in (
        "users",
        "items",
        "interactions",
        "mean length",
        "median length",
        "density",
        "test examples",
    ):
        assert label in shown
    assert prepared.fingerprint[:12] in shown
    assert prepared.info.protocol["core"] == 3


def test_temporal_options(app: typer.Typer, tmp_path: Path) -> None:
    run(app, "synthesize", "--raw", tmp_path / "raw.parquet", "--users", 300, "--items", 50)
    bounds = ("--split", "temporal", "--validation-from", "2021-02-01", "--test-from", "0.9")
    run(app, "prepare", tmp_path / "raw.parquet", "--out", tmp_path / "out", *bounds)
    protocol = Dataset.load(tmp_path / "out").info.protocol
    assert protocol["split"] == "temporal"
    assert protocol["validation_start"] == 1_612_137_600


def test_errors_reach_the_caller_as_data_errors(app: typer.Typer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to write: give --out"):
        run(app, "synthesize")
    with pytest.raises(DataError, match="no such file"):
        run(app, "prepare", tmp_path / "none.csv", "--out", tmp_path / "out")
    run(app, "synthesize", "--out", tmp_path / "out", "--users", 20, "--items", 20)
    with pytest.raises(DataError, match="pass --overwrite"):
        run(app, "synthesize", "--out", tmp_path / "out", "--raw", tmp_path / "raw.csv")
    assert not (tmp_path / "raw.csv").exists()
    run(app, "synthesize", "--out", tmp_path / "out", "--users", 30, "--items", 20, "--overwrite")
    assert Dataset.load(tmp_path / "out").user_count == 30


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--raw", "none/raw.csv", "the folder .*none does not exist"),
        ("--raw", "folder.csv", "a folder; give the name of a file"),
        ("--out", "file/out", "file is a file, not a folder"),
    ],
)
def test_places_that_cannot_be_written_are_refused_before_any_work(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, name: str, message: str
) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.delattr("adrec.data.synthesize._draw")
    with pytest.raises(AdrecError, match=message):
        run(app, "synthesize", option, tmp_path / name)


def test_help_states_the_rules(app: typer.Typer) -> None:
    shown = " ".join(run(app, "prepare", "--help").split())
    for rule in (
        "ties keep the input's order",
        "fewer than 3 interactions",
        "keeps the earliest",
        "Four numbers between tabs",
    ):
        assert rule in shown


def test_commands_import_nothing_heavy() -> None:
    program = (
        "import sys, adrec.commands.prepare; "
        "print([name for name in ('torch', 'polars', 'pyarrow', 'pydantic') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
