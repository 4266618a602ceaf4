"""The engine around a plan: order, batches, noise and lists, with ONNX Runtime in the place of the plan."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from strict_tensorrt import StrictTensorRT
from tensorrt_cases import HERE
from tensorrt_standin import standin
from torch import Tensor

from adrec.data.jagged import Jagged
from adrec.engines import CachedEngine, make_engine
from adrec.engines.exported import ExportError
from adrec.engines.tensorrt import engine, library
from adrec.engines.tensorrt.engine import TensorRTEngine
from adrec.engines.tensorrt.plan import read_record
from adrec.engines.tensorrt.profiles import choose_profile, parse_profile
from adrec.errors import ConfigError, NotSupportedError
from compress.export.onnx_export import ExportOptions, export_onnx

onnxruntime = pytest.importorskip("onnxruntime")
PROFILES = (parse_profile("batch=1:1:1,length=1:4:9"), parse_profile("batch=2:4:7,length=1:4:9"))


class GraphRunner:
    """Takes and gives what `PlanRunner` does; the ONNX file stands for its plan."""

    def __init__(self, graph: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        self.record = SimpleNamespace(key=SimpleNamespace(profiles=PROFILES))
        self.device, self.batches = torch.device("cpu"), []  # type: ignore[var-annotated]
        self.replayed: list[tuple[int, ...]] = []

    def replay(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        self.replayed.append(tuple(inputs["histories"].shape))
        return self(inputs)

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        batch, length = inputs["histories"].shape
        choose_profile(self.record.key.profiles, {"batch": batch, "length": length})
        self.batches.append(batch)
        names = [each.name for each in self.session.get_outputs()]
        found = self.session.run(names, {name: each.numpy() for name, each in inputs.items()})
        return {name: torch.from_numpy(np.array(each)) for name, each in zip(names, found, strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shallow_model: Any) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    export_onnx(shallow_model(timesteps=32, max_length=9), out, ExportOptions(steps=(2,), k=5))
    return out


@pytest.fixture
def made(folder: Path, shallow_model: Any, monkeypatch: pytest.MonkeyPatch) -> TensorRTEngine:
    monkeypatch.setattr(engine, "PlanRunner", GraphRunner)
    monkeypatch.setattr(engine, "find_plan", lambda graph, here: graph)
    monkeypatch.setattr(library, "load", lambda: StrictTensorRT("11_4"))
    monkeypatch.setattr(library, "this_platform", lambda module: HERE)
    return TensorRTEngine(shallow_model(timesteps=32, max_length=9), folder=folder)


def histories(batch: int) -> Jagged:
    generator = torch.Generator().manual_seed(batch)
    lengths = torch.randint(1, 13, (batch,), generator=generator).tolist()
    return Jagged.from_lists([torch.randint(1, 41, (length,), generator=generator).tolist() for length in lengths])


@pytest.mark.parametrize(("batch", "batches"), [(1, [1]), (7, [7]), (18, [7, 7, 4])])
def test_a_request_is_that_of_cached(made: TensorRTEngine, batch: int, batches: list[int]) -> None:
    exact, given, steps = CachedEngine(made.model), histories(batch), 2
    expected, found = exact.recommend(given, 4, steps, seed=3), made.recommend(given, 4, steps, seed=3)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=0)
    assert torch.equal(found.items, expected.items)
    noise = torch.randn(steps + 1, batch, 16)
    rows = made.represent(given, steps, noise=noise)
    torch.testing.assert_close(rows, exact.represent(given, steps, noise=noise), atol=1e-5, rtol=0)
    _, runner = made.session(made.table(steps))
    assert runner.batches == batches * 2  # type: ignore[attr-defined]


def test_lengths_are_padded_to_a_few_sizes_where_graphs_are_replayed(made: TensorRTEngine, folder: Path) -> None:
    given = Jagged.from_lists([[3, 5, 7]] * 2)
    exact = CachedEngine(made.model).recommend(given, 4, 2)
    found = made.recommend(given, 4, 2)
    torch.testing.assert_close(found.scores, exact.scores, atol=1e-5, rtol=0)
    made.recommend(Jagged.from_lists([[3] * 9]), 4, 2)
    _, runner = made.session(made.table(2))
    # A power of two from 8 on, and never more than the profile has.
    assert runner.replayed == [(2, 8), (1, 9)]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="no profile covers a request of batch 2, length 12; the nearest is"):
        made.columns(runner, 2, 12)
    plain = TensorRTEngine(made.model, folder=folder, cuda_graphs=False)
    again = plain.recommend(given, 4, 2)
    assert torch.equal(again.items, found.items)
    _, runner = plain.session(plain.table(2))
    assert runner.replayed == []  # type: ignore[attr-defined]
    assert plain.columns(runner, 2, 3) == 3


def test_a_request_is_refused_as_a_whole_where_a_part_of_it_is_not_covered(made: TensorRTEngine) -> None:
    given, (_, runner) = histories(8), made.session(made.table(2))
    runner.record.key.profiles = (parse_profile("batch=2:4:7,length=4:4:9"),)  # type: ignore[misc]
    # Seven users fit and the eighth does not.
    with pytest.raises(ConfigError, match="no profile covers a request of batch 1, length 9; the nearest is"):
        made.recommend(given, 4, 2)
    assert runner.batches == []  # type: ignore[attr-defined]


def test_histories_shorter_than_every_profile_are_padded(made: TensorRTEngine, folder: Path) -> None:
    given = Jagged.from_lists([[3, 5], [7]])
    plain = TensorRTEngine(made.model, folder=folder, cuda_graphs=False)
    _, runner = plain.session(plain.table(2))
    runner.record.key.profiles = (parse_profile("batch=2:4:7,length=6:6:9"),)  # type: ignore[misc]
    assert plain.columns(runner, 2, 2) == 6
    expected, found = CachedEngine(made.model).recommend(given, 4, 2), plain.recommend(given, 4, 2)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=0)
    assert torch.equal(found.items, expected.items)


def test_by_name_it_exports_builds_and_keeps_a_plan(
    shallow_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = standin("11_4")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "load", lambda: trt)
    monkeypatch.setattr(library, "this_platform", lambda module: HERE)
    monkeypatch.setattr(engine, "PlanRunner", lambda plan: GraphRunner(plan.parent / f"{plan.name.split('.')[0]}.onnx"))
    model, given = shallow_model(timesteps=32, max_length=9), histories(3)
    for _ in range(2):
        found = make_engine("tensorrt", model).recommend(given, 4, 1)
        assert torch.equal(found.items, CachedEngine(model).recommend(given, 4, 1).items)
    assert len(trt.calls("Builder.build_serialized_network")) == 1
    (plan,) = tmp_path.rglob("*.plan")
    assert plan.parent.name.startswith("onnx-fp32-")
    profiles = read_record(plan).key.profiles
    assert [str(each) for each in profiles] == [
        "batch=1:1:1,length=1:9:9", "batch=2:16:32,length=1:9:9", "batch=33:256:512,length=1:9:9"
    ]  # fmt: skip


def test_where_it_cannot_run_the_error_says_what_to_do(
    shallow_model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shallow_model(timesteps=32, max_length=9)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for name in ("tensorrt", "tensorrt-fp16"):
        with pytest.raises(
            NotSupportedError, match=f"engine '{name}' cannot run here: TensorRT is not installed: pip install .*"
        ):
            make_engine(name, model)
    monkeypatch.undo()
    monkeypatch.setattr(library, "load", lambda: StrictTensorRT("11_4"))
    monkeypatch.setattr(library, "this_platform", lambda module: HERE)
    without = make_engine("tensorrt", model, folder)
    with pytest.raises(ExportError, match=r"holds no plan of .* Build it: adrec export RUN --to tensorrt"):
        without.recommend(histories(2), 4, 2)
    with pytest.raises(ConfigError, match="holds no onnx request graph in fp16"):
        make_engine("tensorrt-fp16", model, folder)


def test_lists_that_the_graph_does_not_rank_are_scored_here(made: TensorRTEngine) -> None:
    exact, given = CachedEngine(made.model), histories(5)
    for k, exclude in ((9, None), (4, given)):
        expected, found = exact.recommend(given, k, 2, exclude=exclude), made.recommend(given, k, 2, exclude=exclude)
        assert torch.equal(found.items, expected.items)


def test_steps_that_were_not_exported_are_refused(made: TensorRTEngine) -> None:
    with pytest.raises(ConfigError, match="holds no fp32 graph for 3 steps; it holds: 2; export it with --steps 3"):
        made.recommend(histories(2), 4, 3)


def test_a_folder_of_another_model_is_refused(made: TensorRTEngine, folder: Path, shallow_model: Any) -> None:
    with pytest.raises(ExportError, match="was exported from another model"):
        TensorRTEngine(shallow_model(seed=1, timesteps=32, max_length=9), folder=folder)
    with pytest.raises(ConfigError, match="holds no onnx request graph in fp16; it holds: fp32"):
        TensorRTEngine.from_export(folder, made.model, precision="fp16")
    with pytest.raises(ExportError, match=r"holds no export.json"):
        TensorRTEngine(made.model, folder=folder.parent)


def test_it_runs_on_no_cpu() -> None:
    assert not TensorRTEngine.runs_on(torch.device("cpu"))
