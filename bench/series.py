"""Rows of a trade-off as series: one an engine, told apart by colour, marker and dash, with what a point stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.chart import BASELINE_STYLE, FEW_STEPS, Line
from bench.recommendation import METRIC, counted, interval, share
from bench.record import BASELINE_MODEL, TradeoffRecord


@dataclass(frozen=True)
class Series:
    """Rows of one engine at one precision (or of the baseline), few steps first, and how they are told from others."""

    name: str
    style: int
    hollow: bool
    rows: list[TradeoffRecord]

    @property
    def calls(self) -> str:
        timing = self.rows[0].timing
        return counted(timing.calls if timing else 0, "call")

    def line(self, **parts: Any) -> Line:
        first, engine = self.rows[0], self.rows[0].engine or ""
        return Line(self.name, style=self.style, hollow=self.hollow, engine=engine, precision=first.precision, **parts)


def series_of(rows: Sequence[TradeoffRecord]) -> list[Series]:
    keys = sorted({(each.engine or "", each.precision) for each in rows if each.steps is not None}, reverse=True)
    named = [engine for engine, _ in keys]
    found = []
    for index, (engine, precision) in enumerate(keys):
        members = [
            each for each in rows if each.steps is not None and (each.engine, each.precision) == (engine, precision)
        ]
        name = engine if named.count(engine) == 1 else f"{engine}, {precision}"
        members.sort(key=lambda each: each.steps or 0)
        found.append(Series(name, index % BASELINE_STYLE, index // BASELINE_STYLE % 2 == 1, members))
    baseline = [each for each in rows if each.model == BASELINE_MODEL]
    engines = list(dict.fromkeys(each.engine or "" for each in baseline))
    for index, engine in enumerate(engines):
        name = BASELINE_MODEL if len(engines) == 1 else f"{BASELINE_MODEL} in {engine}"
        members = [each for each in baseline if (each.engine or "") == engine]
        found.append(Series(name, BASELINE_STYLE, index % 2 == 1, members))
    # Rivals without reverse steps; popularity has no latency.
    rivals = sorted({each.model for each in rows if each.steps is None and each.timing} - {BASELINE_MODEL})
    for index, model in enumerate(rivals):
        members = [each for each in rows if each.model == model]
        found.append(Series(model, BASELINE_STYLE, index % 2 == 0, members))
    return found


def few_and_exact(rows: Sequence[TradeoffRecord]) -> list[Series]:
    """The series of the fewest and of the most steps; the former are dotted."""
    first = first_seed(rows)
    steps = sorted({each.steps for each in first if each.steps is not None})
    shown = list(dict.fromkeys((*steps[:1], *steps[-1:])))
    found = []
    for series in series_of(first):
        for count in sorted({each.steps or 0 for each in series.rows}):
            if count and count not in shown:
                continue
            members = [each for each in series.rows if (each.steps or 0) == count]
            name = f"{series.name}, {counted(count, 'step')}" if count else series.name
            style = series.style + (0 if count in (0, shown[-1]) else FEW_STEPS)
            found.append(replace(series, name=name, style=style, rows=members))
    return found


def details_of(row: TradeoffRecord) -> str:
    """What a point stands for: the setting, its latency, accuracy and what it keeps, each with what is known of it."""
    setting = [row.model, row.engine or "", "" if row.steps is None else counted(row.steps, "step"), row.precision]
    said = [", ".join(filter(None, setting)) + f", batch {row.batch_size_users}"]
    if timing := row.timing:
        said.append(
            f"p50 {timing.latency_ms_p50:.4g} ms, p95 {timing.latency_ms_p95:.4g}, p99 {timing.latency_ms_p99:.4g}"
        )
        said.append(f"{timing.throughput_users_per_second:.4g} users/s, {counted(timing.calls, 'call')}")
        if ratio := timing.time_ratio_to_baseline:
            base = f"{timing.baseline_engine} at {counted(timing.baseline_steps, 'step')}"
            said.append(f"time of {base}: {share(ratio.value)} [{share(ratio.low)}, {share(ratio.high)}]")
    if accuracy := row.accuracy:
        said.append(f"{METRIC} {interval(accuracy.metrics_percent[METRIC])} %")
        if kept := accuracy.ndcg20_kept_percent:
            said.append(f"kept {interval(kept, 1)} %")
        if accuracy.top20_overlap_fraction is not None:
            said.append(f"top-20 overlap with exact {accuracy.top20_overlap_fraction:.4f}")
    return "\n".join(said)


def first_seed(rows: Sequence[TradeoffRecord]) -> list[TradeoffRecord]:
    # Latency does not depend on the seed: a row a setting is enough.
    kept: dict[tuple[object, ...], TradeoffRecord] = {}
    for row in rows:
        kept.setdefault((row.model, row.engine, row.precision, row.steps, row.batch_size_users), row)
    return list(kept.values())
