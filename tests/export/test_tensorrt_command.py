"""`adrec export RUN --to tensorrt` where TensorRT is missing: everything but the plan, said so, and status 3."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from adrec.checkpoint import save_run
from adrec.cli import build_app
from adrec.config import RunConfig
from adrec.data.dataset import Dataset
from adrec.errors import AdrecError
from compress.export.folder import check_folder
from compress.export.tensorrt.graph import read_graph

pytest.importorskip("onnxscript")
PROFILE = ("--profile", "batch=1:1:1,length=1:8:20")


def adrec(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "400"}).invoke(build_app(), [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "modelopt.onnx.quantization", None)


@pytest.fixture
def run(tmp_path: Path, shallow_model: Any, tiny_dataset: Dataset) -> Path:
    model = shallow_model(model="sasrec", positions="learned", max_length=20)
    save_run(tmp_path / "run", RunConfig(model=model.config), model, tiny_dataset, "data", {})
    return tmp_path / "run"


def test_all_but_the_plan_is_written_and_the_status_is_3(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("export", run, "--to", "tensorrt", *PROFILE, "--weights", "refit", "--k", "5", "--out", out)
    result = adrec(*arguments)
    assert isinstance(result.exception, AdrecError), result.output
    assert result.exception.exit_code == 3
    assert f"All else is in {out}" in str(result.exception)
    assert f"sh {out / 'build.sh'}" in str(result.exception)
    graph = next(out.glob("*.onnx"))
    assert {path.name for path in out.iterdir()} == {graph.name, "export.json", "tensorrt.json", "build.sh"}
    assert f"which all is there): trtexec --onnx={graph.name}" in result.output
    assert json.loads((out / "tensorrt.json").read_text())["options"]["weights"] == "refit"
    # Another export may replace the folder, files of TensorRT and all; a foreign file keeps it.
    (out / f"{graph.stem}.0123456789abcdef.plan").write_bytes(b"an older plan")
    check_folder(out, overwrite=True)
    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in str(adrec(*arguments, "--overwrite").exception)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_eight_bits_are_a_precision_of_tensorrt(
    tmp_path: Path, shallow_model: Any, tiny_dataset: Dataset, precision: str
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    tiny_dataset.save(data)
    model = shallow_model(model="sasrec", positions="learned", max_length=20)
    save_run(tmp_path / "run", RunConfig(model=model.config), model, tiny_dataset, str(data), {})
    # The same said twice is no contradiction.
    again = ("--int8", "qdq") if precision == "int8" else ("--fp8",)
    asked = ("--to", "tensorrt", *PROFILE, "--precision", precision, *again, "--k", "5")
    result = adrec("export", tmp_path / "run", *asked, "--out", out)
    assert isinstance(result.exception, AdrecError), result.output
    assert result.exception.exit_code == 3
    assert [each.name for each in out.glob("*.onnx")] == [f"request-{precision}-qdq-fp16.onnx"]
    graph = read_graph(out / f"request-{precision}-qdq-fp16.onnx")
    assert graph.floats == {"float16", {"int8": "int8", "fp8": "float8_e4m3fn"}[precision]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--profile", "batch=1:1:1,lenght=1:8:20"), "did you mean 'length'?"),
        (("--profile", "batch=4:2:8,length=1:8:20"), "allowed: 1 <= min <= opt <= max"),
        ((*PROFILE, "--k", "3841"), "TensorRT's TopK allows 3840"),
        ((*PROFILE, "--hardware-compatibility", "any"), "hardware_compatibility"),
        ((*PROFILE, "--weights", "none"), "weights"),
        ((*PROFILE, "--int8", "dynamic"), "use --int8 qdq"),
        ((*PROFILE, "--precision", "int8", "--int8", "dynamic"), "--precision is 'int8' and int8-dynamic is asked for"),
        (
            (*PROFILE, "--precision", "int8", "--fp8"),
            "for several plans use --precision fp16 with --int8 qdq and --fp8",
        ),
        ((*PROFILE, "--precision", "fp8", "--int8", "qdq"), "--precision is 'fp8' and int8-qdq is asked for as well"),
        ((*PROFILE, "--precision", "int4"), "allowed: fp32, fp16, int8, fp8"),
        ((*PROFILE, "--quantiser", "modelopt", "--int8", "qdq"), "pip install 'adrec[modelopt]'"),
        ((*PROFILE, "--loop"), "leave out --loop"),
    ],
)
def test_bad_input_is_refused_before_the_run_is_read(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = adrec("export", tmp_path / "no run", "--to", "tensorrt", *arguments, "--out", tmp_path / "out")
    assert isinstance(result.exception, AdrecError), result.output
    assert result.exception.exit_code == 2
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()
