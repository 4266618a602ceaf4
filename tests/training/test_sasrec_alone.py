"""`adrec train --model sasrec` trains what stage 1 of an ADRec training trains, bit for bit."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from adrec.checkpoint import load_run
from adrec.cli import build_app
from adrec.data.dataset import Dataset


def test_the_baseline_alone_is_stage_one(tiny_dataset: Dataset, tmp_path: Path) -> None:
    tiny_dataset.save(tmp_path / "data")
    common = ["--epochs", "2", "--no-progress", "--set", "model.width=16", "--seed", "3"]
    for name, options in (("whole", []), ("alone", ["--model", "sasrec"])):
        arguments = ["train", str(tmp_path / "data"), "--out", str(tmp_path / name), *common, *options]
        result = CliRunner().invoke(build_app(), arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    baseline, alone = load_run(tmp_path / "whole").baseline(), load_run(tmp_path / "alone")
    assert baseline is not None
    assert baseline.config == alone.config
    assert baseline.fingerprint == alone.fingerprint
