"""Weights of a stack of post-norm transformer blocks as kernels read them, and the block in pure torch.

Block (arXiv 2505.19544): ``x = LN(x + attention(x))``, ``x = LN(x + down(gelu_tanh(up(x))))``, LN with the biased
variance and epsilon 1e-12 inside the root.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPSILON = 1e-12


class BlockWeights(NamedTuple):
    """``n`` blocks stacked along the first dimension; matrices `[out, in]` as in `torch.nn.Linear`, contiguous.

    qkv: `[n, 3 D, D]`, rows are queries, keys, values, each head by head. qkv_bias: `[n, 3 D]`. out: `[n, D, D]`.
    out_bias: `[n, D]`. attention_norm: `[n, 2, D]`, gain and shift. up: `[n, 4 D, D]`. up_bias: `[n, 4 D]`.
    down: `[n, D, 4 D]`. down_bias: `[n, D]`. feed_forward_norm: `[n, 2, D]`, gain and shift.
    Matrices are in the storage dtype (float32, bfloat16, float16); biases and norms are always float32.
    """

    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    out_bias: Tensor
    attention_norm: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    feed_forward_norm: Tensor

    @property
    def blocks(self) -> int:
        return self.qkv.shape[0]

    @property
    def width(self) -> int:
        return self.qkv.shape[2]

    def to(self, dtype: torch.dtype) -> BlockWeights:
        """Matrices in another storage dtype."""
        matrices = ("qkv", "out", "up", "down")
        return self._replace(**{name: getattr(self, name).to(dtype) for name in matrices})


def split_qkv(weights: BlockWeights, index: int, rows: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of block ``index``, each `[..., H, D / H]`."""
    projected = F.linear(rows, weights.qkv[index].to(rows.dtype), weights.qkv_bias[index].to(rows.dtype))
    query, key, value = projected.unflatten(-1, (3, heads, -1)).unbind(-3)
    return query, key, value


def finish_block(weights: BlockWeights, index: int, rows: Tensor, mixed: Tensor) -> Tensor:
    """Everything after attention: output projection of ``mixed`` `[..., D]`, residual, norm, feed-forward, norm."""

    def linear(name: str, values: Tensor) -> Tensor:
        matrix, bias = getattr(weights, name)[index], getattr(weights, f"{name}_bias")[index]
        return F.linear(values, matrix.to(values.dtype), bias.to(values.dtype))

    def norm(name: str, values: Tensor) -> Tensor:
        gain, shift = getattr(weights, name)[index].to(values.dtype)
        return F.layer_norm(values, gain.shape, gain, shift, NORM_EPSILON)

    rows = norm("attention_norm", rows + linear("out", mixed))
    hidden = F.gelu(linear("up", rows), approximate="tanh")
    return norm("feed_forward_norm", rows + linear("down", hidden))


def pad_weights(lengths: Tensor, pads: int, max_length: int) -> Tensor:
    """What padding adds to its attention scores, `[B, pads]` float32, for histories of ``lengths`` `[B]`.

    A history of length l has ``n = max_length - l`` pads. One pad row stands for all of them and weighs ``log n``; as
    many rows as positions (``pads == max_length``) are seen up to the n-th. -inf: not seen.
    """
    count = (max_length - lengths)[:, None]
    if pads == 1:
        return count.float().log()
    place = torch.arange(pads, device=lengths.device)
    return torch.zeros(count.shape[0], pads, device=lengths.device).masked_fill(place >= count, -torch.inf)
