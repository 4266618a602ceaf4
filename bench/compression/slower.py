"""Rows that were rounded to int8 and take longer for it, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bench.compression.record import CompressRecord, CompressTiming
from bench.record import Estimate
from bench.timing import paired_ratio

PLAIN = ("float32", "bf16")
INT8, INT8_ENGINE = "int8", "-int8"


class Row(NamedTuple):
    """What is timed. measured: data, teacher, split, environment and command, which two rows of a pair share."""

    network: str
    run: str
    steps: int | None
    precision: str
    engine: str
    measured: tuple[str, ...]


def slower_sentences(records: Sequence[CompressRecord]) -> list[str]:
    """A sentence for every int8 row that surely takes longer than the float32 or bf16 row of the same shape.

    Surely: the whole interval of the ratio lies above 1. Only rows that one command measured together are held against
    each other. One sentence says so where none is slower; none where no int8 row has a plain one beside it.
    """
    timings = {(_row(record), timing.batch_size_users): timing for record in records for timing in record.timings}
    found, compared = [], False
    for (row, batch), timing in timings.items():
        for plain in _plain(row):
            beside = timings.get((plain, batch))
            ratio = None if beside is None else slowdown(timing, beside)
            if ratio is None:
                continue
            compared = True
            if ratio.low > 1.0:
                found.append(_sentence(row, plain, batch, ratio))
    return found if found or not compared else ["No int8 row surely takes longer than float32 or bf16 at its shape."]


def slowdown(timing: CompressTiming, plain: CompressTiming) -> Estimate | None:
    """Time over the plain row's, with an interval over rounds; None where no interval can be said.

    Records without rounds have the intervals of both against `reference`; their quotient is the wider one of both ends.
    """
    if timing.round_medians_ms and plain.round_medians_ms:
        value, low, high = paired_ratio(np.array(timing.round_medians_ms), np.array(plain.round_medians_ms))
        return Estimate(value=value, low=low, high=high)
    own, other = timing.times_reference, plain.times_reference
    if own is None or other is None:
        return None
    return Estimate(value=other.value / own.value, low=other.low / own.high, high=other.high / own.low)


def _row(record: CompressRecord) -> Row:
    # The load at the start, which the environment has, tells two runs of a command apart.
    environment = record.environment.model_dump_json()
    measured = (record.dataset_fingerprint, record.run_fingerprint, record.split, environment, record.command)
    return Row(record.network, record.run_name, record.steps, record.precision, record.engine, measured)


def _plain(row: Row) -> Iterator[Row]:
    if row.precision.startswith(INT8):
        beside = dict.fromkeys((*PLAIN, row.precision.replace(INT8, "bf16", 1)))
        yield from (row._replace(precision=each) for each in beside)
    elif row.engine.endswith(INT8_ENGINE):
        yield row._replace(engine=row.engine.removesuffix(INT8_ENGINE))


def _sentence(row: Row, plain: Row, batch: int, ratio: Estimate) -> str:
    rounded = row.precision != plain.precision
    own, other = (row.precision, plain.precision) if rounded else (row.engine, plain.engine)
    where = f"{row.network} of {row.run}"
    where += "" if row.steps is None else f", {row.steps} step{'s' if row.steps > 1 else ''}"
    where += f", {row.engine}" if rounded else ""
    return (
        f"{own} takes {ratio.value:.2f} times [{ratio.low:.2f}, {ratio.high:.2f}] as long as {other} at batch"
        f" {batch} ({where}); there it saves bytes, not time."
    )
