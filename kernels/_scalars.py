"""Checks of numbers, made before a kernel or its twin is chosen: both refuse the same."""

from __future__ import annotations

import math
from typing import Any

from kernels._runtime import require


def require_integers(**values: Any) -> None:
    """Raise UnsupportedError naming an argument that is not an int; a bool is none."""
    for name, value in values.items():
        fits = isinstance(value, int) and not isinstance(value, bool)
        require(fits, f"{name} is {value!r}, a {type(value).__name__}; expected an int")


def require_numbers(**values: Any) -> None:
    """Raise UnsupportedError naming an argument that is not a finite int or float; a bool is none."""
    for name, value in values.items():
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        require(fits, f"{name} is {value!r}, a {type(value).__name__}; expected a number")
        require(math.isfinite(value), f"{name} is {value}; expected a finite number")
