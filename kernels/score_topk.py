"""Exact scores of the whole catalogue and the best k items of each row, without the B x N matrix of scores.

One launch for up to 128 results: every tile of rows and split of the catalogue is one program, which keeps the best k
keys of its split, and the last program of a tile merges those. For more results, lists are merged by launches of their
own, four or two at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels._runtime import require, require_offsets, runs_triton
from kernels._scalars import require_integers
from kernels._score_topk_op import _score_topk, counters
from kernels.inventory import Cost, Entry, Shape

ROW_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT8 = torch.float8_e4m3fn
TABLE_DTYPES = (*ROW_DTYPES, FLOAT8, torch.int8)
MOST_RESULTS = 1024
WIDEST = 256
MOST_ITEMS = 1 << 30
# Scores that the twin holds at a time.
_SCORES_BUDGET = 2**25


def score_topk(
    rows: Tensor,
    table: Tensor,
    k: int,
    *,
    scale: Tensor | None = None,
    exclude_items: Tensor | None = None,
    exclude_offsets: Tensor | None = None,
    first: int = 1,
    arrivals: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the k best items of each row by ``rows @ table.T * scale``: ids `[B, k]` int64, scores `[B, k]` float32.

    rows: `[B, D]` float32, float16 or bfloat16. table: `[N + 1, D]` float32, float16, bfloat16, float8_e4m3fn or int8,
    contiguous. scale: `[N + 1]` float32, multiplies the scores of each table row. exclude_items, exclude_offsets: `[X]`
    and `[B + 1]` int64, items never returned to each row, in any order. first: table rows below it are never returned.
    k: 1 to 1024. D: 1 to 256. N: below 2^30. arrivals: `[max(1024, B)]` int32 zeros or more, which
    are zeros again afterwards; calls that may run at the same time need their own. By default the calls of a CUDA
    stream share some, and a call captured in a CUDA graph fills its own in each replay, which takes a launch more.

    Exact: every product is taken of the stored numbers and summed in float32. Rows and a table of one half-precision
    dtype, and half-precision rows with an int8 or float8 table, use tensor cores; any other pair is lifted to float32.
    Order: score descending, then id ascending. The score of a row and an item does not depend on the batch, k or how
    the catalogue is split, and -0.0 is 0.0, so ties are exact and results deterministic. An item whose score is NaN or
    -inf is never returned. Where fewer than k items are left: item 0 and score -inf.

    Memory beyond inputs and results: 8 bytes for each key and 4 for each list of all rows and splits. A list has
    ``5 (k + 39)`` keys at most, but never less than 128, for D above 128 than 256, nor in catalogues of 2^17 items or
    more than 512; there are at most ``max(B, 16384)`` lists, and 512 a row. All lists together take 8 MiB, or half the
    bytes of the `[B, N]` scores in float32, or one list a row, whichever is the most. Exclusion lists are read a few
    times by every split: time grows with the longest. Without gradient. Raises UnsupportedError. Without Triton, or on
    a CPU, this is `score_topk_twin`.
    """
    _check(rows, table, k, scale, exclude_items, exclude_offsets, first, arrivals)
    rows, table = rows.detach(), table.detach()
    tensors = [value for value in (rows, table, scale, exclude_items, exclude_offsets, arrivals) if value is not None]
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
        arrivals,
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
    arrivals: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`score_topk` in pure torch, by a stable sort of chunks of 2^25 scores, or B k, at most; float64 stays.

    arrivals is not touched.
    """
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
    arrivals: Tensor | None,
) -> None:
    require_integers(k=k, first=first)
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
    if arrivals is not None:
        found = f"arrivals is {arrivals.dtype} of shape {list(arrivals.shape)}"
        fits = arrivals.dtype == torch.int32 and arrivals.is_contiguous() and arrivals.numel() >= counters(batch)
        require(fits, f"{found}; expected {counters(batch)} contiguous int32 zeros or more")
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


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    batch, width, count = shape["users"], shape["width"], shape["items"] + 1
    exact = dtype in ROW_DTYPES
    if dtype == torch.int8:
        table = torch.randint(-127, 128, (count, width), dtype=torch.int8, device=device)
    else:
        table = torch.randn(count, width, device=device, dtype=dtype if exact else torch.float16).to(dtype)
    return {
        "rows": torch.randn(batch, width, device=device, dtype=dtype if exact else torch.bfloat16),
        "table": table,
        "k": shape["results"],
        "scale": None if exact else torch.rand(count, device=device),
    }


def _excluding(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    batch, length = shape["users"], shape["excluded"]
    lists = torch.randint(1, shape["items"] + 1, (batch * length,), device=device)
    offsets = torch.arange(batch + 1, device=device) * length
    return {**_inputs(shape, dtype, device), "exclude_items": lists, "exclude_offsets": offsets}


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    batch, width, count = shape["users"], shape["width"], shape["items"]
    exact = dtype in ROW_DTYPES
    stored = count * (width * dtype.itemsize + (0 if exact else 4))
    rows = batch * width * (dtype.itemsize if exact else 2)
    lists = 8 * (batch * shape["excluded"] + batch + 1) if "excluded" in shape else 0
    return Cost(bytes=stored + rows + lists + batch * shape["results"] * 12, flops=2 * batch * count * width)


_SHAPES: dict[str, Shape] = {
    "paper": {"users": 512, "items": 12301, "width": 128, "results": 20},
    "fifty results": {"users": 512, "items": 12301, "width": 128, "results": 50},
    "one user": {"users": 1, "items": 12301, "width": 128, "results": 20},
    "wide": {"users": 512, "items": 12301, "width": 256, "results": 20},
    "narrow": {"users": 512, "items": 12301, "width": 64, "results": 10},
    "width 32": {"users": 512, "items": 12301, "width": 32, "results": 10},
    "width 192": {"users": 512, "items": 12301, "width": 192, "results": 20},
    "odd width": {"users": 32, "items": 64669, "width": 96, "results": 100},
    "million": {"users": 512, "items": 1_000_000, "width": 128, "results": 20},
    "million, wide": {"users": 512, "items": 1_000_000, "width": 256, "results": 200},
    "ten million": {"users": 16, "items": 10_000_000, "width": 128, "results": 20},
    "candidates": {"users": 64, "items": 1_000_000, "width": 128, "results": 1024},
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
            "paper": {"users": 512, "items": 12301, "width": 128, "results": 20, "excluded": 50},
            "fifty results": {"users": 512, "items": 12301, "width": 128, "results": 50, "excluded": 50},
            "narrow": {"users": 512, "items": 12301, "width": 64, "results": 10, "excluded": 50},
            "width 32": {"users": 512, "items": 12301, "width": 32, "results": 10, "excluded": 50},
            "width 192": {"users": 512, "items": 12301, "width": 192, "results": 20, "excluded": 50},
            "odd width": {"users": 32, "items": 64669, "width": 96, "results": 100, "excluded": 50},
            "wide": {"users": 512, "items": 12301, "width": 256, "results": 20, "excluded": 50},
            "million": {"users": 512, "items": 1_000_000, "width": 128, "results": 20, "excluded": 50},
            "candidates": {"users": 16, "items": 1_000_000, "width": 128, "results": 1024, "excluded": 50},
        },
        inputs=_excluding,
        run=score_topk,
        twin=score_topk_twin,
        cost=_cost,
    ),
]
