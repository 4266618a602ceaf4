"""ADRec: token-independent diffusion over a causal sequence (Chen, Xu and Jiang, KDD 2025, arXiv 2505.19544)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adrec.config import ModelConfig
from adrec.models.base import SequenceModel, TokenBatch
from adrec.models.layers import CausalTransformer, LayerNorm, TimeEmbedding
from adrec.noise import TokenNoise, noised, unit
from adrec.schedule import DiffusionTable, diffusion_table, named_betas


class MLPDenoiser(nn.Module):
    """``D -> 4D -> SiLU -> D -> LN``, each token by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm = LayerNorm(width, epsilon=1e-5)

    def forward(self, rows: Tensor) -> Tensor:
        return self.norm(self.down(F.silu(self.up(rows))))


class ADRec(SequenceModel):
    """Causal condition c, then ``x0_hat = ADM(c + lambda (x_t + e_t))``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.betas = named_betas(config.schedule, config.timesteps)
        self.schedule: DiffusionTable = diffusion_table(self.betas)
        self.time_embedding = TimeEmbedding(config.width, config.timesteps)
        self.denoiser: CausalTransformer | MLPDenoiser = (
            MLPDenoiser(config.width)
            if config.denoiser == "mlp"
            else CausalTransformer(config.width, config.heads, config.denoiser_blocks, config.dropout)
        )
        self.initialise()

    def forward(self, batch: TokenBatch, noise: TokenNoise) -> Tensor:
        """Reconstruct every target from its noised self: ``x0_hat`` of every packed token, `[M, D]`.

        noise: the steps and Gaussian noise of each token, and which sequences keep their condition.
        """
        condition, pads = self.encode(batch.inputs, batch.layout)
        clean = self.clean_target(batch.targets)
        noisy = noised(clean, noise.steps, noise.gaussian, self.schedule, self.config.geodesic)
        if noise.keep_condition is not None:
            keep = noise.keep_condition.to(condition.dtype)
            condition = condition * keep[batch.layout.users, None]
            pads = None if pads is None else pads * keep[:, None, None]
        mixed = condition + self.config.lambda_uncertainty * (noisy + self.time_embedding(noise.steps))
        if isinstance(self.denoiser, MLPDenoiser):
            return self.denoiser(mixed)
        states = None if pads is None else self.denoiser.pad_states(self.mix_pads(pads, noise.padding_steps))
        return self.denoiser(mixed, batch.layout, states, self.pad_bias(batch.layout.lengths))

    def clean_target(self, items: Tensor) -> Tensor:
        """``x_0 = E[item]``, on the unit sphere when geodesic. `[...]` int64 -> `[..., D]`."""
        rows = self.item_embedding(items)
        return unit(rows) if self.config.geodesic else rows

    def mix_pads(self, pads: Tensor, steps: Tensor) -> Tensor:
        """Padding at the denoiser's input `[U, P, D]`: x_0 is zero and never noised. steps: `[1]` or `[B]` int64."""
        return pads + self.config.lambda_uncertainty * self.time_embedding(steps)[:, None]

    def mix(self, condition: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """``c + lambda (x_t + e_t)`` for one step shared by all rows. time: scalar int64 tensor."""
        return condition + self.config.lambda_uncertainty * (x_t + self.time_embedding(time))

    @torch.no_grad()
    def load_table(self, table: Tensor) -> None:
        """Copy a pre-trained item table `[N + 1, D]` (stage 1) into this model."""
        self.item_embedding.weight.copy_(table)
