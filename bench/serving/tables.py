"""Serving records as a console table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from bench.recommendation import METRIC, interval
from bench.serving.records import ServingRecord


def serving_table(records: Sequence[ServingRecord]) -> Table:
    """One row a scenario: latency, throughput, share in time, and whether the figures count."""
    table = Table(
        "scenario", "engine", "steps", "arrivals/s", "p50, ms", "p90, ms", "p99, ms", "users/s", "in time", "busy",
        "batch", "queries", METRIC, "counts",
    )  # fmt: skip
    for record in records:
        summary, rate = record.summary, record.demand.arrivals_per_second
        head = [record.scenario, record.engine, "-" if record.steps is None else str(record.steps)]
        head.append("-" if rate is None else f"{rate:.4g}")
        if summary is None:
            table.add_row(*head, record.error or "not measured", style="bold red")
            continue
        met = summary.bound_met_fraction
        table.add_row(
            *head,
            f"{summary.latency_ms_p50:.4g}",
            f"{summary.latency_ms_p90:.4g}",
            f"{summary.latency_ms_p99:.4g}",
            f"{summary.throughput_users_per_second:.4g}",
            "-" if met is None else f"{met:.1%} in {record.demand.latency_bound_ms:g} ms",
            f"{summary.busy_fraction:.0%}",
            f"{summary.batch_mean:.3g}",
            str(summary.queries),
            interval(record.accuracy.metrics_percent[METRIC]) if record.accuracy else record.error or "-",
            "yes" if summary.valid else f"no: {summary.invalid_because}",
            style=None if summary.valid else "yellow",
        )
    return table
