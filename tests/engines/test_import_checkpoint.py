"""`adrec import-checkpoint`: released weights become a run that computes what the released code computed."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from adrec.checkpoint import load_run
from adrec.cli import build_app, main
from adrec.data.dataset import Dataset
from adrec.data.jagged import Jagged
from adrec.engines import make_engine
from adrec.errors import RunError
from adrec.released import from_released, read_released

# The small reference files have 8 steps, where trunc_lin changes its end value and says so.
pytestmark = pytest.mark.filterwarnings("ignore:schedule 'trunc_lin' at 8 steps")

GoldenPath = Callable[[str], Path]
GOLDEN_ITEMS = 97
CALL = ["import-checkpoint"]


def golden_dataset(folder: Path, items: int = GOLDEN_ITEMS) -> Path:
    rows = [[(user + place) % items + 1 for place in range(5)] for user in range(0, items, 3)]
    rows.append([items, 1, 2])
    dataset = Dataset.from_lists([row[:-2] for row in rows], [[row[-2]] for row in rows], [[row[-1]] for row in rows])
    assert dataset.item_count == items
    dataset.save(folder)
    return folder


def released_state(path: Path) -> dict[str, Tensor]:
    return {name[2:]: torch.from_numpy(value) for name, value in np.load(path).items() if name.startswith("w/")}


def options_of(path: Path) -> list[str]:
    """The settings that the weights do not tell, from the reference file's description."""
    meta = json.loads(str(np.load(path)["meta"]))
    names = {"L": "max_length", "T": "timesteps", "heads": "heads"}
    names |= {"noise_schedule": "schedule", "lambda_uncertainty": "lambda_uncertainty", "geodesic": "geodesic"}
    return [part for key, ours in names.items() if key in meta for part in ("--set", f"{ours}={meta[key]}")]


def run_import(file: Path, data: Path, out: Path, *more: str) -> Result:
    arguments = [*CALL, str(file), "--dataset", str(data), "--out", str(out), *more]
    return CliRunner(env={"COLUMNS": "200"}).invoke(build_app(), arguments)


def refused(result: Result, *parts: str) -> None:
    """The command raises an AdrecError (status 2 in `adrec.cli.main`) whose message has these parts."""
    assert isinstance(result.exception, RunError), result.output
    assert result.exception.exit_code == 2
    assert all(part in str(result.exception) for part in parts), str(result.exception)


def wrapped(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}


@pytest.mark.parametrize("wrap", [dict, wrapped], ids=["plain", "wrapped"])
@pytest.mark.parametrize("name", ["adrec_small", "adrec_lambda1", "adrec_mlp", "adrec_geodesic", "sasrec_small"])
def test_an_imported_run_computes_the_released_samples(
    golden_path: GoldenPath, tmp_path: Path, name: str, wrap: Callable[[dict[str, Tensor]], Any]
) -> None:
    source = golden_path(f"{name}.npz")
    arrays = np.load(source)
    torch.save(wrap(released_state(source)), tmp_path / "released.pth")
    data = golden_dataset(tmp_path / "data")
    result = run_import(tmp_path / "released.pth", data, tmp_path / "run", *options_of(source))
    assert result.exit_code == 0, result.exception
    assert "97 items written to" in result.output
    run = load_run(tmp_path / "run")
    assert run.item_ids.to_pylist() == list(range(1, GOLDEN_ITEMS + 1))
    assert run.dataset_fingerprint == Dataset.load(data).fingerprint
    assert run.metrics == {"imported_from": "released.pth"}
    assert run.config.model == name.split("_")[0]
    assert not run.model.training
    histories = Jagged.from_padded(torch.from_numpy(arrays["hist"]))
    noise = torch.from_numpy(arrays["sample_noise"]) if name.startswith("adrec") else None
    for engine_name in ("reference", "cached"):
        engine = make_engine(engine_name, run.model)
        rows = engine.represent(histories, noise=noise)
        np.testing.assert_allclose(rows.numpy(), arrays["sample_last"], rtol=0.0, atol=1e-5)
        assert engine.top_k(rows, 10).items.tolist() == arrays["topk"].tolist()


def test_shape_settings_are_read_off_the_weights(golden_path: GoldenPath, tmp_path: Path) -> None:
    for name in ("adrec_small", "adrec_mlp", "sasrec_small"):
        source = golden_path(f"{name}.npz")
        torch.save(released_state(source), tmp_path / f"{name}.pth")
        data = tmp_path / "data" if (tmp_path / "data").exists() else golden_dataset(tmp_path / "data")
        assert run_import(tmp_path / f"{name}.pth", data, tmp_path / name).exit_code == 0
    adrec, mlp, sasrec = (load_run(tmp_path / name).config for name in ("adrec_small", "adrec_mlp", "sasrec_small"))
    assert (adrec.width, adrec.encoder_blocks, adrec.denoiser, adrec.denoiser_blocks) == (32, 2, "att", 2)
    assert (adrec.positions, adrec.padding, adrec.timesteps, adrec.max_length) == ("none", "released", 32, 50)
    assert (mlp.denoiser, mlp.encoder_blocks) == ("mlp", 2)
    assert (sasrec.model, sasrec.positions, sasrec.max_length) == ("sasrec", "released", 12)


class RunsCode:
    """Unpickling this would make a file: the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("legacy", [False, True], ids=["torch.save", "pickle.dump"])
def test_a_pickle_that_runs_code_is_refused_without_running_it(tmp_path: Path, legacy: bool) -> None:
    canary, file = tmp_path / "canary", tmp_path / "evil.pth"
    value = {"item_embedding.weight": torch.zeros(98, 4), "more": RunsCode(canary)}
    if legacy:
        file.write_bytes(pickle.dumps(value, protocol=2))
    else:
        torch.save(value, file)
    pickle.loads(pickle.dumps(RunsCode(canary)))
    assert canary.exists(), "the canary must work, or its absence would prove nothing"
    canary.unlink()
    data, out = golden_dataset(tmp_path / "data"), tmp_path / "run"
    refused(run_import(file, data, out), str(file), "not a plain state dict of tensors", "Files that need code to load")
    assert not canary.exists()
    assert not out.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.zeros(3)], "holds list; expected a state dict of tensors"),
        (torch.zeros(3), "holds Tensor; expected a state dict of tensors"),
        ({}, "holds dict; expected a state dict of tensors"),
        ({"epoch": 3}, "holds dict; expected a state dict of tensors"),
        ({"weight": torch.zeros(3)}, "holds no item_embedding.weight; found weight"),
        ({"item_embedding.weight": torch.zeros(3)}, "holds no item_embedding.weight"),
        (
            {"item_embedding.weight": torch.full((98, 4), torch.nan)},
            "'item_embedding.weight' holds NaN or infinite values",
        ),
        (
            {
                "item_embedding.weight": torch.zeros(98, 4),
                "trm_encoder.transformer_blocks.0.attention.linear_layers.1.weight": torch.zeros(4, 4),
            },
            "needs the projections 0, 1 and 2 of the released state dict; found [1]",
        ),
    ],
)
def test_what_is_no_released_state_dict_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    file, out = tmp_path / "odd.pth", tmp_path / "run"
    torch.save(value, file)
    refused(run_import(file, golden_dataset(tmp_path / "data"), out), message)
    assert not out.exists()


@pytest.mark.parametrize("content", [b"", b"just text\n", b"PK\x03\x04 torn"])
def test_a_file_that_torch_cannot_read_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "odd.pth"
    file.write_bytes(content)
    refused(run_import(file, golden_dataset(tmp_path / "data"), tmp_path / "run"), str(file), "not a plain state dict")
    missing = tmp_path / "none.pth"
    refused(run_import(missing, tmp_path / "data", tmp_path / "run"), str(missing))


def test_the_number_of_items_must_be_the_data_sets(golden_path: GoldenPath, tmp_path: Path) -> None:
    torch.save(released_state(golden_path("adrec_mlp.npz")), tmp_path / "released.pth")
    data, out = golden_dataset(tmp_path / "data", items=96), tmp_path / "run"
    refused(run_import(tmp_path / "released.pth", data, out), "has 97 items, but data set 'lists' has 96")
    assert not out.exists()


def test_weights_that_do_not_fit_the_settings_are_refused(golden_path: GoldenPath, tmp_path: Path) -> None:
    state = released_state(golden_path("adrec_mlp.npz"))
    del state["hist_norm.bias"]
    torch.save(state, tmp_path / "partial.pth")
    data, out = golden_dataset(tmp_path / "data"), tmp_path / "run"
    refused(run_import(tmp_path / "partial.pth", data, out), "the weights do not fit adrec", "history_norm.bias")
    assert not out.exists()


def test_an_existing_folder_is_left_alone(golden_path: GoldenPath, tmp_path: Path) -> None:
    torch.save(released_state(golden_path("adrec_mlp.npz")), tmp_path / "released.pth")
    data, out = golden_dataset(tmp_path / "data"), tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(run_import(tmp_path / "released.pth", data, out), f"{out}: exists and is not empty; choose another --out")
    assert [entry.name for entry in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    assert run_import(tmp_path / "released.pth", data, out, "--set", "lambda_uncertainty=0.5").exit_code == 0
    assert load_run(out).config.lambda_uncertainty == 0.5


def test_a_setting_may_be_named_as_in_other_commands(golden_path: GoldenPath, tmp_path: Path) -> None:
    torch.save(released_state(golden_path("adrec_mlp.npz")), tmp_path / "released.pth")
    options = [
        "model.lambda_uncertainty=0.25",
        "model.geodesic=true",
        "guidance_scale=2",
        "model.condition_dropout=0.3",
    ]
    pairs = [part for option in options for part in ("--set", option)]
    result = run_import(tmp_path / "released.pth", golden_dataset(tmp_path / "data"), tmp_path / "run", *pairs)
    assert result.exit_code == 0, result.exception
    config = load_run(tmp_path / "run").config
    assert (config.lambda_uncertainty, config.geodesic, config.guidance_scale) == (0.25, True, 2.0)


def test_the_console_command_prints_the_message_and_ends_with_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CliRunner sees the exception itself; `main` is what turns it into text and a status."""
    file = tmp_path / "odd.pth"
    torch.save([1], file)
    data = golden_dataset(tmp_path / "data")
    monkeypatch.setattr(sys, "argv", ["adrec", *CALL, str(file), "--dataset", str(data), "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert "error:" in printed.err
    assert "holds list; expected a state dict of tensors" in printed.err
    assert printed.out == ""


def test_renaming_loses_no_parameter(golden_path: GoldenPath, tiny_model: Callable[..., torch.nn.Module]) -> None:
    for name, overrides in (("adrec_small", {}), ("sasrec_small", {"model": "sasrec", "positions": "released"})):
        state = released_state(golden_path(f"{name}.npz"))
        ours = from_released(state)
        assert sum(value.numel() for value in ours.values()) == sum(value.numel() for value in state.values())
        assert set(ours) == set(tiny_model(**overrides).state_dict())


def test_a_state_dict_under_model_is_found(tmp_path: Path) -> None:
    torch.save({"model": {"module.a": torch.ones(2)}, "optimizer": {"lr": 0.1}}, tmp_path / "x.pth")
    assert list(read_released(tmp_path / "x.pth")) == ["a"]
