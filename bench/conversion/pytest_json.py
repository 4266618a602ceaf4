"""pytest-benchmark's JSON of records, and records of its JSON.

Every benchmark carries its record in ``extra_info.adrec_record``, without the machine where that is the file's own;
``stats`` are over the record's round medians. The suites of `bench/suites` leave the record's timing out, which is then
read from ``stats.data``, and name their benchmarks as `identity` does, so that a file of either is a baseline for the
other. Records without a time have no place among benchmarks and lie in ``adrec_untimed``. So do
those of several rows (an axis, batch sizes), each of which is a benchmark that names its record's ``adrec_position``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from adrec.data.json_text import parse_json
from adrec.errors import DataError
from bench.archive import ADAPTER, AnyRecord
from bench.comparing.rows import Row, label, rows_in
from bench.conversion.statistics import statistics_of
from bench.foreign_files import described, foreign
from bench.kernels.records import PathTiming
from bench.record import TimingSummary

RECORD, POSITION, UNTIMED, MACHINE = "adrec_record", "adrec_position", "adrec_untimed", "adrec"
NOT_MEASURED = "not measured by pytest-benchmark"
NO_ACCURACY = {
    "kernel": "a kernel alone ranks nothing",
    "engine": "models with random weights learned nothing",
    "scaling": "models with random weights learned nothing",
    "training": "a step alone is timed; what training leads to, `adrec train` and `adrec evaluate` say",
}
OPTIONS = {
    "disable_gc": False,
    "timer": "perf_counter",
    "min_rounds": 1,
    "max_time": 0.0,
    "min_time": 0.0,
    "warmup": True,
}


def pytest_json(records: Sequence[AnyRecord]) -> dict[str, Any]:
    """Return the content of a file that pytest-benchmark loads and compares with; raises DataError without records."""
    if not records:
        raise DataError("there are no records to convert")
    environment = records[0].environment.model_dump(mode="json")
    revision = records[0].environment.revision
    benchmarks, untimed = [], []
    for position, record in enumerate(records):
        content = record.model_dump(mode="json")
        if content["environment"] == environment:
            del content["environment"]
        rows = rows_in(record)
        timed = [row for row in rows if row.rounds_ms]
        if len(rows) == len(timed) == 1:
            benchmarks.append(_benchmark(record, timed[0], {POSITION: position, RECORD: content}))
        else:
            untimed.append({POSITION: position, RECORD: content})
            benchmarks += [_benchmark(record, row, {POSITION: position}) for row in timed]
    return {
        "machine_info": {
            "node": "",
            "processor": records[0].environment.machine.processor,
            "cpu": {"brand_raw": records[0].environment.machine.processor},
            MACHINE: environment,
        },
        "commit_info": {"id": revision.git or "unversioned", "dirty": bool(revision.dirty)},
        "benchmarks": benchmarks,
        "datetime": max(record.measured_at_utc for record in records),
        "version": "4.0.0",
        UNTIMED: untimed,
    }


def records_of(content: object, where: str) -> list[AnyRecord]:
    """Records of a file's content, in their order; DataError names the benchmark that holds none."""
    if not isinstance(content, dict) or not isinstance(content.get("benchmarks"), list):
        raise DataError(
            f"{where}: not a file of pytest-benchmark but {described(content)}, without a list of 'benchmarks';"
            " `pytest bench/suites --benchmark-json=FILE.json` writes one"
        )
    if not content["benchmarks"] and not content.get(UNTIMED):
        raise DataError(
            f"{where}: its list of 'benchmarks' is empty, as after a run that selected or measured none; run"
            " `pytest bench/suites --benchmark-only --benchmark-json=FILE.json` again"
        )
    machine = content.get("machine_info")
    environment = machine.get(MACHINE) if isinstance(machine, dict) else None
    untimed = content.get(UNTIMED, [])
    if not isinstance(untimed, list):
        raise DataError(f"{where}: damaged: {UNTIMED!r} is {described(untimed)}, not a list")
    beside = [each.get(POSITION) for each in untimed if isinstance(each, dict)]
    found: list[tuple[int, AnyRecord]] = []
    for number, entry in enumerate([*content["benchmarks"], *untimed]):
        timed = number < len(content["benchmarks"])
        name = str(entry.get("fullname", f"row {number}")) if isinstance(entry, dict) else f"row {number}"
        holder = entry.get("extra_info") if timed and isinstance(entry, dict) else entry
        if timed and isinstance(holder, dict) and RECORD not in holder and holder.get(POSITION, -1) in beside:
            continue
        record = holder.get(RECORD) if isinstance(holder, dict) else None
        if not isinstance(record, dict) or not isinstance(holder, dict):
            raise DataError(f"{where}: benchmark {name!r} holds no record of adrec; only its own suites' files convert")
        full = {"environment": environment, **record}
        try:
            if timed and full.get("timing") is None and full.get("kind") in ("tradeoff", "engine", "kernel"):
                full["timing"] = _timing(full, entry.get("stats"), f"{where}: benchmark {name!r}")
            found.append((int(holder.get(POSITION, number)), ADAPTER.validate_python(full)))
        except (ValidationError, ValueError, TypeError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise DataError(f"{where}: the record of benchmark {name!r} is damaged: {reason}") from None
    return [record for _, record in sorted(found, key=lambda each: each[0])]


def read_pytest_json(path: Path) -> list[AnyRecord]:
    """Records of a file of pytest-benchmark; DataError says what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
        content = parse_json(text)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; `pytest bench/suites --benchmark-json={path}` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a JSON file of pytest-benchmark ({error})") from None
    except ValueError as error:
        raise DataError(f"{path}: not a JSON file of pytest-benchmark: {_not_json(text, str(error))}") from None
    return records_of(content, str(path))


def _not_json(text: str, reason: str) -> str:
    first = text.strip().split("\n", 1)[0]
    if not first:
        return "it is empty"
    if '"schema_version"' in first:
        return "it holds JSON lines, as records do; give it a name that ends in .jsonl"
    if first[0] not in "{[":
        return foreign(text) or reason
    return f"{reason}; it is damaged or cut short: write it again"


def describe_benchmark(benchmark: Any, record: AnyRecord) -> None:
    """Give a fixture of pytest-benchmark the identity of a record, whose machine the file itself holds.

    Before the measurement, which copies the names. Its timing follows from the file's samples where the record is of a
    trade-off or of a kernel; of other kinds, call this again with the complete record.
    """
    (row,) = rows_in(record)
    content = record.model_dump(mode="json")
    del content["environment"]
    found = identity(record.kind, row)
    # What is measured already shares this dictionary.
    benchmark.extra_info.update(found.pop("extra_info"), **{RECORD: content})
    for name, value in found.items():
        setattr(benchmark, name, value)


def identity(kind: str, row: Row) -> dict[str, Any]:
    """What pytest-benchmark knows a row by: group, name, ``fullname`` (which it compares by), params and extra_info."""
    parts, name = dict(row.key), label(row.key)
    group = ", ".join(
        f"{part} {parts[part]}" for part in ("scenario", "kernel", "items", "steps", "batch", "data") if part in parts
    )
    extra: dict[str, Any] = {**parts, "threads": row.threads, "device": row.device}
    if row.accuracy is not None:
        extra["accuracy"] = {name: metric.value for name, metric in row.accuracy.metrics_percent.items()}
        extra["accuracy_users"] = row.accuracy.users
        extra["accuracy_measured_with"] = row.accuracy.measured_with
        extra["top20_overlap"] = row.accuracy.top20_overlap_fraction
        extra["engine_agreement"] = row.accuracy.engine_agreement_fraction
    else:
        missing = "it was not measured"
        extra["accuracy_missing"] = missing if row.weights else NO_ACCURACY.get(kind, missing)
    if row.weights:
        extra["model_fingerprint"] = row.weights
    return {
        "group": f"{kind}: {group}" if group else kind,
        "name": name,
        "fullname": f"adrec/{kind}::{name}",
        "params": parts,
        "param": name,
        "extra_info": extra,
    }


def pytest_text(records: Sequence[AnyRecord]) -> str:
    """The file as text."""
    return json.dumps(pytest_json(records), allow_nan=False, indent=1) + "\n"


def _benchmark(record: AnyRecord, row: Row, holder: dict[str, Any]) -> dict[str, Any]:
    found = identity(record.kind, row)
    found["extra_info"] |= holder
    return {**found, "options": OPTIONS, "stats": statistics_of([each / 1e3 for each in row.rounds_ms])}


def _timing(record: Mapping[str, Any], stats: object, where: str) -> dict[str, Any]:
    data = stats.get("data") if isinstance(stats, dict) else None
    if not data or not all(isinstance(each, int | float) and each > 0 for each in data):
        raise DataError(f"{where} keeps no samples; write it with --benchmark-json, or add --benchmark-save-data")
    milliseconds = 1e3 * np.asarray(data, dtype=np.float64)
    p50, p95, p99 = (float(each) for each in np.quantile(milliseconds, [0.5, 0.95, 0.99]))
    if record["kind"] != "tradeoff":
        return PathTiming(
            latency_us_p50=1e3 * p50,
            latency_us_p95=1e3 * p95,
            latency_us_p99=1e3 * p99,
            round_medians_us=[round(1e3 * float(each), 4) for each in milliseconds],
            calls=len(data),
            rounds=len(data),
            time_ratio_to_baseline=None,
            peak_memory_mib=None,
            peak_memory_meaning=NOT_MEASURED,
        ).model_dump(mode="json")
    return TimingSummary(
        latency_ms_p50=p50,
        latency_ms_p95=p95,
        latency_ms_p99=p99,
        round_medians_ms=[round(float(each), 6) for each in milliseconds],
        calls=len(data),
        rounds=len(data),
        throughput_users_per_second=1e3 * float(record.get("batch_size_users") or 1) / p50,
        time_ratio_to_baseline=None,
        baseline_engine=str(record.get("engine") or ""),
        baseline_steps=int(record.get("steps") or 0),
        history_tokens_per_batch_mean=float(record.get("history_tokens", 0)),
        peak_memory_mib=None,
        peak_memory_meaning=NOT_MEASURED,
        seed=int(record.get("seed", 0)),
    ).model_dump(mode="json")
