"""Exporting to TensorRT where it is missing, and what is refused before anything is built."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import onnx
import pytest
from onnx import TensorProto, helper
from strict_tensorrt import StrictTensorRT
from tensorrt_cases import HERE, PROFILES, save_graph
from tensorrt_standin import standin

from adrec.engines.tensorrt import library
from adrec.engines.tensorrt.library import TensorRTError
from adrec.engines.tensorrt.plan import read_plan, record_path
from adrec.engines.tensorrt.profiles import parse_profile
from adrec.errors import ConfigError, NotSupportedError
from compress.export.tensorrt.build import PlanNotBuiltError, export_tensorrt, own_files, read_request
from compress.export.tensorrt.command import check_lengths, check_tensorrt
from compress.export.tensorrt.graph import read_graph
from compress.export.tensorrt.operators import DOMAIN
from compress.export.tensorrt.options import BuildOptions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT is not installed, whatever this machine has."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> StrictTensorRT:
    """A stand-in that accepts calls of the right shape, on a GPU that is not there."""
    trt = standin("11_4")
    monkeypatch.setattr(library, "load", lambda: trt)
    monkeypatch.setattr(library, "this_platform", lambda module: HERE)
    return trt


@pytest.mark.usefixtures("missing")
def test_without_tensorrt_all_but_the_plan_is_written(tmp_path: Path) -> None:
    graph = save_graph(tmp_path / "small.onnx", external=True)
    exported = export_tensorrt([graph], PROFILES, limits={"length": (1, 60)})
    assert exported.plans == {}
    assert exported.notes == (
        "no profile covers batch 1 to 1, length 51 to 60",
        "no profile covers batch 2 to 8, length 41 to 60",
    )
    with pytest.raises(
        PlanNotBuiltError, match=r"no plan was built: TensorRT is not installed.*sh .*build\.sh"
    ) as raised:
        exported.require_plans()
    assert raised.value.exit_code == 3
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"small.onnx", "small.data", "tensorrt.json", "build.sh"}
    assert read_request(tmp_path).profiles == PROFILES
    assert {"tensorrt.json", "build.sh"} <= own_files(tmp_path, ["small.onnx"])


@pytest.mark.usefixtures("missing")
def test_the_script_builds_with_trtexec(tmp_path: Path) -> None:
    graph = save_graph(tmp_path / "small.onnx")
    exported = export_tensorrt([graph], PROFILES, BuildOptions(weights="refit", hardware_compatibility="ampere_plus"))
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "trtexec").write_text('#!/bin/sh\n[ "$1" = --help ] && echo "$KNOWN" && exit\necho "$@"\n')
    (tools / "trtexec").chmod(0o755)

    def script(known: str) -> list[str]:
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "KNOWN": known}
        done = subprocess.run(
            ["sh", str(tmp_path / "build.sh"), "trtexec"], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    asked = script("--stronglyTyped")
    assert ["trtexec", *sorted(asked)] == ["trtexec", *sorted(exported.trtexec["small.onnx"].split()[1:])]
    assert "--minShapes=x:2x1x4" in asked
    assert "--maxShapes=x:8x40x4" in asked
    assert {"--profile=0", "--profile=1", "--refit", "--noTF32", "--hardwareCompatibilityLevel=ampere+"} <= set(asked)
    assert set(asked) - set(script("none of it")) == {"--stronglyTyped"}


@pytest.mark.usefixtures("missing")
def test_the_script_builds_with_this_package(tmp_path: Path) -> None:
    export_tensorrt([save_graph(tmp_path / "small.onnx")], PROFILES)
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['tensorrt'] = None\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PYTHON": sys.executable}
    done = subprocess.run(
        ["sh", str(tmp_path / "build.sh")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert "error: no plan was built: TensorRT is not installed" in done.stderr


@pytest.mark.usefixtures("missing")
def test_the_script_says_what_is_not_there(tmp_path: Path) -> None:
    export_tensorrt([save_graph(tmp_path / "small.onnx")], PROFILES)
    for how, message in (
        ([], "no adrec: pip install 'adrec.tensorrt.', or: sh build.sh trtexec"),
        (["trtexec"], "not on"),
    ):
        done = subprocess.run(
            ["/bin/sh", str(tmp_path / "build.sh"), *how],
            env={"PATH": "/usr/bin:/bin", "PYTHON": "/bin/false"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 3, done.stderr
        assert re.search(message, done.stderr)


def test_a_plan_is_written_with_its_record_and_kept(tmp_path: Path, present: StrictTensorRT) -> None:
    graph = save_graph(tmp_path / "small.onnx")
    lines: list[str] = []
    plan = export_tensorrt([graph], PROFILES, report=lines.append).require_plans()["small.onnx"]
    content, record = read_plan(plan, HERE)
    assert content == b"plan of TensorRT"
    assert record.layers == {"float32": 2}
    assert record.precision_confirmed
    assert record.trtexec.startswith("trtexec --onnx=small.onnx")
    assert record.graph_files == read_graph(graph).files
    assert (tmp_path / "timing.cache").read_bytes() == b"plan of TensorRT"
    assert len(lines) == 1
    builds = len(present.calls("Builder.build_serialized_network"))
    export_tensorrt([graph], PROFILES, report=lines.append)
    assert (len(present.calls("Builder.build_serialized_network")), len(lines)) == (builds, 1)
    # "The file exists" is no reason to keep it.
    plan.write_bytes(b"plan of TensorR?")
    export_tensorrt([graph], PROFILES)
    assert len(present.calls("Builder.build_serialized_network")) == builds + 1
    assert read_plan(plan, HERE)[0] == b"plan of TensorRT"
    other = export_tensorrt([graph], PROFILES, BuildOptions(tf32=True)).require_plans()["small.onnx"]
    assert other != plan
    assert own_files(tmp_path, ["small.onnx"]) >= {each.name for p in (plan, other) for each in (p, record_path(p))}


def test_a_plan_of_the_wrong_precision_is_not_kept(tmp_path: Path, present: StrictTensorRT) -> None:
    graph = save_graph(tmp_path / "small.onnx", kind=TensorProto.FLOAT16)
    with pytest.raises(TensorRTError, match="no layer in float16"):
        export_tensorrt([graph], PROFILES)
    assert list(tmp_path.glob("*.plan*")) == []


def test_a_precision_that_is_hidden_is_said_to_be(tmp_path: Path, present: StrictTensorRT) -> None:
    present.replies["EngineInspector.get_engine_information"] = lambda inspector, format: json.dumps(
        {"Layers": [{"Name": "node", "Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]}]}
    )
    exported = export_tensorrt([save_graph(tmp_path / "small.onnx")], PROFILES)
    assert "hides some dtypes, so the precision is not confirmed" in exported.notes[-1]
    record = read_plan(exported.require_plans()["small.onnx"], HERE)[1]
    assert not record.precision_confirmed


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 26}, "is opset 26; TensorRT reads 9 to 25: export again with opset 20"),
        ({"opset": 8}, "is opset 8"),
        ({"k": 3841}, r"takes the best 3841 items \(k\); TensorRT's TopK allows 3840"),
    ],
)
def test_graphs_that_tensorrt_cannot_read_are_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    graph = save_graph(tmp_path / "small.onnx", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        export_tensorrt([graph], PROFILES)
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]


@pytest.mark.usefixtures("missing")
def test_missing_and_cut_weights_are_refused(tmp_path: Path) -> None:
    graph = save_graph(tmp_path / "small.onnx", external=True)
    data = tmp_path / "small.data"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=f"has {len(content) - 1} bytes, and small.onnx needs {len(content)}"):
        export_tensorrt([graph], PROFILES)
    data.unlink()
    with pytest.raises(ConfigError, match=r"keeps weights in small.data, which is not beside it"):
        export_tensorrt([graph], PROFILES)


def test_weights_outside_of_the_folder_are_refused(tmp_path: Path) -> None:
    graph = save_graph(tmp_path / "small.onnx", external=True)
    model = onnx.load(str(graph), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../secret.data"
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match=r"keeps weights in ../secret.data, outside its folder"):
        read_graph(graph)


def test_changed_weights_change_the_fingerprint(tmp_path: Path) -> None:
    graph = save_graph(tmp_path / "small.onnx", external=True)
    before = read_graph(graph).fingerprint
    data = tmp_path / "small.data"
    content = bytearray(data.read_bytes())
    content[0] ^= 1  # of a weight
    data.write_bytes(bytes(content))
    assert read_graph(graph).fingerprint != before


def test_files_that_are_no_graphs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; export the run to ONNX first"):
        read_graph(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(ConfigError, match="is not an ONNX file"):
        read_graph(tmp_path / "text.onnx")
    graph = save_graph(tmp_path / "small.onnx")
    model = onnx.load(str(graph))
    model.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param")
    onnx.save(model, graph)
    with pytest.raises(ConfigError, match="dimension 0 of 'x' has no name"):
        read_graph(graph)


def test_what_a_graph_is_read_as(tmp_path: Path) -> None:
    graph = read_graph(save_graph(tmp_path / "small.onnx", kind=TensorProto.FLOAT16))
    assert graph.dimensions == ("batch", "length")
    assert graph.inputs[0].dtype == "float16"
    assert graph.floats == {"float16"}
    assert graph.plugins == ()


def test_own_operators_are_found_and_trtexec_is_told_apart(tmp_path: Path, missing: None) -> None:
    graph = save_graph(tmp_path / "small.onnx")
    model = onnx.load(str(graph))
    model.graph.node.append(helper.make_node("merge_splits", ["a", "b"], ["c", "d", "e"], domain=DOMAIN))
    onnx.save(model, graph)
    assert read_graph(graph).plugins == ("merge_splits",)
    exported = export_tensorrt([graph], PROFILES)
    assert exported.trtexec == {}
    done = subprocess.run(["sh", str(tmp_path / "build.sh"), "trtexec"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "operators of adrec (merge_splits) that trtexec does not know" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": ["batch=1:1:1,lenght=1:8:50"]}, "'lenght'"),
        ({"profile": ["batch=3:2:1,length=1:8:50"]}, "allowed: 1 <= min <= opt <= max"),
        ({"k": 3841}, "--k is 3841; TensorRT's TopK allows 3840"),
        ({"loop": True}, "leave out --loop"),
        ({"table": "outside"}, "the item table cannot be outside"),
        ({"quantised": ["int8-dynamic"]}, "no dynamic int8"),
    ],
)
def test_commands_are_refused_before_the_export(options: dict[str, object], message: str) -> None:
    asked = {"profile": ["batch=1:1:1,length=1:8:50"], "k": 20} | options
    with pytest.raises(ConfigError, match=message):
        check_tensorrt(**asked)  # type: ignore[arg-type]


def test_a_profile_of_longer_histories_than_the_run_reads_is_refused() -> None:
    profiles = (parse_profile("batch=1:1:1,length=1:8:50"), parse_profile("batch=2:2:4,length=1:8:51"))
    check_lengths(profiles, 51)
    with pytest.raises(ConfigError, match="covers length 51; allowed: up to 50"):
        check_lengths(profiles, 50)


def test_a_gpu_that_torch_does_not_see_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    trt = ModuleType("tensorrt")
    trt.__version__ = "11.4.0.106"  # type: ignore[attr-defined]
    with pytest.raises(NotSupportedError, match=r"TensorRT 11.4.0.106 is installed, and torch sees no NVIDIA GPU"):
        library.this_platform(trt)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert not library.available()


def test_a_folder_without_a_request_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tensorrt.json"):
        read_request(tmp_path)
    (tmp_path / "tensorrt.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a build request"):
        read_request(tmp_path)
