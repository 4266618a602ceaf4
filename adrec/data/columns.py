"""Which column of a file is the user, the item, the time and the rating."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from adrec.errors import DataError, nearest

# Earlier names win: Amazon 2023 rows hold both `asin` and `parent_asin`, and the parent is the product.
KNOWN_NAMES: dict[str, tuple[str, ...]] = {
    "user": ("user_id", "user", "uid", "reviewer_id", "customer_id", "visitor_id", "session_id", "session"),
    "item": (
        *("item_id", "item", "iid", "movie_id", "parent_asin", "asin", "product_id", "business_id"),
        *("article_id", "track_id", "book_id", "song_id", "video_id", "sku"),
    ),
    "time": ("timestamp", "unix_review_time", "time", "sort_timestamp", "unixtime", "date", "datetime"),
    "rating": ("rating", "overall", "score", "stars"),
}


@dataclass(frozen=True)
class ColumnNames:
    """Column names asked for; ``None`` means "detect by name"."""

    user: str | None = None
    item: str | None = None
    time: str | None = None
    rating: str | None = None


@dataclass(frozen=True)
class ChosenColumns:
    """The file's columns that are read; ``rating`` is ``None`` when no option needs one."""

    user: str
    item: str
    time: str
    rating: str | None

    def renames(self) -> dict[str, str]:
        """Map the file's names to ``user``, ``item``, ``time`` and ``rating``."""
        chosen = {self.user: "user", self.item: "item", self.time: "time"}
        return chosen if self.rating is None else {**chosen, self.rating: "rating"}


def choose_columns(place: str, present: Sequence[str], asked: ColumnNames, needs_rating: bool) -> ChosenColumns:
    """Pick one column of ``present`` for each role: the one asked for, else the earliest of its known names.

    Known names are compared without case, ``_``, ``-`` and blanks, so ``userId``, ``User_ID`` and ``user id``
    are one name. ``place`` starts every message (file, and line where there is one). Raises: `DataError` for
    a column that is missing, listed twice in the file, also in two spellings, or chosen for two roles.
    """
    user, item, time = (_choose(place, present, getattr(asked, role), role) for role in ("user", "item", "time"))
    # A rating is read only to filter by it, so that a bad rating cannot stop a run that ignores ratings.
    rating = _choose(place, present, asked.rating, "rating") if needs_rating or asked.rating else None
    chosen = ChosenColumns(user, item, time, rating if needs_rating else None)
    names = [name for name in (user, item, time, rating) if name is not None]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{place}: column {name!r} is chosen for two roles; name each column explicitly")
        if list(present).count(name) > 1:
            raise DataError(f"{place}: column {name!r} stands {list(present).count(name)} times in the header")
    return chosen


def _choose(place: str, present: Sequence[str], asked: str | None, role: str) -> str:
    listing = ", ".join(repr(name) for name in present[:20])
    if asked is not None:
        if asked not in present:
            raise DataError(f"{place}: no column {asked!r}{nearest(asked, present)}; the columns are {listing}")
        return asked
    for known in KNOWN_NAMES[role]:
        found = list(dict.fromkeys(name for name in present if _plain(name) == _plain(known)))
        if len(found) > 1:
            both = " and ".join(map(repr, found))
            raise DataError(f"{place}: columns {both} both name the {role}; choose one with --{role}-column")
        if found:
            return found[0]
    raise DataError(
        f"{place}: no {role} column among {listing}; name it with --{role}-column "
        "(a file without a header line needs one)"
    )


def _plain(name: str) -> str:
    return re.sub(r"[_\-\s]", "", name).casefold()
