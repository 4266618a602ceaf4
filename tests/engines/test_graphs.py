"""Requests of fixed capacity: the same recommendations as the engine's, whatever the padding."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adrec.config import ServingConfig
from adrec.data.jagged import Jagged
from adrec.engines import make_engine
from adrec.engines.graphs import CapturedEngine, CapturedRequest, FixedRequest, token_capacities
from adrec.engines.triton import TritonEngine
from adrec.errors import ConfigError
from adrec.models.base import SequenceModel
from kernels import _runtime
from tests.engines.device_operations import DeviceOperations

pytestmark = pytest.mark.skipif(not _runtime.AVAILABLE, reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ModelFactory = Callable[..., SequenceModel]


def histories_of(lengths: list[int], seed: int = 0) -> Jagged:
    generator = torch.Generator().manual_seed(seed)
    return Jagged.from_lists([torch.randint(1, 41, (n,), generator=generator).tolist() for n in lengths])


def engine_of(factory: ModelFactory, **overrides: Any) -> TritonEngine:
    settings = {"width": 32, "heads": 2, "max_length": 20, "timesteps": 6, "schedule": "sqrt"} | overrides
    engine = make_engine("triton", factory(**settings).to(DEVICE))
    assert isinstance(engine, TritonEngine)
    return engine


def test_a_fixed_request_recommends_what_the_engine_does(tiny_model: ModelFactory) -> None:
    engine = engine_of(tiny_model, lambda_uncertainty=1.0)
    request = FixedRequest(engine, users=5, tokens=40, k=7, steps=2)
    # The second batch is smaller than the first: nothing of the first may be left in the buffers.
    for seed, lengths in enumerate([[9, 1, 12, 4, 10], [2, 3], [30], []]):
        histories = histories_of(lengths, seed)
        expected = engine.recommend(histories, 7, steps=2, seed=seed)
        found = request(histories, seed=seed)
        assert torch.equal(found.items, expected.items)
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)


def test_the_seed_on_the_device_is_read(tiny_model: ModelFactory) -> None:
    engine = engine_of(tiny_model, lambda_uncertainty=1.0)
    request = FixedRequest(engine, users=2, tokens=10, k=5, steps=2)
    histories = histories_of([3, 4])
    request.seed.fill_(11)
    found = request(histories, seed=None)
    torch.testing.assert_close(found.scores, engine.recommend(histories, 5, steps=2, seed=11).scores)
    assert not torch.equal(found.scores, request(histories, seed=12).scores)


def test_other_plans_of_as_many_steps_leave_its_tables_alone(tiny_model: ModelFactory) -> None:
    """A graph reads the memory of its tables: it must keep them, and not read those of another plan."""
    engine = engine_of(tiny_model, lambda_uncertainty=1.0)
    request = FixedRequest(engine, users=2, tokens=10, k=5, steps=3)
    histories = histories_of([3, 4])
    expected = request(histories)
    assert request.table is not None
    tables = engine.step_tables(request.table)
    kept = [weakref.ref(tables.times), weakref.ref(tables.coefficients)]
    del tables
    engine.recommend(histories, 5, steps=ServingConfig(sampler="ddim", times=(0, 2, 4)))
    gc.collect()
    assert all(each() is not None for each in kept)
    assert torch.equal(request(histories).scores, expected.scores)
    assert engine.step_tables(request.table).times is not kept[0]()


def test_what_does_not_fit_is_refused(tiny_model: ModelFactory) -> None:
    engine = engine_of(tiny_model)
    request = FixedRequest(engine, users=3, tokens=8, k=5, steps=1)
    assert request.fits(histories_of([3, 4]))
    for lengths in ([3, 5], [1, 1, 1, 1]):
        with pytest.raises(ValueError, match="do not fit 3 users and 8 tokens"):
            request(histories_of(lengths))
    with pytest.raises(ValueError, match="history 1 is empty"):
        request(histories_of([2, 0]))
    with pytest.raises(ConfigError, match="a capacity of 2 tokens for 3 users"):
        FixedRequest(engine, users=3, tokens=2, k=5, steps=1)


@pytest.mark.parametrize("name", ["triton", "triton-bf16"])
def test_what_a_replay_launches(tiny_model: ModelFactory, name: str) -> None:
    """Three kernels, items and scores gathered in the order of the request, and rows rounded to 16 bits."""
    model = tiny_model(width=32, heads=2, max_length=20, timesteps=6, schedule="sqrt").to("meta")
    with _runtime.record_launches() as launches, torch.inference_mode():
        engine = make_engine(name, model)
        assert isinstance(engine, TritonEngine)
        request = FixedRequest(engine, users=3, tokens=12, k=5, steps=2)
        with DeviceOperations() as operations:
            request._body()
    assert len(launches) == 3
    assert operations.names == [*(["to"] if name == "triton-bf16" else []), "index", "index"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 80), min_size=1, max_size=60), st.sampled_from([1, 7, 512]))
def test_capacities_rise_and_the_last_fits_everything(lengths: list[int], users: int) -> None:
    found = token_capacities(torch.tensor(lengths), users, 50)
    assert found == sorted(set(found))
    assert found[-1] == users * 50
    assert found[0] >= min(users * min(50, min(lengths)), found[-1])


def test_capacities_follow_the_lengths() -> None:
    # Nine in ten histories have 6 items: the median batch of 512 must not be given room for 50 each.
    lengths = torch.tensor([6] * 90 + [50] * 10)
    found = token_capacities(lengths, 512, 50)
    assert found[0] < 512 * 12
    with pytest.raises(ConfigError, match="0 lengths"):
        token_capacities(torch.tensor([], dtype=torch.int64), 4, 50)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal on a CPU")
def test_graphs_need_a_gpu(tiny_model: ModelFactory) -> None:
    with pytest.raises(ConfigError, match="CUDA graphs need a CUDA device"):
        CapturedRequest(engine_of(tiny_model), users=1, tokens=4, k=5, steps=1)


def test_row_keys_are_checked_and_read(tiny_model: ModelFactory) -> None:
    engine = engine_of(tiny_model, lambda_uncertainty=1.0)
    request = FixedRequest(engine, users=3, tokens=12, k=5, steps=2)
    histories, keys = histories_of([4, 2]), torch.tensor([9, 2**39 - 1])
    expected = engine.recommend(histories, 5, steps=2, row_keys=keys)
    assert torch.equal(request(histories, row_keys=keys).items, expected.items)
    with pytest.raises(ValueError, match=r"row_keys is \(3,\); expected \[2\]"):
        request(histories, row_keys=torch.arange(3))
    with pytest.raises(ValueError, match="row keys span 0 to 549755813888"):
        request(histories, row_keys=torch.tensor([0, 2**39]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that torch can use")
def test_a_captured_graph_draws_by_the_seed_on_the_device(tiny_model: ModelFactory) -> None:
    engine = engine_of(tiny_model, lambda_uncertainty=1.0)
    request = CapturedRequest(engine, users=2, tokens=10, k=5, steps=2)
    histories = histories_of([3, 4])
    for seed in (11, 12):
        request.seed.fill_(seed)
        found = request(histories, seed=None)
        torch.testing.assert_close(found.scores, engine.recommend(histories, 5, steps=2, seed=seed).scores)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that torch can use")
def test_a_replayed_graph_recommends_what_the_engine_does(tiny_model: ModelFactory) -> None:
    engine = engine_of(tiny_model, lambda_uncertainty=1.0)
    captured = CapturedEngine(engine, torch.tensor([2, 5, 9, 20]), k=7, steps=3, users=(1, 4))
    for seed, lengths in enumerate([[9], [3, 1, 20], [5, 5, 5, 5], [1], [2, 2, 2, 2, 2]]):
        histories = histories_of(lengths, seed)
        expected = engine.recommend(histories, 7, steps=3, seed=seed)
        for _ in range(2):
            found = captured.recommend(histories, seed=seed)
            assert torch.equal(found.items, expected.items)
            torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)
