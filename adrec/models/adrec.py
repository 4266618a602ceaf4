"""ADRec: token-independent diffusion over a causal sequence (Chen, Xu and Jiang, KDD 2025, arXiv 2505.19544)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adrec.config import ModelConfig
from adrec.models.base import SequenceModel, TokenBatch
from adrec.models.layers import CausalTransformer, LayerNorm, TimeEmbedding
from adrec.noise import SeededTokenNoise, TokenNoise, noised, unit
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

    noise_levels: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.betas = named_betas(config.schedule, config.timesteps)
        self.schedule: DiffusionTable = diffusion_table(self.betas)
        # On the model's device, where kernels read it.
        self.register_buffer("noise_levels", torch.stack([self.schedule.signal, self.schedule.noise]), persistent=False)
        self.time_embedding = TimeEmbedding(config.width, config.timesteps)
        self.denoiser: CausalTransformer | MLPDenoiser = (
            MLPDenoiser(config.width)
            if config.denoiser == "mlp"
            else CausalTransformer(config.width, config.heads, config.denoiser_blocks, config.dropout)
        )
        self.initialise()

    def forward(self, batch: TokenBatch, noise: TokenNoise | SeededTokenNoise) -> Tensor:
        """Reconstruct every target from its noised self: ``x0_hat`` of every packed token, `[M, D]`.

        noise: the steps and Gaussian noise of each token, or the seed that `kernels.token_noise` draws them from, and
        which sequences keep their condition.
        """
        condition, pads = self.encode(batch.inputs, batch.layout)
        # Before the condition is dropped: the order of operations is that of their gradients' sums, down to the bit.
        if isinstance(noise, TokenNoise):
            clean = self.clean_target(batch.targets)
            noisy = noised(clean, noise.steps, noise.gaussian, self.schedule, self.config.geodesic)
        if noise.keep_condition is not None:
            keep = noise.keep_condition.to(condition.dtype)
            condition = condition * keep[batch.layout.users, None]
            pads = None if pads is None else pads * keep[:, None, None]
        if isinstance(noise, TokenNoise):
            mixed = condition + self.config.lambda_uncertainty * (noisy + self.time_embedding(noise.steps))
            padding_steps = noise.padding_steps
        else:
            mixed, padding_steps = self._mix_seeded(batch, condition, noise)
        if isinstance(self.denoiser, MLPDenoiser):
            return self.denoiser(mixed)
        states = None if pads is None else self.denoiser.pad_states(self.mix_pads(pads, padding_steps))
        return self.denoiser(mixed, batch.layout, states, self.pad_bias(batch.layout.lengths))

    def _mix_seeded(self, batch: TokenBatch, condition: Tensor, noise: SeededTokenNoise) -> tuple[Tensor, Tensor]:
        """The denoiser's input `[M, D]` in one fused pass, and the steps of the padding `[1]` or `[B]`."""
        # Triton, which this brings in, is imported where it is used.
        from kernels.token_noise import token_noise

        layout, device = batch.layout, condition.device
        signal, level = self.noise_levels.float()
        noised_tokens = token_noise(
            self.table,
            batch.targets,
            condition,
            self.time_embedding(torch.arange(self.config.timesteps, device=device)),
            signal,
            level,
            weight=self.config.lambda_uncertainty,
            seed=noise.seed,
            sequences=None if noise.independent else layout.users,
            geodesic=self.config.geodesic,
            return_steps=not noise.independent,
        )
        if noised_tokens.steps is None:
            return noised_tokens.z, layout.lengths.new_zeros(1)
        # Every sequence of a training batch has a first token, and all its tokens have one step.
        return noised_tokens.z, noised_tokens.steps[layout.offsets[:-1]]

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
