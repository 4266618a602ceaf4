# mypy: allow-untyped-defs
"""What the two denoiser kernels share: noise, the reverse update, and products with streamed weights.

Tiles are `[ROWS, WIDTH]` float32, WIDTH a power of two; columns from D on hold zeros.
"""

from __future__ import annotations

from kernels import philox
from kernels._gaussian import normal
from kernels._runtime import constant, jit, tl
from kernels._tile_ops import dot, gelu_tanh, silu

_KEY_SHIFT = constant(philox.DIMENSION_BITS + philox.DRAW_BITS)
_DRAW_SHIFT = constant(philox.DIMENSION_BITS)
_UNIT_EPSILON = constant(1e-12)


@jit
def gaussian(
    seed_ptr,
    row_keys_ptr,
    noise_ptr,
    draw,
    users,
    user,
    columns,
    D: tl.constexpr,
    KEYED: tl.constexpr,
    NOISE: tl.constexpr,
):
    """Noise of one draw for some users (int64), given (NOISE) or drawn from their row keys (KEYED) or places."""
    known, inside = user < users, columns < D
    draw = tl.full([], draw, tl.int64)
    cell = known[:, None] & inside[None, :]
    if NOISE:
        place = (draw * users + user)[:, None] * D + columns[None, :]
        noise = tl.load(noise_ptr + place, mask=cell, other=0.0).to(tl.float32)
    else:
        key = user
        if KEYED:
            key = tl.load(row_keys_ptr + user, mask=known, other=0)
        offset = (key << _KEY_SHIFT) + (draw << _DRAW_SHIFT)
        noise = tl.where(cell, normal(tl.load(seed_ptr), offset[:, None] + columns[None, :]), 0.0)
    return noise


@jit
def reverse_step(
    x_t,
    x0_hat,
    coefficients_ptr,
    row,
    steps,
    seed_ptr,
    row_keys_ptr,
    noise_ptr,
    users,
    user,
    columns,
    D: tl.constexpr,
    KEYED: tl.constexpr,
    NOISE: tl.constexpr,
    GEODESIC: tl.constexpr,
):
    """x_{t-1} of row ``row`` of the coefficient table; at row 0, which adds no noise, x0_hat itself."""
    if row > 0:
        from_x0 = tl.load(coefficients_ptr + row * 3)
        from_xt = tl.load(coefficients_ptr + row * 3 + 1)
        sigma = tl.load(coefficients_ptr + row * 3 + 2)
        draw = steps - row
        noise = gaussian(seed_ptr, row_keys_ptr, noise_ptr, draw, users, user, columns, D, KEYED, NOISE)
        x_t = from_x0 * x0_hat + from_xt * x_t + sigma * noise
    else:
        x_t = x0_hat
    if GEODESIC:
        x_t /= tl.maximum(tl.sqrt(tl.sum(x_t * x_t, 1)), _UNIT_EPSILON)[:, None]
    return x_t


@jit
def publish(operand, operand_ptr, SLICE: tl.constexpr):
    """Write an operand `[ROWS, WIDTH]` to scratch where `project` reads it in slices."""
    if operand.shape[1] != SLICE:
        rows, columns = tl.arange(0, operand.shape[0]), tl.arange(0, operand.shape[1])
        # Other threads of the program may still read the last operand, and will read this one.
        tl.debug_barrier()
        tl.store(operand_ptr + rows[:, None] * operand.shape[1] + columns[None, :], operand)
        tl.debug_barrier()


@jit
def project(operand, operand_ptr, weight_ptr, bias_ptr, outputs, inside, D: tl.constexpr, SLICE: tl.constexpr):
    """Operand times some rows (``outputs``) of a weight `[.., D]`, plus bias: `[ROWS, outputs]` float32.

    operand: `[ROWS, WIDTH]` in storage dtype, used where SLICE is WIDTH. Otherwise its copy at ``operand_ptr`` is read
    in slices: tensor cores do not multiply float32 exactly, and other products hold whole operands in registers.
    """
    ROWS: tl.constexpr = operand.shape[0]
    WIDTH: tl.constexpr = operand.shape[1]
    bias = tl.load(bias_ptr + outputs, mask=inside, other=0.0)
    product = tl.zeros([ROWS, outputs.shape[0]], tl.float32) + bias[None, :]
    columns = tl.arange(0, SLICE)
    if SLICE == WIDTH:
        mask = inside[None, :] & (columns < D)[:, None]
        weight = tl.load(weight_ptr + outputs[None, :] * D + columns[:, None], mask=mask, other=0.0)
        product = dot(operand, weight, product)
    else:
        rows = tl.arange(0, ROWS)
        for first in range(0, D, SLICE):
            mask = inside[None, :] & (first + columns < D)[:, None]
            part = tl.load(operand_ptr + rows[:, None] * WIDTH + first + columns[None, :])
            weight = tl.load(weight_ptr + outputs[None, :] * D + first + columns[:, None], mask=mask, other=0.0)
            product = dot(part, weight, product)
    return product


@jit
def feed_forward(
    operand,
    operand_ptr,
    out,
    up_ptr,
    up_bias_ptr,
    down_ptr,
    down_bias_ptr,
    columns,
    D: tl.constexpr,
    HIDDEN: tl.constexpr,
    SLICE: tl.constexpr,
    GELU: tl.constexpr,
):
    """``out + down(activation(up(operand)))``, HIDDEN of the 4 D hidden units at a time; tanh-GELU or SiLU."""
    column_inside = columns < D
    out += tl.load(down_bias_ptr + columns, mask=column_inside, other=0.0)[None, :]
    for first in range(0, 4 * D, HIDDEN):
        units = first + tl.arange(0, HIDDEN)
        inside = units < 4 * D
        hidden = project(operand, operand_ptr, up_ptr, up_bias_ptr, units, inside, D, SLICE)
        hidden = gelu_tanh(hidden) if GELU else silu(hidden)
        mask = inside[:, None] & column_inside[None, :]
        weight = tl.load(down_ptr + columns[None, :] * (4 * D) + units[:, None], mask=mask, other=0.0)
        out = dot(hidden, weight, out)
    return out
