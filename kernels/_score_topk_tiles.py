# mypy: allow-untyped-defs
"""Triton code of `score_topk`: score a split of the catalogue and keep its best keys (`_score_topk_merge`)."""

from __future__ import annotations

from kernels._runtime import LIFT_DOTS, constant, jit, tl
from kernels._score_topk_merge import EMPTY, LAST_ID, keep_best, merge_if_last, order_bits

FLOAT8_SCALE = constant(256.0)


@jit
def decode_float8(stored):
    """float8_e4m3fn bytes to float16, divided by 256, which the shift leaves out; exact, NaN kept."""
    wide = stored.to(tl.int8, bitcast=True).to(tl.int16)
    bits = tl.where((wide & 0x7F) == 0x7F, 0x7E00, (wide << 7) & -0x4001)
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


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
def drop_excluded(key, exclude_items_ptr, offsets_ptrs, inside):
    """Put EMPTY for the keys of each row's excluded items. key: `[ROWS, SIZE]`. offsets_ptrs, inside: `[ROWS]`."""
    complement = (key & LAST_ID).to(tl.int32)
    begin = tl.load(offsets_ptrs, mask=inside, other=0)
    end = tl.load(offsets_ptrs + 1, mask=inside, other=0)
    for entry in range(tl.max(end - begin)):
        at = begin + entry
        excluded = tl.load(exclude_items_ptr + at, mask=at < end, other=-1) ^ LAST_ID
        key = tl.where(complement == excluded[:, None], EMPTY, key)
    return key


@jit
def score_splits(
    rows_ptr, table_ptr, scale_ptr, exclude_items_ptr, exclude_offsets_ptr, candidates_ptr, bounds_ptr, arrivals_ptr,
    items_ptr, scores_ptr, B, first, last, k, most, reserved, splits, split_items, groups,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, CHUNK: tl.constexpr, LIFT: tl.constexpr, ROWS: tl.constexpr,
    ITEMS: tl.constexpr, CAPACITY: tl.constexpr, COMPACTED_ROWS: tl.constexpr, FLOAT8: tl.constexpr,
    SCALED: tl.constexpr, EXCLUDES: tl.constexpr, BEST: tl.constexpr, FAN: tl.constexpr, MERGED_ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows against one split of the catalogue; leaves the best k keys of each row, unordered.

    candidates: `[B, splits, CAPACITY]` int64; at the end a list is its first k keys. bounds: `[B, splits]` float32, the
    k-th best score so far: an item at or below it is not kept, since those before it have lower ids. A row's list has
    ITEMS lanes of CAPACITY / ITEMS keys; a tile adds one key to a lane at most, so threads append without asking each
    other, and as many tiles as the fullest lane has room for need no check. Then, seldom, lists are compacted,
    COMPACTED_ROWS at a time: excluded items are dropped, k to ``most`` keys kept in the first ``reserved`` places of
    the lanes, and the bounds raised.

    FAN: how many lists `merge_if_last` merges at a time, MERGED_ROWS rows at a time, into items and scores `[B, k]`;
    arrivals: `[tiles, groups]` int32 zeros. FAN 0: lists are left to `merge_splits`.
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
            for index in range(0, live, COMPACTED_ROWS):
                some = index + tl.arange(0, COMPACTED_ROWS)
                some_inside = some < live
                list_ptrs = (lists_ptr + some * list_stride)[:, None]
                key = tl.load(list_ptrs + slots[None, :], mask=some_inside[:, None], other=EMPTY)
                if EXCLUDES:
                    offsets_ptrs = exclude_offsets_ptr + first_row + some
                    key = drop_excluded(key, exclude_items_ptr, offsets_ptrs, some_inside)
                # Nothing reads a finished list beyond its first k keys.
                limit = tl.where(some_inside, tl.where(done, k, CAPACITY), 0)[:, None]
                worst, kept = keep_best(list_ptrs, key, slots, k, tl.where(done, k, most), limit)
                bits = order_bits((worst >> 32).to(tl.int32))
                tl.store(bound_ptr + some * splits, bits.to(tl.float32, bitcast=True), mask=some_inside & (kept >= k))
            tl.debug_barrier()
            place = lists + item[:, None] + reserved * ITEMS
            room = DEPTH - reserved
    if FAN > 0:
        row_ptr = candidates_ptr + first_row.to(tl.int64) * list_stride
        result = first_row.to(tl.int64) * k
        merge_if_last(
            row_ptr, list_stride, live, split, splits, arrivals_ptr + tl.program_id(0) * groups, items_ptr + result,
            scores_ptr + result, k, CAPACITY, MERGED_ROWS, BEST, FAN,
        )  # fmt: skip
