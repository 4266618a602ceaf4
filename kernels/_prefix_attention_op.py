"""Prefix attention as operators of torch: block sizes, launches, and the link from forward to backward."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels._prefix_attention_backward import prefix_attention_backward_kernel, prefix_attention_pads_kernel
from kernels._prefix_attention_forward import DRAW_LEVELS, NO_PADS, PADS_BY_ROW, SHARED_PADS, prefix_attention_kernel
from kernels._runtime import cdiv, kernel_op, launch, next_power_of_2

WIDEST = 128
# Rows over which one program sums the gradient of padding, where all users share several pads.
_STRETCH = 256


class _Blocks(NamedTuple):
    """rows: tokens of a tile, as queries and as keys. chunk: columns of a product at a time, backward (`products`).

    maxnreg: left to itself, ptxas spills a few registers to fit one more block.
    """

    rows: int
    chunk: int
    num_warps: int
    maxnreg: int


def _forward_blocks(width: int, dtype: torch.dtype) -> _Blocks:
    # Tensor cores want 16 rows at least; a tile of 32 packed tokens holds four users of the mean length.
    rows = 16 if dtype == torch.float32 else 32
    return _Blocks(rows, width, num_warps=4, maxnreg=255 if rows == 32 and width == WIDEST else 168)


def _backward_blocks(width: int, dtype: torch.dtype) -> _Blocks:
    if dtype == torch.float32:
        return _Blocks(16, 32, num_warps=4, maxnreg=168)
    rows = 16 if width == WIDEST else 32
    return _Blocks(rows, width, num_warps=4, maxnreg=168 if rows == 16 else 255)


def _constants(
    qkv: Tensor, offsets: Tensor, pads: Tensor | None, pad_bias: Tensor | None, max_length: int, dropped: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Numbers and constexpr parameters that forward and backward kernels share, in their order."""
    tokens, _, heads, head = qkv.shape
    mode = NO_PADS if pads is None else SHARED_PADS if pads.shape[1] == 1 < pads.shape[3] else PADS_BY_ROW
    pad_half = 0 if pads is None else pads.numel() // 2
    numbers = (
        tokens, heads, pad_half, max_length, 1.0 / math.sqrt(head), dropped, DRAW_LEVELS / (DRAW_LEVELS - dropped)
    )  # fmt: skip
    return numbers, {
        "HEAD": head,
        "WIDTH": max(16, next_power_of_2(head)),
        "PADS": 0 if pads is None else pads.shape[3],
        "PAD_MODE": mode,
        "OWN": int(pads is not None and pads.shape[1] > 1),
        "BIASED": pad_bias is not None,
        "DROPOUT": dropped > 0,
    }


def _forward_fake(
    qkv: Tensor,
    offsets: Tensor,
    users: Tensor,
    pads: Tensor | None,
    pad_bias: Tensor | None,
    max_length: int,
    dropped: int,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tokens, _, heads, head = qkv.shape
    return qkv.new_empty(tokens, heads, head), qkv.new_empty(heads, tokens, dtype=torch.float32)


def _forward(
    qkv: Tensor,
    offsets: Tensor,
    users: Tensor,
    pads: Tensor | None,
    pad_bias: Tensor | None,
    max_length: int,
    dropped: int,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    output, log_sum = _forward_fake(qkv, offsets, users, pads, pad_bias, max_length, dropped, seed)
    numbers, constants = _constants(qkv, offsets, pads, pad_bias, max_length, dropped)
    blocks = _forward_blocks(constants["WIDTH"], qkv.dtype)
    launch(
        prefix_attention_kernel,
        (cdiv(qkv.shape[0], blocks.rows), qkv.shape[2]),
        qkv, offsets, users, pads, pad_bias, seed, output, log_sum, *numbers,
        **constants, ROWS=blocks.rows, num_warps=blocks.num_warps, num_stages=2, maxnreg=blocks.maxnreg,
    )  # fmt: skip
    return output, log_sum


attention = kernel_op("prefix_attention", _forward_fake)(_forward)


def _backward_fake(
    gradient: Tensor,
    qkv: Tensor,
    offsets: Tensor,
    users: Tensor,
    pads: Tensor | None,
    pad_bias: Tensor | None,
    output: Tensor,
    log_sum: Tensor,
    max_length: int,
    dropped: int,
    seed: Tensor | None,
    pads_gradient: bool,
) -> tuple[Tensor, Tensor]:
    wanted = pads is not None and pads_gradient
    return torch.empty_like(qkv), qkv.new_empty(pads.shape if pads is not None and wanted else 0)


def _backward(
    gradient: Tensor,
    qkv: Tensor,
    offsets: Tensor,
    users: Tensor,
    pads: Tensor | None,
    pad_bias: Tensor | None,
    output: Tensor,
    log_sum: Tensor,
    max_length: int,
    dropped: int,
    seed: Tensor | None,
    pads_gradient: bool,
) -> tuple[Tensor, Tensor]:
    numbers, constants = _constants(qkv, offsets, pads, pad_bias, max_length, dropped)
    blocks = _backward_blocks(constants["WIDTH"], qkv.dtype)
    tiles, heads = cdiv(qkv.shape[0], blocks.rows), qkv.shape[2]
    options = {"ROWS": blocks.rows, "CHUNK": blocks.chunk}
    options |= {"num_warps": blocks.num_warps, "num_stages": 2, "maxnreg": blocks.maxnreg}
    qkv_gradient = torch.empty_like(qkv)
    partial = None
    in_passing = False
    if pads is not None and pads_gradient:
        _, owners, _, count, head = pads.shape
        in_passing = owners == count == 1
        parts = owners if owners > 1 else tiles if in_passing else cdiv(qkv.shape[0], _STRETCH)
        partial = torch.empty(2, parts, heads, count, head, dtype=torch.float32, device=qkv.device)
        if not in_passing:
            launch(
                prefix_attention_pads_kernel,
                (parts, heads, cdiv(count, blocks.rows)),
                qkv, offsets, users, pads, pad_bias, seed, output, log_sum, gradient, partial, *numbers, _STRETCH,
                **{name: value for name, value in constants.items() if name != "PAD_MODE"}, **options,
            )  # fmt: skip
    launch(
        prefix_attention_backward_kernel,
        (tiles, heads, 2),
        qkv, offsets, users, pads, pad_bias, seed, output, log_sum, gradient, qkv_gradient, partial, *numbers,
        **constants, PARTIAL=in_passing, **options,
    )  # fmt: skip
    if partial is None:
        return qkv_gradient, qkv.new_empty(0)
    if pads is not None and pads.shape[1] == 1:
        partial = partial.sum(1, keepdim=True)
    return qkv_gradient, partial.to(qkv.dtype)


attention_gradients = kernel_op("prefix_attention_gradients", _backward_fake)(_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, offsets, users, pads, pad_bias, ctx.max_length, ctx.dropped, seed = inputs
    ctx.save_for_backward(qkv, offsets, users, pads, pad_bias, seed, *output)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, offsets, users, pads, pad_bias, seed, output, log_sum = ctx.saved_tensors
    wanted = ctx.needs_input_grad[3]
    qkv_gradient, pads_gradient = attention_gradients(
        gradient.contiguous(), qkv, offsets, users, pads, pad_bias, output, log_sum, ctx.max_length, ctx.dropped, seed,
        wanted,
    )  # fmt: skip
    return qkv_gradient, None, None, pads_gradient if wanted else None, None, None, None, None


attention.op.register_autograd(_differentiate, setup_context=_setup_context)
