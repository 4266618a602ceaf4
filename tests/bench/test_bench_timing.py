"""Interleaved measurement, with a clock that reports what the calls return: no test depends on real time."""

from __future__ import annotations

import numpy as np
import pytest

from bench.timing import (
    MOST_CALLS_A_TURN,
    Clock,
    TimingProtocol,
    WallClock,
    measure_interleaved,
    paired_ratio,
    quantiles_ms,
    round_count,
)

PROTOCOL = TimingProtocol(seconds=0.1, rounds=5, rounds_slow=3, rounds_most=10, warmup_calls=2)


def test_rounds_interleave_and_fast_calls_fill_their_turn(counting_clock: Clock) -> None:
    order: list[str] = []

    def fast(number: int) -> float:
        order.append("A")
        return 0.0

    def slow(number: int) -> float:
        order.append("B")
        return 19.0

    series = measure_interleaved({"A": fast, "B": slow}, PROTOCOL, counting_clock)
    # 100 ms hold five calls of 20 ms, so five turns of 20 ms: up to 20 calls of 1 ms against one of 20 ms.
    assert [len(turn) for turn in series["B"].rounds_ms] == [1] * 5
    assert [len(turn) for turn in series["A"].rounds_ms] == [19] * 5
    measured = "".join(order[4:])
    assert measured == ("A" * 19 + "B") * 5
    assert series["B"].medians_ms.tolist() == [20.0] * 5


def test_call_numbers_go_on_between_rounds(counting_clock: Clock) -> None:
    numbers: list[int] = []

    def call(number: int) -> float:
        numbers.append(number)
        return 98.0

    measure_interleaved({"only": call}, PROTOCOL, counting_clock)
    assert numbers[PROTOCOL.warmup_calls :] == [0, 1, 2]


@pytest.mark.parametrize("failing_call", [0, 1, 5])
def test_a_failing_callable_drops_out_alone(counting_clock: Clock, failing_call: int) -> None:
    calls = 0

    def broken(number: int) -> float:
        nonlocal calls
        calls += 1
        if calls > failing_call:
            raise RuntimeError("out of cheese\nsecond line")
        return 19.0

    series = measure_interleaved({"broken": broken, "fine": lambda number: 19.0}, PROTOCOL, counting_clock)
    assert series["broken"].error == "RuntimeError: out of cheese"
    assert series["fine"].error is None
    assert len(series["fine"].rounds_ms) == 5


def test_nothing_left_to_measure(counting_clock: Clock) -> None:
    def broken(number: int) -> float:
        raise ValueError

    series = measure_interleaved({"broken": broken}, PROTOCOL, counting_clock)
    assert series["broken"].error == "ValueError: no message"
    assert series["broken"].rounds_ms == []


@pytest.mark.parametrize(
    ("slowest_seconds", "expected"), [(10.0, 3), (0.03, 3), (0.024, 4), (0.02, 5), (0.0125, 8), (1e-4, 10)]
)
def test_round_count(slowest_seconds: float, expected: int) -> None:
    assert round_count(PROTOCOL, slowest_seconds) == expected


def test_a_slow_call_already_made_is_not_warmed_up_again(counting_clock: Clock) -> None:
    numbers: list[int] = []
    series = measure_interleaved({"A": numbers.append}, PROTOCOL, counting_clock, called_seconds={"A": 7.0})
    assert len(series["A"].rounds_ms) == PROTOCOL.rounds_slow
    assert len(numbers) == len(series["A"].samples_ms)


def test_a_turn_is_bounded(counting_clock: Clock) -> None:
    protocol = TimingProtocol(seconds=1e4, rounds=1, rounds_slow=1, rounds_most=1, warmup_calls=1)
    series = measure_interleaved({"A": lambda number: 0.0}, protocol, counting_clock)
    assert len(series["A"].samples_ms) == MOST_CALLS_A_TURN


def test_progress_reports_the_expected_total(counting_clock: Clock) -> None:
    seen: list[float] = []
    measure_interleaved(
        {"A": lambda number: 19.0}, PROTOCOL, counting_clock, lambda done, expected: seen.append(expected)
    )
    assert seen == pytest.approx([0.1] * 5)


def test_quantiles() -> None:
    assert quantiles_ms(np.arange(101.0)) == (50.0, 95.0, 99.0)


def test_paired_ratio_is_exact_when_the_rounds_agree() -> None:
    base = np.array([10.0, 30.0, 20.0, 50.0])
    assert paired_ratio(base / 4, base) == (0.25, 0.25, 0.25)


def test_paired_ratio_interval_holds_the_value_and_uses_common_rounds() -> None:
    value, low, high = paired_ratio(np.array([1.0, 2.0, 3.0, 9.0]), np.array([1.0, 1.0, 1.0]))
    assert value == 2.0
    assert (low, high) == (1.0, 3.0)
    with pytest.raises(ValueError, match="at least one round"):
        paired_ratio(np.array([]), np.array([1.0]))


def test_wall_clock_runs_the_call_once_and_is_positive() -> None:
    numbers: list[int] = []
    assert WallClock().time_ms(numbers.append, 3) > 0.0
    assert numbers == [3]
