"""`adrec export` and `adrec export verify` from the command line, on a run with random weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from adrec.checkpoint import load_run, save_run
from adrec.cli import build_app
from adrec.config import RunConfig, TableFormat
from adrec.data.dataset import Dataset
from adrec.engines import CachedEngine
from adrec.engines.base import TopK
from adrec.errors import AdrecError
from adrec.models import quantization_of
from adrec.models.item_tables import QuantizedTable
from compress.export.comparison import Pair, hit_difference, tied_overlap
from compress.export.onnx_export import ExportOptions, export_onnx
from compress.export.replay_compare import compare_float32, compare_lists

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def adrec(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "250"}).invoke(build_app(), [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    result = adrec(*arguments)
    assert isinstance(result.exception, AdrecError), result.output
    assert result.exception.exit_code == 2
    return str(result.exception)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    tiny_dataset.save(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shallow_model: Any, tiny_dataset: Dataset, data: Path) -> Path:
    model = shallow_model(timesteps=4, schedule="sqrt", max_length=20, lambda_uncertainty=1.0)
    folder = tmp_path_factory.mktemp("run") / "run"
    save_run(folder, RunConfig(model=model.config), model, tiny_dataset, str(data), {})
    plain = shallow_model(model="sasrec", max_length=20)
    save_run(folder / "baseline", RunConfig(model=plain.config), plain, tiny_dataset, str(data), {})
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    out = tmp_path_factory.mktemp("exports") / "onnx"
    result = adrec("export", run, "--to", "onnx", "--steps", "2", "--int8", "dynamic", "--k", "20", "--out", out)
    assert result.exit_code == 0, result.output
    assert "2 graphs in" in result.output
    return out


def test_an_export_is_held_to_its_run(run: Path, exported: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.json"
    result = adrec("export", "verify", exported, "--against", run, "--batch-sizes", "1,3,64", "--json", pairs)
    record = json.loads(pairs.read_text())
    assert (record["model_fingerprint"], record["split"]) == (load_run(run).fingerprint, "validation")
    found = {each["precision"]: Pair.model_validate(each) for each in record["pairs"]}
    exact = found["fp32"]
    assert exact.faults == []
    assert exact.score_error < 1e-6
    assert exact.users == 60
    assert exact.overlap == 1.0
    # Forty random items in eight bits: the lists differ, and the command must say by how much.
    loose = found["int8-dynamic"]
    assert loose.score_error > 1e-4
    assert loose.tie_tolerance > exact.tie_tolerance
    assert result.exit_code == (1 if loose.faults else 0), result.output
    assert re.search(r"request-fp32-s2\.onnx, onnxruntime cpu, 2 steps: score error .* 60 users: ok", result.output)


def test_a_graph_of_other_weights_fails_with_1(run: Path, exported: Path, tmp_path: Path) -> None:
    """A file whose weights were changed, and its checksum with it: only running it can tell."""
    from adrec.engines.exported import graph_sha256

    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = onnx.load(tmp_path / "request-fp32-s2.onnx")
    weight = next(
        each for each in model.graph.initializer if each.name.endswith("denoiser.blocks.0.feed_forward_norm.bias")
    )
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.5, weight.name))
    onnx.save(model, tmp_path / "request-fp32-s2.onnx")
    manifest = json.loads((tmp_path / "export.json").read_text())
    manifest["graphs"] = [manifest["graphs"][0] | {"sha256": graph_sha256(tmp_path, "request-fp32-s2.onnx", None)}]
    (tmp_path / "export.json").write_text(json.dumps(manifest))
    (tmp_path / "one.plan").touch()
    result = adrec("export", "verify", tmp_path, "--against", run, "--users", "20", "--providers", "cpu")
    assert result.exit_code == 1, result.output
    assert "allowed 1e-05" in result.output
    assert "not compared: one.plan (--providers leaves TensorRT's plans out)" in result.output


def test_scores_that_are_no_numbers_are_an_error(run: Path, exported: Path, tmp_path: Path) -> None:
    from adrec.engines.exported import graph_sha256

    name = "request-fp32-s2.onnx"
    model = onnx.load(exported / name)
    bias = next(each for each in model.graph.initializer if each.name.endswith("score_bias"))
    values = onnx.numpy_helper.to_array(bias).copy()
    values[7] = float("nan")
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, tmp_path / name)
    manifest = json.loads((exported / "export.json").read_text())
    manifest["graphs"] = [manifest["graphs"][0] | {"sha256": graph_sha256(tmp_path, name, None)}]
    (tmp_path / "export.json").write_text(json.dumps(manifest))
    message = refused("export", "verify", tmp_path, "--against", run, "--users", "20")
    assert message.startswith("request-fp32-s2.onnx, onnxruntime cpu: scores of a batch of 1 are not finite")


def test_an_export_of_another_run_is_refused(
    exported: Path, tmp_path: Path, tiny_model: Any, tiny_dataset: Dataset, data: Path
) -> None:
    other = tiny_model(seed=7, timesteps=4, schedule="sqrt", max_length=20)
    save_run(tmp_path / "other", RunConfig(model=other.config), other, tiny_dataset, str(data), {})
    message = refused("export", "verify", exported, "--against", tmp_path / "other")
    assert "was exported from the model" in message
    assert "name the run that it came from with --against" in message


def test_saved_inputs_and_outputs_replay(run: Path, exported: Path, tmp_path: Path) -> None:
    polygraphy_json = pytest.importorskip("polygraphy.json")
    from polygraphy.comparator import RunResults

    result = adrec("export", "verify", exported, "--against", run, "--users", "7", "--save", tmp_path)
    assert f"{tmp_path / 'replay.sh'} repeats them with TensorRT and Polygraphy" in result.output
    script = (tmp_path / "replay.sh").read_text()
    # In TensorRT 10 a network is strongly typed only where it is asked for. Dynamic int8 is not for TensorRT.
    assert "runner=${POLYGRAPHY_RUNNER:---trt --strongly-typed}" in script
    assert re.search(r"--input-shapes histories:\[7,\d+\] lengths:\[7\] noise:\[3,7,16\]", script)
    assert "int8-dynamic" not in script
    (inputs,) = polygraphy_json.load_json(str(tmp_path / "request-fp32-s2-inputs.json"))
    outputs = RunResults.load(str(tmp_path / "request-fp32-s2-outputs.json"))
    assert inputs["histories"].shape[0] == 7
    session = pytest.importorskip("onnxruntime").InferenceSession(
        str(exported / "request-fp32-s2.onnx"), providers=["CPUExecutionProvider"]
    )
    items = session.run(["items"], dict(inputs))[0]
    assert (items == outputs["onnxruntime-cpu"][0]["items"]).all()


def test_nothing_is_saved_where_nothing_replays(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("polygraphy")
    out, saved = tmp_path / "loop", tmp_path / "saved"
    export_onnx(load_run(run).model, out, ExportOptions(steps=(), loop=True, k=20))
    result = adrec("export", "verify", out, "--against", run, "--users", "7", "--save", saved)
    assert "holds no request graph that TensorRT reads, so nothing was saved" in result.output
    assert not saved.exists()
    message = refused("export", "verify", out, "--against", run, "--save", out)
    assert "the export itself; choose another folder" in message
    # Told before the run is read, let alone compared.
    monkeypatch.setitem(sys.modules, "polygraphy.json", None)
    message = refused("export", "verify", out, "--against", tmp_path / "none", "--save", saved)
    assert message == "Polygraphy is not installed: pip install 'adrec[polygraphy]'"


def replay(*change: tuple[str, Any]) -> tuple[dict[str, bool], dict[str, bool]]:
    """Verdicts of both comparisons on one list of three items, the second and the third tied, with changes."""
    there: dict[str, Any] = {
        "items": np.array([[4, 7, 2]]), "scores": np.array([[3.0, 2.0, 2.0]]), "rows": np.array([[0.5, -1.0]])
    }  # fmt: skip
    here = there | dict(change)
    return dict(compare_float32(here, there)), dict(compare_lists(here, there))


def test_a_replay_compares_lists_up_to_ties() -> None:
    right = {"scores": True, "rows": True, "items": True}
    assert replay() == (right, {"scores": True, "items": True})
    assert replay(("items", np.array([[4, 2, 7]])))[0] == right
    # Item 9 has the score of the last one: which of the tied items is listed is not said.
    assert replay(("items", np.array([[4, 7, 9]])))[0] == right
    assert replay(("items", np.array([[9, 7, 2]]))) == (right | {"items": False}, {"scores": True, "items": False})
    repeated = replay(("items", np.array([[4, 7, 7]])))
    assert repeated == (right | {"items": False}, {"scores": True, "items": False})
    assert replay(("scores", np.array([[3.0, 2.0, 2.0 - 4e-5]])))[0] == right | {"scores": False}
    assert replay(("rows", np.array([[0.5, -1.0 + 2e-5]])))[0] == right | {"rows": False}
    assert replay(("scores", np.array([[3.0, 2.0, np.nan]]))) == (
        right | {"scores": False}, {"scores": False, "items": True}
    )  # fmt: skip


@pytest.mark.slow
def test_the_script_replays_and_tells_a_wrong_graph(run: Path, exported: Path, tmp_path: Path) -> None:
    """With Polygraphy's runner of ONNX Runtime in the place of TensorRT's."""
    pytest.importorskip("polygraphy")
    adrec("export", "verify", exported, "--against", run, "--users", "7", "--save", tmp_path / "saved")
    other = tmp_path / "other"
    other.mkdir()
    model = onnx.load(exported / "request-fp32-s2.onnx")
    bias = next(each for each in model.graph.initializer if each.name.endswith("score_bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.01), bias.name))
    onnx.save(model, other / "request-fp32-s2.onnx")
    environment = {
        **os.environ, "POLYGRAPHY_RUNNER": "--onnxrt", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    }  # fmt: skip
    for folder, status in ((exported, 0), (other, 1)):
        command = ["sh", str(tmp_path / "saved" / "replay.sh"), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout
        report = (tmp_path / "saved" / "request-fp32-s2-accuracy.json").read_text()
        assert ('"scores": false' in report) is bool(status)
        assert '"items": true' in report


def test_the_parts_of_a_request_are_verified_too(run: Path, tmp_path: Path) -> None:
    from adrec.engines.exported import graph_sha256

    out = tmp_path / "parts"
    assert adrec("export", run, "--steps", "2", "--loop", "--split", "--table", "input", "--out", out).exit_code == 0
    checked = ("export", "verify", out, "--against", run, "--users", "30", "--batch-sizes", "1,7")
    result = adrec(*checked)
    assert result.exit_code == 0, result.output
    lines = [line.split(":")[0] for line in result.output.splitlines()]
    assert "encode-fp32.onnx + denoise-fp32-s2.onnx + score-fp32.onnx, onnxruntime cpu, 2 steps" in lines
    assert "encode-fp32.onnx + denoise-fp32-loop.onnx + score-fp32.onnx, onnxruntime cpu, 4 steps" in lines
    # Whole and in parts, each unrolled and as a loop of 1 and of 4 steps.
    assert len(lines) == 2 * (1 + 2)
    model = onnx.load(out / "score-fp32.onnx")
    constant = next(
        node for node in model.graph.node if node.op_type == "Gemm" or node.op_type == "MatMul"
    )  # scores before the top k
    model.graph.node.append(onnx.helper.make_node("Neg", [constant.output[0]], ["turned"]))
    for node in model.graph.node:
        if node.op_type in ("Add", "TopK") and constant.output[0] in node.input:
            node.input[list(node.input).index(constant.output[0])] = "turned"
    nodes = sorted(model.graph.node, key=lambda node: (node.op_type == "TopK", node.op_type == "Neg"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, out / "score-fp32.onnx")
    manifest = json.loads((out / "export.json").read_text())
    for graph in manifest["graphs"]:
        if graph["file"] == "score-fp32.onnx":
            graph["sha256"] = graph_sha256(out, graph["file"], None)
    (out / "export.json").write_text(json.dumps(manifest))
    result = adrec(*checked)
    assert result.exit_code == 1, result.output
    assert "request-fp32-s2.onnx, onnxruntime cpu, 2 steps: score error" in result.output
    wrong = [line for line in result.output.splitlines() if not line.endswith("ok")]
    assert len(wrong) == 3
    assert all("score-fp32.onnx" in line for line in wrong)


@pytest.mark.parametrize(("model", "table"), [("adrec", "outside"), ("sasrec", "inside")])
def test_representations_are_verified_where_the_table_is_outside(
    tmp_path: Path, shallow_model: Any, tiny_dataset: Dataset, data: Path, model: str, table: str
) -> None:
    steps = {"timesteps": 4, "schedule": "sqrt"} if model == "adrec" else {}
    made = shallow_model(model=model, max_length=20, **steps)
    save_run(tmp_path / "run", RunConfig(model=made.config), made, tiny_dataset, str(data), {})
    out = tmp_path / "out"
    assert (
        adrec("export", tmp_path / "run", "--split", "--table", table, "--precision", "fp16", "--out", out).exit_code
        == 0
    )
    result = adrec("export", "verify", out, "--against", tmp_path / "run", "--users", "30")
    named = ["represent-fp16-s1.onnx", "encode-fp16.onnx + denoise-fp16-s1.onnx"]
    expected = named if model == "adrec" else ["request-fp16.onnx", "represent-fp16.onnx + score-fp16.onnx"]
    assert [line.split(",")[0] for line in result.output.splitlines()] == expected
    assert result.exit_code == 0, result.output


def test_the_baseline_is_exported_and_verified_too(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sasrec"
    assert adrec("export", run, "--baseline", "--out", out).exit_code == 0
    pairs = tmp_path / "pairs.json"
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/adrec", "export", "verify", "a folder"])
    result = adrec("export", "verify", out, "--against", run, "--users", "30", "--json", pairs)
    assert result.exit_code == 0, result.output
    assert "request-fp32.onnx" in result.output
    record = json.loads(pairs.read_text())
    assert record["command"] == "adrec export verify 'a folder'"
    assert record["model_fingerprint"] == load_run(run / "baseline").fingerprint != load_run(run).fingerprint


def test_a_run_in_fewer_bits_says_what_its_graph_computes(
    tmp_path: Path, shallow_model: Any, tiny_dataset: Dataset, data: Path
) -> None:
    made = shallow_model(model="sasrec", max_length=20)
    made.item_embedding = QuantizedTable.of(made.table.detach(), TableFormat(format="int8"))
    settings = RunConfig(model=made.config, quantization=quantization_of(made))
    save_run(tmp_path / "run", settings, made, tiny_dataset, str(data), {})
    out = tmp_path / "out"
    said = "the run stores int8: the graph computes with those numbers in float32\n"
    assert said in adrec("export", tmp_path / "run", "--out", out).output
    facts = {each.key: each.value for each in onnx.load(out / "request-fp32.onnx").metadata_props}
    assert facts["adrec.source_formats"] == "int8"
    result = adrec("export", "verify", out, "--against", tmp_path / "run", "--users", "30")
    assert result.exit_code == 0, result.output
    assert "held to the numbers that the run stores (int8) in float32, not to" in result.output


def test_bad_options_are_refused_before_any_work(run: Path, exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "--to is 'onx' (did you mean 'onnx'?); allowed: onnx, " in refused(
        "export", run, "--to", "onx", "--out", out
    )
    assert "--precision is 'fp8', which is for --to tensorrt; here eight bits are written beside" in refused(
        "export", run, "--precision", "fp8", "--out", out
    )
    assert "--precision is 'fp46' (did you mean 'fp16'?)" in refused("export", run, "--precision", "fp46", "--out", out)
    assert "--quantiser is of Q/DQ nodes, and none are asked for" in refused(
        "export", run, "--quantiser", "modelopt", "--out", out
    )
    assert "dynamic int8 is for CPUs" in refused(
        "export", run, "--precision", "fp16", "--int8", "dynamic", "--out", out
    )
    assert "--int8 is 'static'; allowed: dynamic, qdq" in refused("export", run, "--int8", "static", "--out", out)
    assert "--steps holds 5; allowed: 1 to 4" in refused("export", run, "--steps", "1,5", "--out", out)
    assert "k is 41; allowed: 1 to 40" in refused("export", run, "--k", "41", "--out", out)
    assert "--profile is for --to tensorrt" in refused("export", run, "--profile", "batch=1:1:1", "--out", out)
    for option in (["--weights", "refit"], ["--workspace-mib", "3"], ["--tf32"], ["--version-compatible"]):
        assert f"{option[0]} is for --to tensorrt; --to is 'onnx'" in refused("export", run, *option, "--out", out)
    assert "--device is for --to aotinductor; --to is 'onnx'" in refused(
        "export", run, "--device", "cuda", "--out", out
    )
    if not torch.cuda.is_available():
        assert "device is 'cuda', but torch finds no CUDA devices here" in refused(
            "export", run, "--to", "aotinductor", "--device", "cuda", "--out", out
        )
    plugins = refused("export", run, "--to", "aotinductor", "--plugins", "--out", out)
    assert plugins == "--to aotinductor has no nodes that TensorRT runs; drop --plugins"
    assert "needs --profile" in refused("export", run, "--to", "tensorrt", "--out", out)
    assert "has no reverse steps" in refused("export", run, "--baseline", "--steps", "4", "--out", out)
    assert "already holds an export; pass --overwrite" in refused("export", run, "--out", exported)
    assert "not a finished run" in refused("export", tmp_path, "--out", out)
    assert "holds no export.json" in refused("export", "verify", run, "--against", run)
    assert not out.exists()


def test_lists_overlap_up_to_ties() -> None:
    best = TopK(torch.tensor([[1, 2, 3]]), torch.tensor([[3.0, 2.0, 1.0]]))
    tied = TopK(torch.tensor([[2, 1, 9]]), torch.tensor([[3.0, 2.0, 1.0]]))
    assert tied_overlap(tied, best, torch.tensor([[2.0, 3.0, 1.0 - 1e-6]])).item() == 1.0
    assert tied_overlap(tied, best, torch.tensor([[2.0, 3.0, 0.9]])).item() == pytest.approx(2 / 3)
    copies = TopK(torch.tensor([[1, 1, 1]]), torch.tensor([[3.0, 3.0, 3.0]]))
    assert tied_overlap(copies, best, torch.tensor([[3.0, 3.0, 3.0]])).item() == pytest.approx(1 / 3)


def test_hit_difference_by_hand() -> None:
    here, there = torch.tensor([0, 19, 20, 25]), torch.tensor([0, 20, 20, 3])
    found = hit_difference(here, there)
    assert found.value == 0.0
    assert found.low <= 0.0 <= found.high
    assert hit_difference(torch.tensor([0, 0]), torch.tensor([20, 20])).value == 100.0


@pytest.mark.parametrize(
    ("precision", "change", "fault"),
    [
        ("fp32", {"score_error": 2e-5}, "score error 2.0e-05, allowed 1e-05"),
        ("fp32", {"tie_tolerance": 2e-5}, "lists differ by more than ties"),
        ("fp16", {"score_error": 5.0}, "score error 5.0e+00, allowed 1e-02"),
        ("fp16", {"overlap": 0.994}, "overlap 0.9940, allowed from 0.995"),
        ("int8-qdq", {"ndcg_kept": (99.4, 99.0, 99.9)}, "keeps 99.40 % of NDCG@20, allowed from 99.5 %"),
        ("fp8-qdq", {"ndcg_kept": (99.4, 99.0, 99.9)}, "keeps 99.40 % of NDCG@20"),
        ("int8-qdq", {"ndcg_kept": None}, "no list of the model has a target, so NDCG@20 tells nothing"),
    ],
)
def test_the_bound_of_each_precision(precision: str, change: dict[str, Any], fault: str) -> None:
    sound = {
        "runtime": "onnxruntime cpu", "graph": "g", "precision": precision, "steps": 1, "users": 9,
        "batch_sizes": (1,), "score_error": 1e-6, "tie_tolerance": 0.0, "overlap": 1.0,
        "hr_difference": (0.0, 0.0, 0.0), "ndcg_kept": (100.0, 100.0, 100.0),
    }  # fmt: skip
    assert Pair.model_validate(sound).faults == []
    (found,) = Pair.model_validate({**sound, **change}).faults
    assert fault in found
    few = Pair.model_validate({**sound, "precision": "int8-qdq", "ndcg_kept": (99.8, 97.0, 101.0)})
    assert few.faults == []
    assert few.verdict == "ok by the value; the interval over 9 users is too wide to tell: compare on more"
    assert Pair.model_validate(sound).verdict == "ok"


def test_onnxruntime_serves_a_run_by_name(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adrec.recommender import Recommender

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    served = Recommender.load(run, engine="onnxruntime").recommend([[1, 2, 3], [7]], k=5)
    exact = Recommender(load_run(run), CachedEngine(load_run(run).model)).recommend([[1, 2, 3], [7]], k=5)
    assert [each.items for each in served] == [each.items for each in exact]
