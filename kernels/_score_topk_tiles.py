# mypy: allow-untyped-defs
"""Triton code of `score_topk`: score a split of the catalogue and keep its best keys, then merge the splits.

A candidate is one int64 key: the score's bits, mapped so that integers order as scores do, above the complement of the
item id. Keys are distinct and their order is the order of results, so any selection of the largest keys is exact
whatever order they were found in.
"""

from __future__ import annotations

from kernels._runtime import LIFT_DOTS, constant, jit, tl

LAST_ID = constant(0x7FFFFFFF)
LARGEST_KEY = constant(0x7FFFFFFFFFFFFFFF)
# Key of score -inf and item 0, which fills lists: it decodes to what is returned where too few items are left.
EMPTY = constant((-0x7F800001 << 32) | 0x7FFFFFFF)
FLOAT8_SCALE = constant(256.0)


@jit
def order_bits(bits):
    """Map the bits of float32 numbers to int32 in the same order, and back. -0.0 must have been made 0.0."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def decode_float8(stored):
    """float8_e4m3fn bytes to float16, divided by 256, which the shift leaves out; exact, NaN kept."""
    wide = stored.to(tl.int8, bitcast=True).to(tl.int16)
    bits = tl.where((wide & 0x7F) == 0x7F, 0x7E00, (wide << 7) & -0x4001)
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@jit
def keep_best(keys_ptr, key, slots, k, most, limit):
    """Store the largest keys at keys_ptr and EMPTY behind them, up to ``limit`` slots.

    key: `[SIZE]`, all but EMPTY distinct. slots: ``tl.arange(0, SIZE)``. All real keys are kept if they are ``most`` or
    fewer, else k to ``most`` of the largest. Returns the smallest key kept and the number kept. Every thread has read
    its keys before any is overwritten.
    """
    real = key > EMPTY
    low = tl.min(tl.where(real, key, LARGEST_KEY), 0)
    high = tl.max(key, 0)
    if tl.sum(real.to(tl.int32), 0) <= most:
        high = low
    # Bisection over key values: k or more keys are at least low, fewer than k are above high.
    while low < high:
        # The mean rounded up, without the overflow of a sum.
        middle = (low | high) - ((low ^ high) >> 1)
        count = tl.sum((key >= middle).to(tl.int32), 0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count > most, high, tl.where(count >= k, middle, middle - 1))
    keep = real & (key >= low)
    kept = tl.sum(keep.to(tl.int32), 0)
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.debug_barrier()
    tl.store(keys_ptr + place, key, mask=keep)
    tl.store(keys_ptr + slots, tl.full(slots.shape, EMPTY, tl.int64), mask=(slots >= kept) & (slots < limit))
    return low, kept


@jit
def score_tile(
    rows_ptr, table_ptr, row, row_inside, rows, at, item_inside,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, CHUNK: tl.constexpr, LIFT: tl.constexpr, ROWS: tl.constexpr,
    ITEMS: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """Inner products of the ITEMS table rows from ``at`` on with ROWS rows, `[ITEMS, ROWS]` float32.

    rows: `[BLOCK_WIDTH, ROWS]`, the rows' columns. LIFT: float32 is multiplied instead, CHUNK columns at a time, so
    that operands need few registers, and the rows are read again. Columns are added up in the same
    order whatever the tile, so that an item's score does not depend on the batch or the split.
    """
    item = tl.arange(0, ITEMS)
    tile_ptr = table_ptr + tl.cast(at, tl.int64) * WIDTH
    if not LIFT:
        column = tl.arange(0, BLOCK_WIDTH)
        items = tl.load(
            tile_ptr + item[:, None] * WIDTH + column[None, :],
            mask=item_inside[:, None] & (column < WIDTH)[None, :],
            other=0,
        )
        if FLOAT8:
            items = decode_float8(items)
        if LIFT_DOTS:
            rows = rows.to(tl.float32)
        items = items.to(rows.dtype)
        scores = tl.dot(items, rows, input_precision="ieee")
    else:
        scores = tl.zeros([ITEMS, ROWS], tl.float32)
        for start in range(0, WIDTH, CHUNK):
            column = start + tl.arange(0, CHUNK)
            items = tl.load(
                tile_ptr + item[:, None] * WIDTH + column[None, :],
                mask=item_inside[:, None] & (column < WIDTH)[None, :],
                other=0,
            )
            part = tl.load(
                rows_ptr + row[None, :] * WIDTH + column[:, None],
                mask=row_inside[None, :] & (column < WIDTH)[:, None],
                other=0,
            )
            if FLOAT8:
                items = decode_float8(items)
            scores = tl.dot(items.to(tl.float32), part.to(tl.float32), scores, input_precision="ieee")
    return scores


@jit
def score_splits(
    rows_ptr, table_ptr, scale_ptr, exclude_items_ptr, exclude_offsets_ptr, candidates_ptr, bounds_ptr,
    B, first, last, k, most, reserved, splits, split_items,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, CHUNK: tl.constexpr, LIFT: tl.constexpr, ROWS: tl.constexpr,
    ITEMS: tl.constexpr, CAPACITY: tl.constexpr, FLOAT8: tl.constexpr, SCALED: tl.constexpr, EXCLUDES: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows against one split of the catalogue; leaves the best k keys of each row, unordered.

    candidates: `[B, splits, CAPACITY]` int64, written whole. bounds: `[B, splits]` float32, the k-th best score so far:
    an item at or below it is not kept, since those before it have lower ids. A row's list has ITEMS lanes of CAPACITY /
    ITEMS keys; a tile adds one key to a lane at most, so threads append without asking each other, and as many tiles as
    the fullest lane has room for need no check. Then, seldom, lists are compacted: excluded items are dropped, k to
    ``most`` keys kept in the first ``reserved`` places of the lanes, and the bounds raised.
    """
    DEPTH: tl.constexpr = CAPACITY // ITEMS
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    local_row = tl.arange(0, ROWS)
    row = first_row.to(tl.int64) + local_row
    row_inside = row < B
    live = tl.minimum(B - first_row, ROWS)
    item = tl.arange(0, ITEMS)
    slots = tl.arange(0, CAPACITY)
    column = tl.arange(0, BLOCK_WIDTH)
    # Offsets inside a tile of rows fit in 32 bits; those of tiles do not.
    list_stride = splits * CAPACITY
    lists_ptr = candidates_ptr + first_row.to(tl.int64) * list_stride + split * CAPACITY
    bound_ptr = bounds_ptr + first_row.to(tl.int64) * splits + split
    for index in range(live):
        tl.store(lists_ptr + index * list_stride + slots, tl.full([CAPACITY], EMPTY, tl.int64))
    bound_ptrs = bound_ptr + local_row * splits
    tl.store(bound_ptrs, tl.full([ROWS], float("-inf"), tl.float32), mask=row_inside)
    tl.debug_barrier()

    start = first + split * split_items
    end = tl.minimum(start + split_items, last)
    lists = (local_row * list_stride)[None, :]
    place = lists + item[:, None]
    room = tl.full([], DEPTH, tl.int32)
    while start < end:
        stop = tl.minimum(end, start + room * ITEMS)
        bound = tl.load(bound_ptrs, mask=row_inside, other=float("inf"))
        # Read again for every run of tiles: held through compaction, the rows would cost registers.
        rows = tl.load(
            rows_ptr + row[None, :] * WIDTH + column[:, None],
            mask=row_inside[None, :] & (column < WIDTH)[:, None],
            other=0,
        )
        for at in range(start, stop, ITEMS):
            ids = at + item
            item_inside = ids < end
            if SCALED:
                scale = tl.load(scale_ptr + ids, mask=item_inside, other=0.0)
            scores = score_tile(
                rows_ptr, table_ptr, row, row_inside, rows, at, item_inside,
                WIDTH, BLOCK_WIDTH, CHUNK, LIFT, ROWS, ITEMS, FLOAT8,
            )  # fmt: skip
            if FLOAT8:
                scores = scores * FLOAT8_SCALE
            if SCALED:
                scores = scores * scale[:, None]
            # NaN passes no comparison, and nothing passes -inf: neither is ever returned.
            passed = (scores > bound[None, :]) & item_inside[:, None]
            if tl.max(passed.to(tl.int32)) > 0:
                # -0.0 and 0.0 are one score.
                scores = tl.where(scores == 0.0, 0.0, scores)
                bits = order_bits(scores.to(tl.int32, bitcast=True))
                key = (bits.to(tl.int64) << 32) | (ids ^ LAST_ID).to(tl.int64)[:, None]
                tl.store(lists_ptr + place, key, mask=passed)
                place += passed.to(tl.int32) * ITEMS
        start = stop
        room = DEPTH - tl.max(place - lists) // ITEMS
        done = start >= end
        if (room < DEPTH // 4) | done:
            tl.debug_barrier()
            for index in range(live):
                list_ptr = lists_ptr + index * list_stride
                key = tl.load(list_ptr + slots)
                if EXCLUDES:
                    complement = (key & LAST_ID).to(tl.int32)
                    offsets_ptr = exclude_offsets_ptr + first_row + index
                    for entry in range(tl.load(offsets_ptr), tl.load(offsets_ptr + 1)):
                        excluded = tl.load(exclude_items_ptr + entry) ^ LAST_ID
                        key = tl.where(complement == excluded, EMPTY, key)
                worst, kept = keep_best(list_ptr, key, slots, k, tl.where(done, k, most), CAPACITY)
                bits = order_bits((worst >> 32).to(tl.int32))
                if kept >= k:
                    tl.store(bound_ptr + index * splits, bits.to(tl.float32, bitcast=True))
            tl.debug_barrier()
            place = lists + item[:, None] + reserved * ITEMS
            room = DEPTH - reserved


@jit
def merge_splits(
    candidates_ptr, items_ptr, scores_ptr, k, splits, step,
    CAPACITY: tl.constexpr, BEST: tl.constexpr, FAN: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One program: the best k keys of FAN lists of one row, left in the first of them; LAST: sorted and written out.

    Lists are those of splits ``(group FAN + i) step``, k keys each. BEST: k rounded up to a power of two. items and
    scores are `[B, k]`.
    """
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * FAN * step
    list_ptr = candidates_ptr + (row * splits + begin) * CAPACITY
    index = tl.arange(0, FAN * BEST)
    split = index // BEST * step
    slot = index % BEST
    key = tl.load(list_ptr + split * CAPACITY + slot, mask=(begin + split < splits) & (slot < k), other=EMPTY)
    keep_best(list_ptr, key, index, k, k, k)
    if LAST:
        tl.debug_barrier()
        best = tl.arange(0, BEST)
        key = tl.sort(tl.load(list_ptr + best, mask=best < k, other=EMPTY), descending=True)
        bits = order_bits((key >> 32).to(tl.int32))
        tl.store(items_ptr + row * k + best, (key & LAST_ID) ^ LAST_ID, mask=best < k)
        tl.store(scores_ptr + row * k + best, bits.to(tl.float32, bitcast=True), mask=best < k)
