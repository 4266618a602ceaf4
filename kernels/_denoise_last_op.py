"""The operator of `kernels.denoise_last`: block sizes, scratch memory and the launch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels._denoise_last_kernel import denoise_last_kernel
from kernels._runtime import cdiv, kernel_op, launch, next_power_of_2

# Above this, tiles of 16 users are more than today's GPUs have multiprocessors, and 32 share a pass over the weights.
LARGE_BATCH = 2048


class Blocks(NamedTuple):
    """Sizes of one program; see `kernels._denoise_last_kernel.denoise_last_kernel`."""

    rows: int
    keys: int
    outputs: int
    hidden: int
    slice: int
    mix_slice: int
    warps: int
    stages: int


def block_sizes(users: int, width: int, dtype: torch.dtype) -> Blocks:
    """Sizes for tiles ``width`` wide, a power of two: registers do not spill, and loads of weights run ahead."""
    small = width <= 128
    if dtype == torch.float32:
        part = min(32, width)
        keys, hidden = (4, 64) if small else (2, 32)
        return Blocks(16, keys, outputs=32, hidden=hidden, slice=part, mix_slice=part, warps=8, stages=2)
    rows = 32 if small and users > LARGE_BATCH else 16
    outputs, stages = (64, 4) if small else (32, 3)
    return Blocks(rows, 4, outputs, hidden=32, slice=width, mix_slice=min(64, width), warps=8, stages=stages)


def _fake(
    condition: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor,
    out: Tensor,
    out_bias: Tensor,
    attention_norm: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    feed_forward_norm: Tensor,
    keys_values: Tensor,
    pads: Tensor | None,
    offsets: Tensor,
    times: Tensor,
    coefficients: Tensor,
    seed: Tensor | None,
    row_keys: Tensor | None,
    noise: Tensor | None,
    mix_weight: float,
    heads: int,
    max_length: int,
    guidance_scale: float,
    geodesic: bool,
) -> Tensor:
    return condition.new_empty(condition.shape, dtype=torch.float32)


@kernel_op("denoise_last", _fake)
def denoise_last_op(
    condition: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor,
    out: Tensor,
    out_bias: Tensor,
    attention_norm: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    feed_forward_norm: Tensor,
    keys_values: Tensor,
    pads: Tensor | None,
    offsets: Tensor,
    times: Tensor,
    coefficients: Tensor,
    seed: Tensor | None,
    row_keys: Tensor | None,
    noise: Tensor | None,
    mix_weight: float,
    heads: int,
    max_length: int,
    guidance_scale: float,
    geodesic: bool,
) -> Tensor:
    B, D = condition.shape
    width, head_count, head_width = max(16, next_power_of_2(D)), next_power_of_2(heads), next_power_of_2(D // heads)
    size = block_sizes(B, width, qkv.dtype)
    programs = cdiv(B, size.rows)
    result = condition.new_empty((B, D), dtype=torch.float32)
    scratch = condition.new_empty((programs, size.rows, 3 * head_count * head_width + width), dtype=torch.float32)
    operand_scratch = condition.new_empty((programs, 2, size.rows, width), dtype=qkv.dtype)
    padding = 0 if pads is None else pads.shape[3]
    # Where an input is absent its pointer is another one's, never read.
    launch(
        denoise_last_kernel,
        (programs,),
        result,
        condition,
        qkv,
        qkv_bias,
        out,
        out_bias,
        attention_norm,
        up,
        up_bias,
        down,
        down_bias,
        feed_forward_norm,
        keys_values,
        keys_values if pads is None else pads,
        offsets,
        times,
        coefficients,
        offsets if seed is None else seed,
        offsets if row_keys is None else row_keys,
        condition if noise is None else noise,
        scratch,
        operand_scratch,
        B,
        keys_values.shape[3],
        times.shape[0],
        qkv.shape[0],
        padding,
        max_length,
        mix_weight,
        1.0 / math.sqrt(D // heads),
        guidance_scale,
        D=D,
        HEADS=heads,
        WIDTH=width,
        HEAD_COUNT=head_count,
        HEAD_WIDTH=head_width,
        ROWS=size.rows,
        KEYS=size.keys,
        OUTPUTS=size.outputs,
        HIDDEN=size.hidden,
        SLICE=size.slice,
        MIX_SLICE=size.mix_slice,
        PADS=min(padding, 2),
        KEYED=row_keys is not None,
        NOISE=noise is not None,
        GUIDED=guidance_scale != 1.0,
        GEODESIC=geodesic,
        num_warps=size.warps,
        num_stages=size.stages,
        # Left to itself, ptxas spills some registers to fit a second program on a multiprocessor.
        maxnreg=255,
    )
    return result
