"""Installed versions of what decides results and speed."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTIONS = (
    *("adrec", "torch", "triton", "lightning", "numpy", "polars", "pyarrow"),
    *("liger-kernel", "onnx", "onnxruntime", "tensorrt"),
)


def installed_versions() -> dict[str, str | None]:
    """Return the version of Python and of each distribution; `None` for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
