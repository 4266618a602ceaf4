"""Models on the fused attention kernel, forced on in the interpreter: what they compute and learn stays the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adrec.data.jagged import Jagged
from adrec.engines import CachedEngine
from adrec.losses import catalogue_cross_entropy, reconstruction_loss
from adrec.models import ADRec, layers
from adrec.models.base import SequenceModel, TokenBatch
from adrec.noise import TokenNoise, draw_token_noise
from kernels import _runtime, prefix_attention

SEQUENCES = [[3, 9, 4], [1, 2], [7, 8, 9, 10, 11, 12, 13, 14], [40, 1, 40, 1, 40], [5, 6], list(range(20, 33))]
MODELS: list[dict[str, Any]] = [
    {"model": "sasrec"},
    {"model": "sasrec", "positions": "released"},
    {"lambda_uncertainty": 1.0},
    {"lambda_uncertainty": 1.0, "padding": "masked", "positions": "learned"},
    {"lambda_uncertainty": 1.0, "independent_noise": False},
    {"lambda_uncertainty": 1.0, "independent_noise": False, "positions": "released"},
    {"lambda_uncertainty": 0.5, "condition_dropout": 0.5},
]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Attention runs as one kernel wherever its dtype and width allow."""
    if not _runtime.INTERPRETED:
        pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1")
    monkeypatch.setattr(layers, "runs_fused", prefix_attention.supports)
    return monkeypatch


def outcome(model: SequenceModel) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Output, losses and the gradient of every parameter, from the same random numbers every time."""
    torch.manual_seed(3)
    device = model.table.device
    batch = TokenBatch.from_sequences(Jagged.from_lists(SEQUENCES), model.config.max_length)
    if isinstance(model, ADRec):
        config = model.config
        noise = draw_token_noise(
            batch.layout,
            config.width,
            config.timesteps,
            independent=config.independent_noise,
            condition_dropout=config.condition_dropout,
        )
        drawn = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(noise).items()}
        batch = batch.to(device)
        rows = model(batch, TokenNoise(**drawn))
        losses = [
            catalogue_cross_entropy(rows, model.table, batch.targets),
            reconstruction_loss(rows, model.clean_target(batch.targets), batch.layout),
        ]
    else:
        batch = batch.to(device)
        rows = model(batch)
        losses = [catalogue_cross_entropy(rows, model.table, batch.targets)]
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(torch.stack(losses).sum(), list(parameters.values()))
    moved = [gradient.cpu() for gradient in gradients]
    return rows.detach().cpu(), [loss.detach().cpu() for loss in losses], dict(zip(parameters, moved, strict=True))


def assert_same(
    found: tuple[Tensor, list[Tensor], dict[str, Tensor]], expected: tuple[Tensor, list[Tensor], dict[str, Tensor]]
) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0.0, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=0.0)
    for name, gradient in expected[2].items():
        # Keys share a bias that no softmax sees: its gradient is zero but for rounding.
        largest = max(float(gradient.abs().max()), 1e-4)
        assert float((found[2][name] - gradient).abs().max()) <= 1e-4 * largest, name


@pytest.mark.parametrize("options", MODELS, ids=lambda options: "-".join(map(str, options.values())))
def test_a_model_learns_the_same_on_the_kernel(
    fused: pytest.MonkeyPatch, tiny_model: Any, options: dict[str, Any]
) -> None:
    model = tiny_model(timesteps=8, max_length=12, dropout=0.0, embedding_dropout=0.0, **options).train()
    found = outcome(model)
    with fused.context() as plain:
        plain.setattr(layers, "runs_fused", lambda qkv: False)
        expected = outcome(model)
    assert not torch.equal(found[0], expected[0]), "the same bits: the kernel did not run"
    assert_same(found, expected)


@pytest.mark.parametrize("options", MODELS[2::3], ids=lambda options: "-".join(map(str, options.values())))
def test_with_dropout_it_learns_what_the_twin_learns(
    fused: pytest.MonkeyPatch, tiny_model: Any, options: dict[str, Any]
) -> None:
    model = tiny_model(timesteps=8, max_length=12, dropout=0.3, embedding_dropout=0.1, **options).train()
    found = outcome(model)
    with fused.context() as twin:
        twin.setattr(prefix_attention, "prefix_attention", prefix_attention.prefix_attention_twin)
        expected = outcome(model)
    assert_same(found, expected)
    without = outcome(model.eval())
    assert float((found[0] - without[0]).abs().max()) > 0.01


def test_every_step_drops_other_weights(fused: pytest.MonkeyPatch, tiny_model: Any) -> None:
    attention = tiny_model(dropout=0.5).train().encoder.blocks[0].attention
    batch = TokenBatch.from_sequences(Jagged.from_lists(SEQUENCES), 12)
    rows = torch.randn(batch.layout.tokens, 16)
    torch.manual_seed(0)
    first, second = (attention(rows, batch.layout, None, None) for _ in range(2))
    torch.manual_seed(0)
    again = attention(rows, batch.layout, None, None)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("positions", ["none", "released"])
def test_the_cached_engine_encodes_the_same_on_the_kernel(
    fused: pytest.MonkeyPatch, tiny_model: Any, positions: str
) -> None:
    """A prefix is one token shorter than its history, and sees the padding of the history."""
    model = tiny_model(timesteps=8, max_length=12, positions=positions, lambda_uncertainty=1.0)
    histories = Jagged.from_lists([row[-12:] for row in SEQUENCES])
    found = CachedEngine(model).represent(histories, 2)
    with fused.context() as plain:
        plain.setattr(layers, "runs_fused", lambda qkv: False)
        expected = CachedEngine(model).represent(histories, 2)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)


def test_a_cpu_keeps_to_rectangles() -> None:
    assert not layers.runs_fused(torch.zeros(3, 3, 2, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("options", MODELS, ids=lambda options: "-".join(map(str, options.values())))
def test_a_gpu_learns_what_a_cpu_learns(tiny_model: Any, options: dict[str, Any]) -> None:
    model = tiny_model(timesteps=8, max_length=12, dropout=0.0, embedding_dropout=0.0, **options).train()
    expected = outcome(model)
    found = outcome(model.cuda())
    assert layers.runs_fused(torch.zeros(3, 3, 2, 8, device="cuda"))
    assert not layers.runs_fused(torch.zeros(3, 3, 2, 4, device="cuda")), "heads are too narrow for the kernel"
    assert_same(found, expected)
