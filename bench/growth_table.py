"""Fitted growth as a table: exponent with its interval, and how far the power law is off at its worst point."""

from __future__ import annotations

from collections.abc import Sequence

from bench.html_tables import Cell, Head, TableRow
from bench.recommendation import interval
from bench.record import Estimate
from bench.scaling.record import ScalingRecord

LARGE_MISFIT = 1.25
HEADS = (
    *(Head(name, numeric=False) for name in ("axis", "path", "precision")),
    *(Head(name, ends=True) for name in ("exponent [95 %]", "between the last two [95 %]")),
    Head("largest misfit"),
    Head("power law", numeric=False),
)


def growth_table(records: Sequence[ScalingRecord]) -> tuple[Sequence[Head], list[TableRow]]:
    """A row a record: what its points grow like, and whether they do."""
    return HEADS, [_row(record) for record in records]


def fits(record: ScalingRecord) -> bool | None:
    """Whether a power law describes the points within `LARGE_MISFIT`; None without a fit."""
    return None if record.largest_misfit is None else record.largest_misfit <= LARGE_MISFIT


def grows(record: ScalingRecord) -> str:
    """The fit in words for a legend; a poor one is said to be none."""
    if record.exponent is None:
        return ""
    if fits(record) is False:
        return f", no power law (off by up to {record.largest_misfit:.2g} times)"
    return f", grows as {record.axis}^{record.exponent.value:.2f}"


def _row(record: ScalingRecord) -> TableRow:
    misfit = record.largest_misfit
    verdict = {None: "too few points", True: "yes", False: f"no: off by more than {LARGE_MISFIT:g} times"}[fits(record)]
    return TableRow(
        [
            *(Cell(each, each) for each in (record.axis, record.path, record.precision)),
            _estimate(record.exponent),
            _estimate(record.exponent_last),
            Cell("" if misfit is None else f"{misfit:.3g} times", misfit),
            Cell(verdict, verdict),
        ],
        {"engine": record.path, "precision": record.precision},
    )


def _estimate(found: Estimate | None) -> Cell:
    return Cell("", None) if found is None else Cell(interval(found), found.value, (found.low, found.high))
