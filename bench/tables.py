"""Columns of the report's tables, shared by HTML and Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.recommendation import METRIC, interval
from bench.record import Accuracy, Estimate, TimingSummary, TradeoffRecord

Value = float | str | None
COMPACT = "{:.4g}"


@dataclass(frozen=True)
class Column:
    """One column: ``sort`` gives the value to sort by, ``text`` what is shown, ``ends`` those of an interval."""

    title: str
    sort: Callable[[TradeoffRecord], Value]
    text: Callable[[TradeoffRecord], str]
    numeric: bool = True
    ends: Callable[[TradeoffRecord], tuple[float, float] | None] | None = None


def main_columns() -> list[Column]:
    """Columns of the table of all rows."""
    return [
        _words("model", lambda row: row.model),
        _words("engine", lambda row: row.engine or ""),
        _number("steps", lambda row: row.steps, "{:d}"),
        _number("batch (users)", lambda row: row.batch_size_users, "{:d}"),
        _number("seed", lambda row: row.seed, "{:d}"),
        _timing("p50 (ms)", lambda timing: timing.latency_ms_p50),
        _timing("p95 (ms)", lambda timing: timing.latency_ms_p95),
        _timing("p99 (ms)", lambda timing: timing.latency_ms_p99),
        _timing("calls", lambda timing: timing.calls, "{:d}"),
        _timing("rounds", lambda timing: timing.rounds, "{:d}"),
        _timing("users/s", lambda timing: timing.throughput_users_per_second),
        _estimate("time ratio to baseline", lambda row: row.timing.time_ratio_to_baseline if row.timing else None, 4),
        _metric(METRIC),
        _metric("HR@20"),
        _estimate(f"{METRIC} kept (%)", lambda row: row.accuracy.ndcg20_kept_percent if row.accuracy else None, 1),
        _accuracy("top-20 overlap with exact", lambda accuracy: accuracy.top20_overlap_fraction),
        _accuracy("of the row's engine", lambda accuracy: accuracy.engine_top20_overlap_fraction),
        _accuracy("on users", lambda accuracy: accuracy.engine_top20_overlap_users or None, "{:d}"),
        _accuracy("engine agreement", lambda accuracy: accuracy.engine_agreement_fraction),
        _words("accuracy measured with", lambda row: row.accuracy.measured_with if row.accuracy else ""),
        _accuracy("users evaluated", lambda accuracy: accuracy.users, "{:d}"),
        _timing("history tokens", lambda timing: timing.history_tokens_per_batch_mean),
        _timing("peak memory (MiB)", lambda timing: timing.peak_memory_mib, "{:.1f}"),
        _words("precision", lambda row: row.precision),
        _words("error", lambda row: row.error or ""),
    ]


def accuracy_columns() -> list[Column]:
    """Columns of the table of all nine metrics."""
    names = [f"{metric}@{cutoff}" for metric in ("HR", "NDCG", "MRR") for cutoff in (5, 10, 20)]
    return [
        _words("model", lambda row: row.model),
        _number("steps", lambda row: row.steps, "{:d}"),
        _number("seed", lambda row: row.seed, "{:d}"),
        *(_metric(name) for name in names),
        _accuracy("users evaluated", lambda accuracy: accuracy.users, "{:d}"),
    ]


def accuracy_rows(records: Sequence[TradeoffRecord]) -> list[TradeoffRecord]:
    """Return one row for each model, step count and seed that has an accuracy."""
    found: dict[tuple[str, int | None, int], TradeoffRecord] = {}
    for record in records:
        if record.accuracy is not None:
            found.setdefault((record.model, record.steps, record.seed), record)
    return list(found.values())


def _words(title: str, read: Callable[[TradeoffRecord], str]) -> Column:
    return Column(title, read, read, numeric=False)


def _number(title: str, read: Callable[[TradeoffRecord], float | None], form: str = COMPACT) -> Column:
    def text(row: TradeoffRecord) -> str:
        value = read(row)
        if value is None:
            return ""
        # Four figures, but never an exponent for a large value.
        return f"{value:.0f}" if form == COMPACT and abs(value) >= 1000 else form.format(value)

    return Column(title, read, text)


def _timing(title: str, read: Callable[[TimingSummary], float | None], form: str = COMPACT) -> Column:
    return _number(title, lambda row: None if row.timing is None else read(row.timing), form)


def _accuracy(title: str, read: Callable[[Accuracy], float | None], form: str = "{:.4f}") -> Column:
    return _number(title, lambda row: None if row.accuracy is None else read(row.accuracy), form)


def _estimate(title: str, read: Callable[[TradeoffRecord], Estimate | None], digits: int = 2) -> Column:
    def value(row: TradeoffRecord) -> float | None:
        found = read(row)
        return None if found is None else found.value

    def text(row: TradeoffRecord) -> str:
        found = read(row)
        return "" if found is None else interval(found, digits)

    def ends(row: TradeoffRecord) -> tuple[float, float] | None:
        found = read(row)
        return None if found is None else (found.low, found.high)

    return Column(title, value, text, ends=ends)


def _metric(name: str) -> Column:
    return _estimate(f"{name} (%)", lambda row: row.accuracy.metrics_percent.get(name) if row.accuracy else None)
