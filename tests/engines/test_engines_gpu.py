"""Both engines on a CUDA device against the CPU; `make gpu` runs these, everything else skips them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adrec.data.jagged import Jagged
from adrec.engines import AotInductorEngine, OnnxRuntimeEngine, make_engine
from adrec.engines.aotinductor import compute_capability, package_target
from adrec.engines.exported import ExportError
from adrec.models import SequenceModel
from kernels import philox

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that torch can use"),
]
ModelFactory = Callable[..., SequenceModel]


def histories() -> Jagged:
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 2, 7, 13, 50, 3, 1]
    return Jagged.from_lists([torch.randint(1, 41, (n,), generator=generator).tolist() for n in lengths])


@pytest.fixture(autouse=True)
def exact_products() -> None:
    # TF32 would hide a real difference between the engines.
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("engine", ["reference", "cached", "triton"])
@pytest.mark.parametrize("padding", ["released", "masked"])
def test_a_gpu_computes_what_the_cpu_does(tiny_model: ModelFactory, engine: str, padding: str) -> None:
    model = tiny_model(padding=padding, max_length=50, timesteps=32, lambda_uncertainty=1.0)
    expected = make_engine("reference", model).represent(histories(), steps=32)
    found = make_engine(engine, model.to("cuda")).represent(histories(), steps=32)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=0.0)


def test_onnxruntime_waits_for_what_another_stream_writes(
    tiny_model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not OnnxRuntimeEngine.runs_on(torch.device("cuda")):
        pytest.skip("needs onnxruntime-gpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny_model(max_length=50, timesteps=32, lambda_uncertainty=1.0)
    expected = make_engine("reference", model).represent(histories(), steps=2)
    engine = make_engine("onnxruntime", model.to("cuda"))
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            found = engine.represent(histories(), steps=2)
        torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=0.0)


def test_a_package_is_compiled_for_the_gpu_of_its_model(
    tiny_model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not AotInductorEngine.runs_on(torch.device("cuda")):
        pytest.skip("needs Triton")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny_model(max_length=50, timesteps=32, lambda_uncertainty=1.0)
    expected = make_engine("reference", model).represent(histories(), steps=2)
    engine = make_engine("aotinductor", copy.deepcopy(model).to("cuda"))
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            found = engine.represent(histories(), steps=2)
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=0.0)
    (package,) = tmp_path.rglob("*.pt2")
    assert package_target(package) == ("cuda", compute_capability(engine.device))
    with pytest.raises(ExportError, match="was compiled for 'cuda', but the model is on 'cpu'"):
        AotInductorEngine.from_export(package.parent, model).represent(histories(), steps=2)


def test_noise_is_the_same_on_both_devices() -> None:
    keys = torch.tensor([0, 5, 2**39 - 1])
    expected = philox.row_noise(2**40 + 3, keys, 4, 33)
    torch.testing.assert_close(philox.row_noise(2**40 + 3, keys.cuda(), 4, 33).cpu(), expected, atol=5e-7, rtol=0.0)
