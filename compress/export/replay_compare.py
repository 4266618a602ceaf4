"""Compare the outputs of a request graph in two runtimes, for `polygraphy run --compare-func-script`.

Needs NumPy only: it is copied beside saved outputs and used on machines without adrec. Scores at each place of a list
are compared, and are the same however ties are ordered; an item that one list has and the other has not is a tie where
its score is the other list's last one, to the tolerance. An item that a list repeats counts once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

TOLERANCE = 1e-5
LEAST_OVERLAP = 0.995


def compare_float32(here: Mapping[str, Any], there: Mapping[str, Any]) -> OrderedDict[str, bool]:
    """Scores and representations equal to 1e-5 of the largest, or of 1; the same lists up to ties."""
    report = {"scores": _error(here, there, "scores"), "rows": _error(here, there, "rows")}
    overlap = _overlap(here, there)
    print(f"error of scores {report['scores']:.1e}, of representations {report['rows']:.1e}; overlap {overlap:.5f}")
    passed = [(name, bool(error <= TOLERANCE)) for name, error in report.items()]
    return OrderedDict([*passed, ("items", overlap == 1.0)])


def compare_lists(here: Mapping[str, Any], there: Mapping[str, Any]) -> OrderedDict[str, bool]:
    """For float16 and eight bits: .995 of the items of the lists are the same, up to ties; scores are finite."""
    overlap = _overlap(here, there)
    print(f"error of scores {_error(here, there, 'scores'):.1e}; overlap {overlap:.5f}")
    return OrderedDict([("scores", bool(np.isfinite(here["scores"]).all())), ("items", overlap >= LEAST_OVERLAP)])


def _error(here: Mapping[str, Any], there: Mapping[str, Any], name: str) -> float:
    expected = np.asarray(there[name], np.float64)
    scale = np.maximum(np.abs(expected).max(-1, keepdims=True), 1.0)
    error = np.abs(np.asarray(here[name], np.float64) - expected) / scale
    return float(error.max()) if np.isfinite(error).all() else float("inf")


def _overlap(here: Mapping[str, Any], there: Mapping[str, Any]) -> float:
    items, expected = np.asarray(here["items"]), np.asarray(there["items"])
    scores, best = np.asarray(here["scores"], np.float64), np.asarray(there["scores"], np.float64)
    listed = (items[:, :, None] == expected[:, None, :]).any(-1)
    last = best[:, -1:]
    tied = np.abs(scores - last) <= TOLERANCE * np.maximum(np.abs(last), 1.0)
    repeated = np.tril(items[:, :, None] == items[:, None, :], -1).any(-1)
    return float(((listed | tied) & ~repeated).mean())
