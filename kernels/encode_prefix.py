"""From item ids to what the reverse steps read: conditions, and the denoiser's keys and values of every history.

One launch does what a request needs before its first reverse step (ADRec, KDD 2025, arXiv 2505.19544): embedding,
layer norm, the causal encoder, the denoiser's input at the clean history, and the denoiser up to the keys and values of
its last block. `kernels.denoise_last` takes it from there. Without a denoiser it is SASRec's forward pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._encode_prefix_op import encode_prefix_op
from kernels._reverse_steps import (
    DTYPES,
    NARROWEST,
    NARROWEST_HEAD,
    WIDEST,
    WIDEST_HEAD,
    check_contiguous,
    check_tensors,
)
from kernels._runtime import require, require_offsets, runs_triton
from kernels._scalars import require_integers, require_numbers
from kernels.block_weights import BlockWeights, finish_block, pad_weights, split_qkv
from kernels.inventory import Cost, Entry, Shape


def encode_prefix(
    items: Tensor,
    offsets: Tensor,
    table: Tensor,
    positions: Tensor | None,
    history_norm: Tensor,
    history_norm_epsilon: float,
    encoder: BlockWeights,
    encoder_pads: Tensor | None,
    *,
    heads: int,
    max_length: int,
    denoiser: BlockWeights | None = None,
    denoiser_pads: Tensor | None = None,
    start_time: Tensor | None = None,
    mix_weight: float = 0.0,
    geodesic: bool = False,
    unconditional: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Encode B histories; returns (last, keys_values).

    last: `[B, D]` float32, the encoder's output c at each user's last token. keys_values: `[branches, n, 2, M, D]` in
    storage dtype, of every denoiser block; None without a denoiser. The denoiser's input at token j is
    ``c_j + mix_weight (clean(E[item_(j+1)]) + start_time)``, where clean projects to the unit sphere if ``geodesic``.
    Rows of a user's last token are zero, rows that belong to no user are undefined. unconditional: a second branch, in
    which c is 0, for classifier-free guidance.

    items: `[M]` int64, packed histories, each item in ``[0, N]``. offsets: `[B + 1]` int64, from 0, rising; user b has
    tokens ``offsets[b]`` to ``offsets[b + 1] - 1``, 1 to ``max_length`` of them; M may be larger than the last offset.
    table: `[N + 1, D]` in storage dtype: float32 (multiplied exactly), float16 or bfloat16 (float32 accumulation).
    positions: `[max_length, D]` in storage dtype, added from the end: the last token has the last row.
    history_norm: `[2, D]` float32, gain and shift. encoder, denoiser: blocks in storage dtype.
    encoder_pads: `[n, 2, P, D]` in storage dtype, keys and values of the padding: P = 1 stands for all
    ``max_length - length`` pads of a user, of P = max_length rows the first are seen; None: padding is not seen.
    denoiser_pads: `[branches, n, 2, P, D]` likewise. start_time: `[D]` float32, the time embedding of step 0.

    D is 8 to 256, D / heads 8 to 128. A program takes the users that start in a stretch of the packed tokens, so long
    and short histories may stand in any order; one longer than a chunk (16 to 64 tokens) is one program's work.
    A history may have any number of tokens L with ``L D`` below 2^31; tested to 200. Items and offsets are not checked
    on a GPU, which would wait for it: others than these read and write elsewhere. On a CPU offsets are.
    Scratch memory, with n encoder blocks and s bytes of the storage dtype: ``2 n M D s`` bytes, and for each program
    ``R D' (3 s + 8)``, D' being D rounded up to a power of two. A program has R = 16 rows in float32, otherwise 64, 32
    or 16, and there are ``M / (3 R / 4)`` programs, rounded up.
    All tensors must be contiguous. Results of a user depend on no other user, up to rounding. Inference only: no
    gradients. Raises UnsupportedError. Without Triton, or on a CPU, this is `encode_prefix_twin`.
    """
    require_integers(heads=heads, max_length=max_length)
    require_numbers(history_norm_epsilon=history_norm_epsilon, mix_weight=mix_weight)
    branches = 0 if denoiser is None else 1 + unconditional
    _check(
        items, offsets, table, positions, history_norm, encoder, encoder_pads, denoiser, denoiser_pads, start_time,
        heads, max_length, branches, unconditional,
    )  # fmt: skip
    optional = [tensor for tensor in (positions, encoder_pads, denoiser_pads, start_time) if tensor is not None]
    if not runs_triton(items, offsets, table, history_norm, *encoder, *(denoiser or ()), *optional):
        return encode_prefix_twin(
            items,
            offsets,
            table,
            positions,
            history_norm,
            history_norm_epsilon,
            encoder,
            encoder_pads,
            heads=heads,
            max_length=max_length,
            denoiser=denoiser,
            denoiser_pads=denoiser_pads,
            start_time=start_time,
            mix_weight=mix_weight,
            geodesic=geodesic,
            unconditional=unconditional,
        )
    last, keys_values = encode_prefix_op(
        items,
        offsets,
        table,
        positions,
        history_norm,
        list(encoder),
        encoder_pads,
        list(denoiser or ()),
        denoiser_pads,
        start_time,
        float(history_norm_epsilon),
        heads,
        max_length,
        branches,
        float(mix_weight),
        geodesic,
    )
    return last, None if denoiser is None else keys_values


@torch.no_grad()
def encode_prefix_twin(
    items: Tensor,
    offsets: Tensor,
    table: Tensor,
    positions: Tensor | None,
    history_norm: Tensor,
    history_norm_epsilon: float,
    encoder: BlockWeights,
    encoder_pads: Tensor | None,
    *,
    heads: int,
    max_length: int,
    denoiser: BlockWeights | None = None,
    denoiser_pads: Tensor | None = None,
    start_time: Tensor | None = None,
    mix_weight: float = 0.0,
    geodesic: bool = False,
    unconditional: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`encode_prefix` in pure torch, in float32; with a float64 table, computed and returned in float64."""
    dtype, D = torch.promote_types(table.dtype, torch.float32), table.shape[1]
    lengths = offsets.diff()
    B, longest = lengths.numel(), int(lengths.max()) if lengths.numel() else 0
    # Users side by side, `[B, longest]`: what stands behind the end of a history sees it but is not seen.
    place = torch.arange(longest, device=items.device)
    tokens = torch.where(place < lengths[:, None], offsets[:-1, None] + place, 0)
    before = place < lengths[:, None] - 1

    def pads_of(pads: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if pads is None:
            return None
        counted = lengths.clamp(max=max_length)
        return pads.to(dtype), pad_weights(counted, pads.shape[2], max_length).to(dtype)

    rows = table[items[tokens]].to(dtype)
    if positions is not None:
        rows = rows + positions.to(dtype)[(max_length - lengths[:, None] + place).clamp(0, max_length - 1)]
    gain, shift = history_norm.to(dtype)
    rows = F.layer_norm(rows, (D,), gain, shift, history_norm_epsilon)
    padding = pads_of(encoder_pads)
    for block in range(encoder.blocks):
        rows, _, _ = _block(encoder, block, rows, padding, heads)
    last = rows[torch.arange(B, device=items.device), lengths - 1] if B else rows.new_empty(0, D)
    if denoiser is None:
        return last, None
    clean = table[items[tokens.roll(-1, 1)]].to(dtype)
    clean = F.normalize(clean, dim=-1) if geodesic else clean
    assert start_time is not None
    mixed = mix_weight * (clean + start_time.to(dtype))
    branches = 1 + unconditional
    keys_values = table.new_zeros(branches, denoiser.blocks, 2, items.numel(), D)
    for branch in range(branches):
        states = mixed + rows if branch == 0 else mixed
        padding = pads_of(None if denoiser_pads is None else denoiser_pads[branch])
        for block in range(denoiser.blocks):
            states, key, value = _block(denoiser, block, states, padding, heads)
            keys_values[branch, block, 0, tokens[before]] = key[before].to(table.dtype)
            keys_values[branch, block, 1, tokens[before]] = value[before].to(table.dtype)
    return last, keys_values


def _block(
    weights: BlockWeights, index: int, rows: Tensor, pads: tuple[Tensor, Tensor] | None, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One block over `[B, L, D]`: its output, keys and values. pads: all blocks' keys and values, weights `[B, P]`."""
    query, key, value = split_qkv(weights, index, rows, heads)
    scale = 1.0 / math.sqrt(query.shape[-1])
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=rows.device).triu(1)
    scores = scores.masked_fill(future, -torch.inf)
    if pads is None:
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
    else:
        pad_key, pad_value = pads[0][index].unflatten(-1, (heads, -1))
        count = pad_key.shape[0]
        pad_scores = torch.einsum("bqhd,phd->bhqp", query, pad_key) * scale + pads[1][:, None, None]
        seen = torch.cat([pad_scores, scores], -1).softmax(-1)
        mixed = torch.einsum("bhqp,phd->bqhd", seen[..., :count], pad_value)
        mixed = mixed + torch.einsum("bhqk,bkhd->bqhd", seen[..., count:], value)
    return finish_block(weights, index, rows, mixed.flatten(2)), key.flatten(2), value.flatten(2)


def _check(
    items: Tensor,
    offsets: Tensor,
    table: Tensor,
    positions: Tensor | None,
    history_norm: Tensor,
    encoder: BlockWeights,
    encoder_pads: Tensor | None,
    denoiser: BlockWeights | None,
    denoiser_pads: Tensor | None,
    start_time: Tensor | None,
    heads: int,
    max_length: int,
    branches: int,
    unconditional: bool,
) -> None:
    require(table.dim() == 2, f"table has shape {list(table.shape)}; expected [N + 1, D]")
    require(table.dtype in DTYPES, f"table is {table.dtype}; allowed: float32, float16, bfloat16")
    D, stored, single = table.shape[1], (table.dtype,), (torch.float32,)
    require(NARROWEST <= D <= WIDEST, f"width is {D}; allowed: {NARROWEST} to {WIDEST}; use engine 'cached' otherwise")
    require(heads >= 1 and D % heads == 0, f"heads is {heads}; allowed: divisors of the width {D}")
    require(
        NARROWEST_HEAD <= D // heads <= WIDEST_HEAD,
        f"heads are {D // heads} wide ({D} / {heads}); allowed: {NARROWEST_HEAD} to {WIDEST_HEAD}; change heads",
    )
    require(max_length >= 1, f"max_length is {max_length}; allowed: 1 or more")
    require(items.dim() == 1, f"items has shape {list(items.shape)}; expected [M], packed")
    require(offsets.dim() == 1 and offsets.numel() >= 1, f"offsets has shape {list(offsets.shape)}; expected [B + 1]")
    require(denoiser is not None or not unconditional, "unconditional is True; allowed: only with a denoiser")
    require(
        denoiser is None or start_time is not None, "start_time is None; a denoiser needs the time embedding of step 0"
    )
    require(
        denoiser is None or (encoder_pads is None) == (denoiser_pads is None),
        "only one of encoder_pads and denoiser_pads is given; allowed: both (padding is seen) or neither",
    )
    padding = 1 if encoder_pads is None or encoder_pads.dim() != 4 or encoder_pads.shape[2] == 1 else max_length
    named = {
        "items": (items, [items.numel()], (torch.int64,)),
        "offsets": (offsets, [offsets.numel()], (torch.int64,)),
        "table": (table, [table.shape[0], D], stored),
        "positions": (positions, [max_length, D], stored),
        "history_norm": (history_norm, [2, D], single),
        "encoder_pads": (encoder_pads, [encoder.blocks, 2, padding, D], stored),
        "start_time": (start_time, [D], single),
    }
    for stack, weights in (("encoder", encoder), ("denoiser", denoiser)):
        if weights is None:
            continue
        n = weights.blocks
        require(n >= 1, f"{stack} holds no block; expected 1 or more")
        for name, rows, columns in (("qkv", 3 * D, D), ("out", D, D), ("up", 4 * D, D), ("down", D, 4 * D)):
            named[f"{stack}.{name}"] = (getattr(weights, name), [n, rows, columns], stored)
            named[f"{stack}.{name}_bias"] = (getattr(weights, f"{name}_bias"), [n, rows], single)
        for name in ("attention_norm", "feed_forward_norm"):
            named[f"{stack}.{name}"] = (getattr(weights, name), [n, 2, D], single)
    if denoiser is not None:
        named["denoiser_pads"] = (denoiser_pads, [branches, denoiser.blocks, 2, padding, D], stored)
    check_tensors([(name, *rest) for name, rest in named.items()])
    check_contiguous({name: tensor for name, (tensor, _, _) in named.items()})
    require_offsets("offsets", offsets, items.shape[0], shortest=1, spare=True)


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `encode_prefix` at a named shape; without values on the meta device."""
    D, max_length, P = (shape[name] for name in ("width", "max_length", "pads"))
    branches = 1 + shape.get("guided", 0)
    lengths = _lengths(shape)
    generator = None if device.type == "meta" else torch.Generator(device=device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0, kind: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * scale).to(kind)

    def stack(n: int) -> BlockWeights:
        def matrix(rows: int, columns: int) -> Tensor:
            return normal(n, rows, columns, scale=columns**-0.5, kind=dtype)

        return BlockWeights(
            matrix(3 * D, D), normal(n, 3 * D), matrix(D, D), normal(n, D), normal(n, 2, D),
            matrix(4 * D, D), normal(n, 4 * D), matrix(D, 4 * D), normal(n, D), normal(n, 2, D),
        )  # fmt: skip

    encoder, denoiser = stack(shape["blocks"]), stack(shape["denoiser_blocks"]) if shape["denoiser_blocks"] else None
    pads = [
        normal(branches, n, 2, P, D, kind=dtype) if P and n else None
        for n in (encoder.blocks, shape["denoiser_blocks"])
    ]
    return {
        "items": torch.randint(1, shape["items"] + 1, (sum(lengths),), generator=generator, device=device),
        "offsets": torch.tensor([0, *lengths], device=device).cumsum(0),
        "table": normal(shape["items"] + 1, D, kind=dtype),
        "positions": normal(max_length, D, kind=dtype) if shape.get("positions") else None,
        "history_norm": normal(2, D),
        "history_norm_epsilon": 1e-12,
        "encoder": encoder,
        "encoder_pads": None if pads[0] is None else pads[0][0],
        "heads": shape["heads"],
        "max_length": max_length,
        "denoiser": denoiser,
        "denoiser_pads": pads[1],
        "start_time": None if denoiser is None else normal(D),
        "mix_weight": 0.001,
        "geodesic": bool(shape.get("geodesic")),
        "unconditional": branches == 2,
    }


def _lengths(shape: Shape) -> list[int]:
    """Lengths 1 to ``shape["length"]`` in equal shares, sorted."""
    return [1 + user * shape["length"] // shape["users"] for user in range(shape["users"])]


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """Weights once, whatever is read again from the second-level cache; attention by true lengths."""
    B, D, n, later, P = (shape[name] for name in ("users", "width", "blocks", "denoiser_blocks", "pads"))
    lengths, branches = _lengths(shape), 1 + shape.get("guided", 0) if later else 0
    tokens = sum(lengths)
    padding = {0: 0, 1: tokens}.get(P, sum(length * (shape["max_length"] - length) for length in lengths))
    # The denoiser does not take the last token of a history, and its last block needs only keys and values.
    keys, prefix_keys = (sum(length * (length + 1) // 2 for length in lengths) - skip for skip in (0, tokens))
    whole, prefix = n, branches * max(0, later - 1)
    flops = whole * (24 * tokens * D * D + 4 * (keys + padding) * D)
    flops += prefix * (24 * (tokens - B) * D * D + 4 * (prefix_keys + padding) * D)
    flops += 4 * branches * (tokens - B) * D * D * min(1, later)
    held = 12 * D * D * (n + max(0, later - 1)) + 2 * D * D * min(1, later)
    held += D * (min(tokens, shape["items"]) + 2 * branches * later * tokens + 2 * P * (n + branches * later))
    return Cost(bytes=dtype.itemsize * held + 4 * B * D + 8 * (tokens + B + 1), flops=flops)


_PAPER = {
    "users": 512, "items": 12_301, "width": 128, "heads": 4, "blocks": 2, "denoiser_blocks": 2, "length": 16,
    "max_length": 50, "pads": 1,
}  # fmt: skip
_SHAPES: dict[str, Shape] = {
    "paper": _PAPER,
    "width 256": _PAPER | {"width": 256},
    "one user": _PAPER | {"users": 1, "length": 9},
    "six users": _PAPER | {"users": 6, "length": 9},
    "large batch": _PAPER | {"users": 4096},
    "masked padding": _PAPER | {"pads": 0},
    "guided, geodesic, positions": _PAPER | {"guided": 1, "geodesic": 1, "positions": 1},
    "padding with positions": _PAPER | {"guided": 1, "positions": 1, "length": 200, "max_length": 200, "pads": 200},
    "width 256, padding with positions": _PAPER
    | {"width": 256, "heads": 8, "positions": 1, "length": 200, "max_length": 200, "pads": 200},
    "sasrec": _PAPER | {"denoiser_blocks": 0, "positions": 1},
    "one head": _PAPER | {"heads": 1},
    "width 32": _PAPER | {"width": 32, "heads": 2},
    "width 64": _PAPER | {"width": 64, "heads": 2},
    "width 96": _PAPER | {"width": 96, "heads": 3},
    "width 192": _PAPER | {"width": 192, "heads": 6},
    "one user of width 32": _PAPER | {"users": 1, "length": 9, "width": 32, "heads": 2},
    "one user of width 64": _PAPER | {"users": 1, "length": 9, "width": 64, "heads": 2},
    "one user of width 256": _PAPER | {"users": 1, "length": 9, "width": 256},
    "six users of width 32": _PAPER | {"users": 6, "length": 9, "width": 32, "heads": 2},
    "six users of width 64": _PAPER | {"users": 6, "length": 9, "width": 64, "heads": 2},
}

ENTRIES = [
    Entry(
        name="encode_prefix",
        summary="embedding, encoder, and the denoiser's keys and values of every history",
        use_when="encoding short histories of many users on a GPU, before denoise_last or for SASRec",
        avoid_when="wider than 256, gradients are needed, or histories of many hundred items",
        dtypes=DTYPES,
        shapes=_SHAPES,
        inputs=_inputs,
        run=encode_prefix,
        twin=encode_prefix_twin,
        cost=_cost,
    ),
]
