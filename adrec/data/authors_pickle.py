"""The ADRec authors' ``dataset.pkl``, read without letting a pickle run code."""

from __future__ import annotations

import pickle
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from adrec.errors import DataError

SPLITS = ("train", "val", "test")
# Ids are rows of a table: one far beyond the number of interactions is no item but a damaged or raw id.
ALWAYS_ALLOWED = 10_000_000
LARGEST_SHARE = 100


class RefusingUnpickler(pickle.Unpickler):
    """Loads plain containers, strings and numbers; what names a global or an outside object is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(f"names the global {module}.{name}, which could run code")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise DataError(f"refers to the outside object {pid!r}")


def read_authors_pickle(path: Path) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Return ``(train, validation, test)``, each a list over users of lists of item ids 1..N.

    The lists are taken as they are. ``val`` and ``test`` hold at most one id for a user. Raises: `DataError`
    for a file that is not such a dict, that names any global, or that holds anything but positive integers.
    """
    try:
        with path.open("rb") as file:
            content = RefusingUnpickler(file).load()
    except DataError as error:
        raise DataError(
            f"{path}: refused, the pickle {error}. A data set holds only a dict of lists of integers: "
            "convert it with the tool that wrote it, or prepare the raw interactions instead"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path}: not a readable pickle ({type(error).__name__}: {error}); copy it again") from None
    if not isinstance(content, dict) or any(not isinstance(content.get(split), list) for split in SPLITS):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: expected a dict with the lists 'train', 'val' and 'test', found {found}")
    train, validation, test = (_checked(path, split, content[split]) for split in SPLITS)
    if not len(train) == len(validation) == len(test):
        raise DataError(
            f"{path}: 'train', 'val' and 'test' must list the same users, "
            f"found {len(train)}, {len(validation)} and {len(test)}"
        )
    if not any(train):
        raise DataError(f"{path}: 'train' holds no interaction; there is nothing to train on")
    _refuse_absurd_ids(path, {"train": train, "val": validation, "test": test})
    return train, validation, test


def _refuse_absurd_ids(path: Path, splits: dict[str, list[list[int]]]) -> None:
    interactions = sum(len(row) for rows in splits.values() for row in rows)
    allowed = max(ALWAYS_ALLOWED, LARGEST_SHARE * interactions)
    for split, rows in splits.items():
        largest = max(chain.from_iterable(rows), default=0)
        if largest > allowed:
            user = next(user for user, row in enumerate(rows) if largest in row)
            shown = str(largest) if largest < 10**40 else "of more than 40 digits"
            raise DataError(
                f"{path}: {split}[{user}] holds the item id {shown}, but there are only {interactions}"
                f" interactions; allowed here: 1 to {allowed}. Ids number the items from 1 to N: renumber them, or"
                " prepare the raw interactions instead"
            )


def _checked(path: Path, split: str, rows: list[Any]) -> list[list[int]]:
    for user, row in enumerate(rows):
        if not isinstance(row, list | tuple):
            raise DataError(f"{path}: {split}[{user}] is a {type(row).__name__}, expected a list of item ids")
        if split != "train" and len(row) > 1:
            raise DataError(f"{path}: {split}[{user}] holds {len(row)} items, allowed is 0 or 1 for a user")
    # One pass at C speed over all ids; the slow search runs only when something is wrong.
    if set(map(type, chain.from_iterable(rows))) <= {int} and min(chain.from_iterable(rows), default=1) >= 1:
        return rows
    user, item = next(
        (user, item) for user, row in enumerate(rows) for item in row if type(item) is not int or item < 1
    )
    raise DataError(f"{path}: {split}[{user}] holds {item!r}, item ids are the integers 1 to N (0 is padding)")
