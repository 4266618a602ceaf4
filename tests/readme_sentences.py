"""Which record a sentence of README and docs is held to: {} is a number."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from readme_records import NoSuchRecordError, Values, one, records, triple, words
from readme_tables import accuracy, compress_record, speed_record


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


def gains(*settings: str) -> Values:
    """Least and most NDCG@20 that the main stage adds to the stage 1 of its own run."""
    found = [
        main["NDCG@20"]["value"] - first["NDCG@20"]["value"]
        for each in settings
        for main, first in zip(accuracy("beauty", "adrec", each), accuracy("beauty", "sasrec+", each), strict=True)
    ]
    return min(found), max(found)


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


def beside_recbole() -> Values:
    rows = records("recbole-beauty-cpu-avx2.jsonl")

    def milliseconds(model: str, users: int) -> float:
        return float(one(rows, model=model, batch_size_users=users)["timing"]["latency_ms_p50"])

    models = ("recbole-sasrec", "adrec", "sasrec+")
    trained = one(rows, model="recbole-sasrec", batch_size_users=1)["accuracy"]["measured_with"]
    epochs = words(r"recbole, best of (\d+) epochs trained.*", trained)[1]
    return *(milliseconds(model, users) for model in models for users in (1, 512)), float(epochs)


def long_histories() -> Values:
    rows = records("engines-ml-100k-cpu-avx2.jsonl")

    def milliseconds(path: str, steps: int) -> float:
        return float(one(rows, path=path, batch_size_users=1, steps=steps)["timing"]["latency_us_p50"]) / 1000

    one_step = [milliseconds(path, 1) for path in ("reference", "cached", "onnxruntime")]
    return *one_step, milliseconds("reference", 32), milliseconds("cached", 32)


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
    ("the test figures of the three seeds stay at {} / {} (`accuracy-beauty-loss-scale-5-*`)", lambda: tuple(
        statistics.mean(row[name]["value"] for row in accuracy("beauty", "adrec", "-loss-scale-5"))
        for name in ("HR@20", "NDCG@20"))),
    ("It adds {} to {} NDCG@20 to its own stage 1 in each of six runs (three seeds, with and without"
     " `train.loss_scale=5`), and {} to {} with the paper's settings", lambda: (
        *gains("", "-loss-scale-5"), *gains("-paper"))),
    ("the top-20 lists of the two engines agree ({} on {} users)", agreement),
    ("One step keeps {} % [{}, {}] of the 32-step NDCG@20, and {} of its top-20 lists", one_step),
    ("Few calls stand behind the slow rows ({} rounds)", slow_rounds),
    ("ONNX Runtime takes one user {} ms, p99 {} ms, and 512 users {} ms, in int8 {} ms; `reference` at 32 steps takes"
     " {} s, compiled {} s", today),
    ("one user of a million items takes {} ms, in float32 {} ms and in `cached` {} ms; of Beauty's size {} ms, {} ms"
     " and {} ms, and in `aotinductor` {} ms", catalogues),
    ("RecBole's SASRec answers one user in {} ms and 512 in {} ms; ADRec at one step in `cached` takes {} ms and {} ms,"
     " SASRec+ there {} ms and {} ms. RecBole trained {} epochs only", beside_recbole),
    ("takes `reference` {} ms, `cached` {} ms and `onnxruntime` {} ms; at 32 steps {} ms and {} ms in the first two",
     long_histories),
    ("an epoch of Beauty takes {} s in stage 1 and {} s in the main stage", lambda: (
        epoch_seconds("sasrec"), epoch_seconds("adrec"))),
    ("compiles for sm_{}, {}, {}, {} and {} without spills (`bench/records/kernels-compiled.json`",
     targets_without_spills),
)  # fmt: skip
