"""Checkpoints of an interrupted stage: written whole, read without executing code, true after the folder has moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from adrec.errors import RunError
from adrec.files import replacing


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the one that it then replaces.

    Lightning's own writes to the folder of temporary files. From another file system the move is a copy over the only
    checkpoint, which an interruption leaves half-written.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of a process that was killed while it wrote.
        for left in path.parent.glob(f".{path.name}.*.partial"):
            left.unlink()
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)


class MovableCheckpoint(ModelCheckpoint):
    """Keeps what it knew about the best weights when a run folder was moved between an interruption and --resume."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        folder = str(self.dirpath)

        def here(path: str) -> str:
            return str(Path(folder) / Path(path).name) if path else path

        models = {here(path): score for path, score in state_dict["best_k_models"].items()}
        paths = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        super().load_state_dict({**state_dict, **paths, "best_k_models": models, "dirpath": folder})


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint (tensors and plain values only); raises RunError naming a damaged one."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; all mean the same to the user
        kind = type(error).__name__
        raise RunError(f"{path}: the checkpoint cannot be read ({kind}); remove it to start its stage again") from None


def stage_ended(last: Path, stopping: EarlyStopping, best: ModelCheckpoint) -> bool:
    """Whether an interrupted stage had already stopped early; then ``best`` is told where the best weights are."""
    if not last.is_file():
        return False
    states = read_checkpoint(last)["callbacks"]
    if states[stopping.state_key]["wait_count"] < stopping.patience:
        return False
    best.load_state_dict(states[best.state_key])
    return True
