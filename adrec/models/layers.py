"""Transformer layers over packed tokens, with the padding of a history as a few shared key rows.

The released code pads every history on the left and masks padded query rows, not padded keys: real positions attend to
the padding. A padded query attends uniformly to itself and the padding before it, so what padding computes is the same
for every user. It is therefore carried apart, as ``pads`` `[U, P, D]`:

- no positions: all pads of a history are equal, P = 1, and n of them weigh ``log(n)`` in the softmax;
- learned positions: pads differ by position, P = max_length, and a user sees the first n of them.

U is 1 where padding is the same for all users and B where it is not (one diffusion step per sequence in training).
Dropout is not applied to pads: it would stand for the mean over up to max_length independent copies.
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
class Pads:
    """Padding of a batch: its hidden rows `[U, P, D]` and the attention bias `[B, P]` each user gives them."""

    hidden: Tensor
    bias: Tensor

    def replace(self, hidden: Tensor) -> Pads:
        return Pads(hidden, self.bias)


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

    def forward(self, tokens: Tensor, layout: Layout, pads: Pads | None) -> tuple[Tensor, Tensor | None]:
        """Attend within each history; returns the outputs of the tokens `[M, D]` and of the pads `[U, P, D]`."""
        qkv = self.split(tokens)
        pads_qkv = None if pads is None else self.split(pads.hidden)
        mixed = [
            self._attend(group, qkv[group.tokens], pads_qkv, None if pads is None else pads.bias[group.users])
            for group in layout.groups
            if group.length
        ]
        out = self.output(torch.cat(mixed) if mixed else tokens)
        if pads_qkv is None:
            return out, None
        return out, self.output(padding_mean(pads_qkv[:, :, 2]).flatten(2))

    def _attend(self, group: Group, qkv: Tensor, pads_qkv: Tensor | None, bias: Tensor | None) -> Tensor:
        query, key, value = group.unpack(qkv).permute(2, 0, 3, 1, 4).unbind()
        scores = query @ key.transpose(-1, -2) * self.scale
        future = torch.ones(group.length, group.length, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
        if pads_qkv is None or bias is None:
            weights = dropout(scores.softmax(-1), self.dropout, self.training)
            return group.pack((weights @ value).transpose(1, 2).flatten(2))
        own = pads_qkv if pads_qkv.shape[0] == 1 else pads_qkv[group.users]
        pad_key, pad_value = own[:, :, 1].transpose(1, 2), own[:, :, 2].transpose(1, 2)
        pad_scores = query @ pad_key.transpose(-1, -2) * self.scale + bias[:, None, None, :]
        weights = torch.cat([pad_scores, scores], -1).softmax(-1)
        pad_weights, weights = weights.split([pad_scores.shape[-1], group.length], -1)
        weights = dropout(weights, self.dropout, self.training)
        return group.pack((pad_weights @ pad_value + weights @ value).transpose(1, 2).flatten(2))


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

    def forward(self, rows: Tensor, noisy: bool = True) -> Tensor:
        hidden = F.gelu(self.up(rows), approximate="tanh")
        return self.down(dropout(hidden, self.dropout, self.training and noisy))


class Block(nn.Module):
    """Post-norm block: ``x = LN(x + drop(attention(x)))``, then ``x = LN(x + drop(feed_forward(x)))``."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.attention_norm = LayerNorm(width)
        self.feed_forward = FeedForward(width, dropout)
        self.feed_forward_norm = LayerNorm(width)
        self.dropout = dropout

    def forward(self, tokens: Tensor, layout: Layout, pads: Pads | None) -> tuple[Tensor, Pads | None]:
        mixed, pads_mixed = self.attention(tokens, layout, pads)
        tokens = self.finish(tokens, mixed)
        if pads is None or pads_mixed is None:
            return tokens, None
        return tokens, pads.replace(self.finish(pads.hidden, pads_mixed, noisy=False))

    def finish(self, rows: Tensor, mixed: Tensor, noisy: bool = True) -> Tensor:
        """Everything after attention, row by row: residual, norm, feed-forward, residual, norm."""
        active = self.training and noisy
        rows = self.attention_norm(rows + dropout(mixed, self.dropout, active))
        return self.feed_forward_norm(rows + dropout(self.feed_forward(rows, noisy), self.dropout, active))


class CausalTransformer(nn.Module):
    """A stack of causal blocks over packed tokens."""

    def __init__(self, width: int, heads: int, blocks: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(blocks))

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, layout: Layout, pads: Pads | None) -> tuple[Tensor, Pads | None]:
        """`[M, D]` packed tokens and pads through every block."""
        for block in self:
            tokens, pads = block(tokens, layout, pads)
        return tokens, pads


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
