"""What training does to the weights: it learns, freezes truly, and keeps the best."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from adrec.checkpoint import Run, load_run
from adrec.data.dataset import Dataset
from adrec.engines import make_engine
from adrec.errors import ConfigError
from adrec.evaluation import evaluate, popularity_evaluation


def name_of(overrides: dict[str, Any]) -> str:
    return "-".join(f"{value}" for value in overrides.values()) or "paper"


@pytest.fixture(scope="module")
def learned(train_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained until item i + 1 follows item i."""
    out = tmp_path_factory.mktemp("learned") / "run"
    model = {"dropout": 0.0, "embedding_dropout": 0.1}
    return train_tiny(out, model=model, epochs=30, main={"patience": 30}, pretrain={"patience": 30}, seed=1)


def test_a_tiny_run_learns(learned: Run, tiny_dataset: Dataset) -> None:
    examples = tiny_dataset.examples("test")
    popular = popularity_evaluation(tiny_dataset.item_counts(), examples).metrics["NDCG@5"]
    baseline = learned.baseline()
    assert baseline is not None
    for model in (learned.model, baseline.model):
        found = evaluate(make_engine("cached", model), examples).metrics["NDCG@5"]
        # Ring of 40 items, the next one is certain: chance is about 7 %, popularity little more.
        assert popular.high < 30.0 < 60.0 < found.low


def test_run_folder(learned: Run) -> None:
    names = sorted(str(path.relative_to(learned.path)) for path in learned.path.rglob("*") if path.is_file())
    for name in ("config.yaml", "model.safetensors", "items.parquet", "run.json", "metrics.json", "job.yaml"):
        assert name in names
    for name in ("config.yaml", "model.safetensors", "items.parquet", "run.json", "metrics.json"):
        assert f"baseline/{name}" in names
    for stage in ("pretrain", "main"):
        for name in ("best.ckpt", "last.ckpt"):
            assert f"checkpoints/{stage}/{name}" in names
        assert f"logs/csv/{stage}/metrics.csv" in names
        assert any(name.startswith(f"logs/tensorboard/{stage}/events.out") for name in names)
    assert not [name for name in names if name.endswith(".tmp")]
    assert (learned.info.dataset_name, learned.info.data_path) == ("tiny", "data")
    metrics = json.loads((learned.path / "metrics.json").read_text("utf-8"))
    assert metrics["epochs"] == 30
    assert metrics["epoch_seconds_median"] > 0.0
    config = yaml.safe_load((learned.path / "config.yaml").read_text("utf-8"))
    assert (config["model"]["model"], config["train"]["seed"]) == ("adrec", 1)
    baseline = learned.baseline()
    assert baseline is not None
    assert (baseline.config.model, baseline.config.positions) == ("sasrec", "learned")
    assert baseline.dataset_fingerprint == learned.dataset_fingerprint


def logged(run: Run, stage: str, name: str) -> list[float]:
    with (run.path / "logs" / "csv" / stage / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.mark.parametrize("stage", ["pretrain", "main"])
def test_the_run_holds_the_best_weights_not_the_last(
    train_tiny: Any, tmp_path: Path, tiny_dataset: Dataset, stage: str
) -> None:
    # So large a rate that accuracy falls again: the last epoch is not the best.
    rough = {stage: {"learning_rate": 0.3, "epochs": 6, "patience": 6}}
    run = train_tiny(tmp_path / "run", epochs=2, warmup_epochs=0, **rough)
    values = logged(run, stage, "val_NDCG@20")
    assert len(values) == 6
    # Logged in single precision, hence the relative 1e-6 below.
    best = max(values)
    assert values[-1] < best, "the test needs a run that gets worse"
    kept = run.baseline() if stage == "pretrain" else run
    assert kept is not None
    assert kept.metrics["validation"]["NDCG@20"] == pytest.approx(best, rel=1e-6)
    found = evaluate(make_engine("cached", kept.model), tiny_dataset.examples("validation"))
    assert found.metrics["NDCG@20"].value == pytest.approx(best, rel=1e-6)
    weights = {
        name: torch.load(run.path / "checkpoints" / stage / f"{name}.ckpt", weights_only=True)["state_dict"]
        for name in ("best", "last")
    }
    state = kept.model.state_dict()
    assert all(torch.equal(value, weights["best"][f"average.module.{name}"]) for name, value in state.items())
    assert not all(torch.equal(value, weights["last"][f"average.module.{name}"]) for name, value in state.items())


def test_training_stops_early(train_tiny: Any, tmp_path: Path) -> None:
    # Weights that do not move never improve: validations at epochs 2, 4 and 6, then the patience of 2 is used up.
    still = {"learning_rate": 1e-30, "validate_every": 2, "patience": 2, "epochs": 50}
    run = train_tiny(tmp_path / "run", main=still)
    assert run.metrics["epochs"] == 6
    assert len(logged(run, "main", "val_NDCG@20")) == 3


def test_same_seed_same_weights(train_tiny: Any, tmp_path: Path) -> None:
    first, second, other = (train_tiny(tmp_path / str(i), seed=seed) for i, seed in enumerate((4, 4, 5)))
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != other.fingerprint
    # What was drawn before from the global generator must not matter.
    torch.manual_seed(99)
    assert train_tiny(tmp_path / "again", seed=4).fingerprint == first.fingerprint


def tables(run: Run) -> tuple[Tensor, Tensor]:
    baseline = run.baseline()
    assert baseline is not None
    return baseline.model.table.detach(), run.model.table.detach()


@pytest.mark.parametrize("pcgrad", [False, True])
def test_the_table_is_frozen_in_warm_up_and_moves_after(train_tiny: Any, tmp_path: Path, pcgrad: bool) -> None:
    # One validation at the end, so that the best weights are those of the last epoch.
    main = {"epochs": 2, "validate_every": 2, "weight_decay": 0.1}
    before, after = tables(train_tiny(tmp_path / "frozen", main=main, warmup_epochs=2, pcgrad=pcgrad))
    assert torch.equal(before, after)
    main |= {"epochs": 3, "validate_every": 3}
    before, after = tables(train_tiny(tmp_path / "moved", main=main, warmup_epochs=2, pcgrad=pcgrad))
    assert bool((before[1:] != after[1:]).any(1).all())
    assert bool((after[0] == 0.0).all())


def test_frozen_decay_is_what_adam_does_to_zero_gradients(train_tiny: Any, tmp_path: Path) -> None:
    # Without averaging, so that what is kept is what the optimiser left.
    main = {"epochs": 2, "validate_every": 2, "weight_decay": 0.01, "average_decay": 0.0}
    before, after = tables(train_tiny(tmp_path / "run", main=main, warmup_epochs=2, frozen_decay=True))
    assert float(after.std()) < float(before.std())
    twin = torch.nn.Parameter(before.clone())
    optimiser = torch.optim.Adam([twin], lr=0.01, weight_decay=0.01)
    steps = math.ceil(60 / 16)
    for epoch in range(2):
        optimiser.param_groups[0]["lr"] = 0.01 * 0.5 * (1.0 + math.cos(math.pi * epoch / 500))
        for _ in range(steps):
            twin.grad = torch.zeros_like(twin)
            optimiser.step()
    torch.testing.assert_close(after, twin.detach(), rtol=1e-6, atol=1e-7)


def test_pcgrad_runs_and_differs(train_tiny: Any, tmp_path: Path) -> None:
    plain, projected = (train_tiny(tmp_path / str(pcgrad), pcgrad=pcgrad) for pcgrad in (False, True))
    assert plain.baseline().fingerprint == projected.baseline().fingerprint
    assert plain.fingerprint != projected.fingerprint


@pytest.mark.parametrize(
    "options",
    [
        {"model": {"positions": "learned"}, "pretrain_positions": "released"},
        {"model": {"padding": "masked"}, "pcgrad": True},
        {"model": {"independent_noise": False, "condition_dropout": 0.3, "guidance_scale": 2.0}},
        {"model": {"geodesic": True, "denoiser": "mlp"}, "frozen_decay": True},
        {"model": {"model": "sasrec"}},
        {"precision": "bf16-mixed"},
        {"logits_budget": 100},
        {"loss_scale": 0.0},
    ],
    ids=lambda options: name_of(options.get("model", options)),
)
def test_the_padding_row_stays_exactly_zero(train_tiny: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    run = train_tiny(tmp_path / "run", pretrain={"weight_decay": 0.1}, main={"weight_decay": 0.1}, **options)
    for each in filter(None, (run, run.baseline())):
        assert bool((each.model.table[0] == 0.0).all())
        assert bool(torch.isfinite(each.model.table).all())
        assert bool((each.model.table[1:] != 0.0).all())


def test_items_must_fit_the_data(train_tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.items is 41, but data set 'tiny' has 40 items"):
        train_tiny(tmp_path / "run", model={"items": 41})


def test_learning_rate_is_logged_an_epoch(train_tiny: Any, tmp_path: Path) -> None:
    run = train_tiny(tmp_path / "run", main={"epochs": 4, "cosine_epochs": 4, "patience": 9})
    rates = logged(run, "main", "learning_rate")
    assert rates == pytest.approx([0.01 * 0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)], rel=1e-6)
    assert load_run(run.path).fingerprint == run.fingerprint
