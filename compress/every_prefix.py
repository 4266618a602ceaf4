"""The denoiser at every position of a batch, each position seeing what the last one of a request sees.

In serving only the last position is noisy: those before it hold their clean targets at step 0. Training noises every
token, so its forward pass says what the model answers to other inputs. Here the clean history runs once and gives the
keys and values of every prefix; the noisy token of each position then attends to the clean ones before it and to
itself. One pass over a sequence of l items so answers its l prefixes, at the cost of one more pass through the denoiser
instead of l requests. Padding is that of the whole sequence, for teacher and student alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adrec.models.adrec import ADRec, MLPDenoiser
from adrec.models.base import SequenceModel, TokenBatch
from adrec.models.dropout import dropout
from adrec.models.layers import Block
from adrec.models.layout import Layout
from adrec.noise import NoiseSource
from adrec.sampler import reverse_process
from adrec.schedule import DiffusionTable

PrefixDenoiser = Callable[[Tensor, Tensor], Tensor]
"""``(x_t [M, D], trained step: int64 scalar or [M]) -> x0_hat [M, D]``."""


class EveryPrefix:
    """``x0_hat = ADM(c + lambda (x_t + e_t))`` of every prefix in a batch; differentiable.

    A model in training mode draws its dropout from torch's global generator.
    """

    def __init__(self, model: ADRec, batch: TokenBatch, *, without_condition: bool = False) -> None:
        self.model, self.layout = model, batch.layout
        condition, pads = model.encode(batch.inputs, batch.layout)
        if without_condition:
            condition, pads = torch.zeros_like(condition), None if pads is None else torch.zeros_like(pads)
        self.condition = condition
        self.clean: list[Tensor] = []
        self.padding: list[Tensor] | None = None
        self.bias = model.pad_bias(batch.layout.lengths)
        if isinstance(model.denoiser, MLPDenoiser):
            return
        start = batch.targets.new_zeros(1)
        if pads is not None:
            self.padding = model.denoiser.pad_states(model.mix_pads(pads, start)).keys_values
        tokens = model.mix(condition, model.clean_target(batch.targets), start)
        blocks = list(model.denoiser)
        for index, block in enumerate(blocks):
            self.clean.append(block.attention.split(tokens)[:, 1:])
            # The last block's outputs at the history are never read: only its keys and values are.
            if index + 1 < len(blocks):
                tokens = block(tokens, self.layout, None if self.padding is None else self.padding[index], self.bias)

    def __call__(self, x_t: Tensor, time: Tensor) -> Tensor:
        """Denoise the last token of every prefix. x_t: `[M, D]`. time: trained step, int64 scalar or `[M]`."""
        rows = self.model.mix(self.condition, x_t, time)
        if isinstance(self.model.denoiser, MLPDenoiser):
            return self.model.denoiser(rows)
        for index, block in enumerate(self.model.denoiser):
            pads = None if self.padding is None else self.padding[index]
            rows = block.finish(rows, _attend(block, rows, self.clean[index], self.layout, pads, self.bias))
        return rows


def _attend(
    block: Block, rows: Tensor, clean: Tensor, layout: Layout, pads: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Attention of each noisy token `[M, D]` over the padding, the clean keys before it `[M, 2, H, d]`, and itself."""
    attention = block.attention
    qkv, mixed = attention.split(rows), []
    for group in layout.groups:
        if not group.length:
            continue
        query, key, value = group.unpack(qkv[group.tokens]).permute(2, 0, 3, 1, 4).unbind()
        clean_key, clean_value = group.unpack(clean[group.tokens]).permute(2, 0, 3, 1, 4).unbind()
        not_before = torch.ones(group.length, group.length, dtype=torch.bool, device=rows.device).triu()
        scores = [
            (query @ clean_key.transpose(-1, -2)).masked_fill(not_before, -torch.inf),
            (query * key).sum(-1, keepdim=True),
        ]
        values = [clean_value]
        if pads is not None and bias is not None:
            pad_key, pad_value = pads if pads.shape[1] == 1 else pads[:, group.users]
            # The weight of padding is added to the scaled score.
            extra = bias[group.users, None, None] / attention.scale
            scores.insert(0, query @ pad_key.transpose(-1, -2) + extra)
            values.insert(0, pad_value.expand(group.size, -1, -1, -1))
        weights = dropout((torch.cat(scores, -1) * attention.scale).softmax(-1), attention.dropout, block.training)
        result = weights[..., :-1] @ torch.cat(values, 2) + weights[..., -1:] * value
        mixed.append(group.pack(result.transpose(1, 2).flatten(2)))
    return attention.output(torch.cat(mixed) if mixed else rows)


def every_prefix(model: ADRec, batch: TokenBatch) -> PrefixDenoiser:
    """What answers for every prefix of a batch, guided where the model's configuration says so."""
    conditional = EveryPrefix(model, batch)
    scale = model.config.guidance_scale
    if scale == 1.0:
        return conditional
    unconditional = EveryPrefix(model, batch, without_condition=True)

    def denoise(x_t: Tensor, time: Tensor) -> Tensor:
        without = unconditional(x_t, time)
        return without + scale * (conditional(x_t, time) - without)

    return denoise


def represent_prefixes(
    model: SequenceModel, batch: TokenBatch, table: DiffusionTable | None, noise: NoiseSource
) -> Tensor:
    """What a model answers to every prefix of a batch, `[M, D]`: what an engine represents it by.

    table: of the reverse steps; a model without diffusion ignores it. noise: `[M, D]` a draw, see
    `adrec.sampler.reverse_process`.
    """
    if not isinstance(model, ADRec):
        return model(batch)
    if table is None:
        raise ValueError("table is None; a model with diffusion needs the table of its reverse steps")
    times, denoise = table.time.to(batch.targets.device), every_prefix(model, batch)
    return reverse_process(lambda x_t, row: denoise(x_t, times[row]), table, noise, geodesic=model.config.geodesic)
