"""Packages of AOTInductor: `cached`'s lists from compiled code, for batches and lengths it was not compiled with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adrec.data.jagged import Jagged
from adrec.engines import AotInductorEngine, CachedEngine, aotinductor
from adrec.engines.aotinductor import check_package, package_target
from adrec.engines.exported import ExportError, load_manifest
from adrec.errors import NotSupportedError
from adrec.models.base import SequenceModel
from adrec.respacing import sampling_table
from compress.export.aotinductor import export_aotinductor, trace
from compress.export.graphs import Graph, GraphPlan
from compress.export.onnx_export import ExportOptions
from compress.export.request import RequestGraph

ITEMS, WIDTH, TOLERANCE = 40, 16, 1e-5
ModelFactory = Callable[..., SequenceModel]

ALONE = """
import json, sys, torch
package = torch._inductor.aoti_load_package(sys.argv[1])
items = package(torch.tensor([[0, 0, 5, 9]]), torch.tensor([2]), torch.zeros(2, 1, 16))[0]
assert not [name for name in sys.modules if name.split(".")[0] in ("adrec", "compress")]
print(json.dumps(items.tolist()))
"""


@pytest.mark.slow
def test_a_package_gives_the_lists_of_cached(tmp_path: Path, tiny_model: ModelFactory) -> None:
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    model = tiny_model(lambda_uncertainty=1.0)
    export_aotinductor(model, tmp_path / "export", ExportOptions(steps=(1,), k=10))
    (graph,) = load_manifest(tmp_path / "export").graphs
    engine, exact = AotInductorEngine.from_export(tmp_path / "export", model), CachedEngine(model)
    for lengths in ([1], [2], [50], [7, 1, 50, 6, 2], [3] * 33):
        generator = torch.Generator().manual_seed(len(lengths))
        histories = Jagged.from_lists(
            torch.randint(1, ITEMS + 1, (length,), generator=generator).tolist() for length in lengths
        )
        best = exact.recommend(histories, 10, 1, seed=3)
        found = engine.recommend(histories, 10, 1, seed=3)
        torch.testing.assert_close(found.scores, best.scores, rtol=0, atol=TOLERANCE)
        assert torch.equal(found.items, best.items)
        wanted = exact.represent(histories, 1, seed=3)
        torch.testing.assert_close(engine.represent(histories, 1, seed=3), wanted, rtol=0, atol=TOLERANCE)
    # Another program loads it without a line of this project.
    package = tmp_path / "export" / graph.file
    assert package_target(package)[0] == "cpu"
    check_package(package, torch.device("cpu"))
    alone = subprocess.run(
        [sys.executable, "-c", ALONE, str(package)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    rows = exact.represent(Jagged.from_lists([[5, 9]]), 1, noise=torch.zeros(2, 1, WIDTH))
    assert json.loads(alone.stdout) == exact.top_k(rows, 10).items.tolist()


def test_what_packages_do_not_hold_is_refused(tmp_path: Path, tiny_model: ModelFactory) -> None:
    with pytest.raises(NotSupportedError, match="float32 requests with unrolled steps only; use --to onnx"):
        export_aotinductor(tiny_model(), tmp_path / "export", ExportOptions(loop=True))
    with pytest.raises(NotSupportedError, match="keeps the item table inside"):
        export_aotinductor(tiny_model(), tmp_path / "export", ExportOptions(catalogue="input"))
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_package_is_an_error(tmp_path: Path, tiny_model: ModelFactory) -> None:
    path = tmp_path / "foreign.pt2"
    path.write_bytes(b"no package")
    with pytest.raises(ExportError, match=r"foreign\.pt2: torch cannot load the package"):
        AotInductorEngine(tiny_model()).open(path)


def package_for(path: Path, **metadata: str) -> Path:
    """A package that says what it is for, and holds no code."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{path.stem}/data/aotinductor/model/a.wrapper.cpp", "")
        file.writestr(f"{path.stem}/data/aotinductor/model/a.wrapper_metadata.json", json.dumps(metadata))
    return path


def test_a_package_of_another_device_is_refused_before_it_is_loaded(
    tmp_path: Path, tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = package_for(tmp_path / "gpu.pt2", AOTI_DEVICE_KEY="cuda", AOTI_COMPUTE_CAPABILITY="90")
    assert package_target(path) == ("cuda", "90")
    with pytest.raises(
        ExportError,
        match=r"gpu\.pt2: was compiled for 'cuda', but the model is on 'cpu'; load it on 'cuda', or export again with"
        " --device cpu",
    ):
        AotInductorEngine(tiny_model()).open(path)
    device = torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda asked: (12, 0) if asked == device else None)
    with pytest.raises(ExportError, match=r"compute capability 90, but 'cuda:1' has 120; export again on this GPU"):
        check_package(path, device)
    check_package(package_for(tmp_path / "fits.pt2", AOTI_DEVICE_KEY="cuda", AOTI_COMPUTE_CAPABILITY="120"), device)
    with pytest.raises(ExportError, match=r"old\.pt2: does not say what device it was compiled for; export again"):
        check_package(package_for(tmp_path / "old.pt2"), device)
    with pytest.raises(ExportError, match=r"cpu\.pt2: was compiled for 'cpu', but the model is on 'cuda:1'"):
        check_package(package_for(tmp_path / "cpu.pt2", AOTI_DEVICE_KEY="cpu"), device)


def test_a_package_of_a_processor_that_can_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = package_for(tmp_path / "new.pt2", AOTI_DEVICE_KEY="cpu", AOTI_CPU_ISA="AVX512 AVX512_VNNI")
    has = {"avx512": True, "avx512_vnni": True}
    for name in has:
        monkeypatch.setitem(aotinductor._INSTRUCTIONS, name, lambda name=name: has[name])
    check_package(path, torch.device("cpu"))
    has["avx512_vnni"] = False
    with pytest.raises(
        ExportError, match=r"new\.pt2: was compiled for processors with avx512_vnni, which this one has not; export"
    ):
        check_package(path, torch.device("cpu"))
    # Instructions of other kinds of processors are not known by name: torch says what it cannot load.
    check_package(package_for(tmp_path / "arm.pt2", AOTI_DEVICE_KEY="cpu", AOTI_CPU_ISA="ASIMD"), torch.device("cpu"))


@pytest.mark.parametrize(
    "settings", [{"positions": "released"}, {"padding": "masked", "positions": "learned", "geodesic": True}]
)
def test_a_program_for_another_device_leaves_nothing_on_the_cpu(
    tiny_model: ModelFactory, settings: dict[str, Any]
) -> None:
    model = tiny_model(encoder_blocks=1, guidance_scale=2.0, condition_dropout=0.3, **settings)
    graph = Graph(RequestGraph(model), GraphPlan("request", sampling_table(model.betas, 2), k=10), model)
    program = trace(graph, "meta")
    held = [*program.state_dict.values(), *(each for each in program.constants.values() if torch.is_tensor(each))]
    assert {each.device.type for each in held} == {"meta"}
    # An operator refuses tensors of two devices.
    found = program.module()(*(tensor.to("meta") for tensor in graph.example()))
    assert [tuple(each.shape) for each in found] == [(3, 10), (3, 10), (3, WIDTH)]
