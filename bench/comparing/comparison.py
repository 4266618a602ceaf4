"""Two files of records against each other: verdicts, rows of one file only, and what else changed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adrec.errors import DataError
from bench.calibration import CalibrationRecord
from bench.comparing.rows import (
    Key,
    Row,
    label,
    machine_differences,
    machine_of,
    shared_parts,
    software_differences,
)
from bench.comparing.verdict import (
    AccuracyChange,
    TimeChange,
    Verdict,
    compare_accuracy,
    judge_tail,
    judge_times,
)

METRIC = "NDCG@20"
BUSY_SHARE = 0.5
# Above the load that a benchmark with a thread on every core leaves behind itself.
OVERLOADED_SHARE = 1.5
# Rounds and the slowest row of a group set how long a row is measured, to a factor well below this.
UNEVEN = 3.0
REGRESSIONS: tuple[Verdict, ...] = ("fails now", "slower")
ORDER: tuple[Verdict, ...] = (
    "fails now",
    "slower",
    "too noisy to tell",
    "works now",
    "faster",
    "no difference",
    "not measured",
)


@dataclass(frozen=True)
class Pair:
    """One measured thing in both files. tail: None where one of them keeps no single calls."""

    key: Key
    old: Row
    new: Row
    time: TimeChange
    tail: TimeChange | None
    accuracy: AccuracyChange | None

    @property
    def slower_tail(self) -> bool:
        """Whether the tail is surely slower."""
        return self.tail is not None and self.tail.verdict == "slower"

    @property
    def order(self) -> tuple[int, float]:
        """Worst first: by verdict, that of the tail if it is the worse one, then by ratio."""
        place = ORDER.index(self.time.verdict)
        return min(place, ORDER.index("slower")) if self.slower_tail else place, -_ratio(self)


@dataclass(frozen=True)
class Comparison:
    """All pairs, worst first. Bounds are shares: 0.05 is 5 %."""

    pairs: list[Pair]
    only_old: list[Key]
    only_new: list[Key]
    shared: list[tuple[str, str]]
    notes: list[str]
    bound: float
    accuracy_bound: float

    @property
    def regressions(self) -> list[Pair]:
        """Pairs that are surely slower, in the tail too, surely less accurate, or fail now, beyond the bounds."""
        return [
            each
            for each in self.pairs
            if each.time.verdict in REGRESSIONS or each.slower_tail or self.less_accurate(each)
        ]

    def less_accurate(self, pair: Pair) -> bool:
        """Whether a pair's accuracy surely fell by more than the bound."""
        return pair.accuracy is not None and pair.accuracy.lower_by(self.accuracy_bound)

    def name(self, key: Key) -> str:
        """A row in words, without what all rows share."""
        return label(key, self.shared)

    @property
    def summary(self) -> str:
        """Counts of verdicts, in words."""
        counts = Counter(each.time.verdict for each in self.pairs)
        parts = [f"{counts[verdict]} {verdict}" for verdict in ORDER if counts[verdict]]
        if slower := sum(each.slower_tail for each in self.pairs):
            parts.insert(0, f"{slower} slower in the tail")
        worse = sum(self.less_accurate(each) for each in self.pairs)
        if worse:
            parts.insert(0, f"{worse} less accurate")
        return ", ".join(parts)


def compare(
    old: Mapping[Key, Row],
    new: Mapping[Key, Row],
    *,
    bound: float,
    accuracy_bound: float,
    calibration: CalibrationRecord | None = None,
    allow_other_machine: bool = False,
    allow_busy_machine: bool = False,
) -> Comparison:
    """Compare rows of the same key.

    A row measured while others overloaded the machine is never called slower or faster, unless that is allowed: no
    interval over its rounds knows how much of the change was theirs.
    Raises DataError when no key is in both, and for times of different machines unless these are allowed.
    """
    common = [key for key in old if key in new]
    if not old and not new:
        raise DataError(
            "neither file holds a row that can be compared: calibrations are given with --calibration, and profiles are"
            " not compared"
        )
    if not common:
        shown = "; ".join(f"{name} {label(next(iter(rows)))}" for name, rows in (("old:", old), ("new:", new)) if rows)
        raise DataError(
            f"no row is in both files ({len(old)} rows and {len(new)} rows; {shown}): measure the"
            " same settings on the same data twice"
        )
    notes = _machine_notes([(old[key], new[key]) for key in common], allow_other_machine)
    spread = 0.0
    if calibration is None:
        notes.append(
            "no --calibration: intervals hold the noise within each run only, not that between runs of the same code"
        )
    else:
        _check_calibration(calibration, new[common[0]], allow_other_machine)
        spread = calibration.noise.between_runs_log_sd
        notes.append(
            f"calibrated: two runs tell {calibration.noise.smallest_between_runs_percent:.2g} % on this machine"
            f" ({calibration.workload}, {len(calibration.runs)} runs)"
        )
    pairs = [_pair(key, old[key], new[key], bound, spread, allow_busy_machine) for key in common]
    notes += _drift_notes(pairs, bound) + _tail_notes(pairs) + _count_notes(pairs) + _repeat_notes(old, new)
    return Comparison(
        pairs=sorted(pairs, key=lambda each: each.order),
        only_old=[key for key in old if key not in new],
        only_new=[key for key in new if key not in old],
        shared=shared_parts(common),
        notes=list(dict.fromkeys(notes)),
        bound=bound,
        accuracy_bound=accuracy_bound,
    )


def _pair(key: Key, old: Row, new: Row, bound: float, spread: float, allow_busy: bool) -> Pair:
    tail = None
    if new.error is not None and old.error is None:
        time = TimeChange(None, "fails now", new.error)
    elif old.error is not None and new.error is None:
        time = TimeChange(None, "works now", f"failed before: {old.error}")
    elif old.error is None and (missing := _missing(old, new)):
        time = TimeChange(None, "fails now", f"the new record holds no {missing}")
    elif not old.rounds_ms or not new.rounds_ms:
        time = TimeChange(None, "not measured", _untimed(old, new))
    else:
        overload = None if allow_busy else _overload(old) or _overload(new)
        lean = new.pressure - old.pressure
        time = _believed(judge_times(old.rounds_ms, new.rounds_ms, bound, spread, lean), overload)
        if old.tail and new.tail:
            found = judge_tail(old.tail.latencies, new.tail.latencies, new.tail.percentile, bound, spread, lean)
            tail = _believed(found, overload)
    accuracy = None
    if old.accuracy and new.accuracy and METRIC in old.accuracy.metrics_percent:
        accuracy = compare_accuracy(old.accuracy, new.accuracy, METRIC, old.users == new.users)
    return Pair(key, old, new, time, tail, accuracy)


def _believed(change: TimeChange, overload: str | None) -> TimeChange:
    """A verdict as it is, or without the certainty that an overloaded machine does not give."""
    if overload is None or change.verdict not in ("slower", "faster"):
        return change
    return replace(change, verdict="too noisy to tell", reason=f"{change.verdict}, but {overload}")


def _missing(old: Row, new: Row) -> str | None:
    if old.rounds_ms and not new.rounds_ms:
        return "times"
    return "accuracy" if old.accuracy and not new.accuracy else None


def _untimed(old: Row, new: Row) -> str:
    if new.error:
        return f"both failed: {new.error}"
    for name, row in (("old", old), ("new", new)):
        if not row.rounds_ms and row.tail_ms is not None:
            return f"the {name} record is of an adrec that kept no rounds; measure it again"
    return "no time in one of the files"


def _overload(row: Row) -> str | None:
    machine = row.environment.machine
    load = machine.load_one_minute
    if load is None or load <= OVERLOADED_SHARE * machine.cores_usable:
        return None
    return f"the machine was overloaded (load {load:g} on {machine.cores_usable} cores)"


def _machine_notes(rows: Sequence[tuple[Row, Row]], allowed: bool) -> list[str]:
    notes = []
    for old, new in rows:
        differences = "; ".join(machine_differences(old, new))
        if differences and not allowed:
            raise DataError(
                f"the records are of different machines or settings ({differences}), so that a difference in time says"
                " nothing about the code; measure both on one machine, or pass --allow-other-machine"
            )
        if differences:
            notes.append(f"different machines: {differences}; times say more about them than about the code")
    for old, new in rows:
        if changed := software_differences(old, new):
            notes.append(f"changed: {'; '.join(changed)}")
        if old.weights != new.weights:
            notes.append("the weights differ in some rows: another training run, not only another build")
        for name, row in (("old", old), ("new", new)):
            machine = row.environment.machine
            if machine.load_one_minute is not None and machine.load_one_minute > BUSY_SHARE * machine.cores_usable:
                notes.append(
                    f"the machine was busy before some of the {name} rows (load {machine.load_one_minute:g} on"
                    f" {machine.cores_usable} cores)"
                )
    # Loads of many rows would repeat the sentence: the first of each kind stands for all.
    first: dict[str, str] = {}
    for note in notes:
        first.setdefault(note.split("(load")[0], note)
    return list(first.values())


def _check_calibration(calibration: CalibrationRecord, row: Row, allowed: bool) -> None:
    ours = machine_of(row.environment, row.device, row.threads, row.clock)
    theirs = machine_of(calibration.environment, calibration.device, calibration.threads, calibration.clock)
    differences = "; ".join(f"{name}: {theirs[name]} -> {ours[name]}" for name in ours if ours[name] != theirs[name])
    if differences and not allowed:
        raise DataError(
            f"the calibration is of another machine or setting than the records ({differences}); calibrate with"
            " `adrec bench calibrate` there, with the same --threads and --device"
        )


def _drift_notes(pairs: Sequence[Pair], bound: float) -> list[str]:
    logs = sorted(math.log(_ratio(each)) for each in pairs if each.time.ratio is not None)
    if len(logs) < 4:
        return []
    middle = logs[len(logs) // 2]
    alike = sum(abs(each - middle) < math.log1p(bound) for each in logs) > 0.8 * len(logs)
    if abs(middle) > math.log1p(bound) and alike:
        return [
            f"nearly all rows changed by about {100 * math.expm1(middle):+.0f} %: the machine or a library may have"
            " changed rather than one engine"
        ]
    return []


def _tail_notes(pairs: Sequence[Pair]) -> list[str]:
    notes = []
    if untold := sum(each.time.ratio is not None and each.tail is None for each in pairs):
        notes.append(
            f"tails of {untold} rows are not judged: their records keep no single calls (those of serving and tradeoff"
            " do, unless an older adrec wrote them)"
        )
    if any(each.new.pressure != each.old.pressure for each in pairs):
        notes.append(
            "arrivals of some servers follow their throughput: intervals hold what other rates than before may change;"
            " --rate of `adrec bench serving` fixes them"
        )
    return notes


def _count_notes(pairs: Sequence[Pair]) -> list[str]:
    """Where the two measurements of a row are not alike: one far shorter, or accuracies of other users."""
    notes = []
    uneven = [
        (max(ratio, 1.0 / ratio), each)
        for each in pairs
        if each.old.measured_ms and each.new.measured_ms and (ratio := each.new.measured_ms / each.old.measured_ms)
    ]
    if far := [(factor, each) for factor, each in uneven if factor > UNEVEN]:
        factor, most = max(far, key=lambda found: found[0])
        notes.append(
            f"{len(far)} rows were measured far longer in one file than in the other, most of all {label(most.key)}"
            f" ({most.old.calls} calls before, {most.new.calls} now, {factor:.2g} times as long in all): the shorter"
            " measurement tells less; measure both with the same seconds and queries"
        )
    others = [each for each in pairs if each.accuracy and each.old.users != each.new.users]
    if others and (old := others[0].old.accuracy) and (new := others[0].new.accuracy):
        notes.append(
            f"accuracies of {len(others)} rows are of other users ({old.users} before, {new.users} now), so that they"
            " are not compared user by user; evaluate both with the same --users"
        )
    return notes


def _repeat_notes(old: Mapping[Key, Row], new: Mapping[Key, Row]) -> list[str]:
    notes = []
    for name, rows in (("old", old), ("new", new)):
        again = [row for row in rows.values() if row.times_measured > 1]
        if again:
            most = max(again, key=lambda row: row.times_measured)
            notes.append(
                f"{len(again)} rows of the {name} file were measured more than once and the last counts, such as"
                f" {label(most.key)} ({most.times_measured} times)"
            )
    return notes


def _ratio(pair: Pair) -> float:
    return 1.0 if pair.time.ratio is None else pair.time.ratio.value
