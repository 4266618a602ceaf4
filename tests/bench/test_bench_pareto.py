"""Pareto front, knee and choices, by value."""

from __future__ import annotations

import pytest

from bench.pareto import Point, best_under, fastest_keeping, knee, pareto_front

FAST = Point("fast", 1.0, 5.0, 90.0)
BEND = Point("bend", 10.0, 9.0, 99.5)
SLOW = Point("slow", 100.0, 10.0, 100.0)
DOMINATED = Point("dominated", 20.0, 8.0, 99.9)
POINTS = [SLOW, DOMINATED, BEND, FAST]


def test_front_is_sorted_and_without_dominated_points() -> None:
    assert pareto_front(POINTS) == [FAST, BEND, SLOW]


def test_front_keeps_one_of_equal_points_and_the_better_at_equal_latency() -> None:
    twin = Point("twin", 1.0, 5.0)
    better = Point("better", 1.0, 6.0)
    assert pareto_front([FAST, twin]) == [FAST]
    assert pareto_front([FAST, better]) == [better]


def test_front_and_knee_of_nothing() -> None:
    assert pareto_front([]) == []
    assert knee([]) is None


def test_knee_is_farthest_above_the_chord() -> None:
    # At the middle of the logarithmic axis, BEND has 4/5 of the gain.
    assert knee(POINTS) == BEND


def test_knee_of_short_fronts_and_of_convex_ones_is_the_fastest() -> None:
    assert knee([SLOW, FAST]) == FAST
    below = Point("below", 10.0, 6.0)
    assert knee([FAST, below, SLOW]) == FAST


@pytest.mark.parametrize(("budget_ms", "expected"), [(0.5, None), (1.0, FAST), (20.0, BEND), (1000.0, SLOW)])
def test_best_under(budget_ms: float, expected: Point | None) -> None:
    assert best_under(POINTS, budget_ms) == expected


def test_best_under_prefers_the_faster_of_equals() -> None:
    assert best_under([Point("later", 5.0, 5.0), FAST], 10.0) == FAST


@pytest.mark.parametrize(("margin", "expected"), [(1.0, BEND), (0.1, DOMINATED), (0.0, SLOW), (10.0, FAST)])
def test_fastest_keeping(margin: float, expected: Point) -> None:
    assert fastest_keeping(POINTS, margin) == expected


def test_fastest_keeping_ignores_points_without_an_exact_result() -> None:
    assert fastest_keeping([Point("baseline", 0.1, 20.0)]) is None
