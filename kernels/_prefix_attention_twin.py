"""Prefix attention in pure torch: in rectangles of the longest history, dropout from the counters that kernels use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels import philox
from kernels._prefix_attention_forward import DRAW_LEVELS, QUAD_BITS, TOKEN_QUADS
from kernels.block_weights import pad_weights


def token_users(offsets: Tensor, tokens: int) -> Tensor:
    """Row of the user of each of the M packed tokens, `[M]` int64; offsets: `[B + 1]` int64. Waits for no device."""
    return torch.searchsorted(offsets[1:], torch.arange(tokens, device=offsets.device), right=True)


def attend(
    qkv: Tensor,
    offsets: Tensor,
    pads: Tensor | None,
    max_length: int | None,
    pad_bias: Tensor | None,
    dropout: float,
    seed: int | Tensor,
    users: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output `[M, H, d]`, and the log-sum-exp in base 2 that the kernel keeps, `[H, M]` float32."""
    tokens, lengths = qkv.shape[0], offsets.diff()
    users = token_users(offsets, tokens) if users is None else users
    longest = int(lengths.max()) if lengths.numel() else 0
    slots = users * longest + torch.arange(tokens, device=users.device) - offsets[users]
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    rectangle = wide.new_zeros(lengths.numel() * longest, *qkv.shape[1:]).index_copy(0, slots, wide)
    query, key, value = rectangle.unflatten(0, (lengths.numel(), longest)).permute(2, 0, 3, 1, 4).unbind()
    scale = 1.0 / math.sqrt(qkv.shape[-1])
    future = torch.ones(longest, longest, dtype=torch.bool, device=qkv.device).triu(1)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(future, -torch.inf)
    count = 0
    if pads is not None:
        count = pads.shape[3]
        pad_key, pad_value = pads.to(wide.dtype)
        if pad_bias is None:
            assert max_length is not None
            pad_bias = pad_weights(lengths.clamp(max=max_length), count, max_length)
        pad_scores = query @ pad_key.transpose(-1, -2) * scale + pad_bias.detach().to(wide.dtype)[:, None, None]
        scores = torch.cat([pad_scores, scores], -1)
    weights = scores.softmax(-1)
    if dropout_count(dropout):
        rows = offsets[:-1, None] + torch.arange(longest, device=qkv.device)
        weights = weights * dropout_factors(rows, rows, qkv.shape[2], count, dropout, int(seed)).to(wide.dtype)
    mixed = weights[..., count:] @ value
    if pads is not None:
        mixed = mixed + weights[..., :count] @ pad_value
    output = mixed.transpose(1, 2).flatten(0, 1)[slots].to(qkv.dtype)
    log_sum = scores.detach().logsumexp(-1).transpose(1, 2).flatten(0, 1)[slots]
    return output, (log_sum.T * math.log2(math.e)).float().contiguous()


def dropout_factors(rows: Tensor, keys: Tensor, heads: int, pads: int, dropout: float, seed: int) -> Tensor:
    """What attention weights are multiplied by, 0 or 1 / (1 - p), `[B, H, R, pads + K]` float32.

    rows, keys: packed tokens `[B, R]`, `[B, K]` int64. A counter serves four neighbouring keys with its first 64
    bits, 16 each, from the lowest. Row i and head h draw for pads 4 q to 4 q + 3 from counter ``(i H + h) 2^16 + q``,
    and for packed tokens 4 q to 4 q + 3 from ``(i H + h) 2^16 + 2^15 + floor(i / 4) - q``. A weight is dropped where
    its 16 bits are below ``round(p 2^16)``. Counters fit 63 bits while M H < 2^47.
    """
    base = (rows[:, None] * heads + torch.arange(heads, device=rows.device)[:, None])[..., None] << QUAD_BITS
    place = torch.arange(pads, device=rows.device)
    to_tokens = TOKEN_QUADS + (rows >> 2)[:, None, :, None] - (keys >> 2)[:, None, None, :]
    to_pads = (place >> 2).expand(*to_tokens.shape[:-1], pads)
    counters = base + torch.cat([to_pads, to_tokens], -1)
    lane = torch.cat([(place & 3).expand(len(keys), pads), keys & 3], -1)[:, None, None]
    # Above the diagonal, where nothing is seen, counters could be negative.
    low, high = philox.philox(seed, counters.clamp(min=0))
    draws = (torch.where(lane < 2, low, high) >> (lane % 2 * 16)) & (DRAW_LEVELS - 1)
    dropped = dropout_count(dropout)
    return (draws >= dropped).float() * (DRAW_LEVELS / (DRAW_LEVELS - dropped))


def dropout_count(dropout: float) -> int:
    """How many of the 2^16 values of a draw drop a weight."""
    return round(dropout * DRAW_LEVELS)
