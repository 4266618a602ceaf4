# mypy: allow-untyped-defs
"""Gaussian noise inside kernels: the numbers of ``tl.randn`` and `kernels.philox`, without CUDA's general cosine.

That cosine keeps a table in local memory for huge angles, in every kernel that draws noise. The angles here are small.
"""

from __future__ import annotations

from kernels._runtime import constant, jit, tl

_TWO_OVER_PI = constant(0.6366197723675814)
# pi / 2 in three parts (Cody and Waite): a whole number below 2^13 times each of the first two is exact in float32.
_HALF_PI_HIGH = constant(1.5703125)
_HALF_PI_MIDDLE = constant(4.837512969970703125e-4)
_HALF_PI_LOW = constant(7.549789954891882e-8)


@jit
def sine_cosine(angle):
    """``sin`` and ``cos`` of float32 angles up to 8192 in size, to 1.5e-7; polynomials of Cephes' sinf and cosf."""
    quarters = tl.floor(angle * _TWO_OVER_PI + 0.5)
    rest = angle - quarters * _HALF_PI_HIGH
    rest = rest - quarters * _HALF_PI_MIDDLE
    rest = rest - quarters * _HALF_PI_LOW
    square = rest * rest
    sine = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * rest + rest
    cosine = (2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cosine = cosine * square * square - 0.5 * square + 1.0
    quadrant = quarters.to(tl.int32) & 3
    odd = (quadrant & 1) == 1
    up, across = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    return tl.where(quadrant >= 2, -up, up), tl.where((quadrant == 1) | (quadrant == 2), -across, across)


@jit
def normal(seed, offset):
    """Standard normals, float32, of an int64 seed (loaded, not an argument) and int64 offsets of any shape."""
    word0, word1, _, _ = tl.randint4x(seed, offset)
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(tl.uint_to_uniform_float(word0), 1.0e-7)))
    _, cosine = sine_cosine(tl.uint_to_uniform_float(word1) * 6.283185307179586)
    return radius * cosine
