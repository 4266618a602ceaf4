# mypy: allow-untyped-defs
"""Triton code of `score_topk`: keep the best keys of lists, and merge the lists of all splits of the catalogue.

A candidate is one int64 key: the score's bits, mapped so that integers order as scores do, above the complement of the
item id. Keys are distinct and their order is the order of results, so any selection of the largest keys is exact
whatever order they were found in, and whichever program merges them.
"""

from __future__ import annotations

from kernels._runtime import constant, jit, tl

LAST_ID = constant(0x7FFFFFFF)
LARGEST_KEY = constant(0x7FFFFFFFFFFFFFFF)
# Key of score -inf and item 0, which fills lists: it decodes to what is returned where too few items are left.
EMPTY = constant((-0x7F800001 << 32) | 0x7FFFFFFF)


@jit
def order_bits(bits):
    """Map the bits of float32 numbers to int32 in the same order, and back. -0.0 must have been made 0.0."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def keep_best(keys_ptr, key, slots, k, most, limit):
    """Store the largest keys of each row at its pointer and EMPTY behind them, up to ``limit`` slots.

    keys_ptr: `[ROWS, 1]`. key: `[ROWS, SIZE]`, all but EMPTY distinct. slots: ``tl.arange(0, SIZE)``. limit: a number
    or `[ROWS, 1]`, 0 for a row to leave alone, whose keys are all EMPTY. All real keys are kept if they are ``most`` or
    fewer, else k to ``most`` of the largest. Returns the smallest key kept and the number kept, `[ROWS]` each. Every
    thread has read its keys before any is overwritten.
    """
    real = key > EMPTY
    low = tl.min(tl.where(real, key, LARGEST_KEY), 1)
    high = tl.max(key, 1)
    high = tl.where(tl.sum(real.to(tl.int32), 1) <= most, low, high)
    # Bisection over key values: k or more keys are at least low, fewer than k are above high. A row that is done keeps
    # its low while others go on.
    while tl.max((low < high).to(tl.int32), 0) > 0:
        # The mean rounded up, without the overflow of a sum.
        middle = (low | high) - ((low ^ high) >> 1)
        count = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count > most, high, tl.where(count >= k, middle, middle - 1))
    keep = real & (key >= low[:, None])
    kept = tl.sum(keep.to(tl.int32), 1)
    place = tl.cumsum(keep.to(tl.int32), 1) - 1
    tl.debug_barrier()
    tl.store(keys_ptr + place, key, mask=keep)
    rest = (slots[None, :] >= kept[:, None]) & (slots[None, :] < limit)
    tl.store(keys_ptr + slots[None, :], tl.full(key.shape, EMPTY, tl.int64), mask=rest)
    return low, kept


@jit
def merge_lists(
    lists_ptr, row_stride, rows, lists, list_stride, items_ptr, scores_ptr, k, last,
    ROWS: tl.constexpr, BEST: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """Leave the best k keys of up to FAN lists of k keys in the first of them, for ``rows`` rows, ROWS at a time.

    last: also sort them and write items and scores, `[rows, k]`. BEST: k rounded up to a power of two.
    """
    index = tl.arange(0, FAN * BEST)
    slot = index % BEST
    source = index // BEST * list_stride + slot
    wanted = (index // BEST < lists) & (slot < k)
    best = tl.arange(0, BEST)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None]
        keys_ptr = (lists_ptr + row * row_stride)[:, None]
        # Other multiprocessors wrote these: read them where writes meet, in the second-level cache.
        key = tl.load(keys_ptr + source[None, :], mask=inside & wanted[None, :], other=EMPTY, cache_modifier=".cg")
        keep_best(keys_ptr, key, index, k, k, tl.where(inside, k, 0))
        if last:
            tl.debug_barrier()
            asked = inside & (best < k)[None, :]
            kept = tl.load(keys_ptr + best[None, :], mask=asked, other=EMPTY)
            order = tl.sort(kept, dim=1, descending=True)
            bits = order_bits((order >> 32).to(tl.int32))
            result = row[:, None] * k + best[None, :]
            tl.store(items_ptr + result, (order & LAST_ID) ^ LAST_ID, mask=asked)
            tl.store(scores_ptr + result, bits.to(tl.float32, bitcast=True), mask=asked)


@jit
def merge_if_last(
    lists_ptr, row_stride, rows, split, splits, arrivals_ptr, items_ptr, scores_ptr, k,
    CAPACITY: tl.constexpr, ROWS: tl.constexpr, BEST: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """Merge the lists of all splits without another launch: whichever program is the last of its group merges it.

    Groups are of FAN splits, then of FAN groups, up to one: a program climbs while it is last. lists_ptr: the lists of
    a tile of rows, those of split 0 first. arrivals_ptr: `[groups]` int32 of the tile, zeros before and after, level by
    level. The lists of a group are merged in the order of their splits, whoever comes last.

    Why the last one sees all lists: threads of another program stored them before its barrier, the barrier orders them
    before its atomic add, a release; the add that finds all others arrived is an acquire of that chain of adds, and the
    barrier after it orders it before the loads of every thread. Release and acquire at GPU scope are cumulative (PTX
    ISA, "Memory Consistency Model"), and nobody waits, so that programs may run in any order.
    """
    lists = tl.cast(splits, tl.int32)
    at = tl.cast(split, tl.int32)
    step = tl.full([], 1, tl.int32)
    level_ptr = arrivals_ptr
    while lists > 0:
        group = at // FAN
        members = tl.minimum(lists - group * FAN, FAN)
        tl.debug_barrier()
        arrived = tl.atomic_add(level_ptr + group, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        above = tl.full([], 0, tl.int32)
        if arrived == members - 1:
            # Nobody else comes here in this launch, and the next one starts when all stores of this one are done.
            tl.store(level_ptr + group, 0)
            first_ptr = lists_ptr + group * FAN * step * CAPACITY
            merge_lists(
                first_ptr, row_stride, rows, members, step * CAPACITY, items_ptr, scores_ptr, k, lists <= FAN,
                ROWS, BEST, FAN,
            )  # fmt: skip
            if lists > FAN:
                above = (lists + FAN - 1) // FAN
        level_ptr += (lists + FAN - 1) // FAN
        lists = above
        at = group
        step = step * FAN


@jit
def merge_splits(
    candidates_ptr, items_ptr, scores_ptr, k, splits, step,
    CAPACITY: tl.constexpr, BEST: tl.constexpr, FAN: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One program: the best k keys of FAN lists of one row, left in the first of them; LAST: sorted and written out.

    Lists are those of splits ``(group FAN + i) step``, k keys each, in candidates `[B, splits, CAPACITY]` int64. BEST:
    k rounded up to a power of two. items and scores are `[B, k]`.
    """
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * FAN * step
    merge_lists(
        candidates_ptr + (row * splits + begin) * CAPACITY, 0, 1, (splits - begin + step - 1) // step, step * CAPACITY,
        items_ptr + row * k, scores_ptr + row * k, k, LAST, 1, BEST, FAN,
    )  # fmt: skip
