"""Receipts, candidates and techniques as tables of the console."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from compress.candidates import CandidateRecord
from compress.recipe import Entry
from compress.search import Search
from compress.technique import METRIC, Accuracy, Change, Reading, Receipt

MEBIBYTE = 2**20
ALIKE = 3


def receipt_table(receipts: Sequence[Receipt], title: str = "") -> Table:
    """What each stage changed and skipped, sizes before and after, accuracy with its interval, and what is kept."""
    columns = ("stage", "changed", "left as it was", "MiB", f"{METRIC} %", "kept %", "by this stage")
    table = Table(*columns, title=escape(title) or None, title_justify="left", box=SIMPLE_HEAD, show_lines=True)
    for number, receipt in enumerate(receipts, 1):
        accuracy = receipt.accuracy
        table.add_row(
            f"{number} {receipt.technique}",
            escape("\n".join(_changes(receipt)) or "nothing"),
            escape("\n".join(_skips(receipt))),
            f"{receipt.bytes_before / MEBIBYTE:.2f} -> {receipt.bytes_after / MEBIBYTE:.2f}",
            "" if accuracy is None else escape(shown(accuracy.metrics[METRIC], 3)),
            *_kept(accuracy),
        )
    return table


def _changes(receipt: Receipt) -> list[str]:
    groups: dict[tuple[str, str], list[Change]] = {}
    for change in receipt.changed:
        groups.setdefault((change.before, change.after), []).append(change)
    lines = []
    for (before, after), changes in groups.items():
        # A network has many layers, all changed alike; compression.json has each.
        parts = [changes] if len(changes) > ALIKE else [[change] for change in changes]
        lines += [f"{_named(part)}: {before} -> {after}{_details(part)}" for part in parts]
    return [*lines, *(f"note: {note}" for note in receipt.notes)]


def _named(changes: Sequence[Change]) -> str:
    if len(changes) == 1:
        return changes[0].what
    return f"{len(changes)} parts, {changes[0].what} to {changes[-1].what}"


def _details(changes: Sequence[Change]) -> str:
    seen: dict[str, list[float | int | str]] = {}
    for change in changes:
        for name, value in change.detail.items():
            seen.setdefault(name, []).append(value)
    texts = []
    for name, values in seen.items():
        numbers = [value for value in values if not isinstance(value, str)]
        if len(numbers) == len(values) > 1:
            texts.append(f"{name} {min(numbers):.4g} to {max(numbers):.4g}")
        else:
            texts.append(f"{name} {', '.join(dict.fromkeys(map(_number, values)))}")
    return f" ({'; '.join(texts)})" if texts else ""


def _skips(receipt: Receipt) -> list[str]:
    return _folded([f"{skip.what}: {skip.why}" for skip in receipt.skipped])


def _folded(lines: list[str], most: int = 12) -> list[str]:
    return lines if len(lines) <= most else [*lines[: most - 1], f"... and {len(lines) - most + 1} more"]


def _number(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _kept(accuracy: Accuracy | None) -> tuple[str, str]:
    if accuracy is None or accuracy.kept is None:
        return "", ""
    own = accuracy.kept_of_before
    return escape(shown(accuracy.kept)), "" if own is None else escape(shown(own))


def shown(reading: Reading, digits: int = 2) -> str:
    """``value [low, high]``."""
    return f"{reading.value:.{digits}f} [{reading.low:.{digits}f}, {reading.high:.{digits}f}]"


def front_table(search: Search, records: Iterable[CandidateRecord], chosen: CandidateRecord | None) -> Table:
    """The Pareto front from fast to slow: time, what of the accuracy is kept, size, and whether all bounds hold."""
    quantities = [f"{name}, batch {size} (ms)" for size in search.budget.batches for name in ("p50", "p99")]
    columns = ["", "student", "steps", "precision", "engine", *quantities, "time ratio", "kept %", "MiB", "bounds"]
    table = Table(*columns, title="Pareto front, fast to slow; * is the choice", title_justify="left", box=SIMPLE_HEAD)
    shown_records = search.front(records)
    if chosen is not None and chosen not in shown_records:
        # Equally fast within the noise, and smaller.
        shown_records = sorted([*shown_records, chosen], key=search.time)
    for record in shown_records:
        candidate = record.candidate
        timings = [record.timings[size] for size in search.budget.batches]
        kept = None if record.accuracy is None else record.accuracy.kept
        missed = [] if search.budget.met(record.timings) else ["too slow"]
        missed += [] if record.loss <= search.max_loss else ["loses too much"]
        table.add_row(
            "*" if chosen is not None and record.candidate == chosen.candidate else "",
            candidate.student,
            str(candidate.steps or "-"),
            candidate.precision,
            candidate.engine,
            *(f"{value:.3g}" for timing in timings for value in (timing.p50_ms, timing.p99_ms)),
            "" if timings[0].ratio is None else escape(shown(timings[0].ratio)),
            "" if kept is None else escape(shown(kept)),
            f"{record.bytes / MEBIBYTE:.2f}",
            ", ".join(missed) or "kept",
        )
    return table


def slower_notes(search: Search, records: Sequence[CandidateRecord]) -> list[str]:
    """A sentence for every precision that surely takes longer here than the plain one of the same network."""
    plain = search.space.precisions[0].label
    batch = search.budget.batches[0]
    measured = {record.candidate: record.timings[batch] for record in records if record.status == "measured"}
    notes = []
    for candidate, timing in measured.items():
        beside = measured.get(candidate.model_copy(update={"precision": plain}))
        if beside is None or timing.ratio is None or beside.ratio is None or timing.ratio.low <= beside.ratio.high:
            continue
        times = timing.ratio.value / beside.ratio.value
        notes.append(f"{candidate} takes {times:.2f} times as long as {plain} here (batch {batch})")
    return notes


def technique_table(entries: Mapping[str, Entry], recipes: Mapping[str, str]) -> list[Table]:
    """Every technique with its settings and their defaults, and the recipes that come with adrec."""
    table = Table("technique", "what it does", "setting", "default", "meaning", box=SIMPLE_HEAD)
    for name, entry in entries.items():
        fields = {key: field for key, field in entry.config.model_fields.items() if key != "technique"}
        defaults = [_default(field.get_default(call_default_factory=True)) for field in fields.values()]
        meanings = [_meaning(field) for field in fields.values()]
        rows = zip(fields, defaults, meanings, strict=True)
        for place, (key, default, meaning) in enumerate(rows):
            head = (name, entry.summary) if place == 0 else ("", "")
            table.add_row(*map(escape, (*head, key, default, meaning)), end_section=place + 1 == len(fields))
    shipped = Table("recipe", "stages", box=SIMPLE_HEAD, show_lines=True)
    for name, text in recipes.items():
        shipped.add_row(name, escape(text.strip()))
    return [table, shipped]


def _meaning(field: FieldInfo) -> str:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    parts = [field.description or "", ", ".join(map(str, choices))]
    return "; ".join(part for part in reversed(parts) if part)


def _default(value: object) -> str:
    if value is None:
        return "null"
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
