# mypy: allow-untyped-defs
"""Pieces that several kernels share: row-wise layer norm, activations, and a matrix product by storage dtype.

Arithmetic is float32. Tiles are `[ROWS, WIDTH]`, WIDTH a power of two; columns from D on hold zeros, before and after.
"""

from __future__ import annotations

from kernels._runtime import LIFT_DOTS, constant, jit, tl

# 2 sqrt(2 / pi) and 2 sqrt(2 / pi) 0.044715: with them tanh-GELU is x sigmoid(x (A + B x^2)).
GELU_A = constant(1.5957691216057308)
GELU_B = constant(0.07135481627260025)


@jit
def layer_norm(x, gain_ptr, shift_ptr, columns, D, eps):
    """Normalise the rows of x `[ROWS, WIDTH]` float32 over their first D columns; zero beyond them.

    gain_ptr, shift_ptr: D elements each. columns: ``tl.arange(0, WIDTH)``. Biased variance, eps inside the root.
    """
    inside = columns < D
    mean = tl.sum(x, 1) / D
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    gain = tl.load(gain_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return centred * scale[:, None] * gain[None, :] + shift[None, :]


@jit
def gelu_tanh(x):
    """GELU in its tanh form, elementwise: 0.5 x (1 + tanh(u)) is x sigmoid(2 u)."""
    return x / (1.0 + tl.exp(-x * (GELU_A + GELU_B * x * x)))


@jit
def silu(x):
    """x sigmoid(x), elementwise."""
    return x / (1.0 + tl.exp(-x))


@jit
def to_storage(x, dtype: tl.constexpr):
    """Round float32 to the nearest value of a storage dtype, in the interpreter too, where a cast to bf16 truncates."""
    if LIFT_DOTS and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 32767 + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@jit
def dot(a, b, accumulator):
    """``a @ b + accumulator`` with float32 accumulation; a is first cast to the dtype of b, as stored.

    float32 operands are multiplied exactly (no TF32). In the interpreter both are lifted to float32: it cannot
    multiply bf16.
    """
    if a.dtype != b.dtype:
        a = to_storage(a, b.dtype)
    if LIFT_DOTS:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")
