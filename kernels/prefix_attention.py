"""Causal multi-head attention over packed histories of any lengths, padding as weighted keys, dropout by counter.

What it computes is the attention of arXiv 2505.19544: token i of a history sees the padding and tokens 0..i of the same
history. Method: FlashAttention-2 (arXiv 2307.08691), with tiles of consecutive packed tokens that span several users,
since one history seldom fills a tile; see `kernels._prefix_attention_forward`. Forward keeps one float per row and head
for the backward pass; no L x L matrix or mask exists in memory, and no order of additions depends on timing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._prefix_attention_forward import DRAW_LEVELS, TOKEN_QUADS
from kernels._prefix_attention_op import attention, attention_gradients
from kernels._prefix_attention_twin import attend, dropout_count, dropout_factors, token_users
from kernels._runtime import check_seed, require, require_offsets, runs_triton, seed_tensor
from kernels._scalars import require_integers, require_numbers
from kernels.block_weights import pad_weights
from kernels.inventory import Cost, Entry, Shape

__all__ = [
    "ENTRIES",
    "dropout_factors",
    "prefix_attention",
    "prefix_attention_gradients",
    "prefix_attention_gradients_twin",
    "prefix_attention_twin",
    "supports",
    "token_users",
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NARROWEST, WIDEST = 8, 128


def supports(qkv: Tensor) -> bool:
    """Whether `prefix_attention` launches its kernel for queries, keys and values `[M, 3, H, d]` like these."""
    return qkv.dtype in DTYPES and NARROWEST <= qkv.shape[-1] <= WIDEST and runs_triton(qkv)


def prefix_attention(
    qkv: Tensor,
    offsets: Tensor,
    *,
    pads: Tensor | None = None,
    max_length: int | None = None,
    pad_bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    users: Tensor | None = None,
) -> Tensor:
    """Attention of each packed token over its history up to itself, `[M, 3, H, d]` -> `[M, H, d]`.

    qkv: queries, keys and values, float32, float16 or bfloat16, contiguous, d from 8 to 128; scores are scaled by
    ``1 / sqrt(d)``, sums are float32. offsets: `[B + 1]` int64, user b owns tokens offsets[b] up to offsets[b + 1],
    possibly none; users in any order; offsets[B] is M. At most 2^17 tokens a user. Values must be finite:
    neighbouring users share a tile, and an infinite value times another user's weight of zero is not a number.

    pads: keys and values of the padding `[2, U, H, P, d]`, U = 1 (all users share it) or B; made contiguous. What it
    weighs: a history of length l has ``n = max_length - l`` pads, none if that is below 1. With P = 1 the one row
    stands for all n (log n is added to its score), with P = max_length a user sees the first n rows. pad_bias `[B, P]`
    gives the numbers added to the scores instead of max_length, for any P below 2^17. pads None: no padding.

    dropout: probability p that one of the attention weights, padding included, is dropped, rounded to a multiple of
    2^-16; the rest is scaled by 1 / (1 - p). seed: int, or `[1]` int64 on the device (read there, so that a captured
    graph draws anew). Token row i of the batch, head h and key decide a draw (counters: `dropout_factors`), so users
    draw by their place in the batch; backward draws the same again. users: `token_users`, if it is already at hand.

    Gradients to qkv and pads, both deterministic. Raises UnsupportedError. Without Triton, or on a CPU, this is
    `prefix_attention_twin`.
    """
    _check_numbers(max_length, dropout, seed, qkv.device)
    _check(qkv, offsets, pads, max_length, pad_bias, dropout, users)
    given = [tensor for tensor in (qkv, offsets, pads, pad_bias, users) if tensor is not None]
    if not runs_triton(*given):
        return prefix_attention_twin(
            qkv, offsets, pads=pads, max_length=max_length, pad_bias=pad_bias, dropout=dropout, seed=seed, users=users
        )
    dropped = dropout_count(dropout)
    return attention(
        qkv,
        offsets,
        token_users(offsets, qkv.shape[0]) if users is None else users,
        None if pads is None else pads.contiguous(),
        None if pads is None or pad_bias is None else pad_bias.detach().contiguous(),
        max_length or 0,
        dropped,
        seed_tensor(seed, qkv.device) if dropped else None,
    )[0]


def prefix_attention_twin(
    qkv: Tensor,
    offsets: Tensor,
    *,
    pads: Tensor | None = None,
    max_length: int | None = None,
    pad_bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    users: Tensor | None = None,
) -> Tensor:
    """`prefix_attention` in pure torch, in rectangles of the longest history; waits for the device to know that length.

    Half-precision inputs are computed in float32, float64 in float64.
    """
    return attend(qkv, offsets, pads, max_length, pad_bias, dropout, seed, users)[0]


def _check_numbers(max_length: int | None, dropout: float, seed: int | Tensor, device: torch.device) -> None:
    require_numbers(dropout=dropout)
    if max_length is not None:
        require_integers(max_length=max_length)
    check_seed(seed, device, needed=dropout > 0)


def _check(
    qkv: Tensor,
    offsets: Tensor,
    pads: Tensor | None,
    max_length: int | None,
    pad_bias: Tensor | None,
    dropout: float,
    users: Tensor | None,
) -> None:
    shape = tuple(qkv.shape)
    require(qkv.dim() == 4 and qkv.shape[1] == 3, f"qkv is {shape}; expected [M, 3, H, d]")
    require(
        qkv.dtype in (*DTYPES, torch.float64) and (qkv.dtype != torch.float64 or not runs_triton(qkv)),
        f"qkv is {qkv.dtype}; supported: {', '.join(map(str, DTYPES))} (float64: prefix_attention_twin)",
    )
    require(
        NARROWEST <= shape[3] <= WIDEST,
        f"head width is {shape[3]}; allowed: {NARROWEST} to {WIDEST}; choose another number of heads",
    )
    require(qkv.is_contiguous(), f"qkv has strides {qkv.stride()}; call .contiguous() first")
    require(
        offsets.dim() == 1 and len(offsets) > 0 and offsets.dtype == torch.int64 and offsets.is_contiguous(),
        f"offsets is {offsets.dtype} {tuple(offsets.shape)}; expected contiguous int64 [B + 1]",
    )
    require_offsets("offsets", offsets, shape[0])
    require(
        users is None or (users.shape == shape[:1] and users.dtype == torch.int64 and users.is_contiguous()),
        "users must be contiguous int64 [M], as token_users makes it; leave it out",
    )
    require(
        0.0 <= dropout < 1.0 and dropout_count(dropout) < DRAW_LEVELS,
        f"dropout is {dropout}; allowed: 0 to 1 - 2^-16",
    )
    if pads is None:
        return
    batch = len(offsets) - 1
    expected = f"[2, 1 or {batch}, {shape[2]}, P, {shape[3]}]"
    fits = pads.dim() == 5 and pads.shape[0] == 2 and pads.shape[1] in (1, batch)
    require(
        fits and (pads.shape[2], pads.shape[4]) == shape[2:] and pads.shape[3] > 0,
        f"pads is {tuple(pads.shape)}; expected {expected}",
    )
    require(pads.dtype == qkv.dtype, f"pads is {pads.dtype} and qkv {qkv.dtype}; cast one of them")
    count = pads.shape[3]
    require(count < 4 * TOKEN_QUADS, f"{count} pad rows; allowed: less than {4 * TOKEN_QUADS}")
    require((max_length is None) != (pad_bias is None), "pads need one of max_length and pad_bias")
    if pad_bias is not None:
        require(
            pad_bias.shape == (batch, count) and pad_bias.is_floating_point(),
            f"pad_bias is {pad_bias.dtype} {tuple(pad_bias.shape)}; expected floating point [{batch}, {count}]",
        )
    else:
        require(
            count in (1, max_length),
            f"{count} pad rows for max_length {max_length}; allowed: 1, or max_length of them",
        )


def _history_lengths(shape: Shape) -> list[int]:
    """Lengths 1, 2, ... ``longest``, over and over: half of ``longest + 1`` on average."""
    return [1 + user % shape["longest"] for user in range(shape["users"])]


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `prefix_attention` at a named shape; without values on the meta device."""
    lengths = torch.tensor(_history_lengths(shape))
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    H, P = shape["heads"], shape["pads"]
    head = shape["width"] // H
    generator = torch.Generator(device=device).manual_seed(0) if device.type != "meta" else None

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    own = len(lengths) if shape.get("own_pads") else 1
    # As the model gives it: numbers to add to the scores.
    bias = pad_weights(lengths, P, shape["max_length"]).to(device) if shape.get("bias") else None
    return {
        "qkv": normal(int(offsets[-1]), 3, H, head),
        "offsets": offsets.to(device),
        "pads": normal(2, own, H, P, head) if P else None,
        "max_length": shape["max_length"] if P and bias is None else None,
        "pad_bias": bias,
        "dropout": shape.get("dropout_percent", 0) / 100.0,
        "seed": torch.ones(1, dtype=torch.int64, device=device),
    }


def _gradient_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `prefix_attention_gradients`."""
    values = _inputs(shape, dtype, device)
    tokens, _, heads, head = values["qkv"].shape
    generator = torch.Generator(device=device).manual_seed(1) if device.type != "meta" else None
    gradient = torch.randn(tokens, heads, head, generator=generator, device=device).to(dtype)
    if device.type == "meta":
        output, log_sum = torch.empty_like(gradient), torch.empty(heads, tokens, device=device)
    else:
        output, log_sum = attend(**values, users=None)
    return {"gradient": gradient, "output": output, "log_sum": log_sum, **values}


def prefix_attention_gradients(
    gradient: Tensor,
    output: Tensor,
    log_sum: Tensor,
    qkv: Tensor,
    offsets: Tensor,
    *,
    pads: Tensor | None,
    max_length: int | None,
    pad_bias: Tensor | None,
    dropout: float,
    seed: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """What backward computes from the gradient of the output `[M, H, d]`: gradients of qkv and pads (empty without).

    output, log_sum: what forward returned and kept, `[M, H, d]` and in base 2 `[H, M]` float32. The rest is as in
    `prefix_attention`, with its dtypes and widths; gradient and output have the dtype of qkv and are made contiguous,
    as is log_sum. For measurements; training reaches this through autograd.

    Raises UnsupportedError. Without Triton, or on a CPU, this is `prefix_attention_gradients_twin`.
    """
    _check_numbers(max_length, dropout, seed, qkv.device)
    _check(qkv, offsets, pads, max_length, pad_bias, dropout, None)
    tokens, _, heads, head = qkv.shape
    for name, tensor, shape, dtype in (
        ("gradient", gradient, [tokens, heads, head], qkv.dtype),
        ("output", output, [tokens, heads, head], qkv.dtype),
        ("log_sum", log_sum, [heads, tokens], torch.float32),
    ):
        fits = list(tensor.shape) == shape and tensor.dtype == dtype
        require(fits, f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {shape}")
    given = [tensor for tensor in (pads, pad_bias) if tensor is not None]
    if not runs_triton(gradient, output, log_sum, qkv, offsets, *given):
        return prefix_attention_gradients_twin(
            gradient, output, log_sum, qkv, offsets, pads=pads, max_length=max_length, pad_bias=pad_bias,
            dropout=dropout, seed=seed,
        )  # fmt: skip
    dropped = dropout_count(dropout)
    return attention_gradients(
        gradient.contiguous(),
        qkv,
        offsets,
        token_users(offsets, tokens),
        None if pads is None else pads.contiguous(),
        None if pads is None or pad_bias is None else pad_bias.detach().contiguous(),
        output.contiguous(),
        log_sum.contiguous(),
        max_length or 0,
        dropped,
        seed_tensor(seed, qkv.device) if dropped else None,
        pads is not None,
    )


def prefix_attention_gradients_twin(
    gradient: Tensor,
    output: Tensor,
    log_sum: Tensor,
    qkv: Tensor,
    offsets: Tensor,
    *,
    pads: Tensor | None,
    max_length: int | None,
    pad_bias: Tensor | None,
    dropout: float,
    seed: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """`prefix_attention_gradients` by autograd through `prefix_attention_twin`."""
    inputs = [tensor.detach().requires_grad_() for tensor in (qkv, pads) if tensor is not None]
    with torch.enable_grad():
        mixed = prefix_attention_twin(
            inputs[0], offsets, pads=None if pads is None else inputs[1], max_length=max_length, pad_bias=pad_bias,
            dropout=dropout, seed=seed,
        )  # fmt: skip
        found = torch.autograd.grad(mixed, inputs, gradient)
    return found[0], found[1] if pads is not None else qkv.new_empty(0)


def _pairs(shape: Shape) -> int:
    """Scores of one head: each token with itself, the tokens before it and the pads it sees."""
    return sum(
        length * (length + 1) // 2 + length * min(shape["pads"], shape["max_length"] - length)
        for length in _history_lengths(shape)
    )


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """qkv in, output and log-sum-exp out, offsets and pads in; two products a score."""
    tokens, D = sum(_history_lengths(shape)), shape["width"]
    owners = shape["users"] if shape.get("own_pads") else 1
    rows = 4 * tokens + 2 * owners * shape["pads"]
    sums = 4 * tokens * shape["heads"] + 8 * (shape["users"] + 1)
    return Cost(bytes=dtype.itemsize * D * rows + sums, flops=4 * D * _pairs(shape))


def _gradient_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """qkv, output and its gradient in, gradient of qkv out, pads in and their gradient out; five products a score."""
    tokens, D = sum(_history_lengths(shape)), shape["width"]
    owners = shape["users"] if shape.get("own_pads") else 1
    rows = 8 * tokens + 4 * owners * shape["pads"]
    sums = 4 * tokens * shape["heads"] + 8 * (shape["users"] + 1)
    return Cost(bytes=dtype.itemsize * D * rows + sums, flops=10 * D * _pairs(shape))


_PAPER: Shape = {
    "users": 512, "longest": 16, "max_length": 50, "width": 128, "heads": 4, "pads": 1, "bias": 1, "dropout_percent": 10
}  # fmt: skip
_SHAPES: dict[str, Shape] = {
    "paper": _PAPER,
    "weights by length": {**_PAPER, "bias": 0},
    "inference": {**_PAPER, "dropout_percent": 0},
    "one step a sequence": {**_PAPER, "own_pads": 1},
    "released positions": {**_PAPER, "pads": 50},
    "released positions, one step a sequence": {**_PAPER, "pads": 50, "own_pads": 1},
    "masked": {**_PAPER, "pads": 0, "bias": 0},
    "long histories": {**_PAPER, "longest": 200, "max_length": 200, "width": 256},
    "heads of 8": {**_PAPER, "width": 32},
    "heads of 16": {**_PAPER, "width": 64},
    "heads of 24": {**_PAPER, "width": 96},
    "heads of 48": {**_PAPER, "width": 192, "pads": 50, "bias": 0},
    "heads of 128": {**_PAPER, "width": 256, "heads": 2},
    "heads of 128, released positions": {**_PAPER, "width": 256, "heads": 2, "pads": 50, "own_pads": 1},
    "one head": {**_PAPER, "heads": 1},
}

ENTRIES = [
    Entry(
        name="prefix_attention",
        summary="causal attention over jagged histories, padding as weighted keys, dropout drawn inside",
        use_when="training and encoding on a GPU: one launch whatever the lengths, nothing padded, no mask in memory",
        avoid_when="heads are narrower than 8 or wider than 128; training must repeat a CPU run draw by draw",
        dtypes=DTYPES,
        shapes=_SHAPES,
        inputs=_inputs,
        run=prefix_attention,
        twin=prefix_attention_twin,
        cost=_cost,
    ),
    Entry(
        name="prefix_attention.backward",
        summary="gradients of queries, keys, values and padding; scores and dropout computed again",
        use_when="wherever prefix_attention trains; results are the same bit for bit from run to run",
        avoid_when="never apart from prefix_attention",
        dtypes=DTYPES,
        shapes=_SHAPES,
        inputs=_gradient_inputs,
        run=prefix_attention_gradients,
        twin=prefix_attention_gradients_twin,
        cost=_gradient_cost,
    ),
]
