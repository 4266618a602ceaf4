"""Two CPU processes train as one does. Each start is a real launch of the command, so these are slow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adrec.checkpoint import Run, load_run
from adrec.data.dataset import Dataset

pytestmark = pytest.mark.slow

# Lightning starts the other process by running the same file again; each notes its weights after every epoch.
PROGRAM = """
import os
from pathlib import Path
from adrec.checkpoint import model_fingerprint
from adrec.cli import main
from adrec.training.module import StageModule

finish = StageModule.on_train_epoch_end

def noting(self):
    finish(self)
    note = Path(os.environ["NOTES"]) / f"{self.stage}-{self.current_epoch}-{self.global_rank}"
    note.write_text(model_fingerprint(self.model.state_dict()))

StageModule.on_train_epoch_end = noting
main()
"""
SETTINGS = [
    "model.width=16",
    "model.heads=2",
    "model.max_length=12",
    "model.dropout=0",
    "model.embedding_dropout=0",
    # 60 users in batches of 7 with a last one of 4, so that processes get unequal shares.
    "train.batch_size=7",
    "train.warmup_epochs=1",
    "train.main.validate_every=2",
    "train.pretrain.validate_every=2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    tiny_dataset.save(folder)
    return folder


def launch(folder: Path, data: Path, model: str, devices: int, *options: str) -> subprocess.CompletedProcess[str]:
    notes, program = folder / "notes", folder / "train.py"
    notes.mkdir()
    program.write_text(PROGRAM, "utf-8")
    pairs = [part for setting in SETTINGS for part in ("--set", setting)]
    command = ["train", str(data), "--out", str(folder / "run"), "--model", model, "--epochs", "2", "--no-progress"]
    return subprocess.run(
        [sys.executable, str(program), *command, "--device", "cpu", "--devices", str(devices), *pairs, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "NOTES": str(notes)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def train(folder: Path, data: Path, model: str, devices: int, *options: str) -> tuple[Run, dict[str, str], str]:
    """Train in ``devices`` processes; the run, each process's fingerprint of its weights, and what was printed."""
    result = launch(folder, data, model, devices, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    notes = folder / "notes"
    return load_run(folder / "run"), {note.name: note.read_text() for note in notes.iterdir()}, result.stdout


def test_two_processes_start_in_a_new_folder(data: Path, tmp_path: Path) -> None:
    run, _, shown = train(tmp_path, data, "sasrec", 2)
    assert run.config.model == "sasrec"
    # What the user reads is said once, not once a process.
    assert shown.count("run written to") == 1


# The tests below pass --resume, which on a new folder starts afresh: how a start goes is the test above's business.


def test_two_processes_train_sasrec_as_one_does(data: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, _, _ = train(tmp_path / "one", data, "sasrec", 1)
    two, notes, _ = train(tmp_path / "two", data, "sasrec", 2, "--resume")
    assert len(notes) == 4
    for epoch in range(2):
        assert notes[f"pretrain-{epoch}-0"] == notes[f"pretrain-{epoch}-1"]
    expected = one.model.state_dict()
    for name, value in two.model.state_dict().items():
        twin = expected[name]
        if name.endswith("qkv.bias"):
            # A bias of the keys moves every logit of a row alike and has no effect: its gradient is rounding noise,
            # which Adam blows up to whole steps.
            value, twin = (torch.cat([v[:16], v[32:]]) for v in (value, twin))
        torch.testing.assert_close(value, twin, rtol=0.0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert two.metrics["validation"]["NDCG@20"] == pytest.approx(one.metrics["validation"]["NDCG@20"], abs=1e-3)


def test_two_processes_train_adrec(data: Path, tmp_path: Path) -> None:
    run, notes, _ = train(tmp_path, data, "adrec", 2, "--resume")
    # One run folder, each file written once and none left over.
    assert run.baseline() is not None
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert len(list((tmp_path / "run").rglob("last.ckpt"))) == 2
    assert len(notes) == 8
    for stage in ("pretrain", "main"):
        for epoch in range(2):
            assert notes[f"{stage}-{epoch}-0"] == notes[f"{stage}-{epoch}-1"]
    assert bool((run.model.table[0] == 0.0).all())


def test_a_batch_too_small_to_share_is_refused(data: Path, tmp_path: Path) -> None:
    result = launch(tmp_path, data, "sasrec", 2, "--resume", "--set", "train.batch_size=1")
    assert result.returncode == 2
    assert "batch_size" in result.stderr
    assert "Traceback" not in result.stderr
