"""Interactions as integer codes, and the filters on them; all of it linear in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from adrec.data.checks import CheckedTable
from adrec.errors import DataError


@dataclass(frozen=True)
class Interactions:
    """``M`` interactions sorted by user, then time, then order in the input.

    users: `[M]` int32 rows of ``user_ids``. items: `[M]` int32 rows of ``item_ids`` (0-based). times: `[M]`
    int64 or float64. user_ids, item_ids: raw ids in ascending order (strings by code point), `int64`,
    `uint64` or `large_string`; every one of them occurs.
    """

    users: NDArray[np.int32]
    items: NDArray[np.int32]
    times: NDArray[np.int64] | NDArray[np.float64]
    user_ids: pa.Array
    item_ids: pa.Array

    def __len__(self) -> int:
        return len(self.users)

    def offsets(self) -> NDArray[np.int64]:
        """Where each user's interactions start, `[U + 1]` int64."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.users, minlength=len(self.user_ids)))])


def encode(table: CheckedTable) -> Interactions:
    """Replace raw ids by codes and sort; ids are numbered in ascending order, so not by the order of rows."""
    vocabularies = {role: _vocabulary(table.frame, role) for role in ("user", "item")}
    frame = table.frame
    for role, vocabulary in vocabularies.items():
        codes = vocabulary.to_frame().with_row_index("code").select(pl.col("code").cast(pl.Int32), role)
        frame = frame.join(codes.lazy(), on=role, how="left").drop(role).rename({"code": role})
    # The join may hand rows out in any order; `row` makes ties keep the order of the input.
    table_now = frame.select("user", "item", "time", "row").collect(engine="streaming")
    table_now = table_now.sort("user", "time", "row").drop("row")
    return Interactions(
        table_now["user"].to_numpy(),
        table_now["item"].to_numpy(),
        table_now["time"].to_numpy(),
        _raw_ids(vocabularies["user"]),
        _raw_ids(vocabularies["item"]),
    )


def deduplicate(interactions: Interactions) -> Interactions:
    """Keep the first of repeated user-item pairs: the earliest in time, on a tie the first in the input."""
    pairs = interactions.users.astype(np.int64) * len(interactions.item_ids) + interactions.items
    order = np.argsort(pairs, kind="stable")
    again = np.zeros(len(pairs), dtype=bool)
    again[order[1:]] = pairs[order[1:]] == pairs[order[:-1]]
    return _keep(interactions, ~again)


def k_core(interactions: Interactions, core: int) -> Interactions:
    """Drop users and items with fewer than ``core`` interactions until none is left below.

    Raises: `DataError` when nothing remains.
    """
    users, items = interactions.users, interactions.items
    position = np.arange(len(users)) if core > 1 else None
    while position is not None:
        few_user = np.bincount(users, minlength=len(interactions.user_ids)) < core
        few_item = np.bincount(items, minlength=len(interactions.item_ids)) < core
        keep = ~(few_user[users] | few_item[items])
        if keep.all():
            break
        users, items, position = users[keep], items[keep], position[keep]
    if position is None or len(position) == len(interactions):
        return interactions
    if len(position) == 0:
        raise DataError(
            f"the {core}-core is empty: of {len(interactions.user_ids)} users, {len(interactions.item_ids)} "
            f"items and {len(interactions)} interactions none remain with at least {core} each; give a "
            "smaller --core (0 or 1 turns it off)"
        )
    kept = np.zeros(len(interactions), dtype=bool)
    kept[position] = True
    return _keep(interactions, kept)


def _keep(interactions: Interactions, kept: NDArray[np.bool_]) -> Interactions:
    """Keep a subset of the rows and renumber the users and items that remain."""
    users, user_ids = _renumber(interactions.users[kept], interactions.user_ids)
    items, item_ids = _renumber(interactions.items[kept], interactions.item_ids)
    return replace(
        interactions,
        users=users,
        items=items,
        times=interactions.times[kept],
        user_ids=user_ids,
        item_ids=item_ids,
    )


def _renumber(codes: NDArray[np.int32], raw: pa.Array) -> tuple[NDArray[np.int32], pa.Array]:
    used = np.bincount(codes, minlength=len(raw)) > 0
    if used.all():
        return codes, raw
    new = (np.cumsum(used) - 1).astype(np.int32)
    return new[codes], raw.filter(pa.array(used))


def _raw_ids(vocabulary: pl.Series) -> pa.Array:
    array = vocabulary.to_arrow()
    return array.cast(pa.large_string()) if vocabulary.dtype == pl.String else array


def _vocabulary(frame: pl.LazyFrame, role: str) -> pl.Series:
    return frame.select(pl.col(role).unique()).collect(engine="streaming")[role].sort()
