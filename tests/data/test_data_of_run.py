"""The data of a run is found from any directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adrec.checkpoint import RUN_FILE, load_run, save_run
from adrec.config import RunConfig
from adrec.data.dataset import Dataset
from adrec.data.of_run import open_data
from adrec.errors import RunError
from adrec.models.base import SequenceModel


def test_data_given_by_a_relative_path_is_found_from_anywhere(
    tiny_model: Callable[..., SequenceModel], tiny_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by runs of earlier versions, which stored the path as it was given, where one folder holds run and data."""
    project, elsewhere, model = tmp_path / "project", tmp_path / "elsewhere", tiny_model()
    tiny_dataset.save(project / "data")
    elsewhere.mkdir()
    monkeypatch.chdir(project)
    save_run(Path("runs/new"), RunConfig(model=model.config), model, tiny_dataset, "data", {})
    shutil.copytree("runs/new", "runs/old")
    info = json.loads(Path("runs/old", RUN_FILE).read_text("utf-8"))
    assert info["data_path"] == str(project / "data")
    Path("runs/old", RUN_FILE).write_text(json.dumps(info | {"data_path": "data"}), "utf-8")
    for place in (project, project / "runs", elsewhere):
        monkeypatch.chdir(place)
        for name in ("new", "old"):
            assert open_data(load_run(project / "runs" / name)).fingerprint == tiny_dataset.fingerprint
    monkeypatch.chdir(project / "runs")
    assert open_data(load_run("old")).fingerprint == tiny_dataset.fingerprint
    shutil.rmtree(project / "data")
    with pytest.raises(RunError, match="trained from 'data', which is not there; say where the data is with --data"):
        open_data(load_run("old"))
