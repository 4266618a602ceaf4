"""Serving scenarios on a clock that the test moves: queues by hand, against queueing theory, and whole records."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adrec.errors import ConfigError, DataError
from bench.archive import read_any
from bench.comparing.rows import row_of
from bench.json_lines import json_line
from bench.serving.measure import Policy, ServingBench, summarise
from bench.serving.records import ServingRecord
from bench.serving.scenarios import (
    Extent,
    Served,
    WallTimeline,
    complaints,
    offline,
    poisson_arrivals,
    server,
    single_stream,
)
from bench.subject import Subject, load_subject


class FakeTimeline:
    """A clock that stands still unless somebody waits or works."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def wait_until(self, moment: float) -> None:
        self.time = max(self.time, moment)


class Worker:
    """Answers a batch in ``fixed + each * users`` seconds of a fake clock."""

    def __init__(self, timeline: FakeTimeline, fixed: float, each: float = 0.0) -> None:
        self.timeline, self.fixed, self.each = timeline, fixed, each
        self.batches: list[range] = []

    def __call__(self, numbers: range) -> None:
        self.batches.append(numbers)
        self.timeline.time += self.fixed + self.each * len(numbers)


def silent(done: float, expected: float) -> None:
    """No progress."""


def test_a_queue_by_hand() -> None:
    timeline = FakeTimeline()
    worker = Worker(timeline, 1.0)
    # 0: served 0..1. At 1.0, three are waiting, of which two fit. At 2.0 one is left; 9.0 comes to an idle server.
    found = server(worker, timeline, np.array([0.0, 0.5, 0.6, 1.0, 9.0]), 2, 0.0, silent)
    assert worker.batches == [range(1), range(1, 3), range(3, 4), range(4, 5)]
    assert found.times_ms == pytest.approx([1000.0, 1500.0, 1400.0, 2000.0, 1000.0])
    assert (found.batch_sizes, found.queue_most) == ([1, 2, 1, 1], 3)
    assert (found.seconds, found.busy_seconds) == pytest.approx((10.0, 4.0))


@pytest.mark.parametrize(
    ("wait", "batch_most", "batches", "first_start"),
    [
        (0.0, 4, [range(1), range(1, 3), range(3, 4)], 1.0),
        # The first waits half a second for company, the third arrives within it.
        (0.5, 4, [range(3), range(3, 4)], 1.5),
        # A full batch does not wait on.
        (0.5, 2, [range(2), range(2, 3), range(3, 4)], 1.2),
        # Nor does one after which nothing arrives.
        (60.0, 4, [range(4)], 3.0),
    ],
)
def test_a_batch_waits_for_company_and_no_longer(
    wait: float, batch_most: int, batches: list[range], first_start: float
) -> None:
    timeline = FakeTimeline()
    worker = Worker(timeline, 0.6)
    found = server(worker, timeline, np.array([1.0, 1.2, 1.4, 3.0]), batch_most, wait, silent)
    assert worker.batches == batches
    assert found.times_ms[0] == pytest.approx(1e3 * (first_start + 0.6 - 1.0))


def test_waiting_time_is_that_of_queueing_theory() -> None:
    timeline = FakeTimeline()
    arrivals = poisson_arrivals(0.7, Extent(0.0, 60_000), seed=3)
    found = server(Worker(timeline, 1.0), timeline, arrivals, 1, 0.0, silent)
    # Pollaczek and Khinchine, M/D/1: rho / (2 (1 - rho)) services in the queue, then one's own.
    assert np.mean(found.times_ms) / 1e3 == pytest.approx(1.0 + 0.7 / (2 * 0.3), rel=0.05)
    assert found.busy_seconds / found.seconds == pytest.approx(0.7, rel=0.02)


@settings(max_examples=40, deadline=None)
@given(
    gaps=st.lists(st.floats(0.0, 3.0), min_size=1, max_size=40),
    batch_most=st.integers(1, 5),
    wait=st.floats(0.0, 2.0),
    each=st.floats(0.01, 2.0),
)
def test_every_query_is_answered_once_in_order_and_after_it_arrived(
    gaps: list[float], batch_most: int, wait: float, each: float
) -> None:
    timeline = FakeTimeline()
    worker = Worker(timeline, 0.01, each)
    found = server(worker, timeline, np.cumsum(gaps), batch_most, wait, silent)
    assert [number for batch in worker.batches for number in batch] == list(range(len(gaps)))
    assert max(found.batch_sizes) <= batch_most
    assert min(found.times_ms) >= 1e3 * (0.01 + each) - 1e-6
    assert found.queries == len(found.times_ms) == len(gaps)


def test_arrivals_reach_both_minima_at_the_rate() -> None:
    assert len(poisson_arrivals(10.0, Extent(60.0, 100), 0)) == 600
    arrivals = poisson_arrivals(10.0, Extent(1.0, 50_000), 0)
    gaps = np.diff(arrivals)
    assert gaps.mean() == pytest.approx(0.1, rel=0.02)
    # Exponential: as much spread as mean.
    assert gaps.std() == pytest.approx(0.1, rel=0.02)
    assert np.array_equal(arrivals, poisson_arrivals(10.0, Extent(1.0, 50_000), 0))


def test_more_arrivals_than_can_be_drawn_are_refused() -> None:
    assert len(poisson_arrivals(2.0**40, Extent(2.0**-30, 5), 0)) == 1024
    for rate, extent in ((1e12, Extent(60.0, 1)), (1.0, Extent(0.0, 10_000_001)), (1e308, Extent(60.0, 1))):
        with pytest.raises(ConfigError, match="arrivals; allowed are 10000000: give a lower --rate or --load, or"):
            poisson_arrivals(rate, extent, 0)


def test_single_stream_and_offline_reach_both_minima() -> None:
    timeline = FakeTimeline()
    found = single_stream(Worker(timeline, 0.25), timeline, Extent(2.0, 3), silent)
    assert (found.queries, found.seconds) == (8, pytest.approx(2.0))
    assert single_stream(Worker(timeline, 0.25), timeline, Extent(0.1, 3), silent).queries == 3
    batches = offline(Worker(timeline, 0.5, 0.25), timeline, Extent(2.0, 9), 4, silent)
    assert (batches.batch_sizes, batches.times_ms) == ([4, 4, 4], pytest.approx([1500.0] * 3))
    stopped = single_stream(Worker(timeline, 1.0), timeline, Extent(1.0, 100, seconds_most=5.0), silent)
    assert complaints(stopped, Extent(1.0, 100), arrivals=False) == ["5 of at least 100 queries"]
    late = server(Worker(timeline, 1.0), timeline, np.arange(50) * 0.5, 1, 0.0, silent, seconds_most=5.0)
    assert late.queries == len(late.times_ms) == 5


def test_no_arrival_is_waited_for_beyond_the_end() -> None:
    timeline = FakeTimeline()
    worker = Worker(timeline, 0.5)
    # The second comes in thirty years; a batch of two would wait as long.
    found = server(worker, timeline, np.array([0.25, 1e9]), 1, 0.0, silent, seconds_most=4.0)
    assert (worker.batches, found.times_ms, found.seconds) == ([range(1)], [500.0], 4.0)
    found = server(worker, timeline, np.array([0.25, 1e9]), 2, 1e9, silent, seconds_most=4.0)
    assert (found.queries, found.times_ms, found.seconds) == (0, [], 4.0)


def test_what_makes_figures_invalid() -> None:
    timeline = FakeTimeline()
    overload = server(Worker(timeline, 1.0), timeline, np.arange(1, 21) * 0.1, 1, 0.0, silent)
    (complaint,) = complaints(overload, Extent(1.0, 5), arrivals=True)
    assert "did not keep up" in complaint
    # Twice what single users would allow, a third of what full batches do: busy all the time, and not behind.
    worker = Worker(timeline, 0.05, 0.01)
    batches = server(worker, timeline, np.arange(1, 2001) * 0.03, 8, 0.0, silent)
    assert batches.busy_seconds > 0.95 * batches.seconds
    assert complaints(batches, Extent(1.0, 5), arrivals=True) == []
    behind = server(worker, timeline, np.arange(1, 2001) * 0.03, 1, 0.0, silent)
    assert "did not keep up" in complaints(behind, Extent(1.0, 5), arrivals=True)[0]
    short = Served([1.0], [1], seconds=0.5, busy_seconds=0.1)
    assert complaints(short, Extent(60.0, 1), arrivals=True) == ["0.5 of at least 60 seconds"]
    assert complaints(Served([1.0], [1], 61.0, 61.0), Extent(60.0, 1), arrivals=False) == []


@pytest.mark.parametrize(("late", "valid"), [(0, True), (1, True), (2, False)])
def test_a_bound_is_kept_by_the_99th_percentile(late: int, valid: bool) -> None:
    served = Served([10.0] * (100 - late) + [10.5] * late, [1] * 100, seconds=1.0, busy_seconds=0.1)
    found = complaints(served, Extent(0.5, 5), arrivals=True, bound_ms=10.0)
    assert found == ([] if valid else ["98.0% of the queries, of at least 99%, took 10 ms or less"])
    assert complaints(served, Extent(0.5, 5), arrivals=True) == []


def test_summary_by_hand() -> None:
    served = Served([float(n) for n in range(1, 101)], [2] * 50, seconds=10.0, busy_seconds=5.0, queue_most=7)
    found = summarise(served, [], 90.0)
    assert (found.latency_ms_p50, found.latency_ms_p90, found.latency_ms_most) == (50.5, pytest.approx(90.1), 100.0)
    assert (found.bound_met_fraction, found.throughput_users_per_second, found.batch_mean) == (0.9, 10.0, 2.0)
    assert len(found.window_medians_ms) == 20
    assert found.window_medians_ms[0] == 3.0
    assert found.latencies is not None
    assert (found.latencies.blocks, found.latencies.calls) == (20, 100)
    assert np.exp(found.latencies.log_quantile(0.9)) == pytest.approx(90.0, rel=0.011)
    assert summarise(Served([5.0], [1], 1.0, 1.0), ["why"], None).valid is False


def test_wall_timeline_waits_long_enough() -> None:
    timeline = WallTimeline()
    moment = time.perf_counter() + 0.005
    timeline.wait_until(moment)
    assert timeline.now() >= moment
    timeline.wait_until(moment - 10.0)


@pytest.fixture(scope="module")
def subject(tiny_run: Path) -> Subject:
    return load_subject(tiny_run, None, "test", 30)


def test_records_of_all_scenarios(subject: Subject, tmp_path: Path) -> None:
    policy = Policy(Extent(0.0, 12, seconds_most=30.0), batch_most=4, rate=1000.0, latency_bound_ms=1e6)
    bench = ServingBench(subject, policy, torch.device("cpu"), "adrec bench")
    records = [bench.record(scenario, "cached", 2, silent) for scenario in ("single stream", "server", "offline")]  # type: ignore[arg-type]
    for record in records:
        assert record.error is None
        assert record.summary is not None
        assert record.summary.queries >= 12
        assert record.accuracy is not None
        assert record.accuracy.users == 30
    single, served, batches = records
    assert (single.demand.batch_most, served.demand.batch_most) == (1, 4)
    assert (served.demand.arrivals_per_second, served.demand.load) == (1000.0, None)
    assert served.summary is not None
    assert served.summary.bound_met_fraction is not None
    assert batches.summary is not None
    assert (batches.summary.batch_mean, batches.demand.latency_bound_ms) == (4.0, None)
    path = tmp_path / "serving.jsonl"
    path.write_text("".join(json_line(record) for record in records))
    assert read_any(path) == records
    window = records[0].model_dump(mode="json")
    window["summary"]["window_medians_ms"][0] = 0.0
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text(json.dumps(window) + "\n")
    with pytest.raises(DataError, match=r"damaged\.jsonl, line 1: .*window_medians_ms\.0': Input should be greater"):
        read_any(damaged)
    rows = [row_of(record) for record in records]
    assert len({row.key for row in rows}) == 3
    assert ("rate", "1000.0") in rows[1].key


def test_a_load_sets_the_rate_and_an_error_is_a_record(subject: Subject) -> None:
    policy = Policy(Extent(0.0, 8, seconds_most=30.0), batch_most=4, load=0.25)
    bench = ServingBench(subject, policy, torch.device("cpu"), "adrec bench", with_accuracy=False)
    found = bench.record("server", "cached", 1, silent)
    assert found.demand.load == 0.25
    assert found.summary is not None
    assert (found.demand.latency_bound_ms, found.summary.bound_met_fraction) == (None, None)
    assert (found.demand.arrivals_per_second or 0.0) > 0.0
    assert ("load", "0.25") in row_of(found).key
    idle = Policy(Extent(0.0, 8, seconds_most=0.01), rate=1e-9)
    none = ServingBench(subject, idle, torch.device("cpu"), "adrec bench").record("server", "cached", 1, silent)
    assert str(none.error).startswith("ConfigError: no query was answered in the 0.01 seconds of --seconds-most: give")
    failed: ServingRecord = bench.record("offline", "cached", 99, silent)
    assert failed.summary is None
    assert str(failed.error).startswith("ConfigError: ")
    warp = bench.record("offline", "warp", 1, silent)
    assert warp.error is not None
    # The precision is the engine's, not that of the run's table.
    low = bench.record("offline", "triton-bf16", 1, silent)
    assert [each.precision for each in (found, warp, low)] == ["float32", "unknown", "bfloat16"]
