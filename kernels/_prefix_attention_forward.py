# mypy: allow-untyped-defs
"""Attention over packed histories, forward: a tile of packed tokens and one head per program.

Histories are short (8.5 tokens on average), so a tile of consecutive packed tokens holds several users: each row sees
the keys from its own user's start to itself, a block-diagonal causal mask of which nothing is stored. The keys of a
tile begin at the start of its first row's user. Everything runs in base 2: scores are scaled by log2(e) and
exponentials are `exp2`, which is what the hardware has.

What the forward and backward kernels share is here too: the weight of padding, and dropout drawn by counter.
"""

from __future__ import annotations

from kernels._runtime import constant, jit, tl
from kernels._tile_ops import dot, to_storage

# How padding is read: not at all; one program reads tiles of the pads that all users share; or row by row, since there
# is one pad, or since each user has its own.
NO_PADS, SHARED_PADS, PADS_BY_ROW = 0, 1, 2
_SHARED = constant(SHARED_PADS)
_BY_ROW = constant(PADS_BY_ROW)
LOG2_E = constant(1.4426950408889634)
# A finite "nothing yet" for the running maximum: -inf minus -inf is not a number.
_LOWEST = constant(-1.0e30)

# Counters of dropout, (row * H + head) * 2^16 + quad: see `kernels.prefix_attention.dropout_factors`.
QUAD_BITS = 16
TOKEN_QUADS = 1 << 15
DRAW_LEVELS = 1 << 16
_QUAD_BITS = constant(QUAD_BITS)
_TOKEN_QUADS = constant(TOKEN_QUADS)


@jit
def load_tile(rows_ptr, real, first, HEAD: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns from ``first`` on of rows `[ROWS, 1]` of pointers; zeros beyond a head's width."""
    columns = first + tl.arange(0, COLUMNS)
    return tl.load(rows_ptr + columns[None, :], mask=real[:, None] & (columns < HEAD)[None, :], other=0.0)


@jit
def keep_quads(seed, counters, dropped, COLUMNS: tl.constexpr):
    """Which of 4 keys per counter `[ROWS, COLUMNS / 4]` survive dropout: `[ROWS, COLUMNS]`."""
    word0, word1, _, _ = tl.randint4x(seed, counters)
    even = tl.join((word0 & 0xFFFF).to(tl.int32), (word1 & 0xFFFF).to(tl.int32))
    odd = tl.join((word0 >> 16).to(tl.int32), (word1 >> 16).to(tl.int32))
    return tl.reshape(tl.join(even, odd), (counters.shape[0], COLUMNS)) >= dropped


@jit
def keep_tokens(seed, counters, rows, first, dropped, COLUMNS: tl.constexpr):
    """Dropout between query rows and the packed tokens from ``first`` (a multiple of 4) on."""
    quads = (rows >> 2)[:, None] - ((first >> 2) + tl.arange(0, COLUMNS // 4))[None, :]
    return keep_quads(seed, counters[:, None] + (_TOKEN_QUADS + quads), dropped, COLUMNS)


@jit
def keep_pads(seed, counters, first, dropped, COLUMNS: tl.constexpr):
    """Dropout between query rows and the pads from ``first`` (a multiple of 4) on."""
    quads = (first >> 2) + tl.arange(0, COLUMNS // 4)
    return keep_quads(seed, counters[:, None] + quads[None, :], dropped, COLUMNS)


@jit
def keep_pad(seed, counters, pad, dropped):
    """Dropout between query rows and one pad: `[ROWS]`."""
    word0, word1, _, _ = tl.randint4x(seed, counters + (pad >> 2))
    word = tl.where((pad & 2) == 0, word0, word1)
    return ((word >> ((pad & 1) * 16)) & 0xFFFF).to(tl.int32) >= dropped


@jit
def pad_weight(bias_ptr, user, count, pad, inside, PADS: tl.constexpr, BIASED: tl.constexpr):
    """What padding adds to a score, in base 2: a given bias, or by the number of pads of the row's history."""
    if BIASED:
        weight = tl.load(bias_ptr + user * PADS + pad, mask=inside, other=float("-inf")).to(tl.float32) * LOG2_E
    elif PADS == 1:
        weight = tl.where(inside & (count > 0), tl.log2(tl.maximum(count, 1).to(tl.float32)), float("-inf"))
    else:
        weight = tl.where(inside & (pad < count), 0.0, float("-inf"))
    return weight


@jit
def accumulate(scores, value, kept, keep_scale, maximum, total, mixed, DROPOUT: tl.constexpr):
    """One step of the online softmax with a tile of scores in base 2 and its values."""
    higher = tl.maximum(maximum, tl.max(scores, 1))
    shrink = tl.exp2(maximum - higher)
    weights = tl.exp2(scores - higher[:, None])
    total = total * shrink + tl.sum(weights, 1)
    if DROPOUT:
        # The sum of the softmax is taken before dropout.
        weights = tl.where(kept, weights * keep_scale, 0.0)
    return higher, total, dot(to_storage(weights, value.dtype), value, mixed * shrink[:, None])


@jit
def prefix_attention_kernel(
    qkv_ptr, offsets_ptr, users_ptr, pads_ptr, bias_ptr, seed_ptr, output_ptr, log_sum_ptr,
    tokens, heads, pad_half, max_length, scale, dropped, keep_scale,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PADS: tl.constexpr,
    PAD_MODE: tl.constexpr, OWN: tl.constexpr, BIASED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    head = tl.program_id(1)
    rows = first_row + tl.arange(0, ROWS)
    real = rows < tokens
    user = tl.load(users_ptr + rows, mask=real, other=0)
    # Rows beyond the last token see the zeros beyond it, so that nothing is divided by zero.
    start = tl.load(offsets_ptr + user, mask=real, other=tokens)
    stride = 3 * heads * HEAD
    qkv_ptr += head * HEAD
    query = load_tile(qkv_ptr + rows[:, None] * stride, real, 0, HEAD, WIDTH)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    counters = (rows * heads + head) << _QUAD_BITS

    maximum = tl.full((ROWS,), _LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    count = max_length - (tl.load(offsets_ptr + user + 1, mask=real, other=tokens) - start)
    if PAD_MODE == _SHARED:
        for first in range(0, PADS, ROWS):
            pad = first + tl.arange(0, ROWS)
            there = pad < PADS
            pad_rows = pads_ptr + (head.to(tl.int64) * PADS + pad[:, None]) * HEAD
            key = load_tile(pad_rows, there, 0, HEAD, WIDTH)
            value = load_tile(pad_rows + pad_half, there, 0, HEAD, WIDTH)
            visible = real[:, None] & there[None, :]
            scores = dot(query, tl.trans(key), tl.zeros((ROWS, ROWS), tl.float32)) * (scale * LOG2_E)
            scores += pad_weight(bias_ptr, user[:, None], count[:, None], pad[None, :], visible, PADS, BIASED)
            kept = keep_pads(seed, counters, first, dropped, ROWS) if DROPOUT else visible
            maximum, total, mixed = accumulate(scores, value, kept, keep_scale, maximum, total, mixed, DROPOUT)
    if PAD_MODE == _BY_ROW:
        pad_rows = pads_ptr + ((user * OWN)[:, None] * heads + head) * PADS * HEAD
        for pad in range(PADS):
            key = load_tile(pad_rows + pad * HEAD, real, 0, HEAD, WIDTH).to(tl.float32)
            value = load_tile(pad_rows + pad_half + pad * HEAD, real, 0, HEAD, WIDTH).to(tl.float32)
            scores = tl.sum(query.to(tl.float32) * key, 1) * (scale * LOG2_E)
            scores += pad_weight(bias_ptr, user, count, pad, real, PADS, BIASED)
            higher = tl.maximum(maximum, scores)
            shrink = tl.exp2(maximum - higher)
            weights = tl.exp2(scores - higher)
            total = total * shrink + weights
            if DROPOUT:
                weights = tl.where(keep_pad(seed, counters, pad, dropped), weights * keep_scale, 0.0)
            mixed = mixed * shrink[:, None] + weights[:, None] * value
            maximum = higher

    # The first row's user starts the keys; a multiple of 4, since dropout draws for 4 keys at a time.
    first_key = tl.load(offsets_ptr + tl.load(users_ptr + first_row)) // 4 * 4
    for first in range(first_key, first_row + ROWS, ROWS):
        token = first + tl.arange(0, ROWS)
        key_rows = qkv_ptr + heads * HEAD + token[:, None] * stride
        key = load_tile(key_rows, token < tokens, 0, HEAD, WIDTH)
        value = load_tile(key_rows + heads * HEAD, token < tokens, 0, HEAD, WIDTH)
        visible = (token[None, :] <= rows[:, None]) & (token[None, :] >= start[:, None])
        scores = dot(query, tl.trans(key), tl.zeros((ROWS, ROWS), tl.float32)) * (scale * LOG2_E)
        scores = tl.where(visible, scores, float("-inf"))
        kept = keep_tokens(seed, counters, rows, first, dropped, ROWS) if DROPOUT else visible
        maximum, total, mixed = accumulate(scores, value, kept, keep_scale, maximum, total, mixed, DROPOUT)

    columns = tl.arange(0, WIDTH)
    place = output_ptr + (rows[:, None] * heads + head) * HEAD + columns[None, :]
    mixed = to_storage(mixed / total[:, None], output_ptr.dtype.element_ty)
    tl.store(place, mixed, mask=real[:, None] & (columns < HEAD)[None, :])
    tl.store(log_sum_ptr + head.to(tl.int64) * tokens + rows, maximum + tl.log2(total), mask=real)
