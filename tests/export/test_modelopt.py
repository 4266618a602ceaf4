"""NVIDIA's quantiser, as the extra `modelopt` installs it, on a run with random weights."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from adrec.checkpoint import save_run
from adrec.config import RunConfig
from adrec.data.dataset import Dataset
from adrec.engines import CachedEngine
from adrec.engines.onnxruntime import OnnxRuntimeEngine
from compress.export.lint import lint

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]
# What pip says of a registry that it cannot reach, and of one without the package.
UNREACHED = "(from versions: none)"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the extra on top of what is installed here; skips where the registry cannot be reached."""
    folder = tmp_path_factory.mktemp("modelopt") / "venv"
    venv.create(folder, with_pip=True)
    paths = {name: sysconfig.get_path(name, vars={"base": str(folder)}) for name in ("purelib", "scripts")}
    beneath = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    Path(paths["purelib"], "beneath.pth").write_text(beneath, encoding="utf-8")
    found = Path(paths["scripts"], Path(sys.executable).name)
    wanted = [Requirement(text) for text in requires("adrec") or ()]
    extra = [str(each).split(";")[0] for each in wanted if each.marker and each.marker.evaluate({"extra": "modelopt"})]
    command = [str(found), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), *extra]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("pip cannot install the extra 'modelopt' within 400 s")
    if UNREACHED in done.stderr:
        pytest.skip(f"pip cannot install the extra 'modelopt': {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_modelopt_quantises_what_the_own_quantiser_does(
    python: Path, tmp_path: Path, tiny_model: Any, tiny_dataset: Dataset, precision: str
) -> None:
    model, run, out = tiny_model(lambda_uncertainty=1.0), tmp_path / "run", tmp_path / "out"
    tiny_dataset.save(tmp_path / "data")
    save_run(run, RunConfig(model=model.config), model, tiny_dataset, str(tmp_path / "data"), {})
    options = ["--steps", "1", "--int8", "qdq", "--fp8", "--precision", precision, "--k", "10"]
    done = subprocess.run(
        [
            str(python), "-c", "from adrec.cli import main; main()",
            "export", str(run), *options, "--quantiser", "modelopt", "--out", str(out),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rest = "" if precision == "fp32" else "-fp16"
    given, exact = tiny_dataset.examples("test").histories, CachedEngine(model)
    kinds: list[tuple[Any, int, float]] = [
        ("int8-qdq", onnx.TensorProto.INT8, 0.05),
        ("fp8-qdq", onnx.TensorProto.FLOAT8E4M3FN, 0.1),
    ]
    for kind, stored, bound in kinds:
        path = out / f"request-{kind}{rest}-s1.onnx"
        # Also that no tensor is stored twice.
        assert lint(path) == []
        graph = onnx.load(path).graph
        made = {name: node for node in graph.node for name in node.output}
        constants = {tensor.name: tensor for tensor in graph.initializer}
        weights = [
            constants[made[node.input[1]].input[0]].data_type
            for node in graph.node
            if node.op_type == "Gemm" and node.input[1] in made and node.input[0] in made
        ]
        # Over items two encoder blocks, a denoiser block and a part of the next.
        assert weights == [stored] * (4 + 4 + 4 + 1)
        noise = torch.randn(2, len(given), model.config.width, generator=torch.Generator().manual_seed(0))
        wanted = exact.represent(given, 1, noise=noise)
        rows = OnnxRuntimeEngine.from_export(out, model, precision=kind).represent(given, 1, noise=noise)
        assert 1e-4 < float((rows - wanted).norm() / wanted.norm()) < bound
