"""Transformer layers over packed tokens, with the padding of a history as a few shared key rows.

The released code pads every history on the left and masks padded query rows, not padded keys: real positions attend to
the padding. A padded query attends uniformly to itself and the padding before it, never to a real item, so padding goes
through a transformer by itself, as rows `[U, P, D]`, and real tokens see only its keys and values (`PadStates`):

- without positions all pads of a history are equal: P = 1, and n of them weigh ``log(n)`` in the softmax;
- where padding carries positions, pads differ: P = max_length, and a user sees the first n of them.

U is 1 where padding is the same for all users and B where it is not (one diffusion step per sequence in training).
What n pads weigh is a bias `[B, P]` on their attention scores.

Attention works in rectangles of similar lengths; on a GPU one kernel takes the packed tokens as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adrec.models.dropout import dropout
from adrec.models.layout import Group, Layout

NORM_EPSILON = 1e-12


@dataclass(frozen=True)
class PadStates:
    """Padding after a transformer: keys and values `[2, U, H, P, d]` of each block, and the output `[U, P, D]`."""

    keys_values: list[Tensor]
    output: Tensor


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with epsilon inside the root: 1e-12 in the transformer, 1e-5 in the MLP denoiser."""

    def __init__(self, width: int, epsilon: float = NORM_EPSILON) -> None:
        super().__init__(width, eps=epsilon)


class Attention(nn.Module):
    """Causal multi-head attention. One projection holds queries, keys and values: weight `[3 D, D]`."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.output.in_features // self.heads)

    def split(self, rows: Tensor) -> Tensor:
        """Project `[..., D]` to queries, keys and values `[..., 3, H, D / H]`."""
        return self.qkv(rows).unflatten(-1, (3, self.heads, -1))

    def forward(self, tokens: Tensor, layout: Layout, pads: Tensor | None, bias: Tensor | None) -> Tensor:
        """Attend within each history. `[M, D]` -> `[M, D]`.

        pads: keys and values of the padding `[2, U, H, P, d]`. bias: `[B, P]`, added to the scores of the padding.
        """
        qkv = self.split(tokens)
        if runs_fused(qkv):
            return self.output(self._attend_fused(layout, qkv, pads, bias).flatten(1))
        mixed = [self._attend(group, qkv[group.tokens], pads, bias) for group in layout.groups if group.length]
        return self.output(torch.cat(mixed) if mixed else tokens)

    def _attend_fused(self, layout: Layout, qkv: Tensor, pads: Tensor | None, bias: Tensor | None) -> Tensor:
        # Triton, which this brings in, is imported where it is used.
        from kernels.prefix_attention import prefix_attention

        active = self.training and self.dropout > 0.0
        return prefix_attention(
            qkv,
            layout.offsets,
            pads=None if bias is None else pads,
            pad_bias=bias,
            dropout=self.dropout if active else 0.0,
            # Drawn on the device, so that the host need not wait, by the generator that training seeds at every step.
            seed=torch.randint(2**63 - 1, (1,), device=qkv.device) if active else 0,
            users=layout.users,
        )

    def _attend(self, group: Group, qkv: Tensor, pads: Tensor | None, bias: Tensor | None) -> Tensor:
        query, key, value = group.unpack(qkv).permute(2, 0, 3, 1, 4).unbind()
        scores = query @ key.transpose(-1, -2) * self.scale
        if group.length > 1:
            future = torch.ones(group.length, group.length, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        if pads is None or bias is None:
            weights = dropout(scores.softmax(-1), self.dropout, self.training)
            return group.pack((weights @ value).transpose(1, 2).flatten(2))
        pad_key, pad_value = pads if pads.shape[1] == 1 else pads[:, group.users]
        pad_scores = query @ pad_key.transpose(-1, -2) * self.scale + bias[group.users, None, None]
        weights = dropout(torch.cat([pad_scores, scores], -1).softmax(-1), self.dropout, self.training)
        pad_weights, weights = weights.split([pad_scores.shape[-1], group.length], -1)
        return group.pack((pad_weights @ pad_value + weights @ value).transpose(1, 2).flatten(2))


def runs_fused(qkv: Tensor) -> bool:
    """Whether attention over `[M, 3, H, d]` is one kernel: on a GPU, where the kernel takes its dtype and head width.

    On a CPU attention stays as it is, down to the last bit.
    """
    if qkv.device.type != "cuda":
        return False
    from kernels.prefix_attention import supports

    return supports(qkv)


def padding_mean(values: Tensor) -> Tensor:
    """What pad p attends to: the mean of pads 0..p (uniform attention). `[U, P, H, d]` -> the same shape."""
    if values.shape[1] == 1:
        return values
    counts = torch.arange(1, values.shape[1] + 1, device=values.device, dtype=values.dtype)
    return values.cumsum(1) / counts[:, None, None]


class FeedForward(nn.Module):
    """``D -> 4D -> D`` with tanh-GELU and dropout after it."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, rows: Tensor) -> Tensor:
        return self.down(dropout(F.gelu(self.up(rows), approximate="tanh"), self.dropout, self.training))


class Block(nn.Module):
    """Post-norm block: ``x = LN(x + drop(attention(x)))``, then ``x = LN(x + drop(feed_forward(x)))``."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.attention_norm = LayerNorm(width)
        self.feed_forward = FeedForward(width, dropout)
        self.feed_forward_norm = LayerNorm(width)
        self.dropout = dropout

    def forward(self, tokens: Tensor, layout: Layout, pads: Tensor | None, bias: Tensor | None) -> Tensor:
        return self.finish(tokens, self.attention(tokens, layout, pads, bias))

    def finish(self, rows: Tensor, mixed: Tensor) -> Tensor:
        """Everything after attention, row by row: residual, norm, feed-forward, residual, norm."""
        rows = self.attention_norm(rows + dropout(mixed, self.dropout, self.training))
        return self.feed_forward_norm(rows + dropout(self.feed_forward(rows), self.dropout, self.training))


class CausalTransformer(nn.Module):
    """A stack of causal blocks over packed tokens."""

    def __init__(self, width: int, heads: int, blocks: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(blocks))

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, layout: Layout, pads: PadStates | None, bias: Tensor | None) -> Tensor:
        """Packed tokens `[M, D]` through every block; see `Attention.forward` for bias."""
        for index, block in enumerate(self):
            tokens = block(tokens, layout, None if pads is None else pads.keys_values[index], bias)
        return tokens

    def pad_states(self, rows: Tensor) -> PadStates:
        """Padding rows `[U, P, D]` through every block. In training all users of a batch share one dropout mask."""
        keys_values = []
        for block in self:
            _, key, value = block.attention.split(rows).unbind(2)
            keys_values.append(torch.stack([key, value]).transpose(2, 3))
            rows = block.finish(rows, block.attention.output(padding_mean(value).flatten(2)))
        return PadStates(keys_values, rows)


class TimeEmbedding(nn.Module):
    """``W2 SiLU(W1 [cos(t f), sin(t f)])`` of the step t scaled by 1000 / T, f = 10000^(-k / (D / 2))."""

    def __init__(self, width: int, timesteps: int) -> None:
        super().__init__()
        self.width, self.timesteps = width, timesteps
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, steps: Tensor) -> Tensor:
        """steps: int64 of any shape `[...]`, 0 <= t < T. Returns `[..., D]`."""
        half = self.width // 2
        exponent = torch.arange(half, dtype=torch.float32, device=steps.device) / half
        angle = steps[..., None].float() * (1000.0 / self.timesteps) * torch.exp(-math.log(10000.0) * exponent)
        features = torch.cat([angle.cos(), angle.sin()], -1).to(self.up.weight.dtype)
        return self.down(F.silu(self.up(features)))
