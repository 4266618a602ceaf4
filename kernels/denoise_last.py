"""All reverse steps of a diffusion recommender for each user's last token, in one launch.

The denoiser is causal and every step gives the history the same input, so only the new token goes through the blocks:
``x0_hat = blocks(c + mix_weight (x_t + e_t))``, attending to keys and values of the history that
`kernels.encode_prefix` computed once; then ``x_{t-1} = from_x0 x0_hat + from_xt x_t + sigma eps`` (ADRec, arXiv
2505.19544, section 4.3). The noise is `kernels.philox`'s, drawn inside.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels._denoise_last_op import denoise_last_op
from kernels._reverse_steps import (
    DTYPES,
    NARROWEST_HEAD,
    WIDEST_HEAD,
    check_contiguous,
    check_steps,
    check_tensors,
    reverse_steps,
)
from kernels._runtime import check_seed, require, require_offsets, runs_triton, seed_tensor
from kernels._scalars import require_integers, require_numbers
from kernels.block_weights import BlockWeights, finish_block, pad_weights, split_qkv
from kernels.inventory import Cost, Entry, Shape


def denoise_last(
    condition: Tensor,
    weights: BlockWeights,
    keys_values: Tensor,
    pads: Tensor | None,
    offsets: Tensor,
    times: Tensor,
    coefficients: Tensor,
    *,
    mix_weight: float,
    heads: int,
    max_length: int,
    seed: int | Tensor = 0,
    row_keys: Tensor | None = None,
    noise: Tensor | None = None,
    guidance_scale: float = 1.0,
    geodesic: bool = False,
) -> Tensor:
    """Run every reverse step of B users; returns x0_hat of the last one, `[B, D]` float32.

    condition: `[B, D]`, c of each user's last token. weights: n denoiser blocks; their dtype is the storage dtype,
    float32 (multiplied exactly), float16 or bfloat16 (float32 accumulation). keys_values: `[branches, n, 2, M, D]` in
    storage dtype, keys and values of the packed tokens; those of a user's last token are not read. pads:
    `[branches, n, 2, P, D]` likewise, of the padding, of which a user with l tokens has ``max_length - l``: P = 1
    stands for all of them, of P = max_length rows the first so many are seen; None: padding is not seen. offsets:
    `[B + 1]` int64 into the M tokens, of which every user has 1 or more.
    times: `[S, D]` float32, e_t of each row of the coefficient table. coefficients: `[S, 3]` float32, from_x0, from_xt
    and sigma of each row; rows S - 1 to 1 are applied in that order, and row 0 returns x0_hat.
    seed: int, or `[1]` int64 on the device. row_keys: `[B]` int64 in ``[0, 2^39)``, default 0 .. B - 1. noise:
    `[S + 1, B, D]` instead of drawn noise: first x_T, then that of each step; the last is not used.
    guidance_scale: s of ``x0 = uncond + s (cond - uncond)``; other than 1 it needs two branches, the second of which is
    without condition. geodesic: project to the unit sphere after every step and at the end.

    D is 8 to 256, D / heads 8 to 128, S up to 4095; widths that are no multiple of 16 are right but slow. weights,
    keys_values, pads, offsets, times and coefficients must be contiguous; other inputs are made so. No gradients.
    A user's result depends on no other user. A history may have any number of tokens below 2^31; tested to 200.
    Offsets are not checked on a GPU, which would wait for it: others than these read elsewhere. On a CPU they are.
    Scratch memory, with s bytes of the storage dtype: ``4 (3 H' d' + D') + 2 s D'`` bytes for each user, their number
    rounded up to a multiple of 16 (32 in 16 bits from 2049 users on, D up to 128); H', d' and D' are heads, D / heads
    and D rounded up to powers of two, D' to 16 or more.
    Users of similar length should stand together: the 16 or 32 of a program wait for the longest. A program reads all
    weights from the second-level cache in every step, whatever its number of users, and that bounds its time: few users
    take about as long as a program of them on every multiprocessor.
    Raises UnsupportedError. Without Triton, or on a CPU, this is `denoise_last_twin`.
    """
    require_integers(heads=heads, max_length=max_length)
    require_numbers(mix_weight=mix_weight, guidance_scale=guidance_scale)
    check_seed(seed, condition.device, needed=noise is None)
    check_steps(condition, times, coefficients, row_keys, noise)
    _check(condition, weights, keys_values, pads, offsets, times, coefficients, heads, max_length, guidance_scale)
    optional = [tensor for tensor in (pads, row_keys, noise) if tensor is not None]
    if not runs_triton(condition, *weights, keys_values, offsets, times, coefficients, *optional):
        return denoise_last_twin(
            condition,
            weights,
            keys_values,
            pads,
            offsets,
            times,
            coefficients,
            mix_weight=mix_weight,
            heads=heads,
            max_length=max_length,
            seed=seed,
            row_keys=row_keys,
            noise=noise,
            guidance_scale=guidance_scale,
            geodesic=geodesic,
        )
    return denoise_last_op(
        condition.contiguous(),
        *weights,
        keys_values,
        pads,
        offsets,
        times,
        coefficients,
        seed_tensor(seed, condition.device) if noise is None else None,
        None if row_keys is None else row_keys.contiguous(),
        None if noise is None else noise.contiguous(),
        float(mix_weight),
        heads,
        max_length,
        float(guidance_scale),
        geodesic,
    )


@torch.no_grad()
def denoise_last_twin(
    condition: Tensor,
    weights: BlockWeights,
    keys_values: Tensor,
    pads: Tensor | None,
    offsets: Tensor,
    times: Tensor,
    coefficients: Tensor,
    *,
    mix_weight: float,
    heads: int,
    max_length: int,
    seed: int | Tensor = 0,
    row_keys: Tensor | None = None,
    noise: Tensor | None = None,
    guidance_scale: float = 1.0,
    geodesic: bool = False,
) -> Tensor:
    """`denoise_last` in pure torch, in float32; a float64 condition is computed and returned in float64."""
    dtype = torch.promote_types(condition.dtype, torch.float32)
    B, D = condition.shape
    lengths = offsets.diff()
    longest = int(lengths.max()) - 1 if B else 0
    place = torch.arange(longest, device=offsets.device)
    visible = place < lengths[:, None] - 1
    tokens = torch.where(visible, offsets[:-1, None] + place, 0)
    # The last column is the new token itself.
    bias = torch.zeros(B, longest + 1, dtype=dtype, device=offsets.device)
    bias[:, :longest].masked_fill_(~visible, -torch.inf)
    seen = keys_values[:, :, :, tokens].to(dtype).masked_fill(~visible[:, :, None], 0.0)
    if pads is not None:
        bias = torch.cat([pad_weights(lengths.clamp(max=max_length), pads.shape[3], max_length).to(dtype), bias], 1)
        padding = pads[:, :, :, None].expand(-1, -1, -1, B, -1, -1)
        seen = torch.cat([padding.to(dtype), seen], 4)
    seen = seen.unflatten(-1, (heads, -1))

    def denoise(mixed: Tensor, branch: int) -> Tensor:
        rows = mixed + condition.to(dtype) if branch == 0 else mixed
        for block in range(weights.blocks):
            query, *own = split_qkv(weights, block, rows, heads)
            key, value = (torch.cat([old, new[:, None]], 1) for old, new in zip(seen[branch, block], own, strict=True))
            scores = torch.einsum("bhd,bkhd->bhk", query, key) / math.sqrt(D // heads) + bias[:, None]
            attended = torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), value)
            rows = finish_block(weights, block, rows, attended.flatten(1))
        return rows

    return reverse_steps(
        denoise,
        B,
        times,
        coefficients,
        dtype,
        seed=seed,
        row_keys=row_keys,
        noise=noise,
        mix_weight=mix_weight,
        guidance_scale=guidance_scale,
        geodesic=geodesic,
    )


def _check(
    condition: Tensor,
    weights: BlockWeights,
    keys_values: Tensor,
    pads: Tensor | None,
    offsets: Tensor,
    times: Tensor,
    coefficients: Tensor,
    heads: int,
    max_length: int,
    guidance_scale: float,
) -> None:
    (B, D), n, stored, single = condition.shape, weights.blocks, (weights.qkv.dtype,), (torch.float32,)
    require(heads >= 1 and D % heads == 0, f"heads is {heads}; allowed: divisors of the width {D}")
    require(
        NARROWEST_HEAD <= D // heads <= WIDEST_HEAD,
        f"heads are {D // heads} wide ({D} / {heads}); allowed: {NARROWEST_HEAD} to {WIDEST_HEAD}; change heads",
    )
    require(max_length >= 1, f"max_length is {max_length}; allowed: 1 or more")
    require(n >= 1, "weights hold no block; expected 1 or more")
    require(keys_values.dim() == 5, f"keys_values has shape {list(keys_values.shape)}; expected [branches, n, 2, M, D]")
    branches, tokens = keys_values.shape[0], keys_values.shape[3]
    needed = 1 if guidance_scale == 1.0 else 2
    require(
        needed <= branches <= 2,
        f"keys_values has {branches} branches; guidance_scale {guidance_scale} needs {needed}: encode with"
        " unconditional=True",
    )
    require(weights.qkv.dtype in DTYPES, f"weights.qkv is {weights.qkv.dtype}; allowed: float32, float16, bfloat16")
    padding = 1 if pads is None or pads.dim() != 5 or pads.shape[3] == 1 else max_length
    named: dict[str, tuple[Tensor | None, list[int], tuple[torch.dtype, ...]]] = {
        "keys_values": (keys_values, [branches, n, 2, tokens, D], stored),
        "pads": (pads, [branches, n, 2, padding, D], stored),
        "offsets": (offsets, [B + 1], (torch.int64,)),
    }
    for name, rows, columns in (("qkv", 3 * D, D), ("out", D, D), ("up", 4 * D, D), ("down", D, 4 * D)):
        named[f"weights.{name}"] = (getattr(weights, name), [n, rows, columns], stored)
        named[f"weights.{name}_bias"] = (getattr(weights, f"{name}_bias"), [n, rows], single)
    for name in ("attention_norm", "feed_forward_norm"):
        named[f"weights.{name}"] = (getattr(weights, name), [n, 2, D], single)
    check_tensors([(name, *rest) for name, rest in named.items()])
    tensors = {name: tensor for name, (tensor, _, _) in named.items()}
    check_contiguous(tensors | {"times": times, "coefficients": coefficients})
    require_offsets("offsets", offsets, tokens, shortest=1, spare=True)


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `denoise_last` at a named shape; without values on the meta device."""
    B, D, n, S, P = (shape[name] for name in ("users", "width", "blocks", "steps", "pads"))
    branches, longest = 1 + shape.get("guided", 0), shape["length"]
    # Lengths 1 to ``longest`` in equal shares, sorted.
    lengths = [1 + user * longest // B for user in range(B)]
    generator = None if device.type == "meta" else torch.Generator(device=device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0, kind: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * scale).to(kind)

    def matrix(rows: int, columns: int) -> Tensor:
        return normal(n, rows, columns, scale=columns**-0.5, kind=dtype)

    weights = BlockWeights(
        matrix(3 * D, D), normal(n, 3 * D), matrix(D, D), normal(n, D), normal(n, 2, D),
        matrix(4 * D, D), normal(n, 4 * D), matrix(D, 4 * D), normal(n, D), normal(n, 2, D),
    )  # fmt: skip
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    return {
        "condition": normal(B, D),
        "weights": weights,
        "keys_values": normal(branches, n, 2, sum(lengths), D, kind=dtype),
        "pads": normal(branches, n, 2, P, D, kind=dtype) if P else None,
        "offsets": offsets,
        "times": normal(S, D),
        "coefficients": torch.full((S, 3), 0.5, device=device),
        "mix_weight": 0.001,
        "heads": shape["heads"],
        "max_length": shape["max_length"],
        "seed": torch.zeros(1, dtype=torch.int64, device=device),
        "row_keys": torch.arange(B, device=device),
        "guidance_scale": 1.5 if branches == 2 else 1.0,
        "geodesic": bool(shape.get("geodesic")),
    }


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """Weights, keys and values once, whatever is read again from the second-level cache; attention by true lengths."""
    B, D, n, S, P = (shape[name] for name in ("users", "width", "blocks", "steps", "pads"))
    branches, tokens = 1 + shape.get("guided", 0), sum(1 + user * shape["length"] // B for user in range(B))
    # A prefix is a token shorter than its history, and the new token attends to itself.
    keys = tokens + {0: 0, 1: B}.get(P, B * shape["max_length"] - tokens)
    flops = S * branches * n * (24 * B * D * D + 4 * keys * D)
    held = n * 12 * D * D + 2 * branches * n * (tokens - B + P) * D
    return Cost(bytes=dtype.itemsize * held + 4 * (2 * B + S) * D, flops=flops)


_PAPER = {
    "users": 512, "width": 128, "heads": 4, "blocks": 2, "steps": 32, "length": 16, "max_length": 50, "pads": 1,
}  # fmt: skip
_SHAPES: dict[str, Shape] = {
    "paper": _PAPER,
    "width 256": _PAPER | {"width": 256},
    "one user": _PAPER | {"users": 1, "length": 9},
    "large batch": _PAPER | {"users": 4096},
    "large batch of width 32": _PAPER | {"users": 4096, "width": 32, "heads": 2},
    "large batch of width 64": _PAPER | {"users": 4096, "width": 64, "heads": 2},
    "one step": _PAPER | {"steps": 1},
    "guided, geodesic": _PAPER | {"guided": 1, "geodesic": 1},
    "width 256, guided, padding with positions": _PAPER
    | {"width": 256, "heads": 8, "guided": 1, "geodesic": 1, "length": 200, "max_length": 200, "pads": 200},
    "masked padding": _PAPER | {"pads": 0},
    "width 32": _PAPER | {"width": 32, "heads": 2},
    "width 64": _PAPER | {"width": 64, "heads": 2},
    "width 96": _PAPER | {"width": 96, "heads": 3},
    "width 192": _PAPER | {"width": 192, "heads": 6},
}

ENTRIES = [
    Entry(
        name="denoise_last",
        summary="all reverse steps of the last token through all denoiser blocks, noise drawn inside",
        use_when="sampling on a GPU, the more steps and users the better",
        avoid_when="wider than 256, or gradients are needed",
        dtypes=DTYPES,
        shapes=_SHAPES,
        inputs=_inputs,
        run=denoise_last,
        twin=denoise_last_twin,
        cost=_cost,
    ),
]
