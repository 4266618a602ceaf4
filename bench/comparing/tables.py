"""A comparison as a console table and as Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from bench.comparing.comparison import METRIC, Comparison, Pair
from bench.markdown import escaped

HEADS = ("row", "old, ms", "new, ms", "new / old", "p95", "verdict", f"{METRIC}, points")


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
        "Brackets: 99 % interval of the ratio of medians over rounds, 95 % of the accuracy difference (paired over"
        " users where marked). p95 is not judged: single calls are not kept.",
    ]
    return "\n".join(lines) + "\n"


def _cells(comparison: Comparison, pair: Pair) -> list[str]:
    ratio = pair.time.ratio
    verdict = pair.time.verdict if not pair.time.reason else f"{pair.time.verdict}: {pair.time.reason}"
    if comparison.less_accurate(pair):
        verdict += "; less accurate"
    tail = "-"
    if pair.old.tail_ms and pair.new.tail_ms:
        tail = f"{pair.new.tail_ms / pair.old.tail_ms:.2f}"
    accuracy = "-"
    if pair.accuracy is not None:
        change = pair.accuracy.difference
        accuracy = f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
        accuracy += " paired" if pair.accuracy.paired else ""
    return [
        comparison.name(pair.key),
        _median(pair.old.rounds_ms),
        _median(pair.new.rounds_ms),
        "-" if ratio is None else f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
        tail,
        verdict,
        accuracy,
    ]


def _median(rounds_ms: Sequence[float]) -> str:
    return f"{float(np.median(rounds_ms)):.4g}" if rounds_ms else "-"
