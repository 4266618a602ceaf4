"""A run that is interrupted anywhere and resumed ends in the bits of a run that was not."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from adrec.checkpoint import Run, load_run
from adrec.cli import build_app
from adrec.data.dataset import Dataset
from adrec.errors import AdrecError, ConfigError, RunError
from adrec.training import stages
from adrec.training.module import StageModule

EPOCHS = 4
# Patience below the number of epochs, so that its state has to survive too.
OPTIONS: dict[str, Any] = {"epochs": EPOCHS, "warmup_epochs": 2, "seed": 7, "pcgrad": True, "pretrain": {"patience": 3}}


class PowerCutError(Exception):
    """Stands for the process dying: nothing in the product catches it."""


@pytest.fixture(scope="module")
def uninterrupted(train_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_tiny(tmp_path_factory.mktemp("whole") / "run", **OPTIONS)


def cut(
    monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, when: Callable[..., bool], after: bool = False
) -> None:
    original = getattr(owner, method)

    def wrapped(self: Any, *arguments: Any, **named: Any) -> Any:
        if not after and when(self):
            raise PowerCutError
        result = original(self, *arguments, **named)
        if after and when(self):
            raise PowerCutError
        return result

    monkeypatch.setattr(owner, method, wrapped)


def at(stage: str, epoch: int, step: int | None = None) -> Callable[[Any], bool]:
    def when(module: Any) -> bool:
        here = module.stage == stage and module.current_epoch == epoch
        return here and (step is None or module.global_step == step)

    return when


CUTS: dict[str, tuple[str, Callable[[Any], bool], bool]] = {
    "first step": ("training_step", at("pretrain", 0, 0), False),
    "middle of stage 1": ("training_step", at("pretrain", 2, 9), False),
    "validation of stage 1": ("validation_step", at("pretrain", 1), False),
    "before stage 2": ("training_step", at("main", 0, 0), False),
    "warm-up": ("training_step", at("main", 1, 6), False),
    "start of stage 3": ("training_step", at("main", 2, 8), False),
    "between best and last": ("on_train_epoch_end", at("main", 3), False),
    "between scheduler and last": ("on_train_epoch_end", at("main", 2), True),
}


def same_run(found: Run, expected: Run) -> None:
    assert (found.path / "model.safetensors").read_bytes() == (expected.path / "model.safetensors").read_bytes()
    for name in ("validation", "epochs"):
        assert found.metrics[name] == expected.metrics[name]
    own, other = found.baseline(), expected.baseline()
    assert (own is None) == (other is None)
    if own is not None and other is not None:
        same_run(own, other)


@pytest.mark.parametrize("place", CUTS)
def test_resumed_run_is_bit_identical(
    train_tiny: Any, uninterrupted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    method, when, after = CUTS[place]
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        cut(patch, StageModule, method, when, after)
        with pytest.raises(PowerCutError):
            train_tiny(out, **OPTIONS)
    assert not (out / "run.json").exists()
    # What was drawn in the meantime must not matter.
    torch.manual_seed(12345)
    same_run(train_tiny(out, resume=True, **OPTIONS), uninterrupted)


def test_resumed_twice(train_tiny: Any, uninterrupted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for epoch in (1, 2, 3):
        with monkeypatch.context() as patch:
            cut(patch, StageModule, "training_step", at("main", epoch))
            with pytest.raises(PowerCutError):
                train_tiny(tmp_path / "run", resume=True, **OPTIONS)
    same_run(train_tiny(tmp_path / "run", resume=True, **OPTIONS), uninterrupted)


@pytest.mark.parametrize("stage", ["pretrain", "main"])
@pytest.mark.parametrize("early", [False, True], ids=["all epochs", "stopped early"])
def test_cut_between_the_last_epoch_and_the_run_folder(
    train_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, early: bool
) -> None:
    options = dict(OPTIONS)
    if early:
        # A rate that ruins the model at once: the patience of 1 ends the stage long before its epochs are over.
        options[stage] = {"learning_rate": 0.5, "patience": 1, "epochs": 30}
    expected = train_tiny(tmp_path / "whole", **options)
    original = stages.save_run
    target = tmp_path / "run" / ("baseline" if stage == "pretrain" else "")

    def dying(path: Path, *arguments: Any) -> None:
        if path == target:
            raise PowerCutError
        original(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "save_run", dying)
        with pytest.raises(PowerCutError):
            train_tiny(tmp_path / "run", **options)
    same_run(train_tiny(tmp_path / "run", resume=True, **options), expected)


def test_cut_while_the_run_folder_is_written(
    train_tiny: Any, uninterrupted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adrec import checkpoint

    def dying(path: Path, metrics: Any) -> None:
        raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_metrics", dying)
        with pytest.raises(PowerCutError):
            train_tiny(tmp_path / "run", **OPTIONS)
    with pytest.raises(RunError, match=r"run\.json is missing"):
        load_run(tmp_path / "run" / "baseline")
    same_run(train_tiny(tmp_path / "run", resume=True, **OPTIONS), uninterrupted)


def interrupted(train_tiny: Any, out: Path, monkeypatch: pytest.MonkeyPatch, stage: str = "main", **more: Any) -> Path:
    with monkeypatch.context() as patch:
        cut(patch, StageModule, "training_step", at(stage, 2))
        with pytest.raises(PowerCutError):
            train_tiny(out, **{**OPTIONS, **more})
    return out


def test_the_folder_may_move_in_between(train_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Too large a rate: the best epoch lies before the cut, and what comes after must not replace it.
    ruinous: dict[str, Any] = {"main": {"learning_rate": 1.0, "patience": 9}, "warmup_epochs": 0, "pcgrad": False}
    options = {**OPTIONS, **ruinous}
    expected = train_tiny(tmp_path / "whole", **options)
    best = torch.load(expected.path / "checkpoints" / "main" / "best.ckpt", weights_only=True)
    assert best["epoch"] < 2, "the test needs a run whose best epoch lies before the cut"
    out = interrupted(train_tiny, tmp_path / "run", monkeypatch, **ruinous)
    out.rename(tmp_path / "moved")
    same_run(train_tiny(tmp_path / "moved", resume=True, **options), expected)


def test_the_log_keeps_the_epochs_before_the_cut(
    train_tiny: Any, uninterrupted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = interrupted(train_tiny, tmp_path / "run", monkeypatch)
    train_tiny(out, resume=True, **OPTIONS)

    def validations(folder: Path) -> list[tuple[str, str]]:
        with (folder / "logs" / "csv" / "main" / "metrics.csv").open(encoding="utf-8") as file:
            return [(row["epoch"], row["val_NDCG@20"]) for row in csv.DictReader(file) if row["val_NDCG@20"]]

    assert validations(out) == validations(uninterrupted.path)


def test_resuming_a_finished_run_is_refused(train_tiny: Any, uninterrupted: Run) -> None:
    before = (uninterrupted.path / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(RunError, match="already a finished run"):
        train_tiny(uninterrupted.path, resume=True, **OPTIONS)
    assert (uninterrupted.path / "model.safetensors").stat().st_mtime_ns == before


def test_resume_of_nothing_starts_afresh(train_tiny: Any, uninterrupted: Run, tmp_path: Path) -> None:
    same_run(train_tiny(tmp_path / "new", resume=True, **OPTIONS), uninterrupted)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"model": {"width": 8}}, "model.width"),
        ({"model": {"padding": "masked"}}, "model.padding"),
        ({"model": {"model": "sasrec"}}, "model.model"),
        ({"seed": 8}, "train.seed"),
        ({"batch_size": 8}, "train.batch_size"),
        ({"epochs": 9}, "train.main.epochs, train.pretrain.epochs"),
        ({"pcgrad": False}, "train.pcgrad"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    train_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], key: str
) -> None:
    out = interrupted(train_tiny, tmp_path / "run", monkeypatch, stage="pretrain")
    kept = (out / "checkpoints" / "pretrain" / "last.ckpt").read_bytes()
    with pytest.raises(ConfigError, match=rf"was being trained with other settings \({key}\)"):
        train_tiny(out, resume=True, **{**OPTIONS, **more})
    assert (out / "checkpoints" / "pretrain" / "last.ckpt").read_bytes() == kept


def test_resuming_with_other_data_is_refused(
    train_tiny: Any, tmp_path: Path, tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = interrupted(train_tiny, tmp_path / "run", monkeypatch, stage="pretrain")
    rows = [[(user + place) % 40 + 1 for place in range(6)] for user in range(40)]
    other = Dataset.from_lists([r[:4] for r in rows], [r[4:5] for r in rows], [r[5:] for r in rows], "tiny")
    assert other.item_count == tiny_dataset.item_count
    with pytest.raises(ConfigError, match="dataset_fingerprint"):
        train_tiny(out, dataset=other, resume=True, **OPTIONS)


def test_a_damaged_checkpoint_is_named(train_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = interrupted(train_tiny, tmp_path / "run", monkeypatch)
    path = out / "checkpoints" / "main" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(AdrecError, match=r"last\.ckpt"):
        train_tiny(out, resume=True, **OPTIONS)


# --- the command ------------------------------------------------------------------------------------------------------

COMMAND = ["--device", "cpu", "--devices", "1", "--no-progress"]
SETTINGS = [
    "model.width=16",
    "model.heads=2",
    "model.max_length=12",
    "train.batch_size=8",
    "train.warmup_epochs=3",
    "train.pretrain.patience=100",
    "train.main.patience=100",
    "train.pretrain.validate_every=2",
    "train.main.validate_every=2",
]


def command_line(data: Path, out: Path, *options: str, epochs: int = 4) -> list[str]:
    pairs = [part for setting in SETTINGS for part in ("--set", setting)]
    fixed = ["--epochs", str(epochs), "--seed", "2", *COMMAND]
    return ["train", str(data), "--out", str(out), *fixed, *pairs, *options]


def adrec(*arguments: str) -> str:
    result = CliRunner().invoke(build_app(), list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    tiny_dataset.save(folder)
    return folder


def stopped(out: Path, checkpoint: Path, saves: int, arguments: list[str]) -> None:
    """Run the command in a process of its own and kill it once ``checkpoint`` has been written ``saves`` times."""
    program = [sys.executable, "-c", "from adrec.cli import main; main()", *arguments]
    process = subprocess.Popen(program, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    try:
        seen: set[int] = set()
        end = time.monotonic() + 240
        while len(seen) < saves:
            assert process.poll() is None, "the command ended before it could be killed"
            assert time.monotonic() < end, "no checkpoint was written"
            try:
                seen.add(checkpoint.stat().st_mtime_ns)
            except FileNotFoundError:
                time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "run.json").exists(), "killed too late for this test"


@pytest.fixture(scope="module")
def commanded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What the command makes when nobody kills it."""
    out = tmp_path_factory.mktemp("commanded") / "run"
    adrec(*command_line(data, out, epochs=20))
    return load_run(out)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "main"])
def test_killed_command_resumes_to_the_same_bits(data: Path, commanded: Run, tmp_path: Path, stage: str) -> None:
    out = tmp_path / "run"
    stopped(out, out / "checkpoints" / stage / "last.ckpt", 4, command_line(data, out, epochs=20))
    assert (out / "baseline" / "run.json").exists() == (stage == "main")
    shown = adrec(*command_line(data, out, "--resume", epochs=20))
    assert ("stage 1 is finished" in shown) == (stage == "main")
    same_run(load_run(out), commanded)
    assert not [path.name for path in out.rglob("*.tmp")]


@pytest.fixture
def halted(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of the command that was cut in stage 1."""
    out = tmp_path / "halted"
    with monkeypatch.context() as patch:
        cut(patch, StageModule, "training_step", at("pretrain", 2))
        with pytest.raises(PowerCutError):
            adrec(*command_line(data, out))
    return out


def test_command_resumes_without_repeating_its_settings(data: Path, halted: Path) -> None:
    adrec("train", str(data), "--out", str(halted), "--resume", *COMMAND)
    run = load_run(halted)
    assert run.settings.train is not None
    assert (run.config.width, run.settings.train.seed, run.settings.train.main.epochs) == (16, 2, 4)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["--seed", "3"], "train.seed"),
        (["--epochs", "31"], "train.main.epochs"),
        (["--set", "model.width=32"], "model.width"),
        (["--model", "sasrec"], "--model is 'sasrec'"),
    ],
)
def test_command_refuses_other_settings_on_resume(data: Path, halted: Path, options: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        adrec("train", str(data), "--out", str(halted), "--resume", *COMMAND, *options)
    assert not (halted / "run.json").exists()


def test_command_asks_for_resume(data: Path, halted: Path) -> None:
    with pytest.raises(RunError, match="not empty; continue an interrupted run with --resume"):
        adrec(*command_line(data, halted))
