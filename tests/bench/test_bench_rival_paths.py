"""Rivals of the `cached` engine: they recommend what their engine does, and are rows of suite engines by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adrec.engines import ENGINES, make_engine
from adrec.errors import ConfigError, NotSupportedError
from adrec.models.base import SequenceModel
from bench.kernels import engine_paths
from bench.kernels.catalogues import RandomCatalogue, random_baseline, random_histories, random_model
from bench.kernels.engine_paths import PATHS, Request, check_paths, engine_name, path_calls, path_engine
from bench.kernels.engine_sweep import Axes, EngineSweep, request_cost
from bench.kernels.measure import INPUTS, Timer
from bench.kernels.records import BASELINE
from bench.kernels.reference_paths import OnnxReferenceEngine
from bench.running import registry
from bench.running.commands import check_engines
from bench.running.unit import Context, Unit
from bench.timing import Clock, TimingProtocol

CPU = torch.device("cpu")
needs_onnx = pytest.mark.skipif(not OnnxReferenceEngine.runs_on(CPU), reason="ONNX Runtime or onnxscript is missing")


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces as the compiler does, and then runs what was traced as it is."""
    monkeypatch.setitem(engine_paths.COMPILE_OPTIONS, "cpu", {"backend": "aot_eager", "dynamic": False})
    torch.compiler.reset()


@pytest.fixture(scope="module")
def model() -> SequenceModel:
    return random_model(40, 16, 4, CPU)


def silent(stage: str, done: float, expected: float) -> None:
    """No progress."""


@pytest.mark.usefixtures("eager_compiler")
@pytest.mark.parametrize("path", ["reference-compiled", pytest.param("reference-onnx", marks=needs_onnx)])
def test_rivals_recommend_what_the_reference_does(path: str, model: SequenceModel) -> None:
    engine, reference = path_engine(path, model), make_engine("reference", model)
    for users, steps in ((3, 1), (3, 4), (1, 4)):
        requests = [Request(random_histories(users, 40, variant), steps, k=7) for variant in range(2)]
        calls, noise = path_calls(path, engine, requests)
        assert noise == "drawn"
        for call, request in zip(calls, requests, strict=True):
            expected = reference.recommend(request.histories, 7, steps=steps)
            assert torch.equal(call(), expected.items)
            found = engine.recommend(request.histories, 7, steps=steps)
            torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)


@needs_onnx
def test_what_the_exported_reference_cannot_do_is_said(model: SequenceModel) -> None:
    engine = path_engine("reference-onnx", model)
    with pytest.raises(NotSupportedError, match="excludes no items"):
        engine.top_k(torch.zeros(2, 16), 3, exclude=random_histories(2, 40))


def test_sasrec_is_measured_in_the_same_engines(tiny_protocol: TimingProtocol, counting_clock: Clock) -> None:
    timer = Timer(CPU, tiny_protocol, counting_clock, "adrec bench")
    paths = ("reference", "cached", "sasrec-reference", "sasrec-cached")
    rows = {
        row.path: row for row in EngineSweep(timer, Axes(paths, (3,), (2,), (RandomCatalogue(30, 16),))).rows(silent)
    }
    assert [row.error for row in rows.values()] == [None] * 4
    assert {path: row.overlap_with for path, row in rows.items()} == {
        "reference": "reference", "cached": "reference",
        "sasrec-reference": "sasrec-reference", "sasrec-cached": "sasrec-reference",
    }  # fmt: skip
    assert {row.top20_overlap_fraction for row in rows.values()} == {1.0}
    assert {(row.baseline, row.steps) for row in rows.values()} == {("reference", 2)}
    # Without the denoiser and its steps there is less to compute and to read.
    tokens = rows["cached"].history_tokens
    ours, theirs = rows["cached"].roof, rows["sasrec-cached"].roof
    assert theirs.least_flops == 2 * 12 * 16 * 16 * 2 * tokens + 2 * 3 * 30 * 16 < ours.least_flops
    assert ours.least_bytes - theirs.least_bytes == 2 * 12 * 16 * 16 * 4
    assert request_cost(tokens, 3, None, 30, 16, torch.float32).flops == theirs.least_flops


def test_the_baseline_shares_the_table_and_has_no_steps(model: SequenceModel) -> None:
    baseline = random_baseline(model)
    assert baseline.table is model.table
    assert (baseline.config.model, baseline.config.items) == ("sasrec", 40)
    request = Request(random_histories(3, 40), None, k=7)
    (call,), _ = path_calls("sasrec-cached", path_engine("sasrec-cached", baseline), [request])
    assert torch.equal(call(), make_engine("reference", baseline).recommend(request.histories, 7).items)


def test_inputs_are_rotated() -> None:
    class Numbers:
        """A clock that keeps what each call gave."""

        name = "numbers"

        def __init__(self) -> None:
            self.seen: list[int] = []

        def time_ms(self, call: Any, number: int) -> float:
            self.seen.append(int(call(number)))
            return 1.0

    clock = Numbers()
    protocol = TimingProtocol(seconds=0.02, rounds=2, rounds_slow=2, rounds_most=2)
    calls = {"path": [lambda each=each: torch.tensor(each) for each in range(INPUTS)]}
    _, results = Timer(CPU, protocol, clock, "adrec bench").measure(calls, "path", lambda done, expected: None)
    assert results["path"] == torch.tensor(0)
    timed = clock.seen[protocol.warmup_calls :]
    assert len(timed) >= 2 * INPUTS
    assert timed == [number % INPUTS for number in range(len(timed))]
    batches = [random_histories(5, 1000, variant) for variant in range(INPUTS)]
    assert all(torch.equal(each.lengths, batches[0].lengths) for each in batches)
    assert len({tuple(each.values.tolist()) for each in batches}) == INPUTS


def test_every_path_is_known_by_its_engine() -> None:
    for path in engine_paths.KNOWN:
        assert engine_name(path) in ENGINES
    assert check_paths("sasrec-onnxruntime,reference-onnx") == ["sasrec-onnxruntime", "reference-onnx"]
    with pytest.raises(ConfigError, match=r"--engines sasrec-cache is not known \(did you mean 'sasrec-cached'"):
        check_paths("sasrec-cache", "--engines")
    here = engine_paths.paths_here(("reference", "cached", "onnxruntime-int8"), CPU)
    assert {"reference-compiled", "cached-compiled", "sasrec-reference", "sasrec-cached"} <= set(here)
    assert f"{BASELINE}onnxruntime-int8" in here
    assert not [path for path in here if path.endswith("-graph")]
    on_a_gpu = engine_paths.paths_here(("cached",), torch.device("cuda"))
    assert {path for path in PATHS if path.endswith("-graph")} <= set(on_a_gpu)
    assert "reference-onnx" not in on_a_gpu


def test_only_the_suite_of_engines_takes_the_paths_of_rivals() -> None:
    context = Context(Path(), CPU, "", engines=("cached-compiled",), engines_named=True)
    assert registry.engine_paths_of(context) == ("cached-compiled",)
    engines = registry._engines(context)
    check_engines(context.engines, engines)
    other = Unit("tradeoff/batch 1", 1.0, lambda report: [])
    check_engines(("cached",), [*engines, other])
    with pytest.raises(
        ConfigError, match="--engines cached-compiled: is measured by suite engines only, not by tradeoff"
    ):
        check_engines(context.engines, [*engines, other])
    assert registry.engine_paths_of(Context(Path(), CPU, "", smoke=True)) == ("reference", "cached", "sasrec-cached")
