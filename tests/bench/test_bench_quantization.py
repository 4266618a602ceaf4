"""The record of quantisation: what a tiny measurement writes, and that the rules in the code are the record's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adrec.checkpoint import save_run
from adrec.config import RunConfig
from adrec.data.dataset import Dataset
from adrec.models.item_tables import DENSE_ITEMS
from bench.quantization import __main__ as command
from bench.quantization import timings
from compress.quantize import AUTO_ROWS

RECORDS = Path(__file__).resolve().parents[2] / "bench" / "records"


def test_a_tiny_measurement(
    tmp_path: Path, tiny_model: Any, tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    model = tiny_model(width=32, timesteps=4, schedule="cosine", max_length=20)
    tiny_dataset.save(tmp_path / "data")
    save_run(tmp_path / "run", RunConfig(model=model.config), model, tiny_dataset, "", {})
    for name, value in {"SHAPES": ((16, 24),), "LAYER_ROWS": (1, 600), "CATALOGUES": (60,), "BATCHES": (3,)}.items():
        monkeypatch.setattr(timings, name, value)
    kept = ("float32", "weights int8", "both int8")
    monkeypatch.setattr(command, "RECIPES", {name: command.RECIPES[name] for name in kept})
    out = tmp_path / "record.json"
    command.main(out, [tmp_path / "run"], [tmp_path / "data"], seconds=1e-4)
    record = json.loads(out.read_text())
    assert [layer["rows"] for layer in record["layers"]] == [1, 600]
    assert set(record["layers"][0]["time_over_float32"]) == {
        "int8-dynamic",
        "int8, computed in bfloat16",
        "torchao int8 dynamic, eager",
    }
    assert record["scoring"][0]["recall@20"].keys() == {"int8", "bf16"}
    (run,) = record["runs"]
    assert [row["recipe"] for row in run["formats"]] == list(kept)
    first, sizes = run["formats"][0], {row["recipe"]: row["file_bytes"] for row in run["formats"]}
    assert first["test"]["kept_percent"] == [100.0, 100.0, 100.0]
    assert sizes["both int8"] < sizes["weights int8"] < sizes["float32"]
    assert [each["users"] for each in run["engine"]] == [1, 512]


def test_the_rules_are_those_of_the_record() -> None:
    record = json.loads((RECORDS / "quantized-layers-cpu.json").read_text())
    rows = [layer for layer in record["layers"] if layer["rows"] >= AUTO_ROWS]
    assert rows
    for layer in rows:
        for name in ("int8-dynamic", "int8, computed in bfloat16"):
            assert layer["time_over_float32"][name][0] < 1.0, (layer["inputs"], layer["outputs"], layer["rows"], name)
    large = [each for each in record["scoring"] if each["items"] + 1 >= DENSE_ITEMS]
    assert large
    for each in large:
        assert each["time_over_float32"]["int8"][0] < 1.0, (each["items"], each["users"])
    for run in json.loads((RECORDS / "quantized-cpu.json").read_text())["runs"]:
        found = {row["recipe"]: row for row in run["formats"]}
        assert found["both int8"]["file_bytes"] <= found["float32"]["file_bytes"] / 3
        assert found["weights int8"]["lowest_sqnr_db"] > 35.0
