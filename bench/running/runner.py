"""Selecting units by pattern and measuring those that are not done yet."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from adrec.errors import ConfigError, NotSupportedError
from bench.progress import StageProgress
from bench.running.journal import Done, Journal
from bench.running.registry import SUITES, Suite
from bench.running.unit import Context, Unit
from bench.timing import describe_error


@dataclass(frozen=True)
class Outcome:
    """Units measured now, units that an earlier run had done, and suites that cannot run here with the reason."""

    measured: list[Done]
    done_before: list[Done]
    left_out: dict[str, str]

    @property
    def failed(self) -> list[Done]:
        """Units with an error in some cell, of this run and of the earlier one."""
        return [each for each in (*self.done_before, *self.measured) if each.failed]


def select(
    patterns: Sequence[str], context: Context, suites: Sequence[Suite] = SUITES
) -> tuple[list[Unit], dict[str, str]]:
    """Units whose name, or whose suite's name, matches a glob; and the suites that match but cannot run here.

    Raises ConfigError for a pattern that matches nothing, NotSupportedError where nothing that matches can run.
    """
    units: list[Unit] = []
    left_out: dict[str, str] = {}
    names: list[str] = [suite.name for suite in suites]
    matched: set[str] = set()
    for suite in suites:
        asked = [each for each in patterns if fnmatchcase(suite.name, each)]
        inside = [each for each in patterns if each.startswith((f"{suite.name}/", "*"))]
        if (reason := suite.obstacle(context)) is not None:
            if asked or inside:
                left_out[suite.name] = reason
                matched.update(asked, inside)
            continue
        chosen = len(units)
        for unit in suite.units(context):
            names.append(unit.name)
            hits = [each for each in patterns if fnmatchcase(unit.name, each)]
            if asked or hits:
                units.append(unit)
                matched.update(asked, hits)
        if len(units) > chosen and (notice := suite.notice(context)) is not None:
            context.notices.append(notice)
    for pattern in patterns:
        if pattern not in matched:
            close = difflib.get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.5)
            hint = f" (did you mean {' or '.join(repr(name) for name in close)}?)" if close else ""
            raise ConfigError(f"pattern '{pattern}' matches no suite and no unit{hint}; `adrec bench list` shows them")
    if not units:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise NotSupportedError(f"nothing of what matches can run here: {reasons}")
    return units, left_out


def run_units(
    units: Sequence[Unit],
    journal: Journal,
    progress: StageProgress,
    say: Callable[[str], None],
    left_out: dict[str, str] | None = None,
) -> Outcome:
    """Measure the units that the journal does not hold, one after the other; an exception is kept as the unit's error.

    An interrupt ends the run between two lines of the journal: the unit in progress is not kept.
    """
    before = [journal.done[unit.name] for unit in units if unit.name in journal.done]
    waiting = [unit for unit in units if unit.name not in journal.done]
    for unit in waiting:
        progress.update(unit.name, 0.0, unit.seconds)
    measured = []
    for unit in waiting:
        started = time.perf_counter()
        progress.update(unit.name, 1e-9, unit.seconds)
        records, error = [], None
        try:
            records = list(unit.measure(_reporter(progress, unit)))
        except Exception as problem:
            error = describe_error(problem)
        seconds = time.perf_counter() - started
        done = journal.keep(unit.name, unit.suite, records, seconds, error)
        progress.update(unit.name, seconds, seconds)
        measured.append(done)
        if done.failed:
            say(f"failed: {unit.name}: {error or f'{done.failed} of {done.records} cells'}")
    return Outcome(measured, before, left_out or {})


def _reporter(progress: StageProgress, unit: Unit) -> Callable[[float, float], None]:
    return lambda done, expected: progress.update(unit.name, done, max(expected, done))
