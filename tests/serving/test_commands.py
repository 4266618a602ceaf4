"""`adrec train`, `evaluate`, `recommend` and `env` as a user types them, and what they say when something is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adrec.checkpoint import load_run
from adrec.cli import build_app
from adrec.commands import environment
from adrec.data.dataset import Dataset
from adrec.environment import printable_command
from adrec.errors import AdrecError, ConfigError, DataError, RunError
from adrec.evaluation import METRICS, evaluate, popularity_evaluation
from adrec.versions import installed_versions

SMALL = ["model.width=16", "model.heads=2", "model.max_length=12", "train.batch_size=16"]
TRAIN = ["--device", "cpu", "--devices", "1", "--no-progress", "--epochs", "2"]


def adrec(*arguments: object) -> str:
    result = CliRunner().invoke(build_app(), [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def train(data: Path, out: Path, *options: str, settings: list[str] | None = None) -> str:
    pairs = [part for setting in SMALL + (settings or []) for part in ("--set", setting)]
    return adrec("train", data, "--out", out, *TRAIN, *pairs, *options)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    tiny_dataset.save(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, str]:
    """A finished run of two epochs a stage, and what the command printed."""
    out = tmp_path_factory.mktemp("trained") / "run"
    return out, train(data, out, "--seed", "3", settings=["train.warmup_epochs=1"])


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    out = tmp_path_factory.mktemp("sasrec") / "run"
    train(data, out, "--model", "sasrec")
    return out


@pytest.fixture(scope="module")
def rows(trained: tuple[Path, str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Rows that `adrec evaluate` writes with every option that adds some."""
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    shown = adrec(
        "evaluate", trained[0], "--steps", "1,4,1", "--seeds", "0,7", "--history", "both", "--strata", "--json", path
    )
    assert "full ranking of 40 items" in shown
    assert all(name in shown for name in METRICS)
    assert "no sasrec+ row" not in shown
    assert f"written to {path}" in shown.replace("\n", "")
    written = json.loads(path.read_text("utf-8"))
    assert (written["run"], written["dataset"]) == (str(trained[0]), "tiny")
    assert written["command"] == printable_command(sys.argv)
    assert written["environment"]["versions"] == installed_versions()
    assert written["environment"]["machine"].keys() >= {"processor", "threads"}
    assert datetime.fromisoformat(written["measured_at_utc"]).utcoffset() == timedelta(0)
    return written["rows"]


def test_train_says_what_it_does(trained: tuple[Path, str]) -> None:
    out, shown = trained
    for text in ("useful tokens: 100.0 %", "stage 1 of 3", "stages 2 and 3: warm up 1 epochs", f"adrec evaluate {out}"):
        assert text in shown
    run = load_run(out)
    assert run.settings.train is not None
    assert (run.settings.train.seed, run.settings.train.main.epochs, run.settings.train.pretrain.epochs) == (3, 2, 2)
    assert (run.settings.model.width, run.settings.model.items) == (16, 40)


def test_evaluate_has_a_row_for_everything(rows: list[dict[str, Any]]) -> None:
    whole = [(r["system"], r["steps"], r["seed"], r["own items"]) for r in rows if r["group"] == "all"]
    systems = [("popularity", "-", 0), ("sasrec+", "-", 0)]
    systems += [("adrec", steps, seed) for seed in (0, 7) for steps in (1, 4)]
    assert whole == [(*system, own) for system in systems for own in ("ranked", "left out")]
    for system in whole:
        own = [
            r for r in rows if (r["system"], r["steps"], r["seed"], r["own items"]) == system and r["group"] != "all"
        ]
        lengths = [r["users"] for r in own if r["group"].startswith("history")]
        assert sum(lengths) == sum(r["users"] for r in own if r["group"].endswith(("%)", "tail items"))) == 60
    assert all({"value", "low", "high"} == set(row[name]) for row in rows for name in METRICS)


def test_evaluate_gives_the_values_of_the_library(
    rows: list[dict[str, Any]], trained: tuple[Path, str], data: Path
) -> None:
    run, dataset = load_run(trained[0]), Dataset.load(data)
    from adrec.engines import make_engine

    examples = dataset.examples("test")
    expected = {
        ("popularity", "-", False): popularity_evaluation(dataset.item_counts(), examples),
        ("popularity", "-", True): popularity_evaluation(dataset.item_counts(), examples, exclude_history=True),
    }
    engine = make_engine("cached", run.model)
    for exclude in (False, True):
        expected["adrec", 4, exclude] = evaluate(engine, examples, steps=4, exclude_history=exclude)
    checked = 0
    for row in rows:
        key = (row["system"], row["steps"], row["own items"] == "left out")
        if row["group"] == "all" and row["seed"] == 0 and key in expected:
            for name in METRICS:
                interval = expected[key].metrics[name]
                assert row[name] == {"value": interval.value, "low": interval.low, "high": interval.high}
            checked += 1
    assert checked == 4


def test_evaluate_the_validation_split_of_a_baseline(baseline: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    adrec("evaluate", baseline, "--data", data, "--split", "validation", "--history", "keep", "--json", out)
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert [(r["system"], r["steps"], r["own items"]) for r in rows] == [
        ("popularity", "-", "ranked"),
        ("sasrec+", "-", "ranked"),
    ]
    # What training noted as its best validation value is what evaluation finds.
    assert rows[1]["NDCG@20"]["value"] == pytest.approx(load_run(baseline).metrics["validation"]["NDCG@20"], abs=1e-4)


def test_recommend_from_the_trained_run(trained: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("user,history\na,1 2 3\n", "utf-8")
    assert "1 users written" in adrec(
        "recommend", trained[0], "--input", tmp_path / "in.csv", "--out", tmp_path / "out.jsonl"
    )
    assert len(json.loads((tmp_path / "out.jsonl").read_text("utf-8"))["items"]) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "33"], "steps is 33; allowed: 1 to 32"),
        (["--k", "41"], "k is 41; allowed: 1 to 40"),
        (["--unknown", "rais"], "did you mean 'raise'"),
        (["--separator", ""], "--separator is empty"),
        (["--engine", "cache"], "did you mean 'cached'"),
        (["--provider", "cuda"], "provider is 'cuda', but engine 'cached' has none; leave it out, or use engine 'onnx"),
    ],
)
def test_recommend_refuses(trained: tuple[Path, str], tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "in.csv").write_text("history\n1 2\n", "utf-8")
    with pytest.raises(ConfigError, match=message):
        adrec("recommend", trained[0], "--input", tmp_path / "in.csv", "--out", tmp_path / "out.csv", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps holds 0; allowed: 1 to 32"),
        (["--steps", "33"], "--steps holds 33; allowed: 1 to 32"),
        (["--steps", "x"], "--steps is 'x'; expected whole numbers"),
        (["--steps", ""], "--steps is ''; expected whole numbers"),
        (["--steps", "1,,2"], "expected whole numbers"),
        (["--seeds", "-1"], "--seeds holds -1"),
        (["--history", "kep"], "did you mean 'keep'"),
        (["--split", "tset"], "did you mean 'test'"),
        (["--engine", "cache"], "unknown engine 'cache'.*did you mean 'cached'"),
    ],
)
def test_evaluate_refuses(trained: tuple[Path, str], options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adrec("evaluate", trained[0], *options)


def test_evaluate_refuses_steps_of_a_baseline(baseline: Path) -> None:
    with pytest.raises(ConfigError, match="--steps holds 2; allowed: 1 to 1"):
        adrec("evaluate", baseline, "--steps", "1,2")


def test_evaluate_refuses_another_data_set(trained: tuple[Path, str], tmp_path: Path) -> None:
    rows = [[1, 2, 40], [3, 4, 5]]
    Dataset.from_lists([row[:1] for row in rows], [row[1:2] for row in rows], [row[2:] for row in rows], "other").save(
        tmp_path / "other"
    )
    with pytest.raises(RunError, match=r"is not that of the run's data set 'tiny'.*item ids would not match"):
        adrec("evaluate", trained[0], "--data", tmp_path / "other")
    with pytest.raises(DataError, match="no such data set"):
        adrec("evaluate", trained[0], "--data", tmp_path / "none")


def test_evaluate_names_a_split_without_targets(tmp_path: Path) -> None:
    rows = [[1, 2, 3], [2, 3, 1]]
    Dataset.from_lists([row[:2] for row in rows], [row[2:] for row in rows], [[], []], "short").save(tmp_path / "data")
    train(tmp_path / "data", tmp_path / "run", "--model", "sasrec")
    for more in ([], ["--strata"]):
        with pytest.raises(DataError, match="no user has a target in the test split; choose --split validation"):
            adrec("evaluate", tmp_path / "run", *more)


def test_evaluate_says_where_the_data_was(trained: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    info = json.loads((run / "run.json").read_text("utf-8"))
    (run / "run.json").write_text(json.dumps(info | {"data_path": str(tmp_path / "gone")}), "utf-8")
    with pytest.raises(RunError, match=r"gone', which is not there; say where the data is with --data"):
        adrec("evaluate", run)


@pytest.mark.parametrize("command", ["evaluate", "recommend"])
def test_a_missing_run_is_named(tmp_path: Path, command: str) -> None:
    (tmp_path / "in.csv").write_text("history\n1\n", "utf-8")
    more = ["--input", tmp_path / "in.csv", "--out", tmp_path / "out.csv"] if command == "recommend" else []
    with pytest.raises(RunError, match=r"not a finished run \(run.json is missing\); train one with"):
        adrec(command, tmp_path / "none", *more)
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.widht=16", r"unknown key 'model.widht' \(did you mean 'width'\?\)"),
        ("train.main.learning_rat=1", r"unknown key 'train.main.learning_rat' \(did you mean 'learning_rate'\?\)"),
        ("modle.width=16", r"unknown key 'modle' \(did you mean 'model'\?\)"),
        ("model.width", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("model.width=[1", "the value is not YAML"),
        ("model.width=15", "width is 15; allowed: even multiples of heads"),
        ("model.width=wide", "model.width is 'wide'"),
        ("model.padding=mask", "model.padding is 'mask'"),
        ("model.width.deep=3", "'width' is a value, not a section"),
        ("model.items=39", "model.items is 39, but data set 'tiny' has 40 items"),
        ("model=3", "model"),
        ("train.seed=-1", "train.seed is -1"),
    ],
)
def test_train_refuses_a_setting(data: Path, tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(data, tmp_path / "run", settings=[setting])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "gpus"], "did you mean 'gpu'"),
        (["--devices", "0"], "--devices is '0'; allowed: auto or a whole number from 1"),
        (["--devices", "two"], "--devices is 'two'"),
        (["--model", "adrek"], "model.model is 'adrek'"),
    ],
)
def test_train_refuses_an_option(data: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(data, tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_train_refuses_missing_data_and_folders_in_use(trained: tuple[Path, str], data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data set; make one with"):
        train(tmp_path / "none", tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(RunError, match="exists and is not empty; continue an interrupted run with --resume"):
        train(data, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    before = (trained[0] / "model.safetensors").read_bytes()
    for options in ([], ["--resume"]):
        with pytest.raises(RunError, match="already a finished run; choose another --out"):
            train(data, trained[0], *options)
    assert (trained[0] / "model.safetensors").read_bytes() == before


def test_train_refuses_data_it_cannot_learn_from(tmp_path: Path) -> None:
    Dataset.from_lists([[1], [2]], [[2], [1]], [[3], [3]], "short").save(tmp_path / "short")
    with pytest.raises(DataError, match="no user with 2 training interactions"):
        train(tmp_path / "short", tmp_path / "run")
    Dataset.from_lists([[1, 2], [2, 3]], [[], []], [[3], [1]], "blind").save(tmp_path / "blind")
    with pytest.raises(DataError, match="no validation example"):
        train(tmp_path / "blind", tmp_path / "run")


def test_configuration_file_and_overrides(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(
        "model: {model: sasrec, width: 8, heads: 1}\ntrain: {batch_size: 64, pretrain: {learning_rate: 0.01}}\n"
    )
    adrec("train", data, "--out", tmp_path / "run", "--config", config, *TRAIN, "--set", "model.heads=2")
    run = load_run(tmp_path / "run")
    assert (run.settings.model.model, run.settings.model.width, run.settings.model.heads) == ("sasrec", 8, 2)
    assert run.settings.train is not None
    assert (run.settings.train.batch_size, run.settings.train.pretrain.learning_rate) == (64, 0.01)
    config.write_text("- a list\n")
    with pytest.raises(ConfigError, match="expected a mapping of settings"):
        adrec("train", data, "--out", tmp_path / "other", "--config", config)


def test_env_lists_versions_and_devices() -> None:
    shown = adrec("env")
    for text in ("python", "torch", "lightning", "torch threads", "gpu", "processors"):
        assert text in shown


def test_env_warns_of_a_shadowing_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {"kernels": ["adrec", "kernels"], "bench": ["adrec"], "adrec": ["adrec", "adrec"]}
    monkeypatch.setattr(environment, "packages_distributions", lambda: owners)
    assert environment.name_clashes() == [("kernels", "kernels")]
    assert "the name 'kernels' also belongs to the installed distribution 'kernels'" in " ".join(adrec("env").split())


def test_errors_end_in_a_message_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from adrec.cli import main; main()", "evaluate", str(tmp_path / "[none]")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {tmp_path / '[none]'}: not a finished run")
    assert "Traceback" not in result.stderr
    assert issubclass(RunError, AdrecError)


def test_evaluate_beside_another_baseline(integer_run: Path, baseline: Path, data: Path, tmp_path: Path) -> None:
    alone = adrec("evaluate", integer_run, "--data", data, "--history", "keep")
    assert "no sasrec+ row: the run holds no baseline; name a SASRec+ run with --baseline RUN" in alone
    out = tmp_path / "rows.json"
    shown = adrec("evaluate", integer_run, "--data", data, "--history", "keep", "--baseline", baseline, "--json", out)
    assert "no sasrec+ row" not in shown
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert [row["system"] for row in rows] == ["popularity", "sasrec+", "adrec"]
    assert f"{rows[1]['NDCG@20']['value']:.2f}" in shown
    assert f"[{rows[1]['NDCG@20']['low']:.2f}, {rows[1]['NDCG@20']['high']:.2f}]" in shown
    with pytest.raises(RunError, match="allowed: a sasrec run beside an adrec run"):
        adrec("evaluate", integer_run, "--data", data, "--baseline", integer_run)
    with pytest.raises(RunError, match="allowed: a sasrec run beside an adrec run"):
        adrec("evaluate", baseline, "--data", data, "--baseline", baseline)
    other = tmp_path / "other"
    shutil.copytree(baseline, other)
    info = json.loads((other / "run.json").read_text("utf-8"))
    (other / "run.json").write_text(json.dumps(info | {"dataset_fingerprint": "0" * 64}), "utf-8")
    with pytest.raises(RunError, match="give a run of the same data set"):
        adrec("evaluate", integer_run, "--data", data, "--baseline", other)


@pytest.mark.parametrize("command", ["evaluate", "recommend"])
def test_a_wrong_device_is_no_fault_of_the_run(trained: tuple[Path, str], tmp_path: Path, command: str) -> None:
    more = ["--input", tmp_path / "in.csv", "--out", tmp_path / "out.csv"] if command == "recommend" else []
    with pytest.raises(ConfigError, match="device is 'foo'; allowed: cpu, cuda"):
        adrec(command, trained[0], "--device", "foo", *more)


def test_train_on_a_gpu_that_is_not_there(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="device is 'gpu', but torch finds no CUDA devices here; allowed: auto, cpu"):
        adrec("train", data, "--out", tmp_path / "run", "--device", "gpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1]\n", "'model' is a value, not a section"),
        ("train: 3\n", "'train' is a value, not a section"),
        ("train: {main: [1]}\n", "'main' is a value, not a section"),
    ],
)
def test_train_refuses_a_configuration_of_another_shape(data: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        train(data, tmp_path / "run", "--config", str(tmp_path / "my.yaml"))


def test_an_empty_stage_takes_the_epochs(data: Path, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("model:\ntrain: {pretrain: null}\n")
    options = ("--config", str(tmp_path / "my.yaml"), "--model", "sasrec", "--epochs", "1")
    train(data, tmp_path / "run", *options)
    settings = load_run(tmp_path / "run").settings.train
    assert settings is not None
    assert settings.pretrain.epochs == 1
