"""The loss and the gradients of a packed batch are those of the padded model, however it is shared out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adrec.config import OptimiserConfig, TrainConfig
from adrec.data.dataset import Dataset
from adrec.data.jagged import Jagged
from adrec.engines import ReferenceEngine
from adrec.losses import catalogue_cross_entropy, reconstruction_loss
from adrec.models import ADRec
from adrec.models.base import SequenceModel, TokenBatch
from adrec.models.layout import Layout
from adrec.noise import TokenNoise, draw_token_noise
from adrec.training.gradients import merge_gradients
from adrec.training.module import StageModule

DENSE = [
    {"model": "sasrec"},
    {"model": "sasrec", "positions": "learned"},
    {"model": "sasrec", "positions": "released"},
    {"lambda_uncertainty": 1.0},
    {"lambda_uncertainty": 1.0, "independent_noise": False},
    {"lambda_uncertainty": 1.0, "padding": "masked", "positions": "learned"},
    {"lambda_uncertainty": 1.0, "positions": "released"},
    {"lambda_uncertainty": 0.5, "denoiser": "mlp"},
    {"lambda_uncertainty": 0.5, "geodesic": True},
    {"lambda_uncertainty": 0.5, "condition_dropout": 0.5, "independent_noise": False},
]


def name_of(overrides: dict[str, Any]) -> str:
    return "-".join(f"{value}" for value in overrides.values()) or "paper"


SEQUENCES = [[3, 9, 4], [1, 2], [7, 8, 9, 10, 11, 12, 13, 14], [40, 1, 40, 1, 40], [5, 6], list(range(20, 31))]


class OneProcess:
    """As much of a trainer as the losses look at."""

    world_size = 1
    precision_plugin = None


def stage_module(model: SequenceModel, dataset: Dataset, **train: Any) -> StageModule:
    module = StageModule(model, dataset, TrainConfig(**train), OptimiserConfig(), "main")
    module._trainer = OneProcess()  # type: ignore[assignment]
    return module


def batch_of(sequences: Sequence[Sequence[int]], model: SequenceModel) -> TokenBatch:
    return TokenBatch.from_sequences(Jagged.from_lists(sequences), model.config.max_length)


def dropless(tiny_model: Any, **overrides: Any) -> SequenceModel:
    body = {"timesteps": 8, "schedule": "sqrt", "max_length": 12, "dropout": 0.0, "embedding_dropout": 0.0}
    model = tiny_model(**body, **overrides)
    return model.train()


def padded(values: Tensor, layout: Layout, length: int) -> Tensor:
    """Packed `[M, ...]` to left-padded `[B, length, ...]`, row by row."""
    out = values.new_zeros(layout.lengths.numel(), length, *values.shape[1:])
    for user, (start, end) in enumerate(zip(layout.offsets.tolist(), layout.offsets[1:].tolist(), strict=False)):
        out[user, length - (end - start) :] = values[start:end]
    return out


def dense_losses(model: SequenceModel, batch: TokenBatch, noise: TokenNoise | None) -> list[Tensor]:
    """The two losses as the released code computes them: everything padded, all logits at once."""
    length = model.config.max_length
    inputs, targets = (padded(ids, batch.layout, length) for ids in (batch.inputs, batch.targets))
    real = inputs != 0
    engine = ReferenceEngine(model)
    model.train()
    rows = model.item_embedding(inputs)
    if model.position_embedding is not None:
        # Positions belong to items; the released SASRec+ gives them to the padding as well.
        carries = real | torch.tensor(model.config.positions == "released")
        rows = rows + torch.where(carries[..., None], model.position_embedding.weight, 0.0)
    out = engine._transformer(model.encoder, model.history_norm(rows), real)
    if isinstance(model, ADRec):
        assert noise is not None
        config = model.config
        if noise.keep_condition is not None:
            out = out * noise.keep_condition[:, None, None]
        clean = model.item_embedding(targets)
        if config.geodesic:
            clean = torch.where(real[..., None], clean / clean.norm(dim=-1, keepdim=True).clamp(min=1e-12), 0.0)
        steps = padded(noise.steps, batch.layout, length)
        steps = torch.where(real, steps, noise.padding_steps[:, None].expand(len(inputs), length))
        gaussian = padded(noise.gaussian, batch.layout, length)
        x_t = model.schedule.signal[steps][..., None] * clean + model.schedule.noise[steps][..., None] * gaussian
        if config.geodesic:
            angle = x_t.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            x_t = angle.cos() * clean + angle.sin() * x_t / angle
        # Padding keeps its x_0, which is zero.
        x_t = torch.where(real[..., None], x_t, 0.0)
        mixed = out + config.lambda_uncertainty * (x_t + model.time_embedding(steps))
        out = model.denoiser(mixed) if config.denoiser == "mlp" else engine._transformer(model.denoiser, mixed, real)
    logits = out @ model.table.T
    losses = [F.cross_entropy(logits[real], targets[real])]
    if isinstance(model, ADRec):
        per_user = [(out[u][real[u]] - clean[u][real[u]]).square().mean() for u in range(len(inputs))]
        losses.append(torch.stack(per_user).mean())
    return losses


def noise_of(model: SequenceModel, batch: TokenBatch, seed: int) -> TokenNoise | None:
    if not isinstance(model, ADRec):
        return None
    config = model.config
    torch.manual_seed(seed)
    return draw_token_noise(
        batch.layout,
        config.width,
        config.timesteps,
        independent=config.independent_noise,
        condition_dropout=config.condition_dropout,
    )


@pytest.mark.parametrize("overrides", DENSE, ids=name_of)
def test_loss_and_gradient_of_a_batch_equal_the_padded_dense_ones(
    tiny_model: Any, tiny_dataset: Dataset, overrides: dict[str, Any]
) -> None:
    model = dropless(tiny_model, **overrides)
    module, batch = stage_module(model, tiny_dataset, loss_scale=0.7), batch_of(SEQUENCES, model)
    torch.manual_seed(11)
    losses = module._losses(batch)
    expected = dense_losses(model, batch, noise_of(model, batch, 11))
    for part, (loss, twin) in enumerate(zip(losses, expected, strict=True)):
        torch.testing.assert_close(loss, twin * (0.7 if part else 1.0), rtol=1e-5, atol=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(torch.stack(losses).sum(), parameters, allow_unused=True)
    total = expected[0] + (0.7 * expected[1] if len(expected) > 1 else 0.0)
    twins = torch.autograd.grad(total, parameters, allow_unused=True)
    for (name, _), gradient, twin in zip(model.named_parameters(), found, twins, strict=True):
        if name == "item_embedding.weight":
            # Row 0 is zeroed by the training step; here the padded twin sends gradient through the padding.
            gradient, twin = gradient[1:], twin[1:]
        if twin is None:
            assert gradient is None, name
            continue
        assert float((gradient - twin).abs().max()) <= 1e-4 * float(twin.abs().max()) + 1e-7, name


@pytest.mark.parametrize("overrides", DENSE, ids=name_of)
def test_the_joint_backward_pass_equals_merging(
    tiny_model: Any, tiny_dataset: Dataset, overrides: dict[str, Any]
) -> None:
    model = dropless(tiny_model, **overrides)
    module, batch = stage_module(model, tiny_dataset), batch_of(SEQUENCES, model)
    parameters = list(model.parameters())
    torch.manual_seed(3)
    joint = module._gradients(module._losses(batch), parameters)
    torch.manual_seed(3)
    losses = module._losses(batch)
    per_loss = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    for (name, _), gradient, twin in zip(
        model.named_parameters(), joint, merge_gradients(per_loss, pcgrad=False), strict=True
    ):
        assert (gradient is None) == (twin is None), name
        if gradient is not None and twin is not None:
            torch.testing.assert_close(gradient, twin, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("overrides", [{"model": "sasrec"}, {"lambda_uncertainty": 1.0}], ids=name_of)
def test_two_processes_compute_the_gradient_of_one(
    tiny_model: Any, tiny_dataset: Dataset, overrides: dict[str, Any]
) -> None:
    model = dropless(tiny_model, **overrides)
    # Ascending lengths, so that every part keeps the order of the whole and noise can be cut along.
    rows = sorted(SEQUENCES, key=len)
    parts = [rows[:2], rows[2:]]
    whole = batch_of(rows, model)
    noise = noise_of(model, whole, 5)
    totals = torch.tensor([whole.layout.tokens, whole.layout.lengths.numel()]).double()
    parameters = list(model.parameters())

    def losses(batch: TokenBatch, first: int, shares: tuple[float, float]) -> list[Tensor]:
        if noise is None:
            rows = model(batch)
            return [catalogue_cross_entropy(rows, model.table, batch.targets) * shares[0]]
        end = first + batch.layout.tokens
        own = TokenNoise(noise.steps[first:end], noise.gaussian[first:end], noise.padding_steps)
        out = model(batch, own)
        ranking = catalogue_cross_entropy(out, model.table, batch.targets)
        near = reconstruction_loss(out, model.clean_target(batch.targets), batch.layout)
        return [ranking * shares[0], near * shares[1]]

    expected = torch.autograd.grad(torch.stack(losses(whole, 0, (1.0, 1.0))).sum(), parameters, allow_unused=True)
    module = stage_module(model, tiny_dataset)
    assert module._shares(whole) == (1.0, 1.0)
    module._trainer.world_size = 2
    module._sum_over_processes = lambda values: totals.clone()  # type: ignore[method-assign]
    gradients, first = [], 0
    for part in parts:
        batch = batch_of(part, model)
        own = losses(batch, first, module._shares(batch))
        gradients.append(torch.autograd.grad(torch.stack(own).sum(), parameters, allow_unused=True))
        first += batch.layout.tokens
    for (name, _), twin, *halves in zip(model.named_parameters(), expected, *gradients, strict=True):
        if twin is not None:
            mean = torch.stack(halves).mean(0)
            assert float((mean - twin).abs().max()) <= 1e-5 * float(twin.abs().max()) + 1e-7, name
