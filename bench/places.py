"""Places of every user's target in the top 20, packed for a record, so that later runs can be compared user by user."""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator

if TYPE_CHECKING:
    from torch import Tensor

LISTED = 20
MOST_USERS = 100_000


def pack_places(ranks: Tensor) -> str | None:
    """Pack ranks `[n]` int64 from 0 as base64 of compressed uint8: 1..20 is the place, 0 beyond it.

    All metrics up to a cutoff of 20 follow from it. `None` for more than 100,000 users, whose row would be too long.
    """
    if ranks.numel() > MOST_USERS:
        return None
    places = (ranks + 1).masked_fill(ranks >= LISTED, 0).cpu().numpy().astype(np.uint8)
    return base64.b64encode(zlib.compress(places.tobytes(), 9)).decode("ascii")


def unpack_places(text: str) -> NDArray[np.uint8]:
    """Undo `pack_places`; raises ValueError for text that it did not write."""
    unpacker = zlib.decompressobj()
    try:
        # Bounded: a damaged record must not unfold into all the memory there is.
        raw = unpacker.decompress(base64.b64decode(text, validate=True), MOST_USERS + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"not packed places: {error}") from None
    if not unpacker.eof or len(raw) > MOST_USERS:
        raise ValueError("not packed places: cut short or too long")
    places = np.frombuffer(raw, dtype=np.uint8)
    if places.size and places.max() > LISTED:
        raise ValueError(f"not packed places: a place is {places.max()}; allowed: 0 to {LISTED}")
    return places


def _checked(text: str) -> str:
    unpack_places(text)
    return text


PackedPlaces = Annotated[str, AfterValidator(_checked)]
"""What `pack_places` writes, as the field of a record: text that cannot be unpacked is refused on reading."""


def metric_gains(places: NDArray[np.uint8], metric: str) -> NDArray[np.float64]:
    """What each user adds to HR@k, NDCG@k or MRR@k, in percent, `[n]` float64; their mean is the metric."""
    name, _, cutoff = metric.partition("@")
    place = places.astype(np.float64)
    hit = (place > 0) & (place <= int(cutoff))
    safe = np.where(hit, place, 1.0)
    gain = {"HR": np.ones_like(safe), "NDCG": 1.0 / np.log2(safe + 1.0), "MRR": 1.0 / safe}[name]
    return np.where(hit, 100.0 * gain, 0.0)
