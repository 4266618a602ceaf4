"""Counter-based Gaussian noise: ``n(seed, offset)`` by Philox-4x32-10 and Box-Muller, in torch and numpy.

The numbers are those of Triton's ``tl.randn(seed, offset)`` to 5e-7 (logarithm and cosine differ in the last bit).
Counter: (offset low, offset high, 0, 0). Key: (seed low, seed high). Source: Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3" (SC 2011).

The noise contract: the offset of an element is made of the user's row key, the draw and the dimension, never of the
position in a batch. A user's noise, and so a user's recommendations, do not depend on who else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DIMENSION_BITS = 12
DRAW_BITS = 12
ROW_KEY_BITS = 63 - DRAW_BITS - DIMENSION_BITS
ROW_KEYS = 1 << ROW_KEY_BITS

_MASK = 0xFFFFFFFF
_MULTIPLIER_A = 0xD2511F53
_MULTIPLIER_B = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_MULTIPLIERS = np.array([[_MULTIPLIER_B], [_MULTIPLIER_A]], dtype=np.uint64)
_ROUNDS = 10
_UNIFORM_SCALE = 4.6566127342e-10
# Elements worked on at a time: the work arrays of a chunk then stay in a core's second-level cache.
_CHUNK = 1 << 14


def offsets(row_keys: Tensor, draw: int, width: int) -> Tensor:
    """Return the counter offsets ``key * 2^24 + draw * 2^12 + dimension`` of one draw.

    row_keys: `[B]` int64 in ``[0, 2^39)``. draw: 0 for the starting noise x_T, then 1, 2, ... for the reverse steps.
    width: D, at most 4096. Returns `[B, width]` int64. Raises ValueError outside those ranges (row keys: on a CPU).
    """
    if not 0 <= draw < 1 << DRAW_BITS:
        raise ValueError(f"draw is {draw}; allowed: 0 to {(1 << DRAW_BITS) - 1}")
    if not 0 < width <= 1 << DIMENSION_BITS:
        raise ValueError(f"width is {width}; allowed: 1 to {1 << DIMENSION_BITS}")
    check_row_keys(row_keys)
    base = (row_keys << (DRAW_BITS + DIMENSION_BITS)) + (draw << DIMENSION_BITS)
    return base[:, None] + torch.arange(width, device=row_keys.device)


def check_row_keys(row_keys: Tensor) -> None:
    """Raise ValueError for a row key outside ``[0, 2^39)``; only of keys on a CPU: reading others would stall."""
    if row_keys.device.type != "cpu" or not row_keys.numel():
        return
    least, most = (int(bound) for bound in row_keys.aminmax())
    if not 0 <= least <= most < ROW_KEYS:
        raise ValueError(f"row keys span {least} to {most}; allowed: 0 to 2^39 - 1")


def philox(seed: int, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first two of the four 32-bit words of Philox-4x32-10.

    seed: 64-bit key. offset: int64 counters of any shape. Returns two int64 tensors of that shape holding values in
    ``[0, 2^32)``.
    """
    first, second = _words(seed, offset.reshape(-1))
    return first.view(offset.shape), second.view(offset.shape)


def _words(seed: int, offset: Tensor) -> Tensor:
    """Both words of counters `[M]` as one tensor, `[2, M]` int64."""
    if offset.device.type == "cpu":
        return torch.from_numpy(_philox_in_place(seed, offset.numpy().view(np.uint64)).view(np.int64))
    return torch.stack(_philox_on_device(seed, offset))


def _philox_on_device(seed: int, offset: Tensor) -> tuple[Tensor, Tensor]:
    c0, c1 = offset & _MASK, (offset >> 32) & _MASK
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for k0, k1 in _round_keys(seed):
        # A product of two 32-bit words wraps around in int64; its bits are right, and the mask undoes the sign.
        product_b, product_a = c2 * _MULTIPLIER_B, c0 * _MULTIPLIER_A
        c0 = (product_b >> 32).bitwise_and_(_MASK).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (product_a >> 32).bitwise_and_(_MASK).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = product_b.bitwise_and_(_MASK), product_a.bitwise_and_(_MASK)
    return c0, c1


def _round_keys(seed: int) -> Iterator[tuple[int, int]]:
    for index in range(_ROUNDS):
        yield (seed + index * _WEYL_0) & _MASK, ((seed >> 32) + index * _WEYL_1) & _MASK


@lru_cache(maxsize=64)
def _key_columns(seed: int) -> tuple[NDArray[np.uint64], ...]:
    """The keys of each round, second word first, `[2, 1]`."""
    return tuple(np.array([[k1], [k0]], dtype=np.uint64) for k0, k1 in _round_keys(seed))


def _philox_in_place(seed: int, offset: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The same rounds in numpy, whose unsigned shifts need no mask and whose operations reuse their arrays.

    Twice as fast as torch's on one core, where the noise of 32 steps is a fifth of the work of a batch. Words 2 and 0
    are rows of one array, as are 3 and 1: half the calls, which are what the noise of a single user costs.
    """
    mask, half = np.uint64(_MASK), np.uint64(32)
    work = np.zeros((3, 2, offset.size), dtype=np.uint64)
    even, odd, product = work
    np.bitwise_and(offset, mask, out=even[1])
    np.right_shift(offset, half, out=odd[1])
    for keys in _key_columns(seed):
        np.multiply(even, _MULTIPLIERS, out=product)
        # The product of word 2 gives the new words 0 and 1, that of word 0 the new words 2 and 3.
        np.right_shift(product[::-1], half, out=even)
        even ^= odd
        even ^= keys
        np.bitwise_and(product[::-1], mask, out=odd)
    return work[:2, 1]


def randn(seed: int, offset: Tensor) -> Tensor:
    """Return standard normals ``sqrt(-2 ln max(1e-7, u0)) cos(2 pi u1)``, float32, one for each int64 offset."""
    flat = offset.reshape(-1)
    if flat.device.type != "cpu" or flat.numel() <= _CHUNK:
        return _normals(seed, flat).view(offset.shape)
    return torch.cat([_normals(seed, part) for part in flat.split(_CHUNK)]).view(offset.shape)


def _normals(seed: int, offset: Tensor) -> Tensor:
    radius, angle = _uniform(_words(seed, offset)).unbind()
    return angle.mul_(2.0 * math.pi).cos_().mul_(radius.clamp_(min=1e-7).log_().mul_(-2.0).sqrt_())


def row_noise(seed: int, row_keys: Tensor, draw: int, width: int) -> Tensor:
    """Return the noise of one draw, `[B, width]` float32; see `offsets` for the arguments."""
    return randn(seed, offsets(row_keys, draw, width))


def _uniform(word: Tensor) -> Tensor:
    # Triton reads the word as a signed int32 and maps a negative x to -x - 1, which is its complement.
    signed = word.to(torch.int32)
    return (signed ^ (signed >> 31)).to(torch.float32).mul_(_UNIFORM_SCALE)
