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
        model = self.model
        padded = histories.to(self.device).padded(model.config.max_length)
        rows = model.item_embedding(padded)
        real = padded != 0
        if model.position_embedding is not None:
            carries = real[..., None] | (model.config.positions == "released")
            rows = rows + model.position_embedding.weight * carries
        return PaddedState(padded, self._transformer(model.encoder, model.history_norm(rows), real))

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
        real = state.padded != 0
        # History positions hold their clean targets, the next items; the last column is overwritten by x_t.
        targets = torch.where(real, state.padded.roll(-1, 1), 0)
        clean = model.clean_target(targets)

        def denoise(x_t: Tensor, row: int) -> Tensor:
            steps = torch.zeros_like(targets)
            steps[:, -1] = table.time[row]
            x = torch.cat([clean[:, :-1], x_t[:, None]], 1)
            mixed = condition + model.config.lambda_uncertainty * (x + model.time_embedding(steps))
            if isinstance(model.denoiser, MLPDenoiser):
                return model.denoiser(mixed)[:, -1]
            return self._transformer(model.denoiser, mixed, real)[:, -1]

        return denoise

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
