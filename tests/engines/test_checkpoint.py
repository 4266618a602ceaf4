"""Run folders: what is saved comes back, and what is damaged is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from adrec import checkpoint
from adrec.checkpoint import load_run, model_fingerprint, save_run, write_metrics
from adrec.config import RunConfig, TrainConfig
from adrec.data.dataset import Dataset
from adrec.data.jagged import Jagged
from adrec.engines import make_engine
from adrec.errors import RunError
from adrec.models.base import SequenceModel

FILES = ["config.yaml", "items.parquet", "metrics.json", "model.safetensors", "run.json"]
METRICS = {"validation": {"NDCG@20": 7.5}, "epochs": 3}


@pytest.fixture
def model(tiny_model: Callable[..., SequenceModel]) -> SequenceModel:
    return tiny_model(timesteps=32, positions="learned", max_length=9, lambda_uncertainty=0.1)


@pytest.fixture
def saved(tmp_path: Path, model: SequenceModel, tiny_dataset: Dataset) -> Path:
    """A run folder of the tiny model."""
    path = tmp_path / "runs" / "first"
    settings = RunConfig(model=model.config, train=TrainConfig(seed=5, pcgrad=True))
    save_run(path, settings, model, tiny_dataset, "data/tiny", METRICS)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(RunError) as caught:
        load_run(path)
    return str(caught.value)


def with_text_ids(dataset: Dataset) -> Dataset:
    return dataclasses.replace(dataset, item_ids=pa.array([f"B00{item:02d} é" for item in range(dataset.item_count)]))


@pytest.mark.parametrize("text", [False, True], ids=["int", "string"])
@pytest.mark.parametrize("kind", ["adrec", "sasrec"])
def test_round_trip(
    tmp_path: Path, tiny_model: Callable[..., SequenceModel], tiny_dataset: Dataset, text: bool, kind: str
) -> None:
    model = tiny_model(model=kind, lambda_uncertainty=0.1)
    dataset = with_text_ids(tiny_dataset) if text else tiny_dataset
    settings = RunConfig(model=model.config, train=TrainConfig(seed=5))
    save_run(tmp_path / "run", settings, model, dataset, "data/tiny", METRICS)
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == FILES
    run = load_run(tmp_path / "run")
    assert run.settings == settings
    assert run.config == model.config
    assert run.item_ids.equals(dataset.item_ids)
    assert run.item_ids.type == (pa.string() if text else pa.int64())
    assert torch.equal(run.item_counts, dataset.item_counts())
    assert (run.metrics, run.data_path) == (METRICS, "data/tiny")
    assert run.dataset_fingerprint == dataset.fingerprint
    assert run.info.dataset_name == "tiny"
    assert run.fingerprint == model_fingerprint(model.state_dict())
    assert not run.model.training
    assert run.baseline() is None
    for name, value in model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value), name
    histories = Jagged.from_lists([[1, 2, 3], [40]])
    rows = [make_engine("cached", one).represent(histories) for one in (model, run.model)]
    assert torch.equal(*rows)


def test_a_baseline_inside_the_run_is_found(
    saved: Path, tiny_model: Callable[..., SequenceModel], tiny_dataset: Dataset
) -> None:
    body = tiny_model(model="sasrec", positions="learned")
    save_run(saved / "baseline", RunConfig(model=body.config), body, tiny_dataset, "data/tiny", {})
    baseline = load_run(saved).baseline()
    assert baseline is not None
    assert baseline.config.model == "sasrec"


def test_the_fingerprint_sees_names_shapes_types_and_values() -> None:
    base = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0])}
    variants = [
        {"a": torch.tensor([[1.0, 2.0]]), "c": torch.tensor([3.0])},
        {"a": torch.tensor([[1.0], [2.0]]), "b": torch.tensor([3.0])},
        {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0]).view(torch.int32)},
        {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0000002])},
    ]
    assert len({model_fingerprint(state) for state in [base, *variants]}) == 5
    assert model_fingerprint(dict(reversed(base.items()))) == model_fingerprint(base)
    assert model_fingerprint({"a": torch.ones(2, 3).T}) == model_fingerprint({"a": torch.ones(3, 2)})


def test_tampered_weights_are_refused(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    state["item_embedding.weight"][7, 3] += 1e-6
    save_file(state, saved / "model.safetensors")
    message = refusal(saved)
    assert str(saved / "model.safetensors") in message
    assert "do not match the fingerprint in run.json" in message


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    message = refusal(saved)
    assert str(saved) in message
    assert name in message


def test_no_run_at_all_says_how_to_make_one(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert "not a finished run (run.json is missing)" in message
    assert "adrec train DATA" in message


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(saved: Path, name: str) -> None:
    path = saved / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refusal(saved)
    assert str(saved) in message
    assert name in message


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_noise_is_named(saved: Path, name: str) -> None:
    (saved / name).write_bytes(b"\x00\xff\x80 [: not it" * 9)
    message = refusal(saved)
    assert str(saved) in message
    assert name in message


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
def test_another_schema_version_is_refused(saved: Path, name: str) -> None:
    path = saved / name
    if name == "run.json":
        path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))
    else:
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "schema_version": 2}))
    message = refusal(saved)
    assert str(path) in message
    assert "schema_version is 2; allowed: 1" in message
    writer = json.loads((saved / "run.json").read_text())["tool_version"]
    assert f"read the run with adrec {writer}, which wrote the run, restore {name} from a copy, or train" in message


def test_a_run_of_an_unknown_writer_says_what_to_do_too(saved: Path) -> None:
    (saved / "run.json").write_text("[1]")
    message = refusal(saved)
    assert "settings is [1]; expected a section of settings" in message
    assert "read the run with the adrec that wrote the run, restore run.json from a copy, or train" in message


def test_a_setting_of_a_later_version_is_refused(saved: Path) -> None:
    values = yaml.safe_load((saved / "config.yaml").read_text())
    values["model"]["experts"] = 4
    (saved / "config.yaml").write_text(yaml.safe_dump(values))
    assert "unknown key 'model.experts'" in refusal(saved)


def test_settings_that_do_not_describe_the_weights_are_refused(saved: Path) -> None:
    values = yaml.safe_load((saved / "config.yaml").read_text())
    values["model"]["encoder_blocks"] = 3
    (saved / "config.yaml").write_text(yaml.safe_dump(values))
    assert "config.yaml does not describe the weights" in refusal(saved)


def test_another_number_of_items_is_refused(saved: Path) -> None:
    table = pq.read_table(saved / "items.parquet")
    pq.write_table(table.slice(0, 39), saved / "items.parquet")
    message = refusal(saved)
    assert str(saved / "items.parquet") in message
    assert "39 items, but the model has 40" in message


def test_an_item_table_with_other_columns_is_refused(saved: Path) -> None:
    pq.write_table(pa.table({"id": list(range(40))}), saved / "items.parquet")
    assert "items.parquet" in refusal(saved)


def test_a_run_interrupted_while_saving_is_no_run(
    tmp_path: Path, model: SequenceModel, tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json comes last: without it a folder is unfinished, whatever else is in it."""

    def fails(path: Path, metrics: object) -> None:
        raise OSError("no space left")

    settings = RunConfig(model=model.config)
    monkeypatch.setattr(checkpoint, "write_metrics", fails)
    with pytest.raises(OSError, match="no space"):
        save_run(tmp_path / "run", settings, model, tiny_dataset, "d", {})
    assert not (tmp_path / "run" / "run.json").exists()
    assert "not a finished run" in refusal(tmp_path / "run")
    monkeypatch.undo()
    save_run(tmp_path / "run", settings, model, tiny_dataset, "d", {})
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == FILES
    load_run(tmp_path / "run")


def test_saving_over_a_run_never_pairs_old_and_new(
    saved: Path, tiny_model: Callable[..., SequenceModel], tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_model(seed=9, timesteps=32)

    def fails(path: Path, text: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "write_text", fails)
    with pytest.raises(OSError, match="no space"):
        save_run(saved, RunConfig(model=other.config), other, tiny_dataset, "d", {})
    assert "not a finished run" in refusal(saved)
    monkeypatch.undo()
    save_run(saved, RunConfig(model=other.config), other, tiny_dataset, "d", {})
    run = load_run(saved)
    assert run.fingerprint == model_fingerprint(other.state_dict())
    assert run.metrics == {}


def test_metrics_can_be_replaced_alone(saved: Path) -> None:
    write_metrics(saved, {"test": 1.5})
    assert load_run(saved).metrics == {"test": 1.5}
    assert sorted(entry.name for entry in saved.iterdir()) == FILES
