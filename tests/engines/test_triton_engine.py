"""The fused engine against `cached` and the authors' values; on CPU tensors the kernels run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adrec.data.jagged import Jagged
from adrec.engines import exact_engines, make_engine
from adrec.errors import ConfigError
from adrec.models.base import SequenceModel
from adrec.verify import verify_file
from kernels import _runtime

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
    "three blocks": {"denoiser_blocks": 3, "encoder_blocks": 1},
    "sasrec": {"model": "sasrec", "positions": "learned"},
}


def model_of(factory: ModelFactory, **overrides: Any) -> SequenceModel:
    settings = {"width": 32, "heads": 2, "max_length": 20, "timesteps": 6, "schedule": "sqrt"} | overrides
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
    steps = [1] if variant == "sasrec" else [1, 6]
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
    assert not torch.allclose(found, fused.represent(histories, 3, row_keys=keys + 1, seed=0), atol=1e-3)


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


@pytest.mark.parametrize(
    "name", ["adrec_small", "adrec_lambda1", "adrec_seq_noise", "adrec_mlp", "adrec_geodesic", "sasrec_small"]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="verification runs on CPU tensors, in the interpreter")
def test_the_authors_values_come_out(golden_path: Callable[[str], Path], name: str) -> None:
    checks = [check for check in verify_file(golden_path(f"{name}.npz")) if check.quantity.startswith("triton")]
    assert len(checks) == 3
    for check in checks:
        assert check.difference <= 1e-4, check
