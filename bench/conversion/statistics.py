"""The statistics that pytest-benchmark's JSON holds for a benchmark, from its samples."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def statistics_of(seconds: Sequence[float]) -> dict[str, object]:
    """Statistics of at least one sample, by the same conventions (quartiles included), with the samples themselves."""
    ordered = sorted(seconds)
    count, total, mean = len(ordered), sum(seconds), statistics.mean(seconds)
    spread = statistics.stdev(seconds) if count > 1 else 0
    low, high = quartiles(ordered)
    lowest, highest = low - 1.5 * (high - low), high + 1.5 * (high - low)
    beyond_spread = sum(not mean - spread <= each <= mean + spread for each in seconds)
    beyond_fences = sum(not lowest <= each <= highest for each in seconds)
    return {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": mean,
        "stddev": spread,
        "rounds": count,
        "median": statistics.median(ordered),
        "iqr": high - low,
        "q1": low,
        "q3": high,
        "iqr_outliers": beyond_fences,
        "stddev_outliers": beyond_spread,
        "outliers": f"{beyond_spread};{beyond_fences}",
        "ld15iqr": next(each for each in ordered if each >= lowest),
        "hd15iqr": next(each for each in reversed(ordered) if each <= highest),
        "ops": count / total if total else 0,
        "total": total,
        "data": list(seconds),
        "iterations": 1,
    }


def quartiles(ordered: Sequence[float]) -> tuple[float, float]:
    """First and third quartile: medians of the halves; of an odd number, weighted between neighbours."""
    count = len(ordered)
    if count == 1:
        return ordered[0], ordered[0]
    if count % 2 == 0:
        return statistics.median(ordered[: count // 2]), statistics.median(ordered[count // 2 :])
    part, left = divmod(count, 4)
    if left == 1:
        return (
            0.25 * ordered[part - 1] + 0.75 * ordered[part],
            0.75 * ordered[3 * part] + 0.25 * ordered[3 * part + 1],
        )
    return (
        0.75 * ordered[part] + 0.25 * ordered[part + 1],
        0.25 * ordered[3 * part + 1] + 0.75 * ordered[3 * part + 2],
    )
