"""The fast exact engine: nothing that a reverse step does not change is computed twice.

The denoiser is causal and every reverse step gives the history positions the same input, so their keys and values are
computed once; each step then runs one token per user. Padding is a few shared key rows (see `adrec.models.layers`),
histories are packed, and coefficients are tables. Exact up to rounding, for both padding modes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adrec.data.jagged import Jagged
from adrec.engines.base import Engine
from adrec.models.adrec import ADRec, MLPDenoiser
from adrec.models.layers import Block, CausalTransformer, Pads
from adrec.models.layout import Group, Layout
from adrec.noise import ExplicitNoise, PhiloxNoise
from adrec.sampler import Denoiser, ddpm, guided
from adrec.schedule import DiffusionTable


@dataclass(frozen=True)
class KeyValues:
    """Keys and values `[U, H, P + l + 1, d]` of one block and one group of users; the last column is the new token."""

    group: Group
    keys: Tensor
    values: Tensor
    bias: Tensor


class PrefixCache:
    """A causal transformer whose prefix is computed once, and which then takes one new token per user at a time."""

    def __init__(self, transformer: CausalTransformer, tokens: Tensor, layout: Layout, pads: Pads | None) -> None:
        self.blocks = list(transformer)
        biases = [_bias(group, layout, pads) for group in layout.groups]
        self.caches: list[list[KeyValues]] = []
        for index, block in enumerate(self.blocks):
            self.caches.append(_key_values(block, tokens, layout, pads, biases))
            # The last block's outputs at the prefix are never read: only its keys and values are.
            if index + 1 < len(self.blocks):
                tokens, pads = block(tokens, layout, pads)

    def step(self, rows: Tensor) -> Tensor:
        """Run the new token of each user through every block. `[B, D] -> [B, D]`."""
        for block, caches in zip(self.blocks, self.caches, strict=True):
            query, key, value = block.attention.split(rows).unbind(1)
            mixed = []
            for cache in caches:
                users = cache.group.users
                cache.keys[:, :, -1] = key[users]
                cache.values[:, :, -1] = value[users]
                attended = F.scaled_dot_product_attention(
                    query[users, :, None], cache.keys, cache.values, attn_mask=cache.bias
                )
                mixed.append(attended.flatten(1))
            rows = block.finish(rows, block.attention.output(torch.cat(mixed)))
        return rows


def _bias(group: Group, layout: Layout, pads: Pads | None) -> Tensor:
    """Additive attention bias `[U, 1, 1, P + l + 1]`: padding weights, and no attention beyond a user's own prefix."""
    lengths = layout.lengths[group.users]
    place = torch.arange(group.length + 1, device=lengths.device)
    beyond = (place >= lengths[:, None]) & (place < group.length)
    own = torch.zeros(beyond.shape, device=lengths.device).masked_fill(beyond, -torch.inf)
    if pads is not None:
        own = torch.cat([pads.bias[group.users].expand(group.size, -1), own], -1)
    return own[:, None, None, :]


def _key_values(
    block: Block, tokens: Tensor, layout: Layout, pads: Pads | None, biases: list[Tensor]
) -> list[KeyValues]:
    attention = block.attention
    width = attention.output.in_features
    weight, bias = attention.qkv.weight[width:], attention.qkv.bias[width:]

    def project(rows: Tensor) -> Tensor:
        return F.linear(rows, weight, bias).unflatten(-1, (2, attention.heads, -1))

    projected = project(tokens)
    padding = None if pads is None else project(pads.hidden)
    caches = []
    for group, group_bias in zip(layout.groups, biases, strict=True):
        first = 0 if padding is None else padding.shape[1]
        shape = (2, group.size, attention.heads, first + group.length + 1, width // attention.heads)
        both = projected.new_zeros(shape)
        if padding is not None:
            own = padding if padding.shape[0] == 1 else padding[group.users]
            both[:, :, :, :first] = own.permute(2, 0, 3, 1, 4)
        both[:, :, :, first:-1] = group.unpack(projected[group.tokens]).permute(2, 0, 3, 1, 4)
        caches.append(KeyValues(group, both[0], both[1], group_bias))
    return caches


@dataclass(frozen=True)
class CachedState:
    """Histories after encoding, users sorted by length. order: `[B]` input row of each sorted row.

    last: `[B, D]` condition (or encoder input) of each user's last token. caches: the conditional prefix, then the
    unconditional one where guidance needs it; empty for the MLP denoiser, which has no prefix.
    """

    order: Tensor
    last: Tensor
    caches: tuple[PrefixCache, ...]


class CachedEngine(Engine):
    """Prefix keys and values once, padding as weighted keys, packed tokens, coefficient tables."""

    name = "cached"

    def encode(self, histories: Jagged) -> CachedState:
        order = torch.argsort(histories.lengths, stable=True)
        histories = histories.select(order)
        layout = Layout.from_sorted_lengths(histories.lengths)
        prefix = Layout.from_sorted_lengths(histories.lengths - 1)
        before = torch.ones(layout.tokens, dtype=torch.bool, device=order.device)
        before[layout.last] = False
        if not isinstance(self.model, ADRec):
            tokens, pads = self.model.embed(histories.values, layout)
            cache = PrefixCache(self.model.encoder, tokens[before], prefix, pads)
            return CachedState(order, tokens[layout.last], (cache,))
        condition, pads = self.model.encode(histories.values, layout)
        last, prefix_condition = condition[layout.last], condition[before]
        if isinstance(self.model.denoiser, MLPDenoiser):
            return CachedState(order, last, ())
        next_items = histories.values[1:][before[:-1]]
        caches = [self._prefix(self.model, prefix_condition, next_items, prefix, pads)]
        if self.model.config.guidance_scale != 1.0:
            nothing = None if pads is None else pads.replace(torch.zeros_like(pads.hidden))
            caches.append(self._prefix(self.model, torch.zeros_like(prefix_condition), next_items, prefix, nothing))
        return CachedState(order, last, tuple(caches))

    @staticmethod
    def _prefix(model: ADRec, condition: Tensor, next_items: Tensor, layout: Layout, pads: Pads | None) -> PrefixCache:
        start = torch.zeros(1, dtype=torch.int64, device=condition.device)
        mixed = model.mix(condition, model.clean_target(next_items), start)
        assert isinstance(model.denoiser, CausalTransformer)
        return PrefixCache(model.denoiser, mixed, layout, model.mix_pads(pads, start))

    def sample(self, state: CachedState, table: DiffusionTable | None, noise: PhiloxNoise | ExplicitNoise) -> Tensor:
        model = self.model
        if table is None or not isinstance(model, ADRec):
            rows = state.caches[0].step(state.last)
        else:
            denoise = self._denoiser(model, state, table, guided_by_nothing=False)
            if model.config.guidance_scale != 1.0:
                without = self._denoiser(model, state, table, guided_by_nothing=True)
                denoise = guided(denoise, without, model.config.guidance_scale)
            rows = ddpm(denoise, table, noise.select(state.order), geodesic=model.config.geodesic)
        return torch.empty_like(rows).index_copy_(0, state.order, rows)

    @staticmethod
    def _denoiser(model: ADRec, state: CachedState, table: DiffusionTable, *, guided_by_nothing: bool) -> Denoiser:
        times = model.config.lambda_uncertainty * model.time_embedding(table.time.to(state.last.device))
        condition = torch.zeros_like(state.last) if guided_by_nothing else state.last

        def denoise(x_t: Tensor, row: int) -> Tensor:
            mixed = torch.add(condition + times[row], x_t, alpha=model.config.lambda_uncertainty)
            if isinstance(model.denoiser, MLPDenoiser):
                return model.denoiser(mixed)
            return state.caches[int(guided_by_nothing)].step(mixed)

        return denoise
