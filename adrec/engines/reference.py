"""The honest baseline: recompute every position of the padded history at every step, as the released code does.

Padding is computed position by position and attention is dense over ``max_length``. It shares with the other engines
the weights, the row-wise layers and the sampler, which the authors' reference values hold; what they save, it does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adrec.data.jagged import Jagged
from adrec.engines.base import Engine, PlanFeature
from adrec.models.adrec import ADRec, MLPDenoiser
from adrec.models.layers import Block, CausalTransformer
from adrec.noise import ExplicitNoise, PhiloxNoise
from adrec.sampler import Denoiser, guided, reverse_process
from adrec.schedule import DiffusionTable

_MASKED = -1e9


@dataclass(frozen=True)
class PaddedState:
    """padded: `[B, L]` left-padded ids. condition: `[B, L, D]`."""

    padded: Tensor
    condition: Tensor


class ReferenceEngine(Engine):
    """Dense engine over left-padded histories."""

    name = "reference"
    features = frozenset[PlanFeature]({"sampler dpm++2m", "start zero"})

    def encode(self, histories: Jagged) -> PaddedState:
        padded = histories.to(self.device).padded(self.model.config.max_length)
        return PaddedState(padded, self.condition(padded))

    def condition(self, padded: Tensor) -> Tensor:
        """Every position of left-padded ids `[B, L]` through the encoder, `[B, L, D]`."""
        model = self.model
        rows = model.item_embedding(padded)
        real = padded != 0
        if model.position_embedding is not None:
            carries = real[..., None] | (model.config.positions == "released")
            rows = rows + model.position_embedding.weight * carries
        return self._transformer(model.encoder, model.history_norm(rows), real)

    def sample(self, state: PaddedState, table: DiffusionTable | None, noise: PhiloxNoise | ExplicitNoise) -> Tensor:
        model = self.model
        if table is None or not isinstance(model, ADRec):
            return state.condition[:, -1]
        denoise = self._denoiser(model, state, state.condition, table)
        if model.config.guidance_scale != 1.0:
            without = self._denoiser(model, state, torch.zeros_like(state.condition), table)
            denoise = guided(denoise, without, model.config.guidance_scale)
        return reverse_process(denoise, table, noise, geodesic=model.config.geodesic)

    def _denoiser(self, model: ADRec, state: PaddedState, condition: Tensor, table: DiffusionTable) -> Denoiser:
        # History positions hold their clean targets, the next items; the last column is overwritten by x_t.
        clean = model.clean_target(torch.where(state.padded != 0, state.padded.roll(-1, 1), 0))
        return lambda x_t, row: self.step(state.padded, condition, clean, x_t, table.time[row])

    def step(self, padded: Tensor, condition: Tensor, clean: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """Every position through the denoiser; returns that of the last one, ``x0_hat`` `[B, D]`.

        padded: `[B, L]`. condition, clean: `[B, L, D]`. x_t: `[B, D]`. time: `[]` int64, the trained step.
        """
        model = self.model
        assert isinstance(model, ADRec)
        steps = torch.zeros_like(padded)
        steps[:, -1] = time
        x = torch.cat([clean[:, :-1], x_t[:, None]], 1)
        mixed = condition + model.config.lambda_uncertainty * (x + model.time_embedding(steps))
        if isinstance(model.denoiser, MLPDenoiser):
            return model.denoiser(mixed)[:, -1]
        return self._transformer(model.denoiser, mixed, padded != 0)[:, -1]

    def _transformer(self, transformer: CausalTransformer, rows: Tensor, real: Tensor) -> Tensor:
        length = rows.shape[1]
        # `released` masks padded queries, which then attend uniformly; `masked` masks padded keys.
        padding = ~real[:, None, :, None] if self.model.config.padding == "released" else ~real[:, None, None, :]
        future = torch.ones(length, length, dtype=torch.bool, device=rows.device).triu(1)
        for block in transformer:
            rows = self._block(block, rows, padding, future)
        return rows

    @staticmethod
    def _block(block: Block, rows: Tensor, padding: Tensor, future: Tensor) -> Tensor:
        query, key, value = block.attention.split(rows).permute(2, 0, 3, 1, 4).unbind()
        scores = query @ key.transpose(-1, -2) * block.attention.scale
        scores = scores.masked_fill(padding, _MASKED).masked_fill(future, -torch.inf)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return block.finish(rows, block.attention.output(mixed))
