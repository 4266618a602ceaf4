"""Raw item ids to item ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa


class ItemIndex:
    """Finds the item id of a raw id; raw id ``item_ids[i - 1]`` is item `i`.

    A raw id is matched as it is first. Where that finds nothing, a string in the usual spelling of an integer also
    matches the integer id (``"123"`` finds ``123``, ``"0123"`` does not), and an integer matches the string id that
    spells it. Anything but a string or an integer is unknown.
    """

    def __init__(self, item_ids: pa.Array) -> None:
        self.raw: list[Any] = item_ids.to_pylist()
        self._items = {raw: item for item, raw in enumerate(self.raw, start=1)}

    def __getitem__(self, value: Any) -> int:
        """Item id of a raw id, 0 when unknown."""
        if isinstance(value, bool) or not isinstance(value, str | int | np.integer):
            return 0
        found = self._items.get(value, 0)
        if found:
            return found
        if not isinstance(value, str):
            return self._items.get(str(value), 0)
        try:
            number = int(value)
        except ValueError:
            return 0
        return self._items.get(number, 0) if str(number) == value else 0
