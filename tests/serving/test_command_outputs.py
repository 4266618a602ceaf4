"""Outputs that cannot be written are refused before any work, and no system error ends in a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adrec import cli
from adrec.errors import ConfigError, RunError


def adrec(*arguments: object) -> None:
    CliRunner().invoke(cli.build_app(), [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.mark.parametrize("name", ["none/rows.json", "folder"])
def test_outputs_are_checked_before_anything_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--json is"):
        adrec("evaluate", tmp_path / "no run", "--json", tmp_path / name)
    with pytest.raises(ConfigError, match="--out is"):
        adrec("recommend", tmp_path / "no run", "--input", tmp_path / "in.csv", "--out", tmp_path / f"{name}.csv")
    for command in (["train", "no data"], ["import-checkpoint", tmp_path / "file", "--dataset", "no data"]):
        with pytest.raises(ConfigError, match="file is a file, not a folder; choose another --out"):
            adrec(*command, "--out", tmp_path / "file")


def test_a_missing_checkpoint_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"nope\.pth: no such file"):
        adrec("import-checkpoint", tmp_path / "nope.pth", "--dataset", "data", "--out", tmp_path / "run")


def test_an_unforeseen_system_error_ends_in_a_message_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> Any:
        return lambda: Path("no/such/file").read_bytes()

    monkeypatch.setattr(cli, "build_app", fails)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no/such/file: No such file or directory\n"
