"""The figures of README and docs against the records of `bench/records`: each is one of a record, or listed here.

A table's row and a sentence choose a record by their words; the number printed must be its value, rounded as printed.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from readme_records import NoSuchRecordError, Values, one, records, triple, words

from compress.export.comparison import Pair

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in (
    "steps", "compress", "export", "bench", "kernels", "accuracy")))  # fmt: skip
"""In the order in which a reader runs their commands."""
NUMBER = r"(?:1/)?(?:\d*\.)?\d+(?:e-\d+)?"
FENCE, CODE = re.compile(r"```.*?```", re.DOTALL), re.compile(r"`[^`]*`")

# Numbers that are no measurement of ours, with the words around them.
NOT_MEASURED = (
    # Names and versions.
    r"KDD 2025|\[arXiv 2505\.19544\]\(\S+\)|Python 3\.10|ML-100k|top-20|Apache-2\.0",
    r"stage 1|stage 2|10\.12 or newer|Python 3\.11 or older|TensorRT 10\.16, 11\.1 and 11\.4",
    # Settings of what is measured.
    r"of 32 DDPM steps|at lambda 1 one|as good as 32;|the run's 32 steps|at 32 steps,|the 32-step|batch 1 and",
    r"and 512 users|at 32 steps takes|seed 0, by|seeds 0, 1 and 2|batches of 512 test histories|batches of 128 users",
    # What the software accepts and gives.
    r"exit status 3|ends with status 3|\(1 to the number|the whole 99 % interval|of 3 to 5 rounds expect",
    r"sm_80, 90 and 100, the graphs|above 128 results|16-bit|rounding of 2\^-8 or 2\^-11|heads below 8 or above 128",
    r"widths above 256|\(to 1024; one launch up to 128\)|float32, 8 MiB, or one list a user",
    # Targets, which the page calls not measured.
    r"at least 100 times as|3 times as fast as the compiled|\(both at batch 512, 32 steps\)|at 70 % of the bandwidth",
    r"\(10 million items, bfloat16\)|within 4 times its floor",
)
# Measured, but of no record: nothing else may join them.
WITHOUT_RECORD = (r"\(19\.2 / 9\.40 against 18\.8 / 9\.45\)", r"\(family 26\)")


# What a rule raises for words that it does not know, and for a record without the value.
UNKNOWN = (NoSuchRecordError, LookupError, TypeError)


def pages() -> str:
    """All pages, one after the other."""
    return "\n".join(path.read_text(encoding="utf-8") for path in PAGES)


def shows(token: str, value: float) -> bool:
    """Whether a printed number is a value rounded to the digits printed; 1/x of a ratio below one."""
    if token.startswith("1/"):
        return value != 0 and shows(token[2:], 1 / value)
    mantissa, power, _ = token.partition("e")
    form = f".{len(mantissa.partition('.')[2])}{power or 'f'}"
    return f"{value:{form}}" == f"{float(token):{form}}"


# Tables: a row's cells by column to the values of those that hold figures; the other cells are its label.


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


SYSTEMS = {"popularity": "popularity", "SASRec+ (stage 1)": "sasrec+", "ADRec, 1 step": "adrec"}


def accuracy(data: str, system: str) -> list[dict[str, Any]]:
    """A system's row on all users, their own items ranked too, in the record of each seed."""
    found = [one(each["rows"], system=system, group="all", **{"own items": "ranked"})
             for each in records(f"accuracy-{data.lower()}-[0-9].json")]  # fmt: skip
    if any(each["steps"] != (1 if system == "adrec" else "-") for each in found):
        raise NoSuchRecordError(f"accuracy of {system} is not at one step")
    return found


def accuracy_row(row: dict[str, str]) -> dict[str, Values]:
    if row["system"] == "ADRec as published":
        # Table 2 of the paper.
        words(r"16\.82, 8\.32", f"{row['HR@20']}, {row['NDCG@20']}")
        return {}
    rows = accuracy(words(r"Beauty|ML-100k", row["data"])[0], SYSTEMS[row["system"].replace("*", "")])
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


# Sentences: {} is a number.


def students(data: str, split: str) -> list[dict[str, Any]]:
    return [one(each["rows"], split=split, role="distilled") for each in records(f"distill-{data}-[0-9].json")]


def students_of_seeds() -> Values:
    found = students("beauty", "test")
    return (*(x for each in found for x in triple(each["kept_percent"])),
            *(x for each in found for x in triple(each["over_baseline_percent"])))  # fmt: skip


def student_of_few_users() -> Values:
    (test,), (validation,) = students("ml-100k", "test"), students("ml-100k", "validation")
    return *triple(test["kept_percent"]), *triple(validation["kept_percent"]), test["users"]


def engine_ms(path: str, items: int) -> float:
    rows = records("engines-cpu.jsonl")
    return float(one(rows, path=path, items=items, batch_size_users=1, steps=1)["timing"]["latency_us_p50"]) / 1000


def best_seed() -> Values:
    best = max(accuracy("beauty", "adrec"), key=lambda row: row["NDCG@20"]["value"])
    return best["HR@20"]["value"], best["NDCG@20"]["value"]


def agreement() -> Values:
    found = [speed_record("reference", steps)["accuracy"] for steps in (1, 32)]
    return min(each["engine_agreement_fraction"] for each in found), min(
        each["engine_agreement_users"] for each in found
    )


def one_step() -> Values:
    found = speed_record("cached", 1)["accuracy"]
    return *triple(found["ndcg20_kept_percent"]), found["top20_overlap_fraction"]


def slow_rounds() -> Values:
    return (speed_record("reference", 32)["timing"]["rounds"],)


def today() -> Values:
    rows = records("engines-beauty-cpu-avx2.jsonl")

    def milliseconds(path: str, users: int, steps: int, quantile: int = 50) -> float:
        timing = one(rows, path=path, batch_size_users=users, steps=steps)["timing"]
        return float(timing[f"latency_us_p{quantile}"]) / 1000

    return (
        milliseconds("onnxruntime", 1, 1), milliseconds("onnxruntime", 1, 1, 99),
        milliseconds("onnxruntime", 512, 1), milliseconds("onnxruntime-int8", 512, 1),
        milliseconds("reference", 512, 32) / 1000, milliseconds("reference-compiled", 512, 32) / 1000,
    )  # fmt: skip


def catalogues() -> Values:
    rows = records("engines-aotinductor-cpu-avx2.jsonl")

    def milliseconds(path: str, items: int) -> float:
        timing = one(rows, path=path, items=items, batch_size_users=1, steps=1)["timing"]
        return float(timing["latency_us_p50"]) / 1000

    paths = ("onnxruntime-int8", "onnxruntime", "cached")
    large, small = ([milliseconds(path, items) for path in paths] for items in (1_000_000, 6086))
    return *large, *small, milliseconds("aotinductor", 6086)


def epoch_seconds(model: str) -> float:
    rows = records("training-beauty-cpu-avx2.jsonl")
    return float(one(rows, model=model, batch_size_users=128, precision="32-true")["timing"]["epoch_seconds"])


def targets_without_spills() -> Values:
    (table,) = records("kernels-compiled.json")
    if any(row["spills"] for row in table["rows"]):
        raise NoSuchRecordError("a kernel spills")
    return tuple(sorted({int(row["target"].removeprefix("sm_")) for row in table["rows"]}))


THREE = "{} % [{}, {}], {} % [{}, {}] and {} % [{}, {}] of"
SENTENCES: tuple[tuple[str, Callable[[], Values]], ...] = (
    (f"the students of three seeds keep {THREE} their teachers' test NDCG@20, which is {THREE} SASRec+",
     students_of_seeds),
    ("{} of the lists' items stay", lambda: (
        compress_record("student 2 + 0 (recipe `fast`)", "float32, `cached`")["accuracy"]["top20_overlap_fraction"],)),
    ("On ML-100k a student keeps {} % [{}, {}] on the test split and {} % [{}, {}] on validation: {} users tell"
     " no more", student_of_few_users),
    ("one step: one user takes `aotinductor` {} ms and the compiled `cached` {} ms; of a million items {} ms in"
     " `cached`, {} ms in `onnxruntime-int8`)", lambda: (
        engine_ms("aotinductor", 6086), engine_ms("cached-compiled", 6086),
        engine_ms("cached", 1_000_000), engine_ms("onnxruntime-int8", 1_000_000))),
    ("the best of the three seeds has {} / {})", best_seed),
    ("the top-20 lists of the two engines agree ({} on {} users)", agreement),
    ("One step keeps {} % [{}, {}] of the 32-step NDCG@20, and {} of its top-20 lists", one_step),
    ("Few calls stand behind the slow rows ({} rounds)", slow_rounds),
    ("ONNX Runtime takes one user {} ms, p99 {} ms, and 512 users {} ms, in int8 {} ms; `reference` at 32 steps takes"
     " {} s, compiled {} s", today),
    ("one user of a million items takes {} ms, in float32 {} ms and in `cached` {} ms; of Beauty's size {} ms, {} ms"
     " and {} ms, and in `aotinductor` {} ms", catalogues),
    ("an epoch of Beauty takes {} s in stage 1 and {} s in the main stage", lambda: (
        epoch_seconds("sasrec"), epoch_seconds("adrec"))),
    ("compiles for sm_{}, {}, {}, {} and {} without spills (`bench/records/kernels-compiled.json`",
     targets_without_spills),
)  # fmt: skip


@dataclass
class Checked:
    """What is wrong with a text, and where (start, end) the figures stand that are held to a record."""

    problems: list[str] = field(default_factory=list)
    figures: list[tuple[int, int]] = field(default_factory=list)
    explained: list[tuple[int, int]] = field(default_factory=list)


def check(text: str) -> Checked:
    """Hold every number of README and docs to the records."""
    done = Checked()
    prose = FENCE.sub(_blank, text)
    for start, end in _check_tables(prose, done):
        prose = prose[:start] + re.sub(r"[^\n]", " ", prose[start:end]) + prose[end:]
    for sentence, values in SENTENCES:
        form = rf"({NUMBER})".join(map(_spaced, sentence.split("{}")))
        found = list(re.finditer(form, prose))
        if len(found) != 1:
            done.problems.append(f"stands {len(found)} times instead of once: {sentence}")
            continue
        spans = [found[0].span(place) for place in range(1, found[0].re.groups + 1)]
        done.explained += spans
        try:
            _compare(text, spans, values(), sentence, done)
        except UNKNOWN as error:
            done.problems.append(f"{sentence}: {error!r}")
    prose = CODE.sub(_blank, prose)
    for pattern in (*NOT_MEASURED, *WITHOUT_RECORD):
        spans = [each.span() for part in pattern.split("|") for each in re.finditer(part.replace(" ", r"\s+"), prose)]
        done.explained += spans
        if not spans:
            done.problems.append(f"no page has anything of {pattern!r}: take it from the list")
    for number in re.finditer(rf"(?<![\w.@]){NUMBER}", prose):
        if not any(start <= number.start() and number.end() <= end for start, end in done.explained):
            near = " ".join(text[max(0, number.start() - 40) : number.end() + 30].split())
            done.problems.append(f"no record and no rule explains {number[0]!r} in: {near}")
    return done


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def _spaced(text: str) -> str:
    return r"\s+".join(map(re.escape, text.split(" ")))


def _compare(text: str, spans: list[tuple[int, int]], values: Values, where: str, done: Checked) -> None:
    tokens = [re.sub(r"(?<=\d) ", "", text[start:end]) for start, end in spans]
    # An interval may be left out.
    if len(tokens) == 1 and len(values) == 3:
        values = values[:1]
    if len(tokens) != len(values):
        done.problems.append(f"{where}: {len(tokens)} numbers; the record gives {len(values)}")
    for span, token, value in zip(spans, tokens, values, strict=False):
        done.figures.append(span)
        if not shows(token, value):
            done.problems.append(f"{where}: the page says {token}; the record says {value:.6g}")


def _check_tables(prose: str, done: Checked) -> Iterator[tuple[int, int]]:
    """Check the tables that hold figures; yields where they stand."""
    for table in re.finditer(r"(?:^\|.*\n)+", prose, re.MULTILINE):
        lines = list(re.finditer(r"^\|.*$", table[0], re.MULTILINE))
        head = [cell.strip() for cell in lines[0][0].strip("|").split("|")]
        rule = TABLES.get((head[0], head[1]))
        if rule is None:
            continue
        for line in lines[2:]:
            places = [each.span(1) for each in re.finditer(r"\|([^|]*)(?=\|)", line[0])]
            row = {name: line[0][start:end].strip() for name, (start, end) in zip(head, places, strict=True)}
            try:
                cells = rule(row)
            except UNKNOWN as error:
                done.problems.append(f"{line[0]}: {error!r}")
                continue
            for name, (start, end) in zip(head, places, strict=True):
                if name in cells and row[name]:
                    offset = table.start() + line.start() + start
                    text = CODE.sub(_blank, line[0][start:end])
                    digits = rf"\d{{1,3}}(?: \d{{3}})+|{NUMBER}"
                    spans = [(offset + each.start(), offset + each.end()) for each in re.finditer(digits, text)]
                    _compare(prose, spans, cells[name], f"{row[head[0]]}, {name}", done)
        yield table.span()
