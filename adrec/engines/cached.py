"""The fast exact engine: nothing that a reverse step does not change is computed twice.

The denoiser is causal and every reverse step gives the history positions the same input, so their keys and values are
computed once; each step then runs one token per user. Padding is a few shared key rows (see `adrec.models.layers`),
histories are packed, and coefficients are tables. Exact up to rounding, for both padding modes.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adrec.config import EarlyStop
from adrec.data.jagged import Jagged
from adrec.engines.base import Engine, PlanFeature
from adrec.models.adrec import ADRec, MLPDenoiser
from adrec.models.base import SequenceModel
from adrec.models.layers import Block, CausalTransformer, PadStates
from adrec.models.layout import Group, Layout
from adrec.models.quantized import outputs_from
from adrec.noise import ExplicitNoise, PhiloxNoise
from adrec.sampler import Denoiser, Sampled, guided, reverse_process, until_stable
from adrec.schedule import DiffusionTable


@dataclass(frozen=True)
class KeyValues:
    """Keys and values `[U, H, P + l + 1, d]` of one block and one group of users; the last column is the new token.

    users: which rows of the sorted batch the group is. bias: `[U, 1, 1, P + l + 1]`.
    """

    users: slice
    keys: Tensor
    values: Tensor
    bias: Tensor

    def select(self, inside: Tensor, first: int) -> KeyValues:
        """A copy of the users `[R]` of this group, which become rows ``first`` on."""
        users = slice(first, first + inside.numel())
        return KeyValues(users, self.keys[inside], self.values[inside], self.bias[inside])


class PrefixCache:
    """A causal transformer whose prefix is computed once, and which then takes one new token per user at a time."""

    def __init__(
        self,
        transformer: CausalTransformer,
        tokens: Tensor,
        layout: Layout,
        pads: PadStates | None,
        bias: Tensor | None,
    ) -> None:
        self.blocks = list(transformer)
        biases = [_bias(group, layout, bias) for group in layout.groups]
        self.caches: list[list[KeyValues]] = []
        for index, block in enumerate(self.blocks):
            padding = None if pads is None else pads.keys_values[index]
            self.caches.append(_key_values(block, tokens, layout, padding, biases))
            # The last block's outputs at the prefix are never read: only its keys and values are.
            if index + 1 < len(self.blocks):
                tokens = block(tokens, layout, padding, bias)

    def step(self, rows: Tensor) -> Tensor:
        """Run the new token of each user through every block. `[B, D] -> [B, D]`."""
        for block, caches in zip(self.blocks, self.caches, strict=True):
            query, key, value = block.attention.split(rows).unbind(1)
            mixed = []
            for cache in caches:
                users = cache.users
                cache.keys[:, :, -1] = key[users]
                cache.values[:, :, -1] = value[users]
                attended = F.scaled_dot_product_attention(
                    query[users, :, None], cache.keys, cache.values, attn_mask=cache.bias
                )
                mixed.append(attended.flatten(1))
            rows = block.finish(rows, block.attention.output(torch.cat(mixed)))
        return rows

    def select(self, users: Tensor) -> PrefixCache:
        """The cache of some users `[R]` int64, ascending; a copy, so that this one stays as it is."""
        chosen = copy(self)
        chosen.caches = []
        for caches in self.caches:
            kept: list[KeyValues] = []
            for cache in caches:
                inside = users[(users >= cache.users.start) & (users < cache.users.stop)] - cache.users.start
                if inside.numel():
                    kept.append(cache.select(inside, kept[-1].users.stop if kept else 0))
            chosen.caches.append(kept)
        return chosen


def _bias(group: Group, layout: Layout, pad_bias: Tensor | None) -> Tensor:
    """Additive attention bias `[U, 1, 1, P + l + 1]`: padding weights, and no attention beyond a user's own prefix."""
    if group.slots is None:
        own = torch.zeros(group.size, group.length + 1, device=layout.lengths.device)
    else:
        lengths = layout.lengths[group.users, None]
        place = torch.arange(group.length + 1, device=lengths.device)
        beyond = (place >= lengths) & (place < group.length)
        own = torch.zeros(beyond.shape, device=lengths.device).masked_fill(beyond, -torch.inf)
    if pad_bias is not None:
        own = torch.cat([pad_bias[group.users], own], -1)
    return own[:, None, None, :]


def _key_values(
    block: Block, tokens: Tensor, layout: Layout, padding: Tensor | None, biases: list[Tensor]
) -> list[KeyValues]:
    attention = block.attention
    width = attention.output.in_features
    projected = outputs_from(attention.qkv, tokens, width).unflatten(-1, (2, attention.heads, -1))
    caches = []
    for group, bias in zip(layout.groups, biases, strict=True):
        first = 0 if padding is None else padding.shape[3]
        shape = (2, group.size, attention.heads, first + group.length + 1, width // attention.heads)
        both = projected.new_zeros(shape)
        if padding is not None:
            both[:, :, :, :first] = padding
        both[:, :, :, first:-1] = group.unpack(projected[group.tokens]).permute(2, 0, 3, 1, 4)
        caches.append(KeyValues(group.users, both[0], both[1], bias))
    return caches


@dataclass(frozen=True)
class Padding:
    """Padding through the encoder and the denoiser: no history changes it, so an engine computes it once.

    unconditional: through the denoiser without condition, for guidance.
    """

    encoder: PadStates
    denoiser: PadStates | None = None
    unconditional: PadStates | None = None


@dataclass(frozen=True)
class CachedState:
    """Histories after encoding, users sorted by length. order: `[B]` input row of each sorted row.

    last: `[B, D]` condition (or encoder input) of each user's last token. caches: the conditional prefix, then the
    unconditional one where guidance needs it; empty for the MLP denoiser, which has no prefix.
    """

    order: Tensor
    last: Tensor
    caches: tuple[PrefixCache, ...]

    def select(self, users: Tensor) -> CachedState:
        """The state of some sorted rows `[R]` int64, ascending; a copy."""
        return CachedState(self.order[users], self.last[users], tuple(cache.select(users) for cache in self.caches))


class CachedEngine(Engine):
    """Prefix keys and values once, padding as weighted keys, packed tokens, coefficient tables.

    Padding and time embeddings are kept from the first request on: make a new engine after changing the weights.
    """

    name = "cached"
    features = frozenset[PlanFeature]({"sampler dpm++2m", "start zero", "early stop"})

    def __init__(self, model: SequenceModel) -> None:
        super().__init__(model)
        self._padding: Padding | None = None
        self._times: dict[int, tuple[DiffusionTable, Tensor]] = {}

    def encode(self, histories: Jagged) -> CachedState:
        histories = histories.to(self.device)
        order = torch.argsort(histories.lengths, stable=True)
        histories = histories.select(order)
        layout = Layout.from_sorted_lengths(histories.lengths)
        prefix = Layout.from_sorted_lengths(histories.lengths - 1)
        before = torch.ones(layout.tokens, dtype=torch.bool, device=order.device)
        before[layout.last] = False
        model, bias, padding = self.model, self.model.pad_bias(histories.lengths), self._pad_states()
        encoder_pads = None if padding is None else padding.encoder
        tokens = model.embed(histories.values, layout)
        if not isinstance(model, ADRec):
            cache = PrefixCache(model.encoder, tokens[before], prefix, encoder_pads, bias)
            return CachedState(order, tokens[layout.last], (cache,))
        condition = model.encoder(tokens, layout, encoder_pads, bias)
        last = condition[layout.last]
        if isinstance(model.denoiser, MLPDenoiser):
            return CachedState(order, last, ())
        # History positions hold their clean targets, the next items, at step 0.
        target = model.clean_target(histories.values[1:][before[:-1]])
        mixed = model.mix(condition[before], target, self._start())
        denoiser_pads = None if padding is None else padding.denoiser
        caches = [PrefixCache(model.denoiser, mixed, prefix, denoiser_pads, bias)]
        if model.config.guidance_scale != 1.0:
            mixed = model.mix(torch.zeros_like(mixed), target, self._start())
            denoiser_pads = None if padding is None else padding.unconditional
            caches.append(PrefixCache(model.denoiser, mixed, prefix, denoiser_pads, bias))
        return CachedState(order, last, tuple(caches))

    def _start(self) -> Tensor:
        return torch.zeros(1, dtype=torch.int64, device=self.device)

    def _pad_states(self) -> Padding | None:
        if self._padding is not None:
            return self._padding
        rows = self.model.pad_rows()
        if rows is None:
            return None
        encoder, denoiser, unconditional = self.model.encoder.pad_states(rows), None, None
        if isinstance(self.model, ADRec) and isinstance(self.model.denoiser, CausalTransformer):
            mixed = self.model.mix_pads(encoder.output, self._start())
            denoiser = self.model.denoiser.pad_states(mixed)
            if self.model.config.guidance_scale != 1.0:
                mixed = self.model.mix_pads(torch.zeros_like(encoder.output), self._start())
                unconditional = self.model.denoiser.pad_states(mixed)
        self._padding = Padding(encoder, denoiser, unconditional)
        return self._padding

    def sample(self, state: CachedState, table: DiffusionTable | None, noise: PhiloxNoise | ExplicitNoise) -> Tensor:
        model = self.model
        if table is None or not isinstance(model, ADRec):
            rows = state.caches[0].step(state.last)
        else:
            denoise = self.denoiser(state, table)
            rows = reverse_process(denoise, table, noise.select(state.order), geodesic=model.config.geodesic)
        return torch.empty_like(rows).index_copy_(0, state.order, rows)

    def sample_until_stable(
        self, state: CachedState, table: DiffusionTable, noise: PhiloxNoise | ExplicitNoise, stop: EarlyStop
    ) -> Sampled:
        found = until_stable(
            lambda users: self.denoiser(state if users.numel() == state.order.numel() else state.select(users), table),
            table,
            noise.select(state.order),
            lambda rows: self.top_k(rows, stop.top).items,
            patience=stop.patience,
            geodesic=self.model.config.geodesic,
        )
        return Sampled(
            torch.empty_like(found.rows).index_copy_(0, state.order, found.rows),
            torch.empty_like(found.steps).index_copy_(0, state.order, found.steps),
        )

    def denoiser(self, state: CachedState, table: DiffusionTable) -> Denoiser:
        """``(x_t [B, D], row of table) -> x0_hat [B, D]`` for users in the order of ``state``, guidance included."""
        assert isinstance(self.model, ADRec)
        denoise = self._denoiser(self.model, state, table, guided_by_nothing=False)
        if self.model.config.guidance_scale != 1.0:
            without = self._denoiser(self.model, state, table, guided_by_nothing=True)
            denoise = guided(denoise, without, self.model.config.guidance_scale)
        return denoise

    def _denoiser(
        self, model: ADRec, state: CachedState, table: DiffusionTable, *, guided_by_nothing: bool
    ) -> Denoiser:
        kept = self._times.get(table.steps)
        if kept is None or kept[0] is not table:
            embedded = model.time_embedding(table.time.to(self.device))
            kept = self._times[table.steps] = table, model.config.lambda_uncertainty * embedded
        times = kept[1]
        condition = torch.zeros_like(state.last) if guided_by_nothing else state.last

        def denoise(x_t: Tensor, row: int) -> Tensor:
            mixed = torch.add(condition + times[row], x_t, alpha=model.config.lambda_uncertainty)
            if isinstance(model.denoiser, MLPDenoiser):
                return model.denoiser(mixed)
            return state.caches[int(guided_by_nothing)].step(mixed)

        return denoise
