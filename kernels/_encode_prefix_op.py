"""The operator of `kernels.encode_prefix`: block sizes, scratch memory and the launch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels._encode_prefix_kernel import encode_prefix_kernel
from kernels._runtime import cdiv, kernel_op, launch, next_power_of_2


class Blocks(NamedTuple):
    """Sizes of one program: token rows of a chunk, columns of an operand and hidden units at a time, warps, stages.

    maxnreg: most registers of a thread, where ptxas would spill some to fit a second program; None: it decides.
    """

    tile: int
    slice: int
    hidden: int
    out_slice: int
    warps: int
    stages: int
    maxnreg: int | None = None

    @property
    def span(self) -> int:
        """Tokens a program's users may start in: so much less than a chunk that most programs need only one."""
        return self.tile * 3 // 4


def block_sizes(width: int, head_width: int, dtype: torch.dtype, tokens: int) -> Blocks:
    """Sizes for rows and heads that fit ``width`` and ``head_width``, powers of two: none of them spills.

    The larger the chunk, the fewer times weights are read from the second-level cache; few tokens take a small one.
    """
    if dtype == torch.float32:
        return Blocks(tile=16, slice=min(32, width), hidden=32, out_slice=min(32, width), warps=8, stages=1)
    if width <= 128 and head_width <= 32 and tokens > 32:
        return Blocks(tile=64, slice=width, hidden=32, out_slice=min(32, width), warps=8, stages=2)
    slice = width if width <= 128 else 64
    out_slice, registers = min(32 if width <= 64 else 64, width), 255 if width <= 32 else None
    return Blocks(32 if tokens > 16 else 16, slice, 64, out_slice, warps=8, stages=2, maxnreg=registers)


def _fake(
    items: Tensor,
    offsets: Tensor,
    table: Tensor,
    positions: Tensor | None,
    history_norm: Tensor,
    encoder: list[Tensor],
    encoder_pads: Tensor | None,
    denoiser: list[Tensor],
    denoiser_pads: Tensor | None,
    start_time: Tensor | None,
    history_norm_epsilon: float,
    heads: int,
    max_length: int,
    branches: int,
    mix_weight: float,
    geodesic: bool,
) -> tuple[Tensor, Tensor]:
    tokens, D = items.shape[0], table.shape[1]
    blocks = denoiser[0].shape[0] if denoiser else 0
    return (
        table.new_empty((offsets.shape[0] - 1, D), dtype=torch.float32),
        table.new_empty((branches, blocks, 2, tokens, D)),
    )


@kernel_op("encode_prefix", _fake)
def encode_prefix_op(
    items: Tensor,
    offsets: Tensor,
    table: Tensor,
    positions: Tensor | None,
    history_norm: Tensor,
    encoder: list[Tensor],
    encoder_pads: Tensor | None,
    denoiser: list[Tensor],
    denoiser_pads: Tensor | None,
    start_time: Tensor | None,
    history_norm_epsilon: float,
    heads: int,
    max_length: int,
    branches: int,
    mix_weight: float,
    geodesic: bool,
) -> tuple[Tensor, Tensor]:
    tokens, D, encoder_blocks = items.shape[0], table.shape[1], encoder[0].shape[0]
    width, head_width = max(16, next_power_of_2(D)), max(16, next_power_of_2(D // heads))
    size = block_sizes(width, head_width, table.dtype, tokens)
    programs = cdiv(tokens, size.span)
    last, keys_values = _fake(
        items, offsets, table, positions, history_norm, encoder, encoder_pads, denoiser, denoiser_pads, start_time,
        history_norm_epsilon, heads, max_length, branches, mix_weight, geodesic,
    )  # fmt: skip
    cache = table.new_empty((encoder_blocks, 2, tokens, D))
    scratch = table.new_empty((programs, 3, size.tile, width))
    residual = table.new_empty((programs, 2, size.tile, width), dtype=torch.float32)
    padding = 0 if encoder_pads is None else encoder_pads.shape[2]
    # Where an input is absent its pointer is another one's, never read.
    launch(
        encode_prefix_kernel,
        (programs,),
        items,
        offsets,
        table,
        table if positions is None else positions,
        history_norm,
        *encoder,
        *(denoiser or encoder),
        table if encoder_pads is None else encoder_pads,
        table if denoiser_pads is None else denoiser_pads,
        history_norm if start_time is None else start_time,
        cache,
        keys_values if denoiser else cache,
        last,
        scratch,
        residual,
        offsets.shape[0] - 1,
        tokens * D,
        size.span,
        encoder_blocks,
        denoiser[0].shape[0] if denoiser else 1,
        branches,
        padding,
        max_length,
        heads,
        D,
        history_norm_epsilon,
        1.0 / math.sqrt(D // heads),
        mix_weight,
        D=D,
        HEAD=D // heads,
        WIDTH=width,
        HEAD_WIDTH=head_width,
        TILE=size.tile,
        SLICE=size.slice,
        HIDDEN=size.hidden,
        OUT_SLICE=size.out_slice,
        POSITIONS=positions is not None,
        PADS=min(padding, 2),
        DENOISER=bool(denoiser),
        GEODESIC=geodesic,
        num_warps=size.warps,
        num_stages=size.stages,
        **({} if size.maxnreg is None else {"maxnreg": size.maxnreg}),
    )
    return last, keys_values
