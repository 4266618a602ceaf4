"""The data set that a run was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adrec.data.dataset import Dataset
from adrec.errors import RunError

if TYPE_CHECKING:
    from adrec.checkpoint import Run


def open_data(run: Run, data: Path | None = None) -> Dataset:
    """Load the data set of a run, given or remembered; raises RunError when it is not the one trained on."""
    path = remembered(run) if data is None else data
    dataset = Dataset.load(path)
    if dataset.fingerprint != run.dataset_fingerprint:
        raise RunError(
            f"{path}: fingerprint {dataset.fingerprint[:12]} is not that of the run's data set"
            f" '{run.info.dataset_name}' ({run.dataset_fingerprint[:12]}); item ids would not match. Give the data set"
            " that the run was trained on with --data"
        )
    return dataset


def remembered(run: Run) -> Path:
    """Where the data of a run is.

    Earlier versions stored a relative path as it was given: it is looked for here and in every folder that the run
    lies in. RunError when it is nowhere.
    """
    if run.data_path:
        for base in (Path(), *run.path.resolve().parents):
            if (base / run.data_path).exists():
                return base / run.data_path
    raise RunError(
        f"{run.path}: the run was trained from {run.data_path!r}, which is not there; say where the data is with --data"
    )
