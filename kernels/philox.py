"""Counter-based Gaussian noise: ``n(seed, offset)`` by Philox-4x32-10 and Box-Muller, in torch and numpy.

The numbers are those of Triton's ``tl.randn(seed, offset)`` to 5e-7 (logarithm and cosine differ in the last bit).
Counter: (offset low, offset high, 0, 0). Key: (seed low, seed high). Source: Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3" (SC 2011).

The noise contract: the offset of an element is made of the user's row key, the draw and the dimension, never of the
position in a batch. A user's noise, and so a user's recommendations, do not depend on who else is in the batch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
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
_LEAST = 1e-7
CHUNK = 1 << 14
"""Elements worked on at a time: the work arrays of a chunk then stay in a core's second-level cache."""


def offsets(row_keys: Tensor, draw: int | Sequence[int], width: int) -> Tensor:
    """Return the counter offsets ``key * 2^24 + draw * 2^12 + dimension`` of one draw or several.

    row_keys: `[B]` int64 in ``[0, 2^39)``. draw: 0 for the starting noise x_T, then 1, 2, ... for the reverse steps.
    width: D, at most 4096. Returns `[B, width]` int64, or `[S, B, width]` for S draws. Raises ValueError outside those
    ranges (row keys: on a CPU).
    """
    draws = list(draw) if isinstance(draw, Sequence) else [int(draw)]
    for number in draws:
        if not 0 <= number < 1 << DRAW_BITS:
            raise ValueError(f"draw is {number}; allowed: 0 to {(1 << DRAW_BITS) - 1}")
    if not 0 < width <= 1 << DIMENSION_BITS:
        raise ValueError(f"width is {width}; allowed: 1 to {1 << DIMENSION_BITS}")
    check_row_keys(row_keys)
    if row_keys.device.type == "cpu":
        counters = torch.from_numpy(_counters(row_keys.numpy(), draws, width))
    else:
        base = (row_keys << (DRAW_BITS + DIMENSION_BITS))[:, None] + torch.arange(width, device=row_keys.device)
        # A tensor of the draws would be copied from the host, which waits for the device.
        parts = [base + (number << DIMENSION_BITS) for number in draws]
        counters = torch.stack(parts) if parts else base.new_empty(0, *base.shape)
    return counters if isinstance(draw, Sequence) else counters[0]


def _counters(row_keys: NDArray[np.int64], draws: Sequence[int], width: int) -> NDArray[np.int64]:
    row = np.arange(width) + (np.array(draws, dtype=np.int64) << DIMENSION_BITS)[:, None, None]
    return (row_keys << (DRAW_BITS + DIMENSION_BITS))[:, None] + row


def check_row_keys(row_keys: Tensor) -> None:
    """Raise ValueError for a row key outside ``[0, 2^39)``; only of keys on a CPU: reading others would stall."""
    if row_keys.device.type != "cpu" or not row_keys.numel():
        return
    keys = row_keys.numpy()
    least, most = keys.min(), keys.max()
    if not 0 <= least <= most < ROW_KEYS:
        raise ValueError(f"row keys span {least} to {most}; allowed: 0 to 2^39 - 1")


def philox(seed: int, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first two of the four 32-bit words of Philox-4x32-10.

    seed: 64-bit key. offset: int64 counters of any shape. Returns two int64 tensors of that shape holding values in
    ``[0, 2^32)``.
    """
    if offset.device.type != "cpu":
        return _philox_on_device(seed, offset)
    work = np.empty((3, 2, offset.numel()), dtype=np.uint64)
    first, second = torch.from_numpy(_words(seed, offset.reshape(-1).numpy().view(np.uint64), work).view(np.int64))
    return first.view(offset.shape), second.view(offset.shape)


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


class _Work(threading.local):
    """Memory that a thread's rounds use again: where it is given back to the system, its pages cost more than they."""

    def __init__(self) -> None:
        self.words = np.empty((3, 2, 0), dtype=np.uint64)

    def of(self, count: int) -> NDArray[np.uint64]:
        if count > self.words.shape[2]:
            # A few words longer: rows that lie multiples of 4 KiB apart wait for each other's writes.
            self.words = np.empty((3, 2, count + 72), dtype=np.uint64)
        return self.words[:, :, :count]


_work = _Work()


def _words(seed: int, offset: NDArray[np.uint64], work: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The rounds of `_philox_on_device` in numpy, of counters `[M]`: both words, `[2, M]`, in ``work`` `[3, 2, M]`.

    Its unsigned shifts need no mask and its operations reuse their arrays: twice as fast as torch's on one core, where
    the noise of 32 steps is a fifth of the work of a batch. Words 2 and 0 are rows of one array, as are 3 and 1: half
    the calls, which are what the noise of a single user costs.
    """
    mask, half = np.uint64(_MASK), np.uint64(32)
    even, odd, product = work
    even[0] = odd[0] = 0
    np.bitwise_and(offset, mask, out=even[1])
    np.right_shift(offset, half, out=odd[1])
    for keys in _key_columns(seed):
        np.multiply(even, _MULTIPLIERS, out=product)
        # The product of word 2 gives the new words 0 and 1, that of word 0 the new words 2 and 3.
        np.right_shift(product[::-1], half, out=even)
        np.bitwise_xor(even, odd, out=even)
        np.bitwise_xor(even, keys, out=even)
        np.bitwise_and(product[::-1], mask, out=odd)
    return work[:2, 1]


def randn(seed: int, offset: Tensor) -> Tensor:
    """Return standard normals ``sqrt(-2 ln max(1e-7, u0)) cos(2 pi u1)``, float32, one for each int64 offset."""
    if offset.device.type != "cpu":
        return _normals_on_device(*_philox_on_device(seed, offset))
    return torch.from_numpy(_randn(seed, offset.numpy()))


def _randn(seed: int, offset: NDArray[np.int64]) -> NDArray[np.float32]:
    flat = offset.reshape(-1).view(np.uint64)
    out = np.empty(flat.size, dtype=np.float32)
    for first in range(0, flat.size, CHUNK):
        part = slice(first, first + CHUNK)
        _normals(_words(seed, flat[part], _work.of(flat[part].size)), out[part])
    return out.reshape(offset.shape)


def _normals(words: NDArray[np.uint64], out: NDArray[np.float32]) -> None:
    # Triton reads a word as a signed int32 and maps a negative x to -x - 1, which is its complement.
    signed = words.astype(np.uint32).view(np.int32)
    radius, angle = np.multiply(signed ^ (signed >> 31), _UNIFORM_SCALE, dtype=np.float32)
    np.log(np.maximum(radius, _LEAST, out=radius), out=radius)
    np.sqrt(np.multiply(radius, -2.0, out=radius), out=radius)
    np.multiply(np.cos(np.multiply(angle, 2.0 * math.pi, out=angle), out=angle), radius, out=out)


def _normals_on_device(first: Tensor, second: Tensor) -> Tensor:
    radius, angle = _uniform(first), _uniform(second)
    return angle.mul_(2.0 * math.pi).cos_().mul_(radius.clamp_(min=_LEAST).log_().mul_(-2.0).sqrt_())


def _uniform(word: Tensor) -> Tensor:
    signed = word.to(torch.int32)
    return (signed ^ (signed >> 31)).to(torch.float32).mul_(_UNIFORM_SCALE)


def row_noise(seed: int, row_keys: Tensor, draw: int | Sequence[int], width: int) -> Tensor:
    """Return the noise of one draw `[B, width]`, or of several `[S, B, width]`, float32; see `offsets`."""
    return randn(seed, offsets(row_keys, draw, width))


def draw_noise(seed: int, row_keys: NDArray[np.int64], draws: Sequence[int], width: int) -> NDArray[np.float32]:
    """`row_noise` of several draws `[S, B, width]`, in numpy and unchecked: for one user torch costs as much again."""
    return _randn(seed, _counters(row_keys, draws, width))
