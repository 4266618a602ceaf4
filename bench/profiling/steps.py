"""The step-count trade-off of one engine at one batch size: a table, the knee, and advice in words."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from bench.pareto import best_under, knee
from bench.recommendation import METRIC, counted, interval, knows_kept, points_of, recommendation, rows_of_batch
from bench.record import TradeoffRecord


def steps_table(records: Sequence[TradeoffRecord]) -> Table:
    """One row a step count, few to many, then the models without steps."""
    table = Table("steps", "p50, ms", "p95, ms", "users/s", METRIC, "kept, %", "top-20 overlap", "time to exact")
    for row in sorted(records, key=lambda each: (each.steps is None, each.steps or 0)):
        timing, accuracy = row.timing, row.accuracy
        ratio = timing.time_ratio_to_baseline if timing else None
        kept = accuracy.ndcg20_kept_percent if accuracy else None
        table.add_row(
            row.model if row.steps is None else str(row.steps),
            f"{timing.latency_ms_p50:.4g}" if timing else "-",
            f"{timing.latency_ms_p95:.4g}" if timing else "-",
            f"{timing.throughput_users_per_second:.0f}" if timing else "-",
            interval(accuracy.metrics_percent[METRIC]) if accuracy else row.error or "-",
            "-" if kept is None else interval(kept, 1),
            f"{accuracy.top20_overlap_fraction:.4f}" if accuracy and accuracy.top20_overlap_fraction else "-",
            "-" if ratio is None else interval(ratio, 3),
        )
    return table


def advice(records: Sequence[TradeoffRecord], budget_ms: float | None = None) -> list[str]:
    """The recommendation, the knee of latency against accuracy, and the best setting within a budget."""
    size = next((row.batch_size_users for row in records if row.batch_size_users is not None), None)
    found = recommendation(records)
    if size is None:
        return found
    rows = [row for row in rows_of_batch(records, size) if row.steps is not None]
    points = points_of(rows)
    if not knows_kept(points):
        return found
    bend = knee(points)
    if bend is not None:
        found.append(
            f"Knee: {bend.label} ({bend.latency_ms:.3g} ms, {METRIC} {bend.accuracy_percent:.2f} %): more steps buy"
            " little accuracy for their time."
        )
    spread = max((point.accuracy_percent for point in points), default=0.0) - min(
        (point.accuracy_percent for point in points), default=0.0
    )
    exact = next((row.accuracy for row in rows if row.steps == row.exact_steps), None)
    if exact is not None and len(points) > 1:
        band = exact.metrics_percent[METRIC]
        if spread < (band.high - band.low) / 2:
            found.append(
                f"All step counts lie within {spread:.2f} points of {METRIC}, less than half the width of the exact"
                f" result's interval {interval(band)}: the knee is within the noise, and fewer steps are simply faster."
            )
    if budget_ms is not None:
        best = best_under(points, budget_ms)
        found.append(
            f"Within {budget_ms:g} ms: "
            + (
                f"{best.label}, {METRIC} {best.accuracy_percent:.2f} % in {best.latency_ms:.3g} ms."
                if best
                else f"none of {counted(len(points), 'setting')}; use a smaller batch or another engine."
            )
        )
    return found
