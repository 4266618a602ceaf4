"""What two record files have in common: each record as a key, its times, accuracy and the machine it ran on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch

from adrec.environment import Environment
from adrec.errors import DataError
from bench.archive import AnyRecord
from bench.calibration import CalibrationRecord
from bench.compression.record import CompressRecord
from bench.kernels.records import CPU_NOTE, EngineRecord, KernelRecord, Measured, Measuring, PathTiming
from bench.latency_blocks import LatencyBlocks
from bench.profiling.record import ProfileRecord
from bench.record import Accuracy, Estimate, MeasuringProtocol, TradeoffRecord
from bench.scaling.record import ScalingRecord
from bench.serving.records import ServingDemand, ServingRecord
from bench.training_speed.record import TrainingRecord

Key = tuple[tuple[str, str], ...]
"""Names and values that identify what was measured, in the order in which they are printed."""


@dataclass(frozen=True)
class Tail:
    """Latencies of single calls, and the percentile of them that people ask about."""

    percentile: float
    latencies: LatencyBlocks


@dataclass(frozen=True)
class Row:
    """One measured thing. ``rounds_ms``: median of each round; empty where nothing was timed.

    ``tail_ms``: p95. ``users``: what must be equal for two accuracies to be of the same users. ``weights``: fingerprint
    of the model. ``tail``: None where the record keeps no single calls. ``pressure``: by how much its logarithm is
    higher than another's, a higher load may account for as much of a latency's. ``times_measured``: in its file.
    ``ratio``: of its time to that of ``baseline``, measured in turn with it. ``calls``: timed calls, queries or
    optimiser steps. ``overlap``: share of a batch's lists that those of ``overlap_with``, measured beside it, hold too.
    """

    key: Key
    rounds_ms: tuple[float, ...]
    tail_ms: float | None
    accuracy: Accuracy | None
    error: str | None
    users: tuple[str, ...]
    weights: str
    clock: str
    device: str
    threads: int
    environment: Environment
    measured_at_utc: str
    tail: Tail | None = None
    pressure: float = 0.0
    times_measured: int = 1
    ratio: Estimate | None = None
    baseline: str = ""
    calls: int = 0
    overlap: float | None = None
    overlap_with: str = ""

    @property
    def measured_ms(self) -> float:
        """About how long its calls took together; 0 where nothing was timed or counted."""
        return self.calls * statistics.median(self.rounds_ms) if self.rounds_ms else 0.0


def rows_of(records: Iterable[AnyRecord]) -> dict[Key, Row]:
    """Rows by key; of several measurements of a thing the last counts. Calibrations and profiles are left out.

    Raises DataError where those were made on different machines, since then no row speaks for the file.
    """
    found: dict[Key, Row] = {}
    for record in records:
        for row in rows_in(record):
            earlier = found.get(row.key)
            if earlier is not None and (differences := machine_differences(earlier, row)):
                raise DataError(
                    f"{label(row.key)} was measured twice, on different machines ({'; '.join(differences)}); keep"
                    " one of them in the file"
                )
            found[row.key] = row if earlier is None else replace(row, times_measured=earlier.times_measured + 1)
    return found


def rows_in(record: AnyRecord) -> list[Row]:
    """The rows of a record: one each for points of an axis and for batch sizes, none of a calibration or a profile."""
    if isinstance(record, CalibrationRecord | ProfileRecord):
        return []
    if isinstance(record, ScalingRecord):
        return list(_points(record))
    return list(_sizes(record)) if isinstance(record, CompressRecord) else [row_of(record)]


@singledispatch
def row_of(record: object) -> Row:
    """The row of a record; raises TypeError for what cannot be compared."""
    raise TypeError(f"a {type(record).__name__} has nothing to compare")


@row_of.register
def _(record: TradeoffRecord) -> Row:
    timing = record.timing
    return _row(
        record,
        record.protocol,
        key=_key(
            model=record.model,
            engine=record.engine,
            steps=record.steps,
            batch=record.batch_size_users,
            seed=record.seed if record.steps is not None else None,
            precision=record.precision,
            data=_data(record),
            split=record.split,
        ),
        rounds_ms=tuple(timing.round_medians_ms) if timing else (),
        tail_ms=timing.latency_ms_p95 if timing else None,
        accuracy=record.accuracy,
        error=record.error,
        users=(record.dataset_fingerprint, record.split, str(record.dataset_users)),
        weights=record.model_fingerprint,
        tail=Tail(95.0, timing.latencies) if timing and timing.latencies else None,
        calls=timing.calls if timing else 0,
    )


@row_of.register
def _(record: ServingRecord) -> Row:
    summary, demand = record.summary, record.demand
    return _row(
        record,
        record,
        key=_key(
            scenario=record.scenario,
            model=record.model,
            engine=record.engine,
            steps=record.steps,
            sampler=record.sampler,
            batch=demand.batch_most,
            # A rate that followed from the throughput differs from run to run: its load is what was asked for.
            load=demand.load,
            rate=demand.arrivals_per_second if demand.load is None else None,
            precision=record.precision,
            data=_data(record),
            split=record.split,
        ),
        rounds_ms=tuple(summary.window_medians_ms) if summary else (),
        tail_ms=summary.latency_ms_p95 if summary else None,
        accuracy=record.accuracy,
        # As `adrec bench serving` says it: such figures count for nothing.
        error=record.error or (f"does not count: {summary.invalid_because}" if summary and not summary.valid else None),
        users=(record.dataset_fingerprint, record.split, str(record.accuracy.users if record.accuracy else 0)),
        weights=record.model_fingerprint,
        tail=Tail(99.0, summary.latencies) if summary and summary.latencies else None,
        pressure=_pressure(demand),
        calls=summary.queries if summary else 0,
    )


@row_of.register
def _(record: KernelRecord) -> Row:
    sizes = " ".join(f"{name}={size}" for name, size in record.shape.items())
    note = CPU_NOTE if record.protocol.device == "cpu" else None
    key = _key(kernel=record.kernel, path=record.path, shape=sizes, dtype=record.dtype, note=note)
    return _measured(record, key, record.timing, record.error)


@row_of.register
def _(record: EngineRecord) -> Row:
    trained = record.trained
    key = _key(
        path=record.path,
        steps=record.steps,
        batch=record.batch_size_users,
        items=record.items,
        width=record.width,
        tokens=record.history_tokens,
        precision=record.precision,
        data=f"{trained.dataset_name} {trained.dataset_fingerprint[:12]}" if trained else None,
        split=trained.split if trained else None,
    )
    row = _measured(record, key, record.timing, record.error)
    row = replace(row, overlap=record.top20_overlap_fraction, overlap_with=record.overlap_with)
    if trained is None:
        return row
    users = (trained.dataset_fingerprint, trained.split, str(trained.users))
    return replace(row, accuracy=record.accuracy, users=users, weights=record.weights)


@row_of.register
def _(record: TrainingRecord) -> Row:
    timing = record.timing
    return _row(
        record,
        record,
        key=_key(
            training=record.model,
            batch=record.batch_size_users,
            precision=record.precision,
            width=record.width,
            data=_data(record),
        ),
        rounds_ms=tuple(timing.window_medians_ms) if timing else (),
        tail_ms=timing.step_ms_p95 if timing else None,
        error=record.error,
        calls=timing.steps if timing else 0,
    )


def _pressure(demand: ServingDemand) -> float:
    """Of arrivals that follow the throughput measured just before, and so its noise; else 0, since rates are equal.

    Waiting for a server grows by the power 1 / (1 - load) of the arrival rate at most.
    """
    if demand.load is None or not demand.arrivals_per_second:
        return 0.0
    return math.log(demand.arrivals_per_second) / max(1.0 - demand.load, 0.05)


def _points(record: ScalingRecord) -> Iterator[Row]:
    """A row for each point; the fitted exponent follows from them."""
    for point in record.points:
        sizes = {"items": record.items, "history": record.history, "batch": record.batch, record.axis: point.value}
        key = _key(
            axis=record.axis, path=record.path, steps=record.steps, width=record.width, precision=record.precision,
            **sizes,
        )  # fmt: skip
        yield _measured(record, key, point.timing, point.error)


def _sizes(record: CompressRecord) -> Iterator[Row]:
    """A row for each batch size that was to be timed; one that was not has the record's error."""
    accuracy = record.accuracy
    for size in record.batch_sizes_users or [timing.batch_size_users for timing in record.timings]:
        timing = record.timing(size)
        yield _row(
            record,
            record.protocol,
            key=_key(
                network=record.network,
                run=record.run_name,
                steps=record.steps,
                precision=record.precision,
                engine=record.engine,
                batch=size,
                data=_data(record),
                split=record.split,
            ),
            rounds_ms=tuple(timing.round_medians_ms) if timing else (),
            tail_ms=timing.latency_ms_p95 if timing else None,
            accuracy=None if accuracy is None else accuracy.as_of_tradeoff(),
            error=None if timing and accuracy else record.error,
            users=(record.dataset_fingerprint, record.split, str(accuracy.users if accuracy else 0)),
            weights=record.model_fingerprint,
            calls=timing.calls if timing else 0,
        )


def _measured(record: Measured | ScalingRecord, key: Key, timing: PathTiming | None, error: str | None) -> Row:
    row = _row(
        record,
        record.protocol,
        key=key,
        rounds_ms=tuple(each / 1e3 for each in timing.round_medians_us) if timing else (),
        tail_ms=timing.latency_us_p95 / 1e3 if timing else None,
        error=error,
    )
    ratio = timing.time_ratio_to_baseline if timing else None
    return replace(row, ratio=ratio, baseline=record.baseline if ratio else "", calls=timing.calls if timing else 0)


def machine_differences(old: Row, new: Row) -> list[str]:
    """In what the machines of two rows differ, so that their times say nothing about the code; empty for the same."""
    return _differences(_machine_of(old), _machine_of(new))


def machine_of(environment: Environment, device: str, threads: int, clock: str) -> dict[str, object]:
    """What must be equal for two times to be comparable."""
    machine = environment.machine
    return {
        "processor": machine.processor,
        "instructions": machine.instructions,
        "physical cores": machine.cores_physical,
        "logical cores": machine.cores_logical,
        "usable cores": machine.cores_usable,
        "threads": threads,
        "memory, GiB": None if machine.memory_gib is None else round(machine.memory_gib),
        "accelerators": ", ".join(each.name for each in machine.accelerators) or "none",
        "device": device,
        "clock": clock,
    }


def software_differences(old: Row, new: Row) -> list[str]:
    """In what versions, system and governor differ: worth knowing, and often just what is being compared."""
    before, after = old.environment, new.environment
    names = sorted(before.versions.keys() | after.versions.keys())
    return _differences(
        {name: before.versions.get(name) for name in names}
        | {"system": before.machine.system, "governor": before.machine.governor},
        {name: after.versions.get(name) for name in names}
        | {"system": after.machine.system, "governor": after.machine.governor},
    )


def label(key: Key, constant: Sequence[tuple[str, str]] = ()) -> str:
    """A key in words, without what all rows share."""
    return ", ".join(f"{name} {value}" for name, value in key if (name, value) not in constant) or "the only row"


def shared_parts(keys: Sequence[Key]) -> list[tuple[str, str]]:
    """The parts that all of several keys have; none of a single key's, which would leave it without a name."""
    if len(keys) < 2:
        return []
    return [part for part in keys[0] if all(part in key for key in keys)]


def _machine_of(row: Row) -> dict[str, object]:
    return machine_of(row.environment, row.device, row.threads, row.clock)


def _differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    return [f"{name}: {old[name]} -> {new[name]}" for name in old if old[name] != new[name]]


def _row(
    record: TradeoffRecord | ServingRecord | TrainingRecord | CompressRecord | Measured | ScalingRecord,
    measuring: MeasuringProtocol | Measuring | ServingRecord | TrainingRecord,
    *,
    key: Key,
    rounds_ms: tuple[float, ...],
    tail_ms: float | None,
    error: str | None,
    accuracy: Accuracy | None = None,
    users: tuple[str, ...] = (),
    weights: str = "",
    tail: Tail | None = None,
    pressure: float = 0.0,
    calls: int = 0,
) -> Row:
    """The row of a record, whose clock, device and threads ``measuring`` has."""
    return Row(
        key=key,
        rounds_ms=rounds_ms,
        tail_ms=tail_ms,
        accuracy=accuracy,
        error=error,
        users=users,
        weights=weights,
        clock=measuring.clock,
        device=measuring.device,
        threads=measuring.threads,
        environment=record.environment,
        measured_at_utc=record.measured_at_utc,
        tail=tail,
        pressure=pressure,
        calls=calls,
    )


def _data(record: TradeoffRecord | ServingRecord | TrainingRecord | CompressRecord) -> str:
    return f"{record.dataset_name} {record.dataset_fingerprint[:12]}"


def _key(**parts: str | float | None) -> Key:
    return tuple((name, str(value)) for name, value in parts.items() if value is not None)
