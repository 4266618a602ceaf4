"""Compressed models held against the models they are made for, as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from adrec.environment import Frozen
from bench.compression.record import CompressRecord, CompressTiming
from bench.compression.slower import slower_sentences
from bench.markdown import escaped
from bench.record import Estimate

MEBIBYTE = 2**20
NOT_IN_TABLES = ("round_medians_ms", "places_base64")

Column = tuple[str, Callable[[CompressRecord], str]]


def columns(records: Sequence[CompressRecord]) -> list[Column]:
    """Columns of the table: what a row is, its accuracy, its size, and its speed at each batch size."""
    found: list[Column] = [
        ("network", lambda row: row.network),
        ("run", lambda row: row.run_name),
        ("steps", lambda row: str(row.steps or "-")),
        ("precision", lambda row: row.precision),
        ("engine", lambda row: row.engine),
        ("NDCG@20 (%)", lambda row: _estimate(row.accuracy.ndcg20_percent) if row.accuracy else ""),
        ("kept (%)", lambda row: _estimate(row.accuracy.ndcg20_kept_percent) if row.accuracy else ""),
        ("top-20 overlap", lambda row: f"{row.accuracy.top20_overlap_fraction:.4f}" if row.accuracy else ""),
        ("file (MiB)", lambda row: f"{row.file_bytes / MEBIBYTE:.2f}" if row.file_bytes else ""),
        ("of the teacher's", lambda row: f"{row.file_bytes / row.teacher_file_bytes:.3f}" if row.file_bytes else ""),
    ]
    for batch in sorted({timing.batch_size_users for row in records for timing in row.timings}):
        found += _timing_columns(batch)
    found.append(("error", lambda row: row.error or ""))
    return [column for column in found if any(column[1](row) for row in records)]


def _timing_columns(batch: int) -> list[Column]:
    def column(title: str, text: Callable[[CompressTiming], str]) -> Column:
        def read(row: CompressRecord) -> str:
            timing = row.timing(batch)
            return "" if timing is None else text(timing)

        return f"{title}, batch {batch}", read

    return [
        column("p50 (ms)", lambda timing: f"{timing.latency_ms_p50:.3g}"),
        column("throughput / reference", lambda timing: _estimate(timing.times_reference, 1)),
        column("latency / SASRec+", lambda timing: _estimate(timing.latency_to_sasrec, 2)),
    ]


def _estimate(estimate: Estimate | None, digits: int = 2) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def markdown_table(records: Sequence[CompressRecord]) -> str:
    """The table as Markdown; below it where int8 takes longer, and what it was measured on."""
    used = columns(records)
    lines = ["| " + " | ".join(escaped(title) for title, _ in used) + " |", "|" + "---|" * len(used)]
    lines += ["| " + " | ".join(escaped(text(row)) for _, text in used) + " |" for row in records]
    notes = "\n".join(f"- {escaped(sentence)}" for sentence in slower_sentences(records))
    first = records[0]
    protocol, machine = first.protocol, first.environment.machine
    about = (
        f"{first.dataset_name}, {first.split} split; {machine.kind}, {protocol.threads} threads, one-minute load"
        f" {machine.load_one_minute}; all rows of a batch size interleaved in one process, {protocol.rounds_minimum} or"
        " more rounds; intervals are 95 % bootstraps over users (accuracy) and rounds (ratios)."
    )
    return "\n\n".join(filter(None, ["\n".join(lines), notes, about, f"```\n{first.command}\n```"])) + "\n"


def csv_table(records: Sequence[CompressRecord]) -> str:
    """Every number of every row, one column each."""
    rows = [_flat(record) for record in records]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(record: CompressRecord) -> dict[str, object]:
    row: dict[str, object] = {
        name: getattr(record, name)
        for name in ("role", "network", "run_name", "steps", "precision", "engine", "dataset_name", "split")
    }
    if record.accuracy is not None:
        row |= _spread("", record.accuracy)
    row |= {"file_bytes": record.file_bytes, "teacher_file_bytes": record.teacher_file_bytes}
    for timing in record.timings:
        row |= _spread(f"batch_{timing.batch_size_users}_", timing)
    return row | {"error": record.error}


def _spread(prefix: str, part: Frozen) -> dict[str, object]:
    row: dict[str, object] = {}
    for name, value in part:
        if name in NOT_IN_TABLES:
            continue
        if isinstance(value, Estimate):
            name = prefix + name
            row |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
        else:
            row[f"{prefix}{name}"] = value
    return row
