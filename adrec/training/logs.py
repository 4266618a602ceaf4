"""CSV and TensorBoard logs of a stage; the CSV log survives --resume."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


def stage_loggers(folder: Path, stage: str, epochs_done: int) -> list[Logger]:
    """Loggers into ``folder/csv/STAGE`` and ``folder/tensorboard/STAGE``.

    Lightning's CSV logger deletes the file of an earlier process. What it says of the ``epochs_done`` epochs that a
    resumed stage keeps is put back; what it says of an epoch cut short, which is trained again, is not.
    """
    path = folder / "csv" / stage / "metrics.csv"
    kept: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            kept = [row for row in csv.DictReader(file) if row.get("epoch") and int(row["epoch"]) < epochs_done]
    table = CSVLogger(folder, name="csv", version=stage)
    if kept:
        _restore(table, path, kept)
    return [table, TensorBoardLogger(folder, name="tensorboard", version=stage)]


@rank_zero_only
def _restore(table: CSVLogger, path: Path, rows: list[dict[str, Any]]) -> None:
    experiment: Any = table.experiment
    experiment.metrics_keys = list(rows[0])
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, experiment.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
