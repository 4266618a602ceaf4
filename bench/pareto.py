"""Choosing among measured settings: Pareto front, knee, best under a budget, fastest that keeps accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One setting: latency in milliseconds (less is better), accuracy in percent (more is better).

    ``kept_low_percent`` is the lower end of the interval of the accuracy relative to the exact step count, in
    percent; `None` where it is not known.
    """

    label: str
    latency_ms: float
    accuracy_percent: float
    kept_low_percent: float | None = None


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other beats in both latency and accuracy, from fast to slow.

    Of several equal points the first is kept.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (each.latency_ms, -each.accuracy_percent)):
        if not front or point.accuracy_percent > front[-1].accuracy_percent:
            front.append(point)
    return front


def knee(points: Iterable[Point]) -> Point | None:
    """Return the point of the front farthest above the front's chord: after it, more time buys little.

    Latency is taken on a logarithmic scale, both axes scaled to 0..1 between the ends of the front. With
    fewer than three points on the front, or none above the chord, it is the fastest one; `None` without
    points.
    """
    front = pareto_front(points)
    if not front:
        return None
    first, last = front[0], front[-1]
    if len(front) < 3:
        return first

    def above_chord(point: Point) -> float:
        across = math.log(point.latency_ms / first.latency_ms) / math.log(last.latency_ms / first.latency_ms)
        up = (point.accuracy_percent - first.accuracy_percent) / (last.accuracy_percent - first.accuracy_percent)
        return up - across

    return max(front, key=lambda point: (above_chord(point), -point.latency_ms))


def best_under(points: Iterable[Point], budget_ms: float) -> Point | None:
    """Return the most accurate point within ``budget_ms``, the faster one of equals; `None` if none fits."""
    fitting = [point for point in points if point.latency_ms <= budget_ms]
    return max(fitting, key=lambda point: (point.accuracy_percent, -point.latency_ms), default=None)


def fastest_keeping(points: Iterable[Point], margin_percent: float = 1.0) -> Point | None:
    """Return the fastest point whose kept accuracy surely reaches ``100 - margin_percent`` percent.

    `None` when no point's ``kept_low_percent`` reaches it.
    """
    least = 100.0 - margin_percent
    keeping = [point for point in points if point.kept_low_percent is not None and point.kept_low_percent >= least]
    return min(keeping, key=lambda point: point.latency_ms, default=None)
