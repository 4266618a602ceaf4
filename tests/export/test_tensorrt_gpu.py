"""Real engines: built, read back and held to `cached`. Needs TensorRT and an NVIDIA GPU; `pytest -m tensorrt`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adrec.data.jagged import Jagged
from adrec.engines import CachedEngine, make_engine
from adrec.engines.tensorrt import PlanRunner, available
from adrec.engines.tensorrt.engine import TensorRTEngine
from adrec.engines.tensorrt.profiles import parse_profile
from adrec.errors import ConfigError
from compress.export.onnx_export import ExportOptions, export_onnx
from compress.export.tensorrt.build import export_tensorrt
from compress.export.tensorrt.options import BuildOptions

pytestmark = [
    pytest.mark.tensorrt,
    pytest.mark.slow,
    pytest.mark.skipif(not available(), reason="needs TensorRT and an NVIDIA GPU that torch can use"),
]
PROFILES = [parse_profile("batch=1:1:1,length=1:8:9"), parse_profile("batch=2:16:33,length=1:8:9")]


def engine(model: Any, folder: Path, *, build: BuildOptions | None = None, **options: Any) -> TensorRTEngine:
    manifest = export_onnx(model, folder, ExportOptions(k=5, **options))
    graphs = [folder / graph.file for graph in manifest.graphs]
    exported = export_tensorrt(graphs, PROFILES, build or BuildOptions(workspace_mib=512))
    assert set(exported.require_plans()) == {graph.name for graph in graphs}
    return TensorRTEngine.from_export(folder, model.cuda())


def histories(batch: int, longest: int = 9) -> Jagged:
    generator = torch.Generator().manual_seed(batch)
    lengths = torch.randint(1, longest + 1, (batch,), generator=generator).tolist()
    return Jagged.from_lists([torch.randint(1, 41, (length,), generator=generator).tolist() for length in lengths])


@pytest.mark.parametrize("plugins", [False, True])
@pytest.mark.parametrize("overrides", [{}, {"padding": "masked", "positions": "learned"}])
def test_float32_is_cached(tiny_model: Any, tmp_path: Path, plugins: bool, overrides: dict[str, str]) -> None:
    model = tiny_model(timesteps=32, max_length=9, **overrides)
    made = engine(model, tmp_path / "out", steps=(1, 4), plugins=plugins)
    exact = CachedEngine(model)
    for steps in (1, 4):
        for batch in (1, 2, 33, 70):
            given = histories(batch)
            expected = exact.recommend(given, 5, steps)
            found = made.recommend(given, 5, steps)
            torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)
            assert float((found.items == expected.items).float().mean()) > 0.99
            torch.testing.assert_close(
                made.represent(given, steps), exact.represent(given, steps), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("plugins", [False, True])
def test_float16_is_float16_and_near(tiny_model: Any, tmp_path: Path, plugins: bool) -> None:
    model = tiny_model(timesteps=32, max_length=9)
    made = engine(model, tmp_path / "out", steps=(1,), precision="fp16", plugins=plugins)
    _, runner = made.session(made.table(1))
    assert runner.record.precision_confirmed
    assert "float16" in runner.record.layers
    given = histories(33)
    torch.testing.assert_close(
        made.represent(given, 1).float(), CachedEngine(model).represent(given, 1), atol=2e-2, rtol=2e-2
    )


@pytest.mark.parametrize("weights", ["refit", "stripped"])
def test_weights_can_be_exchanged(tiny_model: Any, tmp_path: Path, weights: str) -> None:
    first, second = (tiny_model(seed=seed, timesteps=32, max_length=9) for seed in (0, 1))
    build = BuildOptions(weights=weights, workspace_mib=512)  # type: ignore[arg-type]
    made = engine(first, tmp_path / "first", build=build)
    manifest = export_onnx(second.cpu(), tmp_path / "second", ExportOptions(k=5))
    given = histories(33)
    torch.testing.assert_close(made.represent(given, 1), CachedEngine(first).represent(given, 1), atol=1e-5, rtol=1e-5)
    _, runner = made.session(made.table(1))
    assert runner.record.precision_confirmed
    runner.refit(tmp_path / "second" / manifest.graphs[0].file)
    torch.testing.assert_close(
        made.represent(given, 1), CachedEngine(second.cuda()).represent(given, 1), atol=1e-5, rtol=1e-5
    )


def test_a_captured_request_is_the_plain_one(tiny_model: Any, tmp_path: Path) -> None:
    made = engine(tiny_model(timesteps=32, max_length=9), tmp_path / "out")
    _, runner = made.session(made.table(1))

    def request(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "histories": torch.randint(1, 41, (4, 6), generator=generator).cuda(),
            "lengths": torch.randint(1, 7, (4,), generator=generator).cuda(),
            "noise": torch.randn(2, 4, 16, generator=generator).cuda(),
        }

    captured = runner.capture(request(0))
    for seed in (1, 2):
        plain = runner(request(seed))
        replayed = {name: each.clone() for name, each in captured(request(seed)).items()}
        for name, expected in plain.items():
            torch.testing.assert_close(replayed[name], expected)


def test_requests_that_come_again_are_replayed(tiny_model: Any, tmp_path: Path) -> None:
    """Plain, captured and replayed: three times the same request, and then another of the same shape."""
    made = engine(tiny_model(timesteps=32, max_length=9), tmp_path / "out")
    plain = TensorRTEngine.from_export(tmp_path / "out", made.model, cuda_graphs=False)
    for seed, batch in ((0, 4), (0, 4), (0, 4), (1, 4), (0, 1), (0, 1)):
        given = histories(batch)
        found, expected = made.recommend(given, 5, 1, seed), plain.recommend(given, 5, 1, seed)
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)
        assert float((found.items == expected.items).float().mean()) > 0.9
    _, runner = made.session(made.table(1))
    assert len(runner.captures) == 2


@pytest.mark.parametrize(("kind", "dtype"), [("int8-qdq", "int8"), ("fp8-qdq", "float8_e4m3fn")])
@pytest.mark.parametrize("floats", ["fp32", "fp16"])
def test_eight_bits_are_eight_bits_and_near(
    tiny_model: Any, tmp_path: Path, kind: str, dtype: str, floats: str
) -> None:
    if kind == "fp8-qdq" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs Ada or newer")
    model, given = tiny_model(timesteps=32, max_length=9), histories(33)
    made = engine(
        model, tmp_path / "out", precision=floats, quantised=(kind,), keep_float=False, calibration=histories(64)
    )
    _, runner = made.session(made.table(1))
    assert not runner.record.precision_confirmed or dtype in runner.record.layers
    rows, exact = made.represent(given, 1), CachedEngine(model).represent(given, 1)
    assert float((rows - exact).norm() / exact.norm()) < 0.1


def test_by_name_it_builds_what_a_request_needs(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, given = tiny_model(timesteps=32, max_length=9).cuda(), histories(3)
    found, exact = make_engine("tensorrt", model).recommend(given, 5, 1), CachedEngine(model).recommend(given, 5, 1)
    torch.testing.assert_close(found.scores, exact.scores, atol=1e-5, rtol=1e-5)


def test_streams_do_not_disturb_each_other(tiny_model: Any, tmp_path: Path) -> None:
    made = engine(tiny_model(timesteps=32, max_length=9), tmp_path / "out")
    _, runner = made.session(made.table(1))
    given = [
        {
            "histories": torch.randint(1, 41, (batch, 9)).cuda(),
            "lengths": torch.full((batch,), 9).cuda(),
            "noise": torch.randn(2, batch, 16).cuda(),
        }
        for batch in (1, 5, 33)
    ]
    expected = [runner(each)["rows"] for each in given]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in given]
    found = []
    for _ in range(10):
        for stream, each in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                found.append(runner(each)["rows"])
    torch.cuda.synchronize()
    for place, rows in enumerate(found):
        torch.testing.assert_close(rows, expected[place % len(given)])


def test_a_plan_is_kept_and_reloaded(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model(timesteps=32, max_length=9)
    made = engine(model, tmp_path / "out")
    _, runner = made.session(made.table(1))
    written = runner.plan.stat().st_mtime_ns
    graph = tmp_path / "out" / next(iter(runner.record.graph_files))
    export_tensorrt([graph], PROFILES, BuildOptions(workspace_mib=512))
    assert runner.plan.stat().st_mtime_ns == written
    assert PlanRunner(runner.plan).record == runner.record


def test_a_length_that_no_profile_covers_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    made = engine(tiny_model(timesteps=32, max_length=12), tmp_path / "out")
    with pytest.raises(ConfigError, match="no profile covers a request of batch 1, length 12"):
        made.recommend(Jagged.from_lists([list(range(1, 13))]), 5, 1)
