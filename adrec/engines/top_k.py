"""The best items of each row: from a table in chunks, or from a quantised one by candidates that are scored exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adrec.data.jagged import Jagged
from adrec.models.item_tables import QuantizedTable

CANDIDATES = 2
"""Candidates for each result: with 2 none of the rows of the data sets tried had to be scored a second time."""
# Scores held at a time, small enough to stay in the cache, and the fewest items of a chunk.
_PROXY_BUDGET, _PROXY_ITEMS = 2**22, 2**12
# Items unpacked at a time, and numbers of candidate rows held at a time.
_UNPACKED_ITEMS, _RESCORED_NUMBERS = 2**12, 2**24


@dataclass(frozen=True)
class TopK:
    """Best items of each row. items: `[B, k]` int64, 0 where fewer than k were left. scores: `[B, k]` float32."""

    items: Tensor
    scores: Tensor


def chunked_top_k(
    scores: Callable[[int, int], Tensor], rows: Tensor, items: int, chunk: int, k: int, exclude: Jagged | None
) -> TopK:
    """Best k of items 1..N, whose ``scores(first, last)`` `[B, last - first]` are computed ``chunk`` items at a time.

    rows: `[B, D]`, for batch and device. exclude: items to leave out of each row's list.
    """
    best = TopK(torch.zeros(rows.shape[0], 0, dtype=torch.int64, device=rows.device), rows.new_zeros(rows.shape[0], 0))
    owners = None if exclude is None else exclude.rows
    for first in range(1, items + 1, chunk):
        found = scores(first, min(first + chunk, items + 1))
        if exclude is not None and owners is not None:
            inside = (exclude.values >= first) & (exclude.values < first + found.shape[1])
            found[owners[inside], exclude.values[inside] - first] = -torch.inf
        values, places = found.topk(min(k, found.shape[1]), -1)
        values, places = torch.cat([best.scores, values], -1), torch.cat([best.items, places + first], -1)
        values, order = values.topk(min(k, values.shape[1]), -1)
        best = TopK(places.gather(-1, order), values)
    return TopK(best.items.masked_fill(best.scores == -torch.inf, 0), best.scores)


def quantized_top_k(table: QuantizedTable, rows: Tensor, k: int, exclude: Jagged | None) -> TopK:
    """Best k items of each row `[B, D]` by the numbers that the table stands for, up to rounding.

    int8 and bf16 on a CPU: proxy scores by integer (VNNI) or bfloat16 instructions give 2 k candidates, which are
    scored in float32. Where a bound on the proxy's error does not prove that no other item belongs to the list, that
    row is scored in full. A table with product codes: candidates by FAISS, scored likewise, without such a proof.
    Everything else: rows of the table are unpacked a chunk at a time.
    """
    items = table.num_embeddings - 1
    if table.format.product is not None:
        longest = 0 if exclude is None or not len(exclude) else int(exclude.lengths.max())
        likely = table.product_candidates(rows, k * table.format.product.candidates + longest)
        return _best(_rescore(table, rows, _without(likely, exclude)), k)
    proxy = table.proxy(rows.float())
    count = min(items, CANDIDATES * k)
    if proxy is None:
        return _unpacked_top_k(table, rows, k, exclude)
    scores, bound = proxy
    chunk = max(count, min(items, max(_PROXY_ITEMS, _PROXY_BUDGET // max(1, rows.shape[0]))))
    candidates = chunked_top_k(scores, rows.float(), items, chunk, count, exclude)
    best = _best(_rescore(table, rows, candidates.items), k)
    if count == items:
        return best
    # Fewer candidates than asked for are all there are.
    last = candidates.scores[:, -1]
    unsure = (best.scores[:, -1] < bound(last)) & (last != -torch.inf)
    if bool(unsure.any()):
        missed = unsure.nonzero().squeeze(1)
        part = None if exclude is None else exclude.select(missed)
        full = _unpacked_top_k(table, rows[missed], k, part)
        best.items[missed], best.scores[missed] = full.items, full.scores
    return best


def _unpacked_top_k(table: QuantizedTable, rows: Tensor, k: int, exclude: Jagged | None) -> TopK:
    items = table.num_embeddings - 1
    chunk = max(k, min(items, _UNPACKED_ITEMS))
    return chunked_top_k(lambda first, last: rows @ table.rows(first, last).T, rows, items, chunk, k, exclude)


def _rescore(table: QuantizedTable, rows: Tensor, candidates: Tensor) -> TopK:
    """Exact scores of candidate ids `[B, C]`, -inf for id 0."""
    users = max(1, _RESCORED_NUMBERS // max(1, candidates.shape[1] * table.embedding_dim))
    parts = [
        torch.bmm(table(ids), part[:, :, None]).squeeze(2)
        for ids, part in zip(candidates.split(users), rows.split(users), strict=True)
    ]
    scores = torch.cat(parts) if parts else rows.new_zeros(candidates.shape)
    return TopK(candidates, scores.masked_fill(candidates == 0, -torch.inf))


def _best(found: TopK, k: int) -> TopK:
    values, order = found.scores.topk(min(k, found.scores.shape[1]), -1)
    items = found.items.gather(-1, order).masked_fill(values == -torch.inf, 0)
    missing = k - values.shape[1]
    if missing > 0:
        pad = (0, missing)
        return TopK(torch.nn.functional.pad(items, pad), torch.nn.functional.pad(values, pad, value=-torch.inf))
    return TopK(items, values)


def _without(candidates: Tensor, exclude: Jagged | None) -> Tensor:
    """Candidates `[B, C]` with 0 in place of the excluded ones."""
    if exclude is None or exclude.values.numel() == 0:
        return candidates
    longest = int(exclude.lengths.max())
    padded = exclude.padded(longest)
    return candidates.masked_fill((candidates[:, :, None] == padded[:, None, :]).any(-1), 0)
