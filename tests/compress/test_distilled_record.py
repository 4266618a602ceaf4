"""The record of distilled runs: shares of the teacher, of SASRec+, and what a reader needs to repeat a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adrec.errors import ConfigError
from bench.distilled import DistilledRecord, main
from compress.api import compress_run
from compress.recipe import Recipe


def test_record_of_a_student(compressible_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = {"technique": "student", "encoder_blocks": 1, "denoiser_blocks": 1, "optimiser": {"epochs": 1}}
    student = tmp_path / "student"
    compress_run(compressible_run, Recipe.model_validate({"stages": [stage], "max_loss": 99}), student)
    out = tmp_path / "new" / "record.json"
    main(compressible_run, [student], out)
    record = DistilledRecord.model_validate_json(out.read_text(encoding="utf-8"))
    assert [(row.split, row.role) for row in record.rows] == [
        (split, role) for split in ("validation", "test") for role in ("teacher", "baseline", "distilled")
    ]
    teacher, baseline, distilled = record.rows[:3]
    assert teacher.kept_percent is not None
    assert teacher.kept_percent.low == pytest.approx(100.0)
    assert (teacher.blocks, baseline.blocks, distilled.blocks) == (2 + 4 * 2, 2, 1 + 1)
    assert distilled.recipe is not None
    assert distilled.recipe["stages"][0]["technique"] == "student"
    assert distilled.changed is not None
    assert distilled.changed[0].detail["epochs"] == 1
    assert distilled.sampled == "1 step, ddim from noise"
    assert teacher.recipe is teacher.changed is None
    share = 100.0 * distilled.metrics_percent["NDCG@20"].value / teacher.metrics_percent["NDCG@20"].value
    assert distilled.kept_percent is not None
    assert distilled.kept_percent.value == pytest.approx(share, rel=1e-6)
    assert str(tmp_path) not in json.dumps(record.model_dump(mode="json"))
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a folder"):
        main(tmp_path / "none", [], tmp_path)
