# mypy: allow-untyped-defs
"""Stages of `kernels._encode_prefix_kernel`: finding a program's users, projections, attention, the rest of a block."""

from __future__ import annotations

from kernels._runtime import constant, jit, tl
from kernels._tile_ops import dot, gelu_tanh, layer_norm, to_storage

BLOCK_NORM_EPSILON = constant(1e-12)
UNIT_EPSILON = constant(1e-12)
# Offsets read at a time by the search: two rounds find one user among 16 thousand, where bisection takes 14.
PROBES = constant(128)
USERS = constant(16)


@jit
def first_at_least(offsets_ptr, count, target):
    """Index of the first of ``count`` rising offsets that is at least ``target``; ``count`` where there is none."""
    first = tl.full([], 0, tl.int32)
    left = tl.full([], 0, tl.int32) + count
    while left > 0:
        stride = (left + PROBES - 1) // PROBES
        probe = (tl.arange(0, PROBES) + 1) * stride - 1
        values = tl.load(offsets_ptr + first + probe, mask=probe < left, other=target)
        passed = tl.sum((values < target).to(tl.int32), 0) * stride
        first += passed
        left = tl.minimum(stride - 1, left - passed)
    return first


@jit
def users_of_rows(offsets_ptr, first_user, end_user, origin, rows):
    """User of each row, and where that user's history starts and ends: rows counted from the token ``origin``."""
    TILE: tl.constexpr = rows.shape[0]
    user = tl.zeros([TILE], tl.int32) + (first_user - 1)
    start = tl.zeros([TILE], tl.int32)
    end = tl.full([TILE], 2147483647, tl.int32)
    for first in tl.range(first_user, end_user + 1, USERS, disable_licm=True):
        bound = first + tl.arange(0, USERS)
        known = (bound <= end_user)[None, :]
        bounds = (tl.load(offsets_ptr + bound, mask=bound <= end_user, other=0) - origin).to(tl.int32)[None, :]
        before = known & (bounds <= rows[:, None])
        after = known & (bounds > rows[:, None])
        user += tl.sum(before.to(tl.int32), 1)
        start = tl.maximum(start, tl.max(tl.where(before, bounds, 0), 1))
        end = tl.minimum(end, tl.min(tl.where(after, bounds, 2147483647), 1))
    return user, start, end


@jit
def project(operand, rows_ptr, weight_ptr, bias_ptr, outputs, inside, width, D: tl.constexpr, SLICE: tl.constexpr):
    """Chunk times some rows (``outputs``) of a weight `[.., D]`, plus bias: `[TILE, outputs]` float32.

    operand: the chunk `[TILE, WIDTH]` in storage dtype, used where SLICE is WIDTH. Otherwise its copy at ``rows_ptr``
    is read in slices: products that tensor cores do not do hold whole operands in registers.
    """
    TILE: tl.constexpr = operand.shape[0]
    WIDTH: tl.constexpr = operand.shape[1]
    bias = tl.load(bias_ptr + outputs, mask=inside, other=0.0)
    product = tl.zeros([TILE, outputs.shape[0]], tl.float32) + bias[None, :]
    columns = tl.arange(0, SLICE)
    if SLICE == WIDTH:
        mask = inside[None, :] & (columns < D)[:, None]
        weight = tl.load(weight_ptr + outputs[None, :] * D + columns[:, None], mask=mask, other=0.0)
        product = dot(operand, weight, product)
    else:
        rows = tl.arange(0, TILE)
        for first in tl.range(0, width, SLICE, disable_licm=True):
            mask = inside[None, :] & (first + columns < D)[:, None]
            part = tl.load(rows_ptr + rows[:, None] * WIDTH + first + columns[None, :])
            weight = tl.load(weight_ptr + outputs[None, :] * D + first + columns[:, None], mask=mask, other=0.0)
            product = dot(part, weight, product)
    return product


@jit
def halves(x):
    """Left and right half of the columns."""
    ROWS: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, HALF]), (0, 2, 1)))


@jit
def attend(query, key, value, visible, scale, top, total, mixed):
    """One more tile of keys by online softmax: running maximum, denominator and numerator of each query row.

    query: `[TILE, d]`. key, value: `[KEYS, d]`. visible: `[TILE, KEYS]`. top, total: `[TILE]`. mixed: `[TILE, d]`.
    """
    scores = tl.zeros([query.shape[0], key.shape[0]], tl.float32)
    if key.dtype == tl.float32 and key.shape[1] > 64:
        # Exact products hold their operands in registers: those of 128 columns would spill.
        query, other_query = halves(query)
        key, other_key = halves(key)
        scores = dot(other_query, tl.trans(other_key), scores)
    scores = tl.where(visible, dot(query, tl.trans(key), scores) * scale, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # Where no key was seen yet any finite number does: exp(-inf - safe) is then 0 and not NaN.
    safe = tl.where(new_top == -float("inf"), 0.0, new_top)
    weights = tl.exp(scores - safe[:, None])
    keep = tl.exp(top - safe)
    return new_top, total * keep + tl.sum(weights, 1), dot(weights, value, mixed * keep[:, None])


@jit
def matrix(pointer, rows, row_inside, row_stride, columns, column_inside):
    """Load a tile of a row-major matrix; zero outside."""
    places = rows[:, None] * row_stride + columns[None, :]
    return tl.load(pointer + places, mask=row_inside[:, None] & column_inside[None, :], other=0.0)


@jit
def attend_pad_row(query, pads_ptr, absent, outputs, inside, scale, D: tl.constexpr):
    """Begin online softmax with one pad row that stands for ``absent`` pads: see `attend`."""
    key = tl.load(pads_ptr + outputs, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(pads_ptr + D + outputs, mask=inside, other=0.0).to(tl.float32)
    total = tl.where(absent > 0, 1.0, 0.0)
    top = tl.sum(query * key[None, :], 1) * scale + tl.log(tl.maximum(absent, 1).to(tl.float32))
    return tl.where(absent > 0, top, -float("inf")), total, total[:, None] * value[None, :]


@jit
def cells_of(pointer, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses of a `[TILE, WIDTH]` buffer."""
    return pointer + tl.arange(0, TILE)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@jit
def keep(x, residual, operand, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Hand the rows of a chunk on to the next stage of this program, in float32 and in storage dtype.

    Rows held in registers across stages would spill: the compiler spreads the layouts of one stage over all others.
    The barrier: in the next stage threads read what other threads have written here.
    """
    tl.store(cells_of(residual, TILE, WIDTH), x)
    tl.store(cells_of(operand, TILE, WIDTH), to_storage(x, operand.dtype.element_ty))
    tl.debug_barrier()


@jit
def embed_rows(
    items_ptr,
    table_ptr,
    positions_ptr,
    norm_ptr,
    valid,
    place,
    columns,
    epsilon,
    D: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """``LN(E[item] + position)``. items_ptr: addresses of the rows' items. place: position of each row."""
    inside = columns < D
    item = tl.load(items_ptr, mask=valid, other=0)
    x = matrix(table_ptr, item, valid, D, columns, inside).to(tl.float32)
    if POSITIONS:
        x += matrix(positions_ptr, place, valid, D, columns, inside).to(tl.float32)
    return layer_norm(x, norm_ptr, norm_ptr + D, columns, D, epsilon)


@jit
def clean_targets(items_ptr, table_ptr, start_time_ptr, has_next, columns, D: tl.constexpr, GEODESIC: tl.constexpr):
    """``clean(E[next item]) + e_0``. items_ptr: addresses of the rows' items, after which the next ones stand."""
    inside = columns < D
    item = tl.load(items_ptr + 1, mask=has_next, other=0)
    clean = matrix(table_ptr, item, has_next, D, columns, inside).to(tl.float32)
    if GEODESIC:
        clean /= tl.maximum(tl.sqrt(tl.sum(clean * clean, 1)), UNIT_EPSILON)[:, None]
    return clean + tl.load(start_time_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]


@jit
def add_attention(
    residual_ptr, mixed_ptr, out, out_bias, norm, tile, columns, width, D: tl.constexpr, SLICE: tl.constexpr
):
    """``LN(x + out(mixed))`` of a chunk."""
    TILE: tl.constexpr = tile.shape[0]
    WIDTH: tl.constexpr = columns.shape[0]
    inside = columns < D
    x = tl.load(cells_of(residual_ptr, TILE, WIDTH)) + tl.load(out_bias + columns, mask=inside, other=0.0)[None, :]
    for first in tl.range(0, width, SLICE, disable_licm=True):
        units = first + tl.arange(0, SLICE)
        mixed = matrix(mixed_ptr, tile, tile >= 0, WIDTH, units, units < D)
        x = dot(mixed, tl.trans(matrix(out, columns, inside, D, units, units < D)), x)
    return layer_norm(x, norm, norm + D, columns, D, BLOCK_NORM_EPSILON)


@jit
def add_feed_forward(
    residual_ptr, rows_ptr, up, up_bias, down, down_bias, norm, tile, columns, width,
    D: tl.constexpr, SLICE: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """``LN(x + down(gelu(up(x))))`` of a chunk, HIDDEN of the 4 D hidden units at a time."""
    TILE: tl.constexpr = tile.shape[0]
    WIDTH: tl.constexpr = columns.shape[0]
    inside = columns < D
    operand = tl.load(cells_of(rows_ptr, TILE, WIDTH))
    x = tl.load(cells_of(residual_ptr, TILE, WIDTH)) + tl.load(down_bias + columns, mask=inside, other=0.0)[None, :]
    for first in tl.range(0, 4 * width, HIDDEN, disable_licm=True):
        units = first + tl.arange(0, HIDDEN)
        known = units < 4 * D
        hidden = gelu_tanh(project(operand, rows_ptr, up, up_bias, units, known, width, D, SLICE))
        x = dot(hidden, tl.trans(matrix(down, columns, inside, 4 * D, units, known)), x)
    return layer_norm(x, norm, norm + D, columns, D, BLOCK_NORM_EPSILON)
