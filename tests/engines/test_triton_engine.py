"""The fused engine against `cached` and the authors' values; on CPU tensors the kernels run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adrec.data.jagged import Jagged
from adrec.engines import exact_engines, make_engine
from adrec.errors import ConfigError
from adrec.models.base import SequenceModel
from adrec.noise import PhiloxNoise
from kernels import _runtime, _score_topk_op
from tests.engines.device_operations import DeviceOperations

pytestmark = pytest.mark.skipif(not _runtime.AVAILABLE, reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 1e-5
ModelFactory = Callable[..., SequenceModel]
LENGTHS = [3, 1, 9, 2, 20, 1]
VARIANTS: dict[str, dict[str, Any]] = {
    "released": {},
    "masked": {"padding": "masked", "positions": "learned"},
    "positions on padding": {"positions": "released"},
    "lambda 1": {"lambda_uncertainty": 1.0},
    "guidance": {"condition_dropout": 0.3, "guidance_scale": 2.0, "lambda_uncertainty": 1.0},
    "geodesic": {"geodesic": True, "lambda_uncertainty": 0.5},
    "mlp": {"denoiser": "mlp", "lambda_uncertainty": 0.5},
    "mlp with guidance": {
        "denoiser": "mlp",
        "condition_dropout": 0.3,
        "guidance_scale": 2.0,
        "lambda_uncertainty": 1.0,
    },
    "three blocks": {"denoiser_blocks": 3, "encoder_blocks": 1},
    "sasrec": {"model": "sasrec", "positions": "learned"},
}


def model_of(factory: ModelFactory, **overrides: Any) -> SequenceModel:
    settings = {"width": 32, "heads": 2, "max_length": 20, "timesteps": 4, "schedule": "sqrt"} | overrides
    return factory(**settings).to(DEVICE)


def histories_of(lengths: list[int], seed: int = 0) -> Jagged:
    generator = torch.Generator().manual_seed(seed)
    return Jagged.from_lists([torch.randint(1, 41, (n,), generator=generator).tolist() for n in lengths])


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name.replace(" ", "-"))
def test_it_computes_what_cached_does(tiny_model: ModelFactory, variant: str) -> None:
    model = model_of(tiny_model, **VARIANTS[variant])
    histories = histories_of(LENGTHS)
    steps = [1] if variant == "sasrec" else [1, 4]
    cached, fused = make_engine("cached", model), make_engine("triton", model)
    for count in steps:
        expected = cached.represent(histories, count, seed=3)
        found = fused.represent(histories, count, seed=3)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_explicit_noise_and_row_keys_are_read(tiny_model: ModelFactory) -> None:
    model = model_of(tiny_model, lambda_uncertainty=1.0)
    histories = histories_of(LENGTHS)
    cached, fused = make_engine("cached", model), make_engine("triton", model)
    noise = torch.randn(4, len(LENGTHS), 32)
    torch.testing.assert_close(
        fused.represent(histories, 3, noise=noise), cached.represent(histories, 3, noise=noise), atol=1e-5, rtol=1e-5
    )
    keys = torch.tensor([5, 2**39 - 1, 7, 0, 11, 12])
    found = fused.represent(histories, 3, row_keys=keys)
    torch.testing.assert_close(found, cached.represent(histories, 3, row_keys=keys), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, fused.represent(histories, 3, row_keys=keys.flip(0)), atol=1e-3)


def test_recommendations_do_not_depend_on_the_batch(tiny_model: ModelFactory) -> None:
    engine = make_engine("triton", model_of(tiny_model, lambda_uncertainty=1.0))
    histories = histories_of(LENGTHS)
    together = engine.recommend(histories, 10, steps=2)
    for row in range(len(LENGTHS)):
        alone = engine.recommend(histories.select(torch.tensor([row])), 10, steps=2)
        torch.testing.assert_close(alone.scores[0], together.scores[row], atol=1e-5, rtol=1e-5)
        assert torch.equal(alone.items[0], together.items[row])


def test_top_k_with_exclusion(tiny_model: ModelFactory) -> None:
    model = model_of(tiny_model)
    cached, fused = make_engine("cached", model), make_engine("triton", model)
    histories = histories_of(LENGTHS)
    rows = cached.represent(histories, 1)
    expected, found = (engine.top_k(rows, 40, exclude=histories) for engine in (cached, fused))
    assert torch.equal(found.items, expected.items)
    torch.testing.assert_close(found.scores, expected.scores)
    for bad in (0, 41):
        with pytest.raises(ValueError, match=f"k is {bad}; allowed: 1 to 40"):
            fused.top_k(rows, bad)
    with pytest.raises(ValueError, match="exclude has 1 rows"):
        fused.top_k(rows, 5, exclude=histories_of([2]))


def test_more_results_than_the_kernel_keeps(tiny_model: ModelFactory) -> None:
    model = model_of(tiny_model, items=1200)
    rows = torch.randn(2, 32, device=DEVICE)
    expected, found = (make_engine(name, model).top_k(rows, 1100) for name in ("cached", "triton"))
    assert torch.equal(found.items, expected.items)


def test_another_table_of_as_many_steps_is_read(tiny_model: ModelFactory) -> None:
    model = model_of(tiny_model, lambda_uncertainty=1.0)
    histories, keys = histories_of(LENGTHS), torch.arange(len(LENGTHS), device=DEVICE)
    results = []
    for name in ("cached", "triton"):
        engine = make_engine(name, model)
        table = engine.table(3)
        assert table is not None
        other = replace(table, from_x0=1.5 * table.from_x0, time=table.time.flip(0))
        with torch.inference_mode():
            state = engine.encode(histories)
            results.append([engine.sample(state, each, PhiloxNoise(0, keys, 32)) for each in (table, other)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert not torch.allclose(results[0][0], results[0][1], atol=1e-3)


@pytest.mark.parametrize("name", ["triton", "triton-bf16"])
@pytest.mark.parametrize(("items", "k"), [(40, 5), (300_000, 20), (300_000, 128)])
def test_what_a_request_launches(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, name: str, items: int, k: int
) -> None:
    """Three kernels; beside them four copies from the host and a few small operators, each named here."""
    # The counters of `score_topk` are filled once a CUDA stream.
    monkeypatch.setattr(_score_topk_op, "zeros_kept", lambda like, count: like.new_empty(count))
    model = tiny_model(width=32, heads=2, max_length=20, timesteps=6, schedule="sqrt", items=items).to("meta")
    cast = ["to"] if name == "triton-bf16" else []
    with _runtime.record_launches() as launches:
        engine = make_engine(name, model)
        engine.step_tables(engine.table(6))
        with DeviceOperations() as operations:
            engine.recommend(histories_of(LENGTHS), k, steps=6)
    names = [getattr(each.kernel, "__name__", None) or each.kernel.fn.__name__ for each in launches]
    assert names == ["encode_prefix_kernel", "denoise_last_kernel", "score_splits"]
    # From the host: row keys, items, offsets and the users' order. Then: row keys in that order, the seed, rows back in
    # the order of the request, the steps taken.
    assert operations.names == [*["to"] * 4, "index", "fill_", "index_copy_", "full", *cast]


@pytest.mark.parametrize(("width", "heads"), [(288, 4), (16, 4), (512, 2)])
def test_widths_that_no_kernel_has_are_refused(tiny_model: ModelFactory, width: int, heads: int) -> None:
    message = rf"width {width} and heads of {width // heads}; engine 'triton' allows widths of 8 to 256 and heads of 8"
    with pytest.raises(ConfigError, match=message):
        make_engine("triton", model_of(tiny_model, width=width, heads=heads))


@pytest.mark.parametrize("name", ["cached", "triton"])
def test_row_keys_out_of_range_are_refused(tiny_model: ModelFactory, name: str) -> None:
    engine = make_engine(name, model_of(tiny_model))
    with pytest.raises(ValueError, match="row keys span -1 to 3; allowed: 0 to 2"):
        engine.represent(histories_of([2, 3]), 1, row_keys=torch.tensor([3, -1]))


@pytest.mark.parametrize("name", ["triton-bf16", "triton-fp16"])
def test_half_precision_is_close(tiny_model: ModelFactory, name: str) -> None:
    model = model_of(tiny_model)
    histories = histories_of(LENGTHS)
    expected = make_engine("cached", model).represent(histories, 2)
    found = make_engine(name, model).represent(histories, 2)
    assert found.dtype == torch.float32
    # Weights carry 8 or 11 bits, and errors add up over four blocks.
    assert rms_ratio(found, expected) < {"triton-bf16": 0.03, "triton-fp16": 0.004}[name]


def test_an_empty_batch(tiny_model: ModelFactory) -> None:
    engine = make_engine("triton", model_of(tiny_model))
    found = engine.recommend(Jagged.from_lists([]), 5)
    assert found.items.shape == (0, 5)


def test_where_no_kernel_runs_it_says_what_to_use(tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runtime, "INTERPRETED", False)
    model = tiny_model(width=32)
    assert exact_engines(torch.device("cpu")) == ["reference", "cached"]
    with pytest.raises(ConfigError, match=r"'triton' runs on CUDA devices and the model is on cpu.*'cached'"):
        make_engine("triton", model)
    monkeypatch.setattr(_runtime, "AVAILABLE", False)
    with pytest.raises(ConfigError, match=r"pip install 'adrec\[triton\]'"):
        make_engine("triton", model)


def test_it_is_held_to_the_authors_values_where_kernels_are_interpreted() -> None:
    """By test_golden.py, which compares every exact engine on CPU tensors."""
    assert ("triton" in exact_engines(torch.device("cpu"))) == _runtime.INTERPRETED
