"""The operator of `kernels.score_topk`: block sizes, lists of candidates and the launches.

One launch for up to 128 results: programs merge the lists of their tile of rows themselves (`merge_if_last`), which
takes a few microseconds on one multiprocessor. Longer lists are merged by launches of their own, each level on as many
multiprocessors as there are rows and groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels._runtime import cdiv, kernel_op, launch, next_power_of_2, zeros_kept
from kernels._score_topk_merge import merge_splits
from kernels._score_topk_tiles import score_splits

_ITEMS = 32
_FLOAT32_CHUNK = 16
# Programs that fill a GPU of some 130 multiprocessors: several small ones on each, or two large ones.
_SMALL_PROGRAMS, _LARGE_PROGRAMS = 1024, 256
_MOST_SPLITS = 512
_FEWEST_SPLIT_ITEMS = 1024
# Shortest lists, in keys. Shorter ones would be compacted too often: those of wide rows, which is done one by one, and
# those of a large catalogue, whose splits are longer.
_SHORTEST_LIST, _SHORTEST_WIDE_LIST, _SHORTEST_LARGE_LIST = 128, 256, 512
# Items of a split for each key of its list, so that lists take at most half the bytes of float32 scores, unless the
# lists of all rows together hold few keys.
_SPLIT_ITEMS_A_KEY, _FEW_KEYS = 4, 1 << 20
# From so many items on, reading the table once for every 16 rows costs more than larger tiles lose.
_LARGE_CATALOGUE = 1 << 17
# Results up to which one program merges the lists of a tile, and keys of a row that it merges at a time.
_ONE_LAUNCH_RESULTS, _CLIMBED_KEYS, _CLIMBED_KEYS_PER_WARP = 128, 512, 256
# Keys compacted at a time, of as many rows as that gives. With more, programs of 128 registers spill; those of more
# than 128 columns do with more than one row.
_COMPACTED_KEYS = 512
_MERGED_KEYS = 4096
_KEYS_PER_WARP = 512


@dataclass(frozen=True)
class Plan:
    """Sizes of the launches.

    lift: multiplied in float32. rows, items: of a tile. chunk: columns multiplied at a time. capacity: keys of a list.

    most: keys kept when a list is compacted. reserved: places of each lane that those take. compacted_rows: lists
    compacted at a time. split_items: of a split.

    registers: most a thread may use; left to itself, ptxas spills a few to fit one more block.

    best: k rounded up to a power of two. fan: lists merged at a time without another launch, merged_rows: rows at a
    time, groups: merges of a tile of rows, one counter each; all 0 where lists are merged by launches.
    """

    lift: bool
    rows: int
    items: int
    block_width: int
    chunk: int
    capacity: int
    most: int
    reserved: int
    compacted_rows: int
    splits: int
    split_items: int
    registers: int
    num_warps: int
    num_stages: int
    best: int
    fan: int
    merged_rows: int
    groups: int


def plan(batch: int, items: int, width: int, k: int, rows: torch.dtype, table: torch.dtype) -> Plan:
    """Sizes for ``batch`` rows and ``items`` items of ``width`` columns, stored as ``rows`` and ``table``.

    Tiles of 32 items use the same tensor core instruction on every GPU and in both presets, so scores are the same.
    """
    block_width = max(16, next_power_of_2(width))
    # Bytes are converted in registers, which a large tile of wide rows leaves too few of.
    large = batch > 16 and items >= _LARGE_CATALOGUE and not (table == torch.uint8 and block_width > 128)
    tile = 64 if large else 16
    tiles = max(1, cdiv(batch, tile))
    programs = _LARGE_PROGRAMS if large else _SMALL_PROGRAMS
    # A compaction may leave a few keys more than k, which ends its search early.
    most = cdiv(k + 8, _ITEMS) * _ITEMS
    # Room for half as much again as is kept, or compactions would follow each other.
    shortest = _SHORTEST_LIST if block_width <= 128 else _SHORTEST_WIDE_LIST
    shortest = shortest if items < _LARGE_CATALOGUE else _SHORTEST_LARGE_LIST
    capacity = max(shortest, min(2048, next_power_of_2(5 * most // 2)))
    affordable = max(items // (_SPLIT_ITEMS_A_KEY * capacity), _FEW_KEYS // (max(1, batch) * capacity))
    splits = min(programs // tiles, _MOST_SPLITS, items // _FEWEST_SPLIT_ITEMS, affordable)
    split_items = max(1, cdiv(cdiv(items, max(1, splits)), _ITEMS)) * _ITEMS
    lift = rows == torch.float32 or table not in (rows, torch.uint8, torch.int8)
    # Blocks of a multiprocessor: 4 or 3 small ones or 2 large ones where nothing spills, otherwise 2 small or 1 large.
    roomy = capacity <= 512 and not lift and (block_width <= 128 or table.itemsize > 1)
    registers = 128 if large or roomy else 168
    if table == torch.uint8 or capacity == 2048 or (large and (lift or table != rows or block_width > 128)):
        registers = 255
    splits, num_warps, best = max(1, cdiv(items, split_items)), 8 if large else 4, next_power_of_2(k)
    fan = _fan(splits, best) if k <= _ONE_LAUNCH_RESULTS else 0
    return Plan(
        lift=lift,
        rows=tile,
        items=_ITEMS,
        block_width=block_width,
        chunk=_FLOAT32_CHUNK if lift else block_width,
        capacity=capacity,
        most=most,
        reserved=most // _ITEMS,
        compacted_rows=max(1, _COMPACTED_KEYS // capacity) if block_width <= 128 else 1,
        splits=splits,
        split_items=split_items,
        registers=registers,
        num_warps=num_warps,
        num_stages=4 if table.itemsize == 1 and not large else 3,
        best=best,
        fan=fan,
        merged_rows=max(1, min(tile, num_warps * _CLIMBED_KEYS_PER_WARP // (fan * best))) if fan else 0,
        groups=_groups(splits, fan),
    )


def _fan(splits: int, best: int) -> int:
    """Lists merged at a time: as many levels as the largest fan takes, and no larger than those need."""
    fan, levels = max(2, _CLIMBED_KEYS // best), 1
    while fan**levels < splits:
        levels += 1
    while fan > 1 and (fan // 2) ** levels >= splits:
        fan //= 2
    return fan


def _groups(splits: int, fan: int) -> int:
    """Groups of ``fan`` lists on all levels from ``splits`` lists down to one."""
    if not fan:
        return 0
    lists = cdiv(splits, fan)
    found = lists
    while lists > 1:
        lists = cdiv(lists, fan)
        found += lists
    return found


def counters(batch: int) -> int:
    """Counters that any call of so many rows can do with: one for each merge of each tile of rows.

    A tile has fewer merges than splits, or one.
    """
    return max(_SMALL_PROGRAMS, batch)


def _fake(
    rows: Tensor,
    table: Tensor,
    scale: Tensor | None,
    exclude_items: Tensor | None,
    exclude_offsets: Tensor | None,
    arrivals: Tensor | None,
    k: int,
    first: int,
) -> tuple[Tensor, Tensor]:
    shape = (rows.shape[0], k)
    return (
        torch.empty(shape, dtype=torch.int64, device=rows.device),
        torch.empty(shape, dtype=torch.float32, device=rows.device),
    )


@kernel_op("score_topk", _fake)
def _score_topk(
    rows: Tensor,
    table: Tensor,
    scale: Tensor | None,
    exclude_items: Tensor | None,
    exclude_offsets: Tensor | None,
    arrivals: Tensor | None,
    k: int,
    first: int,
) -> tuple[Tensor, Tensor]:
    (batch, width), last, device = rows.shape, table.shape[0], rows.device
    items, scores = _fake(rows, table, scale, exclude_items, exclude_offsets, arrivals, k, first)
    sizes = plan(batch, max(0, last - first), width, k, rows.dtype, table.dtype)
    tiles = cdiv(batch, sizes.rows)
    candidates = torch.empty((batch, sizes.splits, sizes.capacity), dtype=torch.int64, device=device)
    if sizes.fan and arrivals is None:
        arrivals = zeros_kept(rows, counters(batch))
    launch(
        score_splits,
        (tiles, sizes.splits),
        rows,
        table,
        scale,
        exclude_items,
        exclude_offsets,
        candidates,
        torch.empty((batch, sizes.splits), dtype=torch.float32, device=device),
        arrivals if sizes.fan else None,
        items,
        scores,
        batch,
        first,
        last,
        k,
        sizes.most,
        sizes.reserved,
        sizes.splits,
        sizes.split_items,
        sizes.groups,
        WIDTH=width,
        BLOCK_WIDTH=sizes.block_width,
        CHUNK=sizes.chunk,
        LIFT=sizes.lift,
        ROWS=sizes.rows,
        ITEMS=sizes.items,
        CAPACITY=sizes.capacity,
        COMPACTED_ROWS=sizes.compacted_rows,
        FLOAT8=table.dtype == torch.uint8,
        SCALED=scale is not None,
        EXCLUDES=exclude_items is not None,
        BEST=sizes.best,
        FAN=sizes.fan,
        MERGED_ROWS=sizes.merged_rows,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        maxnreg=sizes.registers,
    )
    best, step, lists, done = sizes.best, 1, sizes.splits, sizes.fan > 0
    while not done:
        fan = min(max(2, _MERGED_KEYS // best), next_power_of_2(lists))
        groups, done = cdiv(lists, fan), fan >= lists
        launch(
            merge_splits,
            (batch, groups),
            candidates,
            items,
            scores,
            k,
            sizes.splits,
            step,
            CAPACITY=sizes.capacity,
            BEST=best,
            FAN=fan,
            LAST=done,
            num_warps=min(8, max(1, fan * best // _KEYS_PER_WARP)),
            num_stages=1,
        )
        step, lists = step * fan, groups
    return items, scores
