"""Scaling and training suites: fits of known laws, points that fail alone, steps of real training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adrec.config import ModelConfig
from adrec.data.dataset import Dataset
from bench.archive import read_any
from bench.comparing.rows import row_of, rows_of
from bench.json_lines import json_line
from bench.kernels.measure import Timer
from bench.scaling.measure import Fixed, ScalingBench, equal_histories, growth
from bench.timing import Clock, TimingProtocol
from bench.training_speed.measure import WARM_UP, StepTimes, TrainingBench, summarise

CPU = torch.device("cpu")


def silent(done: float, expected: float) -> None:
    """No progress."""


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_a_power_law_is_found_exactly(exponent: float) -> None:
    points = [(value, [3.0 * value**exponent] * 4) for value in (10, 100, 1000, 5000)]
    found, misfit = growth(points)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((exponent,) * 3, abs=1e-9)
    assert misfit == pytest.approx(1.0)


def test_noise_widens_the_interval_and_a_fixed_cost_is_a_misfit() -> None:
    noisy, _ = growth([(value, [0.8 * value, value, 1.3 * value]) for value in (10, 100, 1000)])
    assert noisy is not None
    assert noisy.low < 1.0 < noisy.high
    # Constant below 100, linear above: half the exponent overall, all of it at the end.
    points = [(value, [float(max(100, value))] * 3) for value in (1, 10, 100, 1000, 10_000)]
    whole, misfit = growth(points)
    last, _ = growth(points[-2:])
    assert whole is not None
    assert last is not None
    assert whole.value < 0.7
    assert last.value == pytest.approx(1.0)
    assert (misfit or 0.0) > 1.5
    assert growth(points[:1]) == (None, None)
    assert growth([(5, [1.0]), (5, [2.0])]) == (None, None)


@pytest.fixture
def bench(tiny_protocol: TimingProtocol, counting_clock: Clock) -> ScalingBench:
    timer = Timer(CPU, tiny_protocol, counting_clock, "adrec bench")
    return ScalingBench(timer, ("cached", "reference"), Fixed(items=40, batch=3, steps=1, width=16))


@pytest.mark.parametrize(
    ("axis", "values", "tokens"),
    [("batch", [1, 2, 5], None), ("history", [1, 7, 60], [3, 21, 180]), ("items", [25, 50, 75], None)],
)
def test_points_along_an_axis(bench: ScalingBench, axis: Any, values: list[int], tokens: list[int] | None) -> None:
    records = list(bench.records(axis, values, silent))
    assert [record.path for record in records] == ["cached", "reference"]
    for record in records:
        assert record.error is None
        assert [point.value for point in record.points] == values
        assert record.model_dump()[axis] == 0
        # The clock counts a millisecond a call, whatever the size.
        assert record.exponent is not None
        assert record.exponent.value == pytest.approx(0.0, abs=1e-9)
        if tokens is not None:
            assert [point.history_tokens for point in record.points] == tokens
    rows = rows_of(records)
    assert len(rows) == 6
    assert {dict(key)[axis] for key in rows} == {str(value) for value in values}
    assert all(row.rounds_ms == (1.0, 1.0) for row in rows.values())


def test_a_point_that_fails_is_an_error_of_its_own(bench: ScalingBench, monkeypatch: pytest.MonkeyPatch) -> None:
    def crowded(items: int, *others: object) -> None:
        if items == 50:
            raise MemoryError("no room")

    monkeypatch.setattr("bench.scaling.measure.check_memory", crowded)
    for record in bench.records("items", [25, 50, 75], silent):
        assert [point.error for point in record.points] == [None, "MemoryError: no room", None]
        assert record.error == "items 50: MemoryError: no room"
        # Two points make no fit, but a last slope.
        assert record.exponent is None
        assert record.exponent_last is not None


def test_equal_histories() -> None:
    found = equal_histories(3, 5, 7)
    assert found.lengths.tolist() == [5, 5, 5]
    assert 1 <= int(found.values.min()) <= int(found.values.max()) <= 7


def times_of(seconds: list[float]) -> StepTimes:
    times = StepTimes(5, CPU, silent)
    times.seconds, times.tokens, times.users = seconds, [10] * len(seconds), [2] * len(seconds)
    return times


def test_summary_of_steps_by_hand() -> None:
    found = summarise(times_of([9.0] * WARM_UP + [0.1, 0.2, 0.3]), 7, 5.0, "MiB")
    assert (found.step_ms_p50, found.steps, found.epoch_seconds) == pytest.approx((200.0, 3, 1.4))
    assert (found.tokens_per_second, found.users_per_second) == pytest.approx((50.0, 10.0))
    assert found.window_medians_ms == pytest.approx([100.0, 200.0, 300.0])
    with pytest.raises(ValueError, match="no step was timed"):
        summarise(times_of([1.0] * WARM_UP), 7, None, "")


@pytest.mark.parametrize("model", ["adrec", "sasrec"])
def test_real_steps_are_timed(tiny_dataset: Dataset, tmp_path: Path, model: Any) -> None:
    bench = TrainingBench(tiny_dataset, CPU, "adrec bench", steps=4)
    config = ModelConfig(model=model, items=tiny_dataset.item_count, width=16, heads=2)
    record = bench.record(config, 16, "32-true", silent)
    assert record.error is None
    assert record.timing is not None
    # 60 users in batches of 16; the first step of each epoch is not timed.
    assert (record.timing.epoch_steps, record.timing.steps) == (4, 4)
    assert row_of(record).rounds_ms == tuple(record.timing.window_medians_ms)
    path = tmp_path / "rows.jsonl"
    path.write_text(json_line(record))
    assert read_any(path) == [record]


def test_training_that_fails_is_a_record(tiny_dataset: Dataset) -> None:
    bench = TrainingBench(tiny_dataset, CPU, "adrec bench", steps=2)
    config = ModelConfig(items=tiny_dataset.item_count, width=16, heads=2)
    one_batch = bench.record(config, 60, "32-true", silent)
    assert "no step was timed" in str(one_batch.error)
    assert "ValidationError" in str(bench.record(config, 16, "8-true", silent).error)
