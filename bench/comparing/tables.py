"""A comparison as a console table and as Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from bench.comparing.comparison import METRIC, Comparison, Pair
from bench.comparing.verdict import TimeChange
from bench.markdown import escaped
from bench.record import Estimate

HEADS = ("row", "old, ms", "new, ms", "new / old", "tail", "verdict", f"{METRIC}, points")


def console_table(comparison: Comparison) -> Table:
    """All pairs, worst first."""
    table = Table(*HEADS)
    for pair in comparison.pairs:
        bad = pair in comparison.regressions
        table.add_row(*_cells(comparison, pair), style="bold red" if bad else None)
    return table


def markdown_of(comparison: Comparison, old_name: str, new_name: str) -> str:
    """Markdown that fits into a pull request's comment: verdict first, then the table, then what to know."""
    outcome = "regression" if comparison.regressions else "no regression"
    lines = [
        f"### adrec bench compare: {outcome}",
        "",
        f"{escaped(old_name)} -> {escaped(new_name)}: {comparison.summary}. Bound {100 * comparison.bound:g} % of"
        f" time, {100 * comparison.accuracy_bound:g} % of {METRIC}.",
    ]
    if comparison.shared:
        lines += ["", "All rows: " + ", ".join(f"{name} {escaped(value)}" for name, value in comparison.shared) + "."]
    lines += ["", f"| {' | '.join(HEADS)} |", f"|---|{'---:|' * 4}---|---:|"]
    lines += [f"| {' | '.join(escaped(cell) for cell in _cells(comparison, pair))} |" for pair in comparison.pairs]
    for name, keys in ((old_name, comparison.only_old), (new_name, comparison.only_new)):
        if keys:
            lines += ["", f"Only in {escaped(name)}:", ""]
            lines += [f"- {escaped(comparison.name(key))}" for key in keys]
    lines += ["", *(f"- {escaped(note)}" for note in comparison.notes)]
    lines += [
        "",
        "Brackets: 99 % interval of the ratio (of medians over rounds; in the tail, of the percentile of all calls),"
        " 95 % of the accuracy difference (paired over users where marked).",
    ]
    return "\n".join(lines) + "\n"


def _cells(comparison: Comparison, pair: Pair) -> list[str]:
    ratio = pair.time.ratio
    verdict = _verdict(pair.time)
    if pair.slower_tail:
        verdict += "; slower in the tail"
    if comparison.less_accurate(pair):
        verdict += "; less accurate"
    accuracy = "-"
    if pair.accuracy is not None:
        change = pair.accuracy.difference
        accuracy = f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
        accuracy += " paired" if pair.accuracy.paired else ""
    return [
        comparison.name(pair.key),
        _median(pair.old.rounds_ms),
        _median(pair.new.rounds_ms),
        "-" if ratio is None else _interval(ratio),
        _tail(pair),
        verdict,
        accuracy,
    ]


def _tail(pair: Pair) -> str:
    """Ratio of the tail and its verdict; of p95, not judged, where single calls are not kept."""
    change, tail = pair.tail, pair.new.tail
    if change is None or tail is None:
        if not pair.old.tail_ms or not pair.new.tail_ms:
            return "-"
        return f"p95 {pair.new.tail_ms / pair.old.tail_ms:.2f}, not judged"
    name = f"p{tail.percentile:g}"
    ratio = "" if change.ratio is None else f" {_interval(change.ratio)}"
    return f"{name}{ratio} {_verdict(change)}"


def _interval(ratio: Estimate) -> str:
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _verdict(change: TimeChange) -> str:
    return f"{change.verdict}: {change.reason}" if change.reason else change.verdict


def _median(rounds_ms: Sequence[float]) -> str:
    return f"{float(np.median(rounds_ms)):.4g}" if rounds_ms else "-"
