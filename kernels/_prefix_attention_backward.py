# mypy: allow-untyped-defs
"""Attention over packed histories, backward: everything is recomputed from queries, keys and the log-sum-exp.

A tile of packed tokens and one head belong to two programs. One takes the tokens as queries and looks back (gradient of
the queries), the other takes them as keys and looks at the rows ahead (gradients of keys and values). No two programs
write to the same place. The gradient of padding sums over rows of many programs, which write partial sums; these are
then summed in a fixed order, so results do not vary from run to run.
"""

from __future__ import annotations

from kernels._prefix_attention_forward import (
    LOG2_E,
    PADS_BY_ROW,
    QUAD_BITS,
    SHARED_PADS,
    keep_pad,
    keep_pads,
    keep_tokens,
    load_tile,
    pad_weight,
)
from kernels._runtime import constant, jit, tl
from kernels._tile_ops import dot, to_storage

_SHARED = constant(SHARED_PADS)
_BY_ROW = constant(PADS_BY_ROW)
_QUAD_BITS = constant(QUAD_BITS)


@jit
def products(left, right, left_ptr, right_ptr, left_real, right_real, HEAD: tl.constexpr, CHUNK: tl.constexpr):
    """``left @ right^T``. Read again, CHUNK columns at a time, where tiles are wider than that.

    An exact float32 product is not made by tensor cores, and holds its operands in registers over all columns.
    """
    total = tl.zeros((left.shape[0], right.shape[0]), tl.float32)
    if left.shape[1] > CHUNK:
        for first in range(0, HEAD, CHUNK):
            part = load_tile(right_ptr, right_real, first, HEAD, CHUNK)
            total = dot(load_tile(left_ptr, left_real, first, HEAD, CHUNK), tl.trans(part), total)
    else:
        total = dot(left, tl.trans(right), total)
    return total


@jit
def score_gradients(scores, towards, log_sum, delta, visible, kept, keep_scale, DROPOUT: tl.constexpr):
    """Attention after dropout and the gradient of the scores, from scores in base 2 and ``gradient @ value^T``."""
    attention = tl.where(visible, tl.exp2(scores - log_sum), 0.0)
    mixed = attention
    if DROPOUT:
        mixed = tl.where(kept, attention * keep_scale, 0.0)
        towards = tl.where(kept, towards * keep_scale, 0.0)
    return mixed, attention * (towards - delta)


@jit
def row_sums(output_ptr, gradient, log_sum_ptr, rows, real, HEAD: tl.constexpr):
    """Log-sum-exp of rows, and the inner product of output and gradient, both `[ROWS, 1]`."""
    output = load_tile(output_ptr, real, 0, HEAD, gradient.shape[1])
    log_sum = tl.load(log_sum_ptr + rows, mask=real, other=0.0)
    return log_sum[:, None], tl.sum(output.to(tl.float32) * gradient.to(tl.float32), 1)[:, None]


@jit
def prefix_attention_backward_kernel(
    qkv_ptr, offsets_ptr, users_ptr, pads_ptr, bias_ptr, seed_ptr, output_ptr, log_sum_ptr, gradient_ptr,
    qkv_gradient_ptr, partial_ptr,
    tokens, heads, pad_half, max_length, scale, dropped, keep_scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, PADS: tl.constexpr,
    PAD_MODE: tl.constexpr, OWN: tl.constexpr, PARTIAL: tl.constexpr, BIASED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    head = tl.program_id(1)
    rows = first_row + tl.arange(0, ROWS)
    real = rows < tokens
    columns = tl.arange(0, WIDTH)
    inside = columns < HEAD
    present = real[:, None] & inside[None, :]
    user = tl.load(users_ptr + rows, mask=real, other=0)
    stride, output_stride = 3 * heads * HEAD, heads * HEAD
    qkv_ptr += head * HEAD
    output_ptr += head * HEAD
    gradient_ptr += head * HEAD
    log_sum_ptr += head.to(tl.int64) * tokens
    own = qkv_ptr + rows[:, None] * stride
    place = qkv_gradient_ptr + rows[:, None] * stride + head * HEAD + columns[None, :]
    element = qkv_gradient_ptr.dtype.element_ty
    seed = tl.load(seed_ptr) if DROPOUT else 0

    if tl.program_id(2) == 0:
        # As queries: padding, then the keys up to these tokens.
        start = tl.load(offsets_ptr + user, mask=real, other=tokens)
        own_gradient = gradient_ptr + rows[:, None] * output_stride
        query = load_tile(own, real, 0, HEAD, WIDTH)
        gradient = load_tile(own_gradient, real, 0, HEAD, WIDTH)
        log_sum, delta = row_sums(
            output_ptr + rows[:, None] * output_stride, gradient, log_sum_ptr, rows, real, HEAD
        )  # fmt: skip
        counters = (rows * heads + head) << _QUAD_BITS
        query_gradient = tl.zeros((ROWS, WIDTH), tl.float32)
        count = max_length - (tl.load(offsets_ptr + user + 1, mask=real, other=tokens) - start)
        if PAD_MODE == _SHARED:
            for first in range(0, PADS, ROWS):
                pad = first + tl.arange(0, ROWS)
                there = pad < PADS
                pad_rows = pads_ptr + (head.to(tl.int64) * PADS + pad[:, None]) * HEAD
                key = load_tile(pad_rows, there, 0, HEAD, WIDTH)
                value = load_tile(pad_rows + pad_half, there, 0, HEAD, WIDTH)
                visible = real[:, None] & there[None, :]
                scores = products(query, key, own, pad_rows, real, there, HEAD, CHUNK) * (scale * LOG2_E)
                scores += pad_weight(bias_ptr, user[:, None], count[:, None], pad[None, :], visible, PADS, BIASED)
                towards = products(gradient, value, own_gradient, pad_rows + pad_half, real, there, HEAD, CHUNK)
                kept = keep_pads(seed, counters, first, dropped, ROWS) if DROPOUT else visible
                _, slope = score_gradients(scores, towards, log_sum, delta, visible, kept, keep_scale, DROPOUT)
                query_gradient = dot(to_storage(slope, key.dtype), key, query_gradient)
        if PAD_MODE == _BY_ROW:
            pad_rows = pads_ptr + ((user * OWN)[:, None] * heads + head) * PADS * HEAD
            for pad in range(PADS):
                key = load_tile(pad_rows + pad * HEAD, real, 0, HEAD, WIDTH).to(tl.float32)
                value = load_tile(pad_rows + pad_half + pad * HEAD, real, 0, HEAD, WIDTH).to(tl.float32)
                scores = tl.sum(query.to(tl.float32) * key, 1)[:, None] * (scale * LOG2_E)
                scores += pad_weight(bias_ptr, user, count, pad, real, PADS, BIASED)[:, None]
                towards = tl.sum(gradient.to(tl.float32) * value, 1)[:, None]
                kept = keep_pad(seed, counters, pad, dropped)[:, None] if DROPOUT else real[:, None]
                mixed, slope = score_gradients(
                    scores, towards, log_sum, delta, real[:, None], kept, keep_scale, DROPOUT
                )  # fmt: skip
                query_gradient += slope * key
                if PARTIAL:
                    # One pad that all users share: its gradient from the rows of this tile.
                    sums = partial_ptr + (tl.program_id(0).to(tl.int64) * heads + head) * HEAD + columns
                    half = tl.num_programs(0).to(tl.int64) * heads * HEAD
                    tl.store(sums, tl.sum(slope * query.to(tl.float32), 0) * scale, mask=inside)
                    tl.store(sums + half, tl.sum(mixed * gradient.to(tl.float32), 0), mask=inside)
        first_key = tl.load(offsets_ptr + tl.load(users_ptr + first_row)) // 4 * 4
        for first in range(first_key, first_row + ROWS, ROWS):
            token = first + tl.arange(0, ROWS)
            there = token < tokens
            key_rows = qkv_ptr + heads * HEAD + token[:, None] * stride
            value_rows = key_rows + heads * HEAD
            key = load_tile(key_rows, there, 0, HEAD, WIDTH)
            value = load_tile(value_rows, there, 0, HEAD, WIDTH)
            visible = (token[None, :] <= rows[:, None]) & (token[None, :] >= start[:, None])
            scores = products(query, key, own, key_rows, real, there, HEAD, CHUNK) * (scale * LOG2_E)
            towards = products(gradient, value, own_gradient, value_rows, real, there, HEAD, CHUNK)
            kept = keep_tokens(seed, counters, rows, first, dropped, ROWS) if DROPOUT else visible
            _, slope = score_gradients(scores, towards, log_sum, delta, visible, kept, keep_scale, DROPOUT)
            query_gradient = dot(to_storage(slope, key.dtype), key, query_gradient)
        tl.store(place, to_storage(query_gradient * scale, element), mask=present)
    else:
        # As keys and values: the rows from these tokens on, up to the end of the last one's user.
        end = tl.load(offsets_ptr + user + 1, mask=real, other=0)
        key_rows = own + heads * HEAD
        value_rows = key_rows + heads * HEAD
        key = load_tile(key_rows, real, 0, HEAD, WIDTH)
        value = load_tile(value_rows, real, 0, HEAD, WIDTH)
        key_gradient = tl.zeros((ROWS, WIDTH), tl.float32)
        value_gradient = tl.zeros((ROWS, WIDTH), tl.float32)
        last_row = tl.minimum(first_row + ROWS, tokens) - 1
        last_end = tl.load(offsets_ptr + tl.load(users_ptr + last_row) + 1)
        for first in range(first_row, last_end, ROWS):
            ahead = first + tl.arange(0, ROWS)
            there = ahead < tokens
            query_rows = qkv_ptr + ahead[:, None] * stride
            gradient_rows = gradient_ptr + ahead[:, None] * output_stride
            query = load_tile(query_rows, there, 0, HEAD, WIDTH)
            gradient = load_tile(gradient_rows, there, 0, HEAD, WIDTH)
            log_sum, delta = row_sums(
                output_ptr + ahead[:, None] * output_stride, gradient, log_sum_ptr, ahead, there, HEAD
            )  # fmt: skip
            visible = (ahead[:, None] >= rows[None, :]) & (ahead[:, None] < end[None, :])
            scores = products(query, key, query_rows, key_rows, there, real, HEAD, CHUNK) * (scale * LOG2_E)
            towards = products(gradient, value, gradient_rows, value_rows, there, real, HEAD, CHUNK)
            kept = visible
            if DROPOUT:
                kept = keep_tokens(seed, (ahead * heads + head) << _QUAD_BITS, ahead, first_row, dropped, ROWS)
            mixed, slope = score_gradients(scores, towards, log_sum, delta, visible, kept, keep_scale, DROPOUT)
            key_gradient = dot(tl.trans(to_storage(slope, query.dtype)), query, key_gradient)
            value_gradient = dot(tl.trans(to_storage(mixed, gradient.dtype)), gradient, value_gradient)
        tl.store(place + output_stride, to_storage(key_gradient * scale, element), mask=present)
        tl.store(place + 2 * output_stride, to_storage(value_gradient, element), mask=present)


@jit
def prefix_attention_pads_kernel(
    qkv_ptr, offsets_ptr, users_ptr, pads_ptr, bias_ptr, seed_ptr, output_ptr, log_sum_ptr, gradient_ptr, partial_ptr,
    tokens, heads, pad_half, max_length, scale, dropped, keep_scale, stretch,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, PADS: tl.constexpr,
    OWN: tl.constexpr, BIASED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """A tile of pads, a head, and some rows: a user's where pads are each user's own, else ``stretch`` of them."""
    part = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first_pad = tl.program_id(2) * ROWS
    pad = first_pad + tl.arange(0, ROWS)
    there = pad < PADS
    if OWN:
        first_row, last_row = tl.load(offsets_ptr + part), tl.load(offsets_ptr + part + 1)
    else:
        first_row, last_row = part * stretch, tl.minimum((part + 1) * stretch, tokens)
    stride, output_stride = 3 * heads * HEAD, heads * HEAD
    qkv_ptr += head * HEAD
    output_ptr += head * HEAD
    gradient_ptr += head * HEAD
    log_sum_ptr += head.to(tl.int64) * tokens
    seed = tl.load(seed_ptr) if DROPOUT else 0
    pad_rows = pads_ptr + ((part * OWN * heads + head) * PADS + pad[:, None]) * HEAD
    key = load_tile(pad_rows, there, 0, HEAD, WIDTH)
    value = load_tile(pad_rows + pad_half, there, 0, HEAD, WIDTH)
    key_gradient = tl.zeros((ROWS, WIDTH), tl.float32)
    value_gradient = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(first_row, last_row, ROWS):
        rows = first + tl.arange(0, ROWS)
        real = rows < last_row
        user = tl.load(users_ptr + rows, mask=real, other=0)
        length = tl.load(offsets_ptr + user + 1, mask=real, other=0) - tl.load(offsets_ptr + user, mask=real, other=0)
        query_rows = qkv_ptr + rows[:, None] * stride
        gradient_rows = gradient_ptr + rows[:, None] * output_stride
        query = load_tile(query_rows, real, 0, HEAD, WIDTH)
        gradient = load_tile(gradient_rows, real, 0, HEAD, WIDTH)
        log_sum, delta = row_sums(
            output_ptr + rows[:, None] * output_stride, gradient, log_sum_ptr, rows, real, HEAD
        )  # fmt: skip
        visible = real[:, None] & there[None, :]
        scores = products(query, key, query_rows, pad_rows, real, there, HEAD, CHUNK) * (scale * LOG2_E)
        scores += pad_weight(
            bias_ptr, user[:, None], (max_length - length)[:, None], pad[None, :], visible, PADS, BIASED
        )  # fmt: skip
        towards = products(gradient, value, gradient_rows, pad_rows + pad_half, real, there, HEAD, CHUNK)
        kept = visible
        if DROPOUT:
            kept = keep_pads(seed, (rows * heads + head) << _QUAD_BITS, first_pad, dropped, ROWS)
        mixed, slope = score_gradients(scores, towards, log_sum, delta, visible, kept, keep_scale, DROPOUT)
        key_gradient = dot(tl.trans(to_storage(slope, query.dtype)), query, key_gradient)
        value_gradient = dot(tl.trans(to_storage(mixed, gradient.dtype)), gradient, value_gradient)
    columns = tl.arange(0, WIDTH)
    present = there[:, None] & (columns < HEAD)[None, :]
    sums = partial_ptr + ((part * heads + head) * PADS + pad[:, None]) * HEAD + columns[None, :]
    tl.store(sums, key_gradient * scale, mask=present)
    tl.store(sums + tl.num_programs(0).to(tl.int64) * heads * PADS * HEAD, value_gradient, mask=present)
