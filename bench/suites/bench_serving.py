"""Single stream and offline, as in MLPerf: `pytest bench/suites --benchmark-only [--adrec-run RUN]`.

Histories are drawn with replacement from the data, so that the distribution of their lengths is real. A round is one
query (single stream) or one full batch (offline). `adrec bench serving` measures for longer, and a server's queue too.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest

from adrec.environment import printable_command
from bench.conversion.pytest_json import describe_benchmark
from bench.serving.measure import Policy, ServingBench, summarise
from bench.serving.records import Scenario, ServingSummary
from bench.serving.scenarios import Extent, Served, complaints
from bench.suites.measured import CLOCK, Measured

BATCH = 32
ROUNDS: dict[Scenario, int] = {"single stream": 64, "offline": 8}


@pytest.mark.parametrize("scenario", ROUNDS)
@pytest.mark.parametrize("steps", [1, 4], ids=lambda steps: f"steps{steps}")
def test_serving(benchmark: Any, measured: Measured, engine_name: str, steps: int, scenario: Scenario) -> None:
    """Time queries; ``extra_info`` holds the setting, the accuracy and the whole record."""
    if engine_name == "reference":
        pytest.skip("the reference serves nobody: it is what the engines are held to")
    measured.check_steps(steps, engine_name)
    batch = 1 if scenario == "single stream" else BATCH
    extent = Extent(0.0, ROUNDS[scenario] * batch)
    command = printable_command(sys.argv)
    bench = ServingBench(measured.subject, Policy(extent, batch), measured.device, command, clock=CLOCK)
    engine, accuracy = measured.engine(engine_name), measured.accuracy(engine_name, steps)
    starts = itertools.count(0, batch)

    def queries() -> tuple[tuple[Any, ...], dict[str, Any]]:
        start = next(starts)
        return (engine, steps, range(start, start + batch)), {}

    describe_benchmark(benchmark, bench.row(scenario, engine_name, steps, None, accuracy))
    benchmark.pedantic(bench.serve, setup=queries, rounds=ROUNDS[scenario], warmup_rounds=2)
    if benchmark.stats is not None:
        summary = summary_of(benchmark.stats.stats.data, batch, extent)
        describe_benchmark(benchmark, bench.row(scenario, engine_name, steps, summary, accuracy))


def summary_of(seconds: list[float], batch: int, extent: Extent) -> ServingSummary:
    """What a record keeps of batches that were answered one after the other."""
    total = sum(seconds)
    served = Served([1e3 * each for each in seconds], [batch] * len(seconds), total, total, queue_most=batch)
    return summarise(served, complaints(served, extent, arrivals=False), None)
