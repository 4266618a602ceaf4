"""Training with `kernels.token_noise`: the loss and every gradient of the torch path for the same steps and noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adrec.config import OptimiserConfig, TrainConfig
from adrec.data.dataset import Dataset
from adrec.data.jagged import Jagged
from adrec.losses import catalogue_cross_entropy, reconstruction_loss
from adrec.models import ADRec
from adrec.models.base import TokenBatch
from adrec.noise import SeededTokenNoise, TokenNoise, seed_token_noise
from adrec.training.module import StageModule
from kernels import _runtime
from kernels._token_noise_draws import drawn

# In the interpreter on a CPU; where a GPU is at hand, tests do not set the interpreter, and the twin stands in here.
SEQUENCES = [[3, 9, 4], [1, 2], [7, 8, 9, 10, 11, 12, 13, 14], [40, 1, 40, 1, 40], [5, 6], list(range(20, 31))]
MODELS = [
    {"lambda_uncertainty": 1.0},
    {"lambda_uncertainty": 1.0, "independent_noise": False},
    {"lambda_uncertainty": 1.0, "independent_noise": False, "padding": "masked", "positions": "learned"},
    {"lambda_uncertainty": 1.0, "positions": "released", "independent_noise": False},
    {"lambda_uncertainty": 0.5, "denoiser": "mlp"},
    {"lambda_uncertainty": 0.5, "geodesic": True},
    {"lambda_uncertainty": 0.5, "geodesic": True, "condition_dropout": 0.5, "independent_noise": False},
]


class OneProcess:
    """As much of a trainer as the losses look at."""

    world_size = 1
    precision_plugin = None


def training_model(tiny_model: Any, **overrides: Any) -> ADRec:
    body = {"timesteps": 8, "schedule": "sqrt", "max_length": 12, "dropout": 0.0, "embedding_dropout": 0.0}
    model = tiny_model(**body, **overrides).train()
    assert isinstance(model, ADRec)
    return model


def batch_of(model: ADRec) -> TokenBatch:
    return TokenBatch.from_sequences(Jagged.from_lists(SEQUENCES), model.config.max_length)


def stage_module(model: ADRec, dataset: Dataset, fused: bool | None) -> StageModule:
    module = StageModule(model, dataset, TrainConfig(), OptimiserConfig(), "main")
    module._trainer = OneProcess()  # type: ignore[assignment]
    module.fused_noise = fused
    return module


def as_drawn(model: ADRec, batch: TokenBatch, noise: SeededTokenNoise) -> TokenNoise:
    """The steps and noise that the kernel draws, as tensors, by its twin."""
    config, layout = model.config, batch.layout
    sequences = None if noise.independent else layout.users
    steps, gaussian = drawn(noise.seed, batch.targets, config.width, config.timesteps, sequences)
    padding = steps.new_zeros(1) if noise.independent else steps[layout.offsets[:-1]]
    return TokenNoise(steps, gaussian, padding, noise.keep_condition)


def losses(model: ADRec, batch: TokenBatch, noise: TokenNoise | SeededTokenNoise) -> list[Tensor]:
    x0_hat = model(batch, noise)
    ranking = catalogue_cross_entropy(x0_hat, model.table, batch.targets)
    return [ranking, reconstruction_loss(x0_hat, model.clean_target(batch.targets), batch.layout)]


def near(actual: Tensor, expected: Tensor, name: str) -> None:
    actual, expected = actual.detach(), expected.detach()
    assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max()) + 1e-7, name


@pytest.mark.skipif(not _runtime.AVAILABLE, reason="Triton is not installed")
@pytest.mark.parametrize("overrides", MODELS, ids=str)
def test_fused_losses_and_gradients_are_those_of_the_torch_path(tiny_model: Any, overrides: dict[str, Any]) -> None:
    model = training_model(tiny_model, **overrides)
    batch = batch_of(model)
    keep = torch.tensor([True, False, True, True, False, True]) if model.config.condition_dropout else None
    noise = SeededTokenNoise(2**40 + 7, model.config.independent_noise, keep)
    explicit = as_drawn(model, batch, noise)
    if not model.config.independent_noise:
        assert explicit.padding_steps.unique().numel() > 1
    parameters = list(model.parameters())
    found, expected = losses(model, batch, noise), losses(model, batch, explicit)
    for fused, plain in zip(found, expected, strict=True):
        near(fused, plain, "loss")
        # Each loss by itself, as projection of conflicts needs them.
        gradients = torch.autograd.grad(fused, parameters, allow_unused=True, retain_graph=True)
        twins = torch.autograd.grad(plain, parameters, allow_unused=True, retain_graph=True)
        for (name, _), gradient, twin in zip(model.named_parameters(), gradients, twins, strict=True):
            assert (gradient is None) == (twin is None), name
            if gradient is not None and twin is not None:
                near(gradient, twin, name)


@pytest.mark.skipif(not _runtime.AVAILABLE, reason="Triton is not installed")
def test_autocast_mixes_storage_dtypes_as_the_torch_path_does(tiny_model: Any) -> None:
    """Linear layers give bf16 and norms float32, so the time table and c differ in dtype."""
    model = training_model(tiny_model, lambda_uncertainty=1.0)
    batch, noise = batch_of(model), SeededTokenNoise(3)
    explicit = as_drawn(model, batch, noise)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model(batch, noise), model(batch, explicit)
    assert found.dtype == expected.dtype
    difference = (found.detach().float() - expected.detach().float()).square().mean().sqrt()
    # One bf16 ulp of slack: the two paths round the denoiser's input alike but for its last bit.
    assert float(difference / expected.detach().float().square().mean().sqrt()) <= 2**-8
    found.float().sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_cpu_keeps_torchs_noise_unless_told_otherwise(tiny_model: Any, tiny_dataset: Dataset) -> None:
    model = training_model(tiny_model)
    batch = batch_of(model)
    drawn_noise = {
        fused: stage_module(model, tiny_dataset, fused)._draw_noise(batch, model) for fused in (None, False, True)
    }
    assert isinstance(drawn_noise[None], TokenNoise)
    assert isinstance(drawn_noise[False], TokenNoise)
    assert isinstance(drawn_noise[True], SeededTokenNoise)


@pytest.mark.parametrize("overrides", [{}, {"condition_dropout": 0.5, "independent_noise": False}], ids=str)
def test_the_training_step_draws_its_seed_from_torchs(
    tiny_model: Any, tiny_dataset: Dataset, overrides: dict[str, Any]
) -> None:
    """A step seeds torch, so equal steps draw equal noise and a resumed run repeats an uninterrupted one."""
    model = training_model(tiny_model, **overrides)
    batch, module = batch_of(model), stage_module(model, tiny_dataset, True)
    config = model.config
    totals = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        totals.append(torch.stack(module._losses(batch)).detach())
    assert torch.equal(totals[0], totals[1])
    assert not torch.equal(totals[0], totals[2])
    torch.manual_seed(4)
    noise = seed_token_noise(
        batch.layout, independent=config.independent_noise, condition_dropout=config.condition_dropout
    )
    assert isinstance(noise.seed, Tensor)
    assert noise.seed.shape == (1,)
    assert (noise.keep_condition is None) == (config.condition_dropout == 0.0)
    near(totals[0], torch.stack(losses(model, batch, as_drawn(model, batch, noise))), "losses")


def test_the_noise_levels_are_not_part_of_a_checkpoint(tiny_model: Any) -> None:
    assert "noise_levels" not in training_model(tiny_model).state_dict()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that torch can use")
@pytest.mark.parametrize("overrides", MODELS, ids=str)
def test_a_gpu_trains_fused_by_default(
    tiny_model: Any, tiny_dataset: Dataset, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model = training_model(tiny_model, **overrides).cuda()
    batch = batch_of(model).to(torch.device("cuda"))
    noise = stage_module(model, tiny_dataset, None)._draw_noise(batch, model)
    assert isinstance(noise, SeededTokenNoise)
    found, expected = losses(model, batch, noise), losses(model, batch, as_drawn(model, batch, noise))
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(torch.stack(found).sum(), parameters, allow_unused=True)
    twins = torch.autograd.grad(torch.stack(expected).sum(), parameters, allow_unused=True)
    for (name, _), gradient, twin in zip(model.named_parameters(), gradients, twins, strict=True):
        if gradient is not None and twin is not None:
            assert float((gradient - twin).abs().max()) <= 1e-4 * float(twin.abs().max()) + 1e-6, name
