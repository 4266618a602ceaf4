"""One request as a module of plain tensor operations, which `torch.export` turns into a graph of named sizes.

It computes what `adrec.engines.cached` computes, with the same savings and other shapes:

- A batch is a rectangle. **Histories are aligned to the right** (padded on the left with item 0), so that the token to
  denoise is always the last column and a prefix is a slice: no gather depends on a length. Lengths come as an input of
  their own; columns before a history are masked. Padding is never read by a real token, so a batch may be padded to any
  width without changing its result; ``padding="released"`` is not this padding, see the next point.
- **The padding that the model was trained with is a key**, not columns: its keys and values are the same for every user
  and are stored as constants. Without positions it is one key with ``log(max_length - length)`` on its logit; where
  padding carries positions it is ``max_length`` keys, of which a user sees the first ``max_length - length``.
- **Item ids are looked up unchecked**: runtimes count ids below 0 from the end of the table, and fail above N or read
  memory beyond it. The engines check them, and a graph says what it takes (``adrec.ids`` in its metadata).
- **The reverse steps run one query.** Keys (transposed) and values of the prefix are computed once; a step adds the
  logit of the new token to those of the prefix and never copies them.
- **Masks are added, and are -1e4**, which float16 holds and whose exponential is zero. A column always sees itself, so
  that no row of a softmax is empty, whatever the padding.
- **Noise is an input**: draw i is row i, as in `adrec.noise.ExplicitNoise`. A random operation in a graph ignores seeds
  in some runtimes, and draws that nobody can repeat in the others.
- **The item table is stored once**: it is looked up, and multiplied as it lies (`F.linear`). The score of the padding
  row is lowered by a bias rather than cut out of the table, which would store it twice or copy all scores.
- **Linear layers see matrices** `[batch * length, D]`: they become one ``Gemm`` whose weight keeps its name and layout,
  so that a runtime can exchange it by that name.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adrec.models.adrec import ADRec, MLPDenoiser
from adrec.models.base import SequenceModel
from adrec.models.layers import Block, CausalTransformer, PadStates
from adrec.noise import ExplicitNoise, unit
from adrec.sampler import reverse_process
from adrec.schedule import DiffusionTable

MASKED = -1e4
UNLISTED = -3e4
"""Score of the padding row: below any item's, a float16, and small enough for the scales that quantisers derive."""


class Prefix(NamedTuple):
    """What a step attends to in one block: keys `[B, H, d, P + L - 1]` and values `[B, H, P + L - 1, d]`."""

    keys: Tensor
    values: Tensor


class Encoded(NamedTuple):
    """Histories after encoding.

    last: `[B, D]`, the condition (or encoder input) of each history's last item. prefixes: blocks of the conditional
    branch, then of the unconditional one. mask: `[B, 1, 1, P + L - 1]`, added to the logits of a step; None where
    nothing is attended to.
    """

    last: Tensor
    prefixes: tuple[Prefix, ...]
    mask: Tensor | None


class RequestGraph(nn.Module):
    """The parts of a request for one model: `encode`, `denoise` and `score`.

    A copy of the model in ``dtype``; constants that do not depend on a request (padding, step embeddings) are computed
    in float32 first. The model's weights are plain floats, see `adrec.models.in_float32`.
    """

    score_bias: Tensor
    start_time: Tensor

    def __init__(self, model: SequenceModel, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = model.config
        self.dtype = dtype
        self.model = copy.deepcopy(model).cpu().eval().requires_grad_(False).to(dtype)
        constants = copy.deepcopy(model).cpu().eval().float()
        with torch.no_grad():
            self._register_pads(constants)
        bias = torch.zeros(model.config.items + 1, dtype=dtype)
        bias[0] = UNLISTED
        self.register_buffer("score_bias", bias)
        if isinstance(constants, ADRec):
            self.register_buffer("start_time", self.embedded_times(constants, torch.zeros(1, dtype=torch.int64)))

    @torch.no_grad()
    def embedded_times(self, model: ADRec, times: Tensor) -> Tensor:
        """Embeddings of trained steps `[S]` int64, `[S, D]` in this graph's dtype, computed in the model's."""
        return model.time_embedding(times).to(self.dtype)

    def _register_pads(self, model: SequenceModel) -> None:
        self._pads: dict[str, int] = {}
        rows = model.pad_rows()
        if rows is None:
            return
        encoder = model.encoder.pad_states(rows)
        self._register("encoder_pads", encoder)
        if isinstance(model, ADRec) and isinstance(model.denoiser, CausalTransformer):
            start = torch.zeros(1, dtype=torch.int64)
            for name, output in (("denoiser_pads", encoder.output), ("free_pads", torch.zeros_like(encoder.output))):
                if name == "denoiser_pads" or self.guided:
                    self._register(name, model.denoiser.pad_states(model.mix_pads(output, start)))

    def _register(self, name: str, states: PadStates) -> None:
        self._pads[name] = len(states.keys_values)
        for index, (keys, values) in enumerate(states.keys_values):
            self.register_buffer(f"{name}_{index}_keys", keys.transpose(-1, -2).to(self.dtype).contiguous())
            self.register_buffer(f"{name}_{index}_values", values.to(self.dtype).contiguous())

    def finish(self, model: Any) -> None:
        """Complete the ``onnx_ir.Model`` that was traced; nothing to do for graphs of standard operators."""

    @property
    def guided(self) -> bool:
        """Whether a step runs a second, unconditional branch."""
        return isinstance(self.model, ADRec) and self.config.guidance_scale != 1.0

    def embed(self, histories: Tensor, table: Tensor | None = None) -> Tensor:
        """Rows of the item table, `[B, L]` int64 -> `[B, L, D]`."""
        return F.embedding(histories, self.model.table if table is None else table)

    def encode(self, items: Tensor, lengths: Tensor) -> Encoded:
        """Everything that no step changes. items: `[B, L, D]`, rows of the table. lengths: `[B]` int64, 1 to L."""
        model, config = self.model, self.config
        batch, length, width = items.shape
        rows = items
        if model.position_embedding is not None:
            places = (torch.arange(length) + (config.max_length - length)).clamp(min=0)
            rows = rows + F.embedding(places, model.position_embedding.weight)
        rows = model.history_norm(rows.reshape(-1, width))
        own = self._own_mask(lengths, length)
        pads = self._pad_mask(lengths)
        mask = own if pads is None else torch.cat([pads.expand(-1, -1, length, -1), own], -1)
        columns = own[:, :, -1:, :-1]
        step_mask = columns if pads is None else torch.cat([pads, columns], -1)
        if not isinstance(model, ADRec):
            before = rows.reshape(batch, length, width)
            prefixes = self._prefixes(model.encoder, before[:, :-1], self._cut(mask), "encoder_pads")
            return Encoded(before[:, -1], prefixes, step_mask)
        for index, block in enumerate(model.encoder):
            rows = self._block(block, rows, batch, mask, "encoder_pads", index)
        condition = rows.reshape(batch, length, width)
        last = condition[:, -1]
        if isinstance(model.denoiser, MLPDenoiser):
            return Encoded(last, (), None)
        # History positions hold their clean targets, the next items, at step 0.
        targets = items[:, 1:]
        if config.geodesic:
            # In float32: the smallest norm that `unit` divides by, met at padding, is no float16.
            targets = unit(targets.float()).to(self.dtype)
        known = config.lambda_uncertainty * (targets + self.start_time)
        short = self._cut(mask)
        prefixes = self._prefixes(model.denoiser, condition[:, :-1] + known, short, "denoiser_pads")
        if self.guided:
            prefixes += self._prefixes(model.denoiser, known, short, "free_pads")
        return Encoded(last, prefixes, step_mask)

    def denoise(self, encoded: Encoded, x_t: Tensor, time: Tensor) -> Tensor:
        """``x0_hat`` of one step, `[B, D]`. x_t: `[B, D]`. time: the step's embedding, `[D]`."""
        assert isinstance(self.model, ADRec)
        weight, scale = self.config.lambda_uncertainty, self.config.guidance_scale
        known = weight * (x_t + time)
        blocks = len(encoded.prefixes) // (2 if self.guided else 1)
        given = self._denoise(encoded.last + known, encoded.prefixes[:blocks], encoded.mask)
        if not self.guided:
            return given
        free = self._denoise(known, encoded.prefixes[blocks:], encoded.mask)
        return free + scale * (given - free)

    def reverse(self, encoded: Encoded, noise: Tensor, times: Tensor, table: DiffusionTable) -> Tensor:
        """All steps of ``table``, unrolled; `[B, D]`. noise: `[S + 1, B, D]`. times: `[S, D]`, embedded steps."""
        source = ExplicitNoise(noise.to(self.dtype))
        return reverse_process(
            lambda x_t, row: self.denoise(encoded, x_t, times[row]), table, source, geodesic=self.config.geodesic
        )

    def reverse_loop(self, encoded: Encoded, noise: Tensor, times: Tensor, coefficients: Tensor) -> Tensor:
        """All steps as one loop, their number that of the rows of ``coefficients``; `[B, D]`.

        noise: `[S + 1, B, D]`, whose last row is multiplied by zero and must be finite. times: `[S]` int64, trained
        steps. coefficients: `[S, 3]`, columns from_x0, from_xt and sigma.
        """
        assert isinstance(self.model, ADRec)
        embedded = self.model.time_embedding(times)
        steps = coefficients.shape[0]
        columns = coefficients.to(self.dtype)

        def more(draw: Tensor, x_t: Tensor) -> Tensor:
            return draw <= steps

        def step(draw: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
            # Selected by tensors of one element: an index of its own would have to be known when the graph is made.
            row, at = (steps - draw).reshape(1), draw.reshape(1)
            from_x0, from_xt, sigma = columns.index_select(0, row).split(1, -1)
            x0_hat = self.denoise(encoded, x_t, embedded.index_select(0, row))
            x_t = from_x0 * x0_hat + from_xt * x_t + sigma * noise.index_select(0, at)[0].to(self.dtype)
            return draw + 1, unit(x_t) if self.config.geodesic else x_t

        # Copies: what a loop carries must not be a view of what it also reads, nor may what it reads be views of one
        # tensor, as keys and values without padding are.
        prefixes = tuple(Prefix(each.keys.clone(), each.values.clone()) for each in encoded.prefixes)
        encoded = encoded._replace(prefixes=prefixes)
        start = (torch.ones((), dtype=torch.int64), noise[0].to(self.dtype).clone())
        rows: Tensor = torch.while_loop(more, step, start)[1]
        return rows

    def represent_plain(self, encoded: Encoded) -> Tensor:
        """The last token through the encoder, for a model without diffusion; `[B, D]`."""
        return self._transformer_step(list(self.model.encoder), encoded.last, encoded.prefixes, encoded.mask)

    def score(self, rows: Tensor, k: int, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Best k items `[B, k]` int64 and their scores `[B, k]` float32, best first."""
        if table is None:
            scores = F.linear(rows, self.model.table, self.score_bias)
        else:
            bias = torch.where(torch.arange(table.shape[0]) == 0, UNLISTED, 0.0).to(self.dtype)
            scores = F.linear(rows, table, bias)
        best = scores.topk(k, -1)
        return best.indices, best.values.float()

    def _denoise(self, rows: Tensor, prefixes: tuple[Prefix, ...], mask: Tensor | None) -> Tensor:
        denoiser = self.model.denoiser
        if isinstance(denoiser, MLPDenoiser):
            return denoiser(rows)
        return self._transformer_step(list(denoiser), rows, prefixes, mask)  # type: ignore[arg-type]

    def _transformer_step(
        self, blocks: list[Block], rows: Tensor, prefixes: tuple[Prefix, ...], mask: Tensor | None
    ) -> Tensor:
        heads = self.config.heads
        for block, prefix in zip(blocks, prefixes, strict=True):
            query, key, value = (
                part.reshape(-1, heads, 1, self.config.width // heads)
                for part in block.attention.qkv(rows).chunk(3, -1)
            )
            query = query * block.attention.scale
            before = query @ prefix.keys + mask
            own = (query * key).sum(-1, keepdim=True)
            weights = torch.cat([before, own], -1).softmax(-1)
            mixed = weights[..., :-1] @ prefix.values + weights[..., -1:] * value
            rows = block.finish(rows, block.attention.output(mixed.reshape(-1, self.config.width)))
        return rows

    def _prefixes(self, transformer: CausalTransformer, rows: Tensor, mask: Tensor, pads: str) -> tuple[Prefix, ...]:
        batch, _, width = rows.shape
        blocks, found = list(transformer), []
        rows = rows.reshape(-1, width)
        for index, block in enumerate(blocks):
            # The last block's outputs at the prefix are never read: only its keys and values are.
            if index + 1 == len(blocks):
                projected = F.linear(rows, block.attention.qkv.weight[width:], block.attention.qkv.bias[width:])
                key, value = (self._heads(part, batch) for part in projected.chunk(2, -1))
                found.append(self._with_pads(key, value, pads, index))
            else:
                query, key, value = (self._heads(part, batch) for part in block.attention.qkv(rows).chunk(3, -1))
                prefix = self._with_pads(key, value, pads, index)
                found.append(prefix)
                rows = self._attend(block, rows, query, prefix, mask)
        return tuple(found)

    def _block(self, block: Block, rows: Tensor, batch: int, mask: Tensor, pads: str, index: int) -> Tensor:
        query, key, value = (self._heads(part, batch) for part in block.attention.qkv(rows).chunk(3, -1))
        return self._attend(block, rows, query, self._with_pads(key, value, pads, index), mask)

    def _attend(self, block: Block, rows: Tensor, query: Tensor, seen: Prefix, mask: Tensor) -> Tensor:
        weights = ((query * block.attention.scale) @ seen.keys + mask).softmax(-1)
        mixed = (weights @ seen.values).transpose(1, 2).reshape(-1, self.config.width)
        return block.finish(rows, block.attention.output(mixed))

    def _heads(self, rows: Tensor, batch: int) -> Tensor:
        """`[B * L, D]` -> `[B, H, L, d]`."""
        heads = self.config.heads
        return rows.reshape(batch, -1, heads, self.config.width // heads).transpose(1, 2)

    def _with_pads(self, key: Tensor, value: Tensor, pads: str, index: int) -> Prefix:
        keys = key.transpose(-1, -2)
        if pads not in self._pads:
            return Prefix(keys, value)
        pad_keys, pad_values = (self.get_buffer(f"{pads}_{index}_{part}") for part in ("keys", "values"))
        batch = key.shape[0]
        return Prefix(
            torch.cat([pad_keys.expand(batch, -1, -1, -1), keys], -1),
            torch.cat([pad_values.expand(batch, -1, -1, -1), value], -2),
        )

    def _own_mask(self, lengths: Tensor, length: int) -> Tensor:
        """`[B, 1, L, L]`: causal, nothing before a history's first item, and itself always."""
        column = torch.arange(length)
        real = column >= length - lengths[:, None]
        earlier = column <= column[:, None]
        itself = column == column[:, None]
        seen = (real[:, None] & earlier) | itself
        return torch.where(seen, 0.0, MASKED).to(self.dtype)[:, None]

    def _pad_mask(self, lengths: Tensor) -> Tensor | None:
        """`[B, 1, 1, P]`: what the padding of the model weighs; see `SequenceModel.pad_bias`."""
        config = self.config
        if config.padding == "masked":
            return None
        counts = (config.max_length - lengths)[:, None]
        if config.positions == "released":
            bias = torch.where(torch.arange(config.max_length) >= counts, MASKED, 0.0)
        else:
            bias = torch.where(counts > 0, counts.clamp(min=1).float().log(), MASKED)
        return bias.to(self.dtype)[:, None, None]

    def _cut(self, mask: Tensor) -> Tensor:
        """The mask of the prefix: without the last query and the last key."""
        return mask[:, :, :-1, :-1]
