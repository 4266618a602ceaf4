"""`adrec train` told to stop, without room for a checkpoint, or with a folder or devices that it cannot train with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from adrec.checkpoint import load_run
from adrec.cli import build_app
from adrec.data.dataset import Dataset
from adrec.errors import ConfigError, RunError
from adrec.training.checkpoints import WholeCheckpointIO
from adrec.training.stages import train_run
from tests.training.conftest import tiny_settings

# The command sends itself the signal when its second epoch has been trained.
PROGRAM = """
import os, signal
from adrec.cli import main
from adrec.training.module import StageModule

finish = StageModule.on_train_epoch_end

def stopping(self):
    finish(self)
    if self.current_epoch == 1:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))

StageModule.on_train_epoch_end = stopping
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
OPTIONS = ["--model", "sasrec", "--set", "model.width=16", "--device", "cpu", "--devices", "1", "--no-progress"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    tiny_dataset.save(folder)
    return folder


def adrec(*arguments: str) -> None:
    result = CliRunner().invoke(build_app(), list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_in_its_status_and_the_command_that_continues(
    data: Path, tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    out = tmp_path / "run"
    command = ["train", str(data), "--out", str(out), "--epochs", "4", *OPTIONS]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "SIGNAL": str(int(sent))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == status, result.stderr
    assert f"interrupted; `adrec train {data} --out {out} --resume`, with the same settings, continues" in result.stdout
    assert "Traceback" not in result.stderr
    assert not (out / "run.json").exists()
    assert (out / "checkpoints" / "pretrain" / "last.ckpt").is_file()
    adrec("train", str(data), "--out", str(out), "--resume", "--device", "cpu", "--devices", "1", "--no-progress")
    assert load_run(out).metrics["epochs"] == 4


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stage" / "last.ckpt"
    writer = WholeCheckpointIO()
    writer.save_checkpoint({"epoch": 1, "weight": torch.ones(3)}, path)

    written: list[Path] = []

    def short(checkpoint: Any, target: Path) -> None:
        written.append(target)
        target.write_bytes(b"half of it")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", short)
        with pytest.raises(OSError, match="no space left"):
            writer.save_checkpoint({"epoch": 2}, path)
    found = writer.load_checkpoint(path, weights_only=True)
    assert (found["epoch"], found["weight"].tolist()) == (1, [1.0, 1.0, 1.0])
    # What a process killed at that point would have left.
    written[0].write_bytes(b"half of it")
    writer.save_checkpoint({"epoch": 3}, path)
    assert writer.load_checkpoint(path, weights_only=True) == {"epoch": 3}
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


def test_checkpoints_never_lie_in_the_folder_of_temporary_files(
    train_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    original = tempfile.mkstemp

    def noting(*arguments: Any, **named: Any) -> Any:
        made.append((arguments, named))
        return original(*arguments, **named)

    monkeypatch.setattr(tempfile, "mkstemp", noting)
    train_tiny(tmp_path / "run", model={"model": "sasrec"})
    assert made == []


def test_resume_needs_an_interrupted_run(train_tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", "utf-8")
    with pytest.raises(RunError, match=r"holds no interrupted run \(job\.yaml is missing\); choose another --out"):
        train_tiny(tmp_path, resume=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_precision_without_its_device_is_refused_before_the_folder_is_claimed(
    train_tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match="'16-mixed', which needs a GPU; use 32-true or bf16-mixed"):
            train_tiny(tmp_path / "run", precision="16-mixed")
    assert not (tmp_path / "run").exists()
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("devices", "accelerator", "message"),
    [
        (2, "cpu", r"train\.batch_size is 1; allowed: 2 or more, one user for each process"),
        (99, "gpu", "--device gpu --devices 99: "),
    ],
)
def test_devices_that_do_not_fit_are_refused_before_the_folder_is_claimed(
    tiny_dataset: Dataset, tmp_path: Path, devices: int, accelerator: str, message: str
) -> None:
    settings = tiny_settings(batch_size=1)
    with pytest.raises(ConfigError, match=message):
        train_run(tiny_dataset, "data", tmp_path / "run", settings, accelerator=accelerator, devices=devices)
    assert not (tmp_path / "run").exists()


def test_two_seeds_are_refused(data: Path, tmp_path: Path) -> None:
    command = ["train", str(data), "--out", str(tmp_path / "run"), "--seed", "2", *OPTIONS]
    with pytest.raises(ConfigError, match=r"--seed is 2, but --set gives train\.seed 3; drop one"):
        adrec(*command, "--set", "train.seed=3")
    assert not (tmp_path / "run").exists()
