"""Which record a row of a table of README and docs is held to.

Each rule turns a row's cells by column into the values of those that hold figures; the other cells are its label.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from typing import Any

from readme_records import NoSuchRecordError, Values, one, records, triple, words

from compress.export.comparison import Pair


def steps_row(row: dict[str, str]) -> dict[str, Values]:
    scale = float(words(r"(\d*\.?\d+)(?: \(the paper's\))?", row["lambda"])[1])
    record = one(records("steps-beauty-lambda*.json"), lambda_uncertainty=scale)
    rows = one(record["evaluations"], split="test")["rows"]

    def kept(steps: int, sampler: str) -> Values:
        return triple(one(rows, steps=steps, sampler=sampler, seed=0)["NDCG@20 kept"])

    found = {
        "NDCG@20 at 32 steps": triple(one(rows, steps=32, sampler="ddpm", seed=0)["NDCG@20"]),
        "1 step from noise": kept(1, "ddpm"),
        "4 steps, DDIM": kept(4, "ddim"),
    }
    return found | ({"1 step from zero": kept(1, "ddpm, from zero")} if row["1 step from zero"] else {})


PRECISIONS = {"": "float32", "float32, ": "float32", "int8 stored, ": "int8", "int8-dynamic, ": "int8 dynamic"}


def compress_record(network: str, engine: str) -> dict[str, Any]:
    rows = records("compress-beauty-cpu.jsonl")
    form = words(r"(?:(student )?(\d) \+ (\d)(?:, (\d) step| \(recipe `fast`\))?|SASRec\+)", network)
    precision, path = words(r"(.*?)`([\w-]+)`", engine).groups()
    if precision not in PRECISIONS:
        raise NoSuchRecordError(f"{engine!r}: no such precision; there are: {list(PRECISIONS)}")
    chosen = {"engine": path, "precision": PRECISIONS[precision]}
    if form[2] is None:
        return one(rows, role="baseline", **chosen)
    teacher = rows[0]["run_name"]
    runs = [row for row in rows if (row["run_name"] != teacher) == bool(form[1])]
    return one(runs, network=f"{form[2]}+{form[3]} x 128", steps=form[4] and int(form[4]), **chosen)


def compress_row(row: dict[str, str]) -> dict[str, Values]:
    record = compress_record(row["network, steps"], row["precision, engine"])
    single = one(record["timings"], batch_size_users=1)
    return {
        "NDCG@20 kept": triple(record["accuracy"]["ndcg20_kept_percent"]),
        "file": (record["file_bytes"] / record["teacher_file_bytes"],),
        "throughput at 512": triple(one(record["timings"], batch_size_users=512)["times_reference"]),
        "one user, p50": (single["latency_ms_p50"],),
        "time of SASRec+": (single["latency_to_sasrec"]["value"],),
    }


def export_row(row: dict[str, str]) -> dict[str, Values]:
    return {name: _exported(name, row["graph"], cell) for name, cell in row.items() if name != "graph"}


def _exported(column: str, label: str, cell: str) -> Values:
    data, users = words(r"(Beauty|ML-100k)(?: \((\d+) users\))?", column).groups()
    files = [f"export-{data.lower()}-0{rest}.json" for rest in ("", "-fp16", "-32-steps")]
    pairs = [pair for name in files for record in records(name) for pair in record["pairs"]]
    if users is not None and {pair["users"] for pair in pairs} != {int(users)}:
        raise NoSuchRecordError(f"{column}: not of {users} users")
    if label == "fp32, also 4 and 32 steps and the loop":
        pairs = [pair for pair in pairs if pair["precision"] == "fp32"]
        looped = [pair["steps"] for pair in pairs if pair["graph"] == "request-fp32-loop.onnx"]
        same = min(pair["overlap"] for pair in pairs) == 1 and cell.endswith(", same lists")
        if not same or not {1, 4, 32} <= {pair["steps"] for pair in pairs} & set(looped):
            raise NoSuchRecordError(f"{column}, {label}: the lists differ, or a graph is not in the records")
        return (max(pair["score_error"] for pair in pairs),)
    if label == "fp16, also 4 and 32 steps":
        pairs = [pair for pair in pairs if pair["precision"] == "fp16"]
        if {pair["steps"] for pair in pairs} != {1, 4, 32}:
            raise NoSuchRecordError(f"{column}, {label}: a graph is not in the records")
        overlaps = [pair["overlap"] for pair in pairs]
        return min(overlaps), max(overlaps)
    precision = words(r"(int8 dynamic|(?:int8|fp8) Q/DQ)", label)[1].lower().replace("/", "").replace(" ", "-")
    pairs = [pair for pair in pairs if pair["precision"] == precision]
    # The cell goes on with the step counts that `adrec export verify` refuses.
    refused = sorted({pair["steps"] for pair in pairs if Pair.model_validate(pair).faults})
    return (*one(pairs, steps=1, graph=f"request-{precision}-s1.onnx")["ndcg_kept"], *refused)


SYSTEMS = {
    "popularity": ("popularity", ""),
    "SASRec+ (stage 1)": ("sasrec+", ""),
    "ADRec, 1 step": ("adrec", ""),
    "stage 1 without positions, the paper's settings": ("sasrec+", "-paper"),
    "ADRec, 1 step, the paper's settings": ("adrec", "-paper"),
}


def accuracy(data: str, system: str, settings: str = "") -> list[dict[str, Any]]:
    """A system's row on all users, their own items ranked too, in the record of each seed."""
    found = [one(each["rows"], system=system, group="all", **{"own items": "ranked"})
             for each in records(f"accuracy-{data.lower()}{settings}-[0-9].json")]  # fmt: skip
    if any(each["steps"] != (1 if system == "adrec" else "-") for each in found):
        raise NoSuchRecordError(f"accuracy of {system} is not at one step")
    return found


def accuracy_row(row: dict[str, str]) -> dict[str, Values]:
    # Table 2 of the paper.
    published = {"ADRec as published": "16.82, 8.32", "SASRec+ as published": "15.20, 7.65"}
    if row["system"] in published:
        words(re.escape(published[row["system"]]), f"{row['HR@20']}, {row['NDCG@20']}")
        return {}
    rows = accuracy(words(r"Beauty|ML-100k", row["data"])[0], *SYSTEMS[row["system"].replace("*", "")])
    found: dict[str, Values] = {}
    for name in ("HR@20", "NDCG@20"):
        values = [each[name]["value"] for each in rows]
        spread = (statistics.stdev(values),) if len(set(values)) > 1 else ()
        found[name] = (statistics.mean(values), *spread)
    return found | ({"runs": (len(rows),)} if row["runs"] else {})


def speed_record(engine: str, steps: int | None, model: str = "adrec") -> dict[str, Any]:
    return one(records("tradeoff-beauty-cpu.jsonl"), model=model, engine=engine, steps=steps, batch_size_users=512)


def speed_row(row: dict[str, str]) -> dict[str, Values]:
    model, engine = words(r"(SASRec\+ in )?`(\w+)`", row["engine"]).groups()
    steps = row["steps"].replace("*", "")
    timing = speed_record(engine, None if steps == "-" else int(steps), "sasrec+" if model else "adrec")["timing"]
    if (timing["baseline_engine"], timing["baseline_steps"]) != ("reference", 32):
        raise NoSuchRecordError("times are not against `reference` at 32 steps")
    return {
        "batch of 512, p50": (timing["latency_ms_p50"],),
        "time against `reference` at 32 steps [95 %]": triple(timing["time_ratio_to_baseline"]),
    }


TABLES: dict[tuple[str, str], Callable[[dict[str, str]], dict[str, Values]]] = {
    ("lambda", "NDCG@20 at 32 steps"): steps_row,
    ("network, steps", "precision, engine"): compress_row,
    ("graph", "Beauty"): export_row,
    ("data", "system"): accuracy_row,
    ("engine", "steps"): speed_row,
}
