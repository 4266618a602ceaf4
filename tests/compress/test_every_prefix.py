"""One pass over a sequence against an engine's request for each of its prefixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distillation_cases import batch_of, prefixes_of

from adrec.config import ServingConfig
from adrec.engines import CachedEngine
from adrec.noise import ExplicitNoise
from adrec.respacing import sampling_table
from compress.every_prefix import every_prefix, represent_prefixes

SMALL: dict[str, Any] = {"timesteps": 6, "schedule": "sqrt", "max_length": 12, "lambda_uncertainty": 1.0}
GUIDED = {"condition_dropout": 0.3, "guidance_scale": 2.5}


@pytest.mark.parametrize("settings", [{}, {"denoiser": "mlp"}, GUIDED, {"geodesic": True}], ids=str)
@pytest.mark.parametrize("steps", [None, 1, ServingConfig(sampler="ddim", times=(1, 5), start="zero")], ids=str)
def test_each_position_answers_like_a_request_for_its_prefix(tiny_model: Any, settings: Any, steps: Any) -> None:
    model = tiny_model(**SMALL, padding="masked", **settings)
    batch, table = batch_of(), sampling_table(model.betas, steps)
    noise = torch.randn(table.steps + 1, batch.layout.tokens, model.config.width)
    with torch.no_grad():
        found = represent_prefixes(model, batch, table, ExplicitNoise(noise))
    expected = CachedEngine(model).represent(prefixes_of(batch), steps, noise=noise)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, GUIDED, {"positions": "released"}, {"positions": "learned"}], ids=str)
def test_the_last_position_answers_like_a_request_with_padding(tiny_model: Any, settings: Any) -> None:
    model = tiny_model(**SMALL, padding="released", **settings)
    batch, table = batch_of(), sampling_table(model.betas, None)
    noise = torch.randn(table.steps + 1, batch.layout.tokens, model.config.width)
    with torch.no_grad():
        found = represent_prefixes(model, batch, table, ExplicitNoise(noise))
    last = batch.layout.last
    whole = prefixes_of(batch).select(last)
    expected = CachedEngine(model).represent(whole, noise=noise[:, last])
    torch.testing.assert_close(found[last], expected, atol=2e-5, rtol=1e-5)


def test_each_position_may_be_at_another_step(tiny_model: Any) -> None:
    model, batch = tiny_model(**SMALL), batch_of()
    x_t = torch.randn(batch.layout.tokens, model.config.width)
    times = torch.arange(batch.layout.tokens) % 6
    with torch.no_grad():
        denoise = every_prefix(model, batch)
        together = denoise(x_t, times)
        for time in range(6):
            torch.testing.assert_close(together[times == time], denoise(x_t, torch.tensor(time))[times == time])


def test_a_later_item_changes_no_earlier_answer(tiny_model: Any) -> None:
    model, batch = tiny_model(**SMALL), batch_of()
    x_t = torch.randn(batch.layout.tokens, model.config.width)
    changed = batch_of()
    changed.inputs[batch.layout.last] = 17
    with torch.no_grad():
        before, after = (every_prefix(model, each)(x_t, torch.tensor(3)) for each in (batch, changed))
    earlier = torch.ones(batch.layout.tokens, dtype=torch.bool)
    earlier[batch.layout.last] = False
    torch.testing.assert_close(before[earlier], after[earlier])
    assert not torch.allclose(before[~earlier], after[~earlier], atol=1e-3)


def test_gradients_agree_with_finite_differences(tiny_model: Any) -> None:
    model, batch = tiny_model(**SMALL).double(), batch_of()
    x_t = torch.randn(batch.layout.tokens, model.config.width, dtype=torch.float64)
    direction = torch.randn_like(x_t)
    weights = [model.item_embedding.weight, model.denoiser.blocks[0].attention.qkv.weight]

    def value() -> torch.Tensor:
        return (every_prefix(model, batch)(x_t, torch.tensor(2)) * direction).sum()

    gradients = torch.autograd.grad(value(), weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        # The padding row of the table is no parameter: its gradient is dropped on purpose.
        step = torch.randn_like(weight)
        step[0] = 0.0 if weight is model.item_embedding.weight else step[0]
        size = 1e-6
        with torch.no_grad():
            weight += size * step
            above = value()
            weight -= 2 * size * step
            below = value()
            weight += size * step
        assert float((above - below) / (2 * size)) == pytest.approx(float((gradient * step).sum()), rel=1e-6)


def test_a_model_with_diffusion_needs_a_table(tiny_model: Any) -> None:
    with pytest.raises(ValueError, match="table of its reverse steps"):
        represent_prefixes(tiny_model(**SMALL), batch_of(), None, ExplicitNoise(torch.zeros(1, 1, 16)))
