"""The ONNX Runtime engine: `cached`'s results whatever the grouping, its cache of exports, and no silent fall-backs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adrec.config import ServingConfig
from adrec.data.jagged import Jagged
from adrec.engines import ENGINES, CachedEngine, OnnxRuntimeEngine, exact_engines, make_engine
from adrec.engines import onnxruntime as module
from adrec.engines.exported import ExportError, load_manifest
from adrec.engines.exported_engine import group_bounds
from adrec.engines.onnxruntime import check_integer_products, check_provider, load_onnxruntime, run_bound
from adrec.errors import ConfigError, NotSupportedError
from adrec.models.base import SequenceModel

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ITEMS, WIDTH, TOLERANCE = 40, 16, 1e-5
ModelFactory = Callable[..., SequenceModel]


def histories_of(lengths: list[int], seed: int = 0) -> Jagged:
    generator = torch.Generator().manual_seed(seed)
    return Jagged.from_lists(torch.randint(1, ITEMS + 1, (length,), generator=generator).tolist() for length in lengths)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of its own, so that no test reads or fills the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "adrec" / "exports"


@pytest.fixture(scope="module")
def model(shallow_model: ModelFactory) -> SequenceModel:
    return shallow_model(lambda_uncertainty=1.0)


@pytest.fixture(scope="module")
def engine(cache: Path, model: SequenceModel) -> OnnxRuntimeEngine:
    """The engine by name; its first request with 2 steps exports a graph, and every later one runs it."""
    made = make_engine("onnxruntime", model)
    assert isinstance(made, OnnxRuntimeEngine)
    made.recommend(histories_of([3]), 1, 2)
    return made


@given(
    lengths=st.lists(st.sampled_from([1, 2, 3, 5, 9, 30, 49, 50, 61]), min_size=1, max_size=12),
    seed=st.integers(0, 2**40),
    k=st.integers(1, 20),
)
@settings(max_examples=25, deadline=None)
def test_lists_and_representations_equal_cached(
    engine: OnnxRuntimeEngine, lengths: list[int], seed: int, k: int
) -> None:
    histories, exact = histories_of(lengths, seed), CachedEngine(engine.model)
    rows = exact.represent(histories, 2, seed)
    torch.testing.assert_close(engine.represent(histories, 2, seed), rows, rtol=0, atol=TOLERANCE)
    best, found = exact.top_k(rows, k), engine.recommend(histories, k, 2, seed)
    torch.testing.assert_close(found.scores, best.scores, rtol=0, atol=TOLERANCE)
    # Where two places hold other items, their scores are ties.
    places = found.items != best.items
    with torch.inference_mode():
        own = torch.einsum("bd,bkd->bk", rows, exact.model.table[found.items])
    assert (own - best.scores)[places].abs().max().item() <= 2 * TOLERANCE if bool(places.any()) else True


def test_row_keys_are_checked_before_the_graph_runs(engine: OnnxRuntimeEngine) -> None:
    histories = Jagged.from_lists([[1, 2], [3]])
    with pytest.raises(ValueError, match=r"row_keys is \(3,\); expected \[2\]"):
        engine.recommend(histories, 3, steps=2, row_keys=torch.arange(3))
    with pytest.raises(ValueError, match="2\\^39"):
        engine.recommend(histories, 3, steps=2, row_keys=torch.tensor([0, 2**39]))
    alone = Jagged.from_lists([[1, 2]])
    with pytest.raises(ValueError, match=r"row_keys is \(2,\); expected \[1\]"):
        engine.recommend(alone, 3, steps=2, row_keys=torch.arange(2))
    with pytest.raises(ValueError, match="2\\^39"):
        engine.recommend(alone, 3, steps=2, row_keys=torch.tensor([2**39]))


def test_row_keys_and_explicit_noise_reach_the_graph(engine: OnnxRuntimeEngine) -> None:
    histories, exact = histories_of([4, 1, 4, 50]), CachedEngine(engine.model)
    keys = torch.tensor([5, 6, 7, 8])
    found = engine.recommend(histories, 5, 2, 3, keys)
    assert torch.equal(found.items, exact.recommend(histories, 5, 2, 3, keys).items)
    for user in range(4):
        row = torch.tensor([user])
        assert torch.equal(engine.recommend(histories.select(row), 5, 2, 3, keys[row]).items, found.items[row])
    assert not torch.equal(found.items, engine.recommend(histories, 5, 2, 3, keys + 1).items)
    noise = torch.randn(3, 4, WIDTH)
    torch.testing.assert_close(
        engine.represent(histories, 2, noise=noise), exact.represent(histories, 2, noise=noise), rtol=0, atol=TOLERANCE
    )


def test_a_user_does_not_depend_on_the_batch(engine: OnnxRuntimeEngine) -> None:
    histories = histories_of([3, 50, 1, 12, 3, 60, 1, 28, 9])
    best = engine.recommend(histories, 10, 2, seed=11)
    for user in range(len(histories)):
        alone = engine.recommend(histories.select(torch.tensor([user])), 10, 2, seed=11)
        assert alone.items[0].tolist() == best.items[user].tolist()
        torch.testing.assert_close(alone.scores[0], best.scores[user], rtol=0, atol=TOLERANCE)


def test_own_items_and_long_lists_are_served_too(engine: OnnxRuntimeEngine) -> None:
    histories, exact = histories_of([6, 2]), CachedEngine(engine.model)
    without = engine.recommend(histories, 5, 2, exclude=histories)
    assert torch.equal(without.items, exact.recommend(histories, 5, 2, exclude=histories).items)
    assert torch.equal(engine.recommend(histories, 33, 2).items, exact.recommend(histories, 33, 2).items)


def test_an_empty_batch_and_bad_requests(engine: OnnxRuntimeEngine) -> None:
    assert engine.recommend(Jagged.from_lists([]), 3, 2).items.shape == (0, 3)
    with pytest.raises(ValueError, match="history 1 is empty"):
        engine.recommend(Jagged.from_lists([[1], []]), 3, 2)
    with pytest.raises(ValueError, match="history 0 is empty"):
        engine.recommend(Jagged.from_lists([[]]), 3, 2)
    for bad in ([41], [1, 41], [0, 2]):
        with pytest.raises(ValueError, match=f"item ids span {min(bad)} to {max(bad)}; allowed: 1 to 40"):
            engine.recommend(Jagged.from_lists([bad]), 3, 2)
    with pytest.raises(ValueError, match="k is 41; allowed: 1 to 40"):
        engine.recommend(histories_of([2]), 41, 2)
    with pytest.raises(ConfigError, match="steps is 33; allowed: 1 to 32"):
        engine.recommend(histories_of([2]), 3, 33)
    with pytest.raises(NotSupportedError, match="cannot sample with early stop"):
        engine.recommend(histories_of([2]), 3, ServingConfig.model_validate({"early_stop": {"top": 5}}))


def test_an_export_is_made_once_and_kept_for_the_next_process(
    engine: OnnxRuntimeEngine, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = (cache / engine.fingerprint[:32]).iterdir()
    assert [graph.steps for graph in load_manifest(folder).graphs] == [2]

    def fails(*arguments: Any, **options: Any) -> None:
        raise AssertionError("exported again")

    monkeypatch.setattr("compress.export.onnx_export.export_onnx", fails)
    histories = histories_of([5, 9])
    again = make_engine("onnxruntime", engine.model).recommend(histories, 5, 2)
    assert torch.equal(again.items, engine.recommend(histories, 5, 2).items)


def test_a_damaged_cache_is_noticed(engine: OnnxRuntimeEngine, cache: Path) -> None:
    (folder,) = (cache / engine.fingerprint[:32]).iterdir()
    path = folder / load_manifest(folder).graphs[0].file
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-100])
        with pytest.raises(ExportError, match="was changed or cut after it was exported"):
            make_engine("onnxruntime", engine.model).recommend(histories_of([2]), 1, 2)
    finally:
        path.write_bytes(whole)


def test_from_export_wants_the_same_model_and_what_the_folder_holds(
    engine: OnnxRuntimeEngine, cache: Path, shallow_model: ModelFactory
) -> None:
    (folder,) = (cache / engine.fingerprint[:32]).iterdir()
    loaded = OnnxRuntimeEngine.from_export(folder, engine.model, threads=1)
    histories = histories_of([5, 9])
    assert torch.equal(loaded.recommend(histories, 5, 2).items, engine.recommend(histories, 5, 2).items)
    named = make_engine("onnxruntime", engine.model, folder)
    assert torch.equal(named.recommend(histories, 5, 2).items, loaded.recommend(histories, 5, 2).items)
    with pytest.raises(ConfigError, match="holds no onnx request graph in int8-dynamic; it holds: fp32"):
        make_engine("onnxruntime-int8", engine.model, folder)
    with pytest.raises(ConfigError, match="engine 'cached' reads no exported folder"):
        make_engine("cached", engine.model, folder)
    with pytest.raises(ExportError, match="was exported from another model"):
        OnnxRuntimeEngine.from_export(folder, shallow_model(seed=1, lambda_uncertainty=1.0))
    with pytest.raises(ConfigError, match="holds no onnx request graph in fp16; it holds: fp32"):
        OnnxRuntimeEngine.from_export(folder, engine.model, precision="fp16")
    with pytest.raises(ConfigError, match="holds no fp32 graph for 5 steps; it holds: 2; export it with --steps 5"):
        loaded.recommend(histories, 5, 5)
    with pytest.raises(ConfigError, match="threads is 0; allowed: 1 or more"):
        OnnxRuntimeEngine.from_export(folder, engine.model, threads=0)


def test_providers_are_there_or_refused(engine: OnnxRuntimeEngine, model: SequenceModel) -> None:
    runtime = load_onnxruntime()
    with pytest.raises(
        ConfigError, match=r"provider is 'cdua' \(did you mean 'cuda'\?\); allowed: cpu, cuda, tensorrt"
    ):
        check_provider(runtime, "cdua")
    assert check_provider(runtime, "cpu") == "CPUExecutionProvider"
    for name, full in (("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")):
        if full not in runtime.get_available_providers():
            with pytest.raises(NotSupportedError, match=f"has no {full}, only .*CPUExecutionProvider"):
                OnnxRuntimeEngine(model, provider=name)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_of_another_provider_is_an_error(
    engine: OnnxRuntimeEngine, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime falls back by itself where a provider's libraries fail to load; asking the session tells."""
    (folder,) = (cache / engine.fingerprint[:32]).iterdir()
    monkeypatch.setattr(module, "check_provider", lambda runtime, name: "CUDAExecutionProvider")
    loaded = OnnxRuntimeEngine.from_export(folder, engine.model)
    with pytest.raises(
        ExportError, match=r"runs it with CPUExecutionProvider, not with CUDAExecutionProvider|cannot load"
    ):
        loaded.recommend(histories_of([2]), 1, 2)


@pytest.mark.parametrize("rows", [1, 40])
def test_sums_of_unsigned_bytes_do_not_saturate(rows: int) -> None:
    """What int8 graphs rely on: every product is 255 x 255, and pairs of them fit no 16 bits."""
    inner, columns = 128, 48
    weight = onnx.numpy_helper.from_array(np.full((inner, columns), 255, np.uint8), "weight")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["given", "weight"], ["found"])],
        "product",
        [onnx.helper.make_tensor_value_info("given", onnx.TensorProto.UINT8, [rows, inner])],
        [onnx.helper.make_tensor_value_info("found", onnx.TensorProto.INT32, [rows, columns])],
        [weight],
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = load_onnxruntime().InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"given": np.full((rows, inner), 255, np.uint8)})
    assert (found == inner * 255 * 255).all()


@pytest.mark.parametrize(
    ("version", "instructions", "refused"),
    [
        ("1.23.2", "amx_int8 avx2 avx512_vnni", "amx_int8"), ("1.24.4", "avx2 avx_vnni", "avx_vnni"),
        ("1.25.0", "amx_int8 avx_vnni", None), ("1.23.2", "avx2 avx512_vnni", None), ("1.23.2", None, None),
    ],
)  # fmt: skip
def test_integer_products_that_come_out_wrong_are_refused(
    monkeypatch: pytest.MonkeyPatch, version: str, instructions: str | None, refused: str | None
) -> None:
    monkeypatch.setattr(module, "processor_instructions", lambda: instructions)
    runtime: Any = SimpleNamespace(__version__=version)
    if refused is None:
        check_integer_products(runtime)
        return
    with pytest.raises(NotSupportedError, match=f"{version} multiplies integers wrongly on processors with {refused};"):
        check_integer_products(runtime)


def test_names_and_precisions() -> None:
    assert {"onnxruntime", "onnxruntime-int8"} <= set(ENGINES)
    # They make a file first, so verification and the tests of all exact engines do not start them.
    assert "onnxruntime" not in exact_engines(torch.device("cpu"))


def test_without_onnxruntime_the_error_says_what_to_install(
    model: SequenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert not OnnxRuntimeEngine.runs_on(torch.device("cpu"))
    with pytest.raises(NotSupportedError, match=r"pip install 'adrec\[onnx\]'"):
        make_engine("onnxruntime", model)


@pytest.fixture
def bound(engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> OnnxRuntimeEngine:
    """The engine as it runs on a GPU, with its tensors on the CPU."""
    monkeypatch.setattr(engine, "bound", True)
    return engine


@pytest.mark.parametrize("lengths", [[7], [3, 50, 1, 12, 3]])
def test_bound_tensors_give_what_copied_arrays_do(lengths: list[int], cache: Path, bound: OnnxRuntimeEngine) -> None:
    histories, copying = histories_of(lengths), OnnxRuntimeEngine(bound.model)
    assert not copying.bound
    for _ in range(2):
        found, wanted = (each.recommend(histories, 5, 2, seed=4) for each in (bound, copying))
        assert torch.equal(found.items, wanted.items)
        assert torch.equal(found.scores, wanted.scores)
    rows = (each.represent(histories, 2, seed=4) for each in (bound, copying))
    assert torch.equal(next(rows), next(rows))


def test_a_run_reads_and_fills_the_tensors_it_is_given(bound: OnnxRuntimeEngine) -> None:
    _, session = bound.session(bound.table(2))
    histories = histories_of([4, 2])
    noise = torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(0))
    inputs = {"histories": histories.padded(4), "lengths": histories.lengths, "noise": noise}
    outputs = {"rows": torch.zeros(2, WIDTH), "items": torch.zeros(2, 20, dtype=torch.int64)}
    run_bound(session, inputs, outputs, bound.run_options)
    exact = CachedEngine(bound.model)
    wanted = exact.represent(histories, 2, noise=noise)
    torch.testing.assert_close(outputs["rows"], wanted, rtol=0, atol=TOLERANCE)
    assert torch.equal(outputs["items"], exact.top_k(wanted, 20).items)
    gaps = noise.repeat(1, 1, 2)[..., ::2]
    with pytest.raises(ValueError, match=r"'noise' has strides \(64, 32, 2\); ONNX Runtime reads and writes without"):
        run_bound(session, inputs | {"noise": gaps}, outputs, bound.run_options)


def test_tensors_of_a_gpu_are_bound_where_they_are_once_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    class Tensor(SimpleNamespace):
        device, dtype, shape = torch.device("cuda", 1), torch.float16, torch.Size([2, 3])

        def is_contiguous(self) -> bool:
            return True

        def data_ptr(self) -> int:
            return int(self.address)

    binding = SimpleNamespace(
        bind_input=lambda *told: said.append(("in", *told)),
        bind_output=lambda *told: said.append(("out", *told)),
        synchronize_inputs=lambda: said.append("inputs"),
        synchronize_outputs=lambda: said.append("outputs"),
    )
    session = SimpleNamespace(
        io_binding=lambda: binding, run_with_iobinding=lambda made, options: said.append(("run", options))
    )
    stream = SimpleNamespace(synchronize=lambda: said.append("stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream if device.index == 1 else None)
    given: Any = ({"a": Tensor(address=64)}, {"b": Tensor(address=128)})
    run_bound(session, *given, "options")
    half = (np.float16, (2, 3))
    assert said == [
        ("in", "a", "cuda", 1, *half, 64), ("out", "b", "cuda", 1, *half, 128),
        "stream", "inputs", ("run", "options"), "outputs",
    ]  # fmt: skip


def cost(lengths: list[int], bounds: tuple[int, ...], run_tokens: float) -> float:
    return sum(run_tokens + (last - first) * lengths[last - 1] for first, last in pairwise(bounds))


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9).map(sorted), run_tokens=st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_groups_cost_the_least_of_all_ways_to_cut(lengths: list[int], run_tokens: int) -> None:
    bounds = group_bounds(tuple(lengths), run_tokens)
    assert bounds[0] == 0
    assert bounds[-1] == len(lengths)
    every = range(2 ** (len(lengths) - 1))
    cuts = ((0, *(1 + bit for bit in range(len(lengths) - 1) if chosen >> bit & 1), len(lengths)) for chosen in every)
    assert cost(lengths, bounds, run_tokens) == min(cost(lengths, each, run_tokens) for each in cuts)


def test_the_bytes_of_its_file(engine: OnnxRuntimeEngine, cache: Path) -> None:
    graph, _ = engine.session(engine.table(2))
    (path,) = cache.glob(f"*/*/{graph.file}")
    assert engine.file_bytes(2) == path.stat().st_size
    # The item table alone, in float32.
    assert engine.file_bytes(2) > (ITEMS + 1) * WIDTH * 4


@pytest.mark.parametrize("lengths", [[3], [4] * 7, [1, 12, 2, 12, 12, 12, 12], [5, 9]])
def test_concurrent_runs_answer_as_one(
    lengths: list[int], cache: Path, model: SequenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = histories_of(lengths)
    engine = OnnxRuntimeEngine(model, threads=3)
    assert engine.concurrent == 3
    exact = CachedEngine(model).recommend(histories, 5, 2)
    found = engine.recommend(histories, 5, 2)
    assert torch.equal(found.items, exact.items)
    torch.testing.assert_close(found.scores, exact.scores, atol=TOLERANCE, rtol=TOLERANCE)
    # No run outlasts its share of the tokens, but for what a single user takes.
    parts = engine._parts(engine.encode(histories), None)
    assert sorted(torch.cat([rows for rows, _ in parts]).tolist()) == list(range(len(lengths)))
    sizes = [(len(rows) - 1) * int(part.lengths.max()) for rows, part in parts]
    assert max(sizes) <= sum(len(rows) * int(part.lengths.max()) for rows, part in parts) / 3
    monkeypatch.setattr(module, "SHARED_TABLE", ITEMS * WIDTH)
    assert OnnxRuntimeEngine(model, threads=3).concurrent == 1


def test_an_error_in_a_concurrent_run_is_the_requests(cache: Path, model: SequenceModel) -> None:
    class Failing(OnnxRuntimeEngine):
        def run(self, *arguments: Any) -> dict[str, torch.Tensor]:
            raise RuntimeError("no such luck")

    with pytest.raises(RuntimeError, match="no such luck"):
        Failing(model, threads=2).recommend(histories_of([1, 12, 3]), 5, 2)
