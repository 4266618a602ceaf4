"""One setting of a sweep, and the measurement of all settings of one batch size against each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from adrec.data.jagged import Jagged
from adrec.engines import Engine
from bench.guest import MEMORY_MEANING, Guest, settled
from bench.latency_blocks import LatencyBlocks
from bench.memory import peak_memory_mib
from bench.record import Estimate, TimingSummary
from bench.timing import (
    Clock,
    Report,
    Series,
    TimingProtocol,
    Turn,
    describe_error,
    measure_turns,
    paired_ratio,
    percentiles_ms,
    quantiles_ms,
    timed_turn,
)


@dataclass(frozen=True)
class Cell:
    """One setting to measure; ``steps`` is `None` for a model without steps."""

    model: str
    engine: str
    steps: int | None
    batch_size: int

    @property
    def name(self) -> str:
        """The setting in words, unique within a sweep."""
        steps = "" if self.steps is None else f", {self.steps} steps"
        return f"{self.model}, {self.engine}{steps}, batch {self.batch_size}"


@dataclass(frozen=True)
class GroupTimer:
    """Times the cells of one batch size, interleaved, on the same batches of real histories.

    ``engine`` finds a cell's engine and may raise: the cell then fails alone. ``longest`` is the history
    length in items beyond which the model reads nothing; ``results`` is k. ``guests`` answer for their model's cells.
    """

    engine: Callable[[Cell], Engine]
    protocol: TimingProtocol
    clock: Clock
    device: torch.device
    seed: int
    longest: int
    results: int
    guests: Mapping[str, Guest] = field(default_factory=dict)

    def measure(
        self, cells: Sequence[Cell], baseline: Cell, batches: Sequence[Jagged], progress: Report
    ) -> dict[Cell, TimingSummary | str]:
        """Return the summary of each cell, or the error that it ended with."""
        memory: dict[str, tuple[float | None, str]] = {}
        errors: dict[str, str] = {}
        called: dict[str, float] = {}
        turns: dict[str, Turn] = {}
        for cell in cells:
            # The stage has begun, though its warm-up is not part of the time that it is expected to take.
            progress(1e-9, len(cells) * self.protocol.seconds)
            started = time.perf_counter()
            try:
                turns[cell.name], memory[cell.name] = self._first(cell, batches)
            except Exception as error:
                errors[cell.name] = describe_error(error)
            called[cell.name] = time.perf_counter() - started
        if self.guests:
            turns = {name: settled(turn) for name, turn in turns.items()}
        series = measure_turns(turns, self.protocol, progress, called)
        errors |= {name: each.error for name, each in series.items() if each.error is not None}
        tokens = sum(int(batch.lengths.clamp(max=self.longest).sum()) for batch in batches) / len(batches)
        return {
            cell: errors[cell.name]
            if cell.name in errors
            else self._summary(cell, series, baseline, tokens, memory[cell.name])
            for cell in cells
        }

    def _first(self, cell: Cell, batches: Sequence[Jagged]) -> tuple[Turn, tuple[float | None, str]]:
        """Call a cell for the first time; what times it, and its memory in MiB with the figure's meaning."""
        if cell.model in self.guests:
            turn = self.guests[cell.model].turn(batches, self.results)
            turn(0, 0.0)
            return turn, (None, MEMORY_MEANING)
        call = partial(self._call, cell, batches)
        return partial(timed_turn, call, self.clock), peak_memory_mib(partial(call, 0), self.device)

    def _call(self, cell: Cell, batches: Sequence[Jagged], number: int) -> object:
        batch = batches[number % len(batches)]
        return self.engine(cell).recommend(batch, k=self.results, steps=cell.steps, seed=self.seed)

    def _summary(
        self,
        cell: Cell,
        series: dict[str, Series],
        baseline: Cell,
        tokens: float,
        memory: tuple[float | None, str],
    ) -> TimingSummary:
        own = series[cell.name]
        p50, p95, p99 = quantiles_ms(own.samples_ms)
        return TimingSummary(
            latency_ms_p50=p50,
            latency_ms_p95=p95,
            latency_ms_p99=p99,
            latency_ms_percentiles=percentiles_ms(own.samples_ms),
            round_medians_ms=[round(float(each), 6) for each in own.medians_ms],
            latencies=LatencyBlocks.of(own.rounds_ms),
            calls=len(own.samples_ms),
            rounds=len(own.rounds_ms),
            throughput_users_per_second=1e3 * cell.batch_size / p50,
            time_ratio_to_baseline=_ratio(own, series.get(baseline.name)),
            baseline_engine=baseline.engine,
            baseline_steps=baseline.steps or 0,
            history_tokens_per_batch_mean=tokens,
            peak_memory_mib=memory[0],
            peak_memory_meaning=memory[1],
            seed=self.seed,
        )


def _ratio(own: Series, baseline: Series | None) -> Estimate | None:
    if baseline is None or baseline.error is not None:
        return None
    value, low, high = paired_ratio(own.medians_ms, baseline.medians_ms)
    return Estimate(value=value, low=low, high=high)
