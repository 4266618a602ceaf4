"""Exact scores of the whole catalogue and the best k items of each row, without the B x N matrix of scores.

Two launches or a few: `score_splits` gives every tile of rows and split of the catalogue to one program, which keeps
the best k keys of its split; `merge_splits` merges them, once where k times the number of splits is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels._runtime import cdiv, kernel_op, launch, next_power_of_2, require, require_offsets, runs_triton
from kernels._score_topk_tiles import merge_splits, score_splits
from kernels.inventory import Cost, Entry, Shape

ROW_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT8 = torch.float8_e4m3fn
TABLE_DTYPES = (*ROW_DTYPES, FLOAT8, torch.int8)
MOST_RESULTS = 1024
WIDEST = 256
MOST_ITEMS = 1 << 30
# Scores that the twin holds at a time.
_SCORES_BUDGET = 2**25
_ITEMS = 32
_FLOAT32_CHUNK = 16
# Programs that fill a GPU of some 130 multiprocessors: several small ones on each, or two large ones.
_SMALL_PROGRAMS, _LARGE_PROGRAMS = 1024, 256
_MOST_SPLITS = 512
_FEWEST_SPLIT_ITEMS = 1024
# From so many items on, reading the table once for every 16 rows costs more than larger tiles lose.
_LARGE_CATALOGUE = 1 << 17
_MERGED_KEYS = 4096
_KEYS_PER_WARP = 512


def score_topk(
    rows: Tensor,
    table: Tensor,
    k: int,
    *,
    scale: Tensor | None = None,
    exclude_items: Tensor | None = None,
    exclude_offsets: Tensor | None = None,
    first: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the k best items of each row by ``rows @ table.T * scale``: ids `[B, k]` int64, scores `[B, k]` float32.

    rows: `[B, D]` float32, float16 or bfloat16. table: `[N + 1, D]` float32, float16, bfloat16, float8_e4m3fn or int8,
    contiguous. scale: `[N + 1]` float32, multiplies the scores of each table row. exclude_items, exclude_offsets: `[X]`
    and `[B + 1]` int64, items never returned to each row, in any order. first: table rows below it are never returned.
    k: 1 to 1024. D: 1 to 256. N: below 2^30.

    Exact: every product is taken of the stored numbers and summed in float32. Rows and a table of one half-precision
    dtype, and half-precision rows with an int8 or float8 table, use tensor cores; any other pair is lifted to float32.
    Order: score descending, then id ascending. The score of a row and an item does not depend on the batch, k or how
    the catalogue is split, and -0.0 is 0.0, so ties are exact and results deterministic. An item whose score is NaN or
    -inf is never returned. Where fewer than k items are left: item 0 and score -inf.

    Memory beyond inputs and results: 8 bytes times the lists of all rows and splits, each of 512 keys (k up to 128),
    1024 (k up to 384) or 2048; lists are at most ``max(B, 16384)``, and 512 a row. Exclusion lists are read a few times
    by every split: time grows with the longest. Without gradient. Raises UnsupportedError. Without Triton, or on a CPU,
    this is `score_topk_twin`.
    """
    _check(rows, table, k, scale, exclude_items, exclude_offsets, first)
    rows, table = rows.detach(), table.detach()
    tensors = [value for value in (rows, table, scale, exclude_items, exclude_offsets) if value is not None]
    if not runs_triton(*tensors):
        return score_topk_twin(
            rows, table, k, scale=scale, exclude_items=exclude_items, exclude_offsets=exclude_offsets, first=first
        )
    result: tuple[Tensor, Tensor] = _score_topk(
        rows.contiguous(),
        # Triton has no float8 before compute capability 8.9: kernels read bytes and convert them themselves.
        table.view(torch.uint8) if table.dtype == FLOAT8 else table,
        None if scale is None else scale.detach().contiguous(),
        None if exclude_items is None else exclude_items.contiguous(),
        None if exclude_offsets is None else exclude_offsets.contiguous(),
        k,
        first,
    )
    return result


def score_topk_twin(
    rows: Tensor,
    table: Tensor,
    k: int,
    *,
    scale: Tensor | None = None,
    exclude_items: Tensor | None = None,
    exclude_offsets: Tensor | None = None,
    first: int = 1,
) -> tuple[Tensor, Tensor]:
    """`score_topk` in pure torch, by a stable sort of chunks of 2^25 scores, or B k, at most; float64 stays."""
    rows, table = rows.detach(), table.detach()
    wide = torch.promote_types(rows.dtype, torch.float32)
    batch, last = rows.shape[0], table.shape[0]
    items = torch.zeros(batch, k, dtype=torch.int64, device=rows.device)
    best = torch.full((batch, k), -torch.inf, dtype=wide, device=rows.device)
    owners = None
    if exclude_items is not None and exclude_offsets is not None:
        lengths = exclude_offsets[1:] - exclude_offsets[:-1]
        numbers = torch.arange(batch, device=rows.device)
        owners = numbers.repeat_interleave(lengths, output_size=exclude_items.numel())
    step = max(k, _SCORES_BUDGET // max(1, batch))
    for start in range(first, last, step):
        stop = min(last, start + step)
        scores = rows.to(wide) @ table[start:stop].to(wide).T
        if scale is not None:
            scores = scores * scale.detach()[start:stop]
        # Adding 0 turns -0.0 into 0.0.
        scores = scores.masked_fill(scores.isnan(), -torch.inf) + 0.0
        if exclude_items is not None and owners is not None:
            inside = (exclude_items >= start) & (exclude_items < stop)
            scores[owners[inside], exclude_items[inside] - start] = -torch.inf
        # What is kept so far comes first: its ids are lower, and the sort is stable.
        ids = torch.arange(start, stop, device=rows.device).expand(batch, -1)
        best, order = torch.cat([best, scores], 1).sort(dim=1, descending=True, stable=True)
        items = torch.cat([items, ids], 1).gather(1, order[:, :k])
        best = best[:, :k].contiguous()
    return items.masked_fill(best == -torch.inf, 0), best


def _check(
    rows: Tensor,
    table: Tensor,
    k: int,
    scale: Tensor | None,
    exclude_items: Tensor | None,
    exclude_offsets: Tensor | None,
    first: int,
) -> None:
    require(rows.dim() == 2, f"rows has shape {list(rows.shape)}; expected [B, D]")
    require(table.dim() == 2, f"table has shape {list(table.shape)}; expected [N + 1, D]")
    (batch, width), count = rows.shape, table.shape[0]
    require(1 <= width <= WIDEST, f"rows has width {width}; allowed: 1 to {WIDEST}; score_topk_twin takes any")
    require(table.shape[1] == width, f"table has width {table.shape[1]} and rows has {width}; expected one width")
    require(count <= MOST_ITEMS, f"table has {count} rows; allowed: up to {MOST_ITEMS}; merge the best of its parts")
    require(1 <= k <= MOST_RESULTS, f"k is {k}; allowed: 1 to {MOST_RESULTS}; score_topk_twin takes any")
    require(first >= 0, f"first is {first}; allowed: 0 or more")
    require(rows.dtype in ROW_DTYPES, f"rows is {rows.dtype}; allowed: {_names(ROW_DTYPES)}")
    require(table.dtype in TABLE_DTYPES, f"table is {table.dtype}; allowed: {_names(TABLE_DTYPES)}")
    require(table.is_contiguous(), f"table has strides {table.stride()}; expected contiguous rows: table.contiguous()")
    if scale is not None:
        found = f"scale is {scale.dtype} of shape {list(scale.shape)}"
        require(scale.dtype == torch.float32 and scale.shape == (count,), f"{found}; expected float32 [{count}]")
    given = (exclude_items is not None) + (exclude_offsets is not None)
    require(given != 1, "exclude_items and exclude_offsets: one is missing; give both or none")
    if exclude_items is None or exclude_offsets is None:
        return
    found = f"exclude_items is {exclude_items.dtype} of shape {list(exclude_items.shape)}"
    require(exclude_items.dtype == torch.int64 and exclude_items.dim() == 1, f"{found}; expected int64 [X]")
    found = f"exclude_offsets is {exclude_offsets.dtype} of shape {list(exclude_offsets.shape)}"
    fits = exclude_offsets.dtype == torch.int64 and exclude_offsets.shape == (batch + 1,)
    require(fits, f"{found}; expected int64 [{batch + 1}], one more than rows")
    require_offsets("exclude_offsets", exclude_offsets, exclude_items.numel())


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


@dataclass(frozen=True)
class Plan:
    """Sizes of the launches.

    lift: multiplied in float32. rows, items: of a tile. chunk: columns multiplied at a time. capacity: keys of a list.

    most: keys kept when a list is compacted. reserved: places of each lane that those take. split_items: of a split.
    registers: most a thread may use; left to itself, ptxas spills a few to fit one more block.
    """

    lift: bool
    rows: int
    items: int
    block_width: int
    chunk: int
    capacity: int
    most: int
    reserved: int
    splits: int
    split_items: int
    registers: int
    num_warps: int
    num_stages: int


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
    splits = min(max(1, programs // tiles), _MOST_SPLITS, max(1, items // _FEWEST_SPLIT_ITEMS))
    split_items = max(1, cdiv(cdiv(items, splits), _ITEMS)) * _ITEMS
    lift = rows == torch.float32 or table not in (rows, torch.uint8, torch.int8)
    # A compaction may leave a few keys more than k, which ends its search early.
    most = cdiv(k + 8, _ITEMS) * _ITEMS
    capacity = 512 if k <= 128 else 1024 if k <= 384 else 2048
    # Blocks of a multiprocessor: 3 small or 2 large ones where nothing spills, otherwise 2 small or 1 large.
    registers = 128 if large else 168
    if table == torch.uint8 or capacity == 2048 or (large and (lift or table != rows or block_width > 128)):
        registers = 255
    return Plan(
        lift=lift,
        rows=tile,
        items=_ITEMS,
        block_width=block_width,
        chunk=_FLOAT32_CHUNK if lift else block_width,
        capacity=capacity,
        most=most,
        reserved=most // _ITEMS,
        splits=max(1, cdiv(items, split_items)),
        split_items=split_items,
        registers=registers,
        num_warps=8 if large else 4,
        num_stages=4 if table.itemsize == 1 and not large else 3,
    )


def _fake(
    rows: Tensor,
    table: Tensor,
    scale: Tensor | None,
    exclude_items: Tensor | None,
    exclude_offsets: Tensor | None,
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
    k: int,
    first: int,
) -> tuple[Tensor, Tensor]:
    (batch, width), last, device = rows.shape, table.shape[0], rows.device
    items, scores = _fake(rows, table, scale, exclude_items, exclude_offsets, k, first)
    sizes = plan(batch, max(0, last - first), width, k, rows.dtype, table.dtype)
    candidates = torch.empty((batch, sizes.splits, sizes.capacity), dtype=torch.int64, device=device)
    launch(
        score_splits,
        (cdiv(batch, sizes.rows), sizes.splits),
        rows,
        table,
        scale,
        exclude_items,
        exclude_offsets,
        candidates,
        torch.empty((batch, sizes.splits), dtype=torch.float32, device=device),
        batch,
        first,
        last,
        k,
        sizes.most,
        sizes.reserved,
        sizes.splits,
        sizes.split_items,
        WIDTH=width,
        BLOCK_WIDTH=sizes.block_width,
        CHUNK=sizes.chunk,
        LIFT=sizes.lift,
        ROWS=sizes.rows,
        ITEMS=sizes.items,
        CAPACITY=sizes.capacity,
        FLOAT8=table.dtype == torch.uint8,
        SCALED=scale is not None,
        EXCLUDES=exclude_items is not None,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        maxnreg=sizes.registers,
    )
    best = next_power_of_2(k)
    step, lists, done = 1, sizes.splits, False
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


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    batch, width, count = shape["B"], shape["D"], shape["N"] + 1
    exact = dtype in ROW_DTYPES
    if dtype == torch.int8:
        table = torch.randint(-127, 128, (count, width), dtype=torch.int8, device=device)
    else:
        table = torch.randn(count, width, device=device, dtype=dtype if exact else torch.float16).to(dtype)
    return {
        "rows": torch.randn(batch, width, device=device, dtype=dtype if exact else torch.bfloat16),
        "table": table,
        "k": shape["K"],
        "scale": None if exact else torch.rand(count, device=device),
    }


def _excluding(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    batch, length = shape["B"], shape["L"]
    lists = torch.randint(1, shape["N"] + 1, (batch * length,), device=device)
    offsets = torch.arange(batch + 1, device=device) * length
    return {**_inputs(shape, dtype, device), "exclude_items": lists, "exclude_offsets": offsets}


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    batch, width, count = shape["B"], shape["D"], shape["N"]
    exact = dtype in ROW_DTYPES
    stored = count * (width * dtype.itemsize + (0 if exact else 4))
    rows = batch * width * (dtype.itemsize if exact else 2)
    lists = 8 * (batch * shape["L"] + batch + 1) if "L" in shape else 0
    return Cost(bytes=stored + rows + lists + batch * shape["K"] * 12, flops=2 * batch * count * width)


_SHAPES: dict[str, Shape] = {
    "paper": {"B": 512, "N": 12301, "D": 128, "K": 20},
    "one_user": {"B": 1, "N": 12301, "D": 128, "K": 20},
    "wide": {"B": 512, "N": 12301, "D": 256, "K": 20},
    "narrow": {"B": 512, "N": 12301, "D": 64, "K": 10},
    "odd_width": {"B": 32, "N": 64669, "D": 96, "K": 100},
    "million": {"B": 512, "N": 1_000_000, "D": 128, "K": 20},
    "million_wide": {"B": 512, "N": 1_000_000, "D": 256, "K": 200},
    "ten_million": {"B": 16, "N": 10_000_000, "D": 128, "K": 20},
    "candidates": {"B": 64, "N": 1_000_000, "D": 128, "K": 1024},
}

ENTRIES: list[Entry] = [
    Entry(
        name="score_topk",
        summary="inner products with the whole catalogue and the exact top k, ties by lower id",
        use_when="the B x N scores would not fit or would cost more traffic than the table; int8 and float8 tables",
        avoid_when="all scores are wanted, or gradients through them",
        dtypes=TABLE_DTYPES,
        shapes=_SHAPES,
        inputs=_inputs,
        run=score_topk,
        twin=score_topk_twin,
        cost=_cost,
    ),
    Entry(
        name="score_topk.exclude",
        summary="the same, leaving out each user's own list of items",
        use_when="items of the user's history must not be recommended",
        avoid_when="lists hold thousands of items: every split reads them several times",
        dtypes=TABLE_DTYPES,
        shapes={
            "paper": {"B": 512, "N": 12301, "D": 128, "K": 20, "L": 50},
            "million": {"B": 512, "N": 1_000_000, "D": 128, "K": 20, "L": 50},
            "candidates": {"B": 16, "N": 1_000_000, "D": 128, "K": 1024, "L": 50},
        },
        inputs=_excluding,
        run=score_topk,
        twin=score_topk_twin,
        cost=_cost,
    ),
]
