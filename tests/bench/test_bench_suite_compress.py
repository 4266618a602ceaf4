"""The suite of compressed models: its rows, resumption, comparison of two of its files, and where int8 takes longer."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from adrec.checkpoint import load_run
from adrec.config import LayerFormat, QuantizationConfig, TableFormat
from adrec.errors import ConfigError, RunError
from bench.archive import read_any
from bench.cli import register
from bench.comparing.comparison import compare
from bench.comparing.rows import rows_of
from bench.compression.networks import NAMES, load_networks, stored_precision
from bench.compression.record import CompressRecord
from bench.compression.slower import slowdown, slower_sentences
from bench.compression.tables import csv_table, markdown_table
from bench.conversion.pytest_json import UNTIMED, pytest_json, records_of
from bench.json_lines import json_line
from bench.record import Estimate
from bench.report import write_report
from compress.api import compress_, compress_run
from compress.recipe import Recipe, read_stages
from compress.technique import Draft
from compress.workshop import PRECISIONS

pytest.importorskip("torchao", reason="torchao is not installed")


@pytest.fixture(scope="module")
def stored_int8(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run as `adrec compress` stores it in int8, served with one step."""
    out = tmp_path_factory.mktemp("stored") / "small"
    compress_run(
        tiny_run, Recipe(stages=[{"technique": "steps", "steps": 1}, "quantize", "item_table"], max_loss=99), out
    )
    return out


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["bench", *arguments])


def options(out: Path, run: Path, *more: str) -> list[str]:
    fast = ["--smoke", "--seconds-per-cell", "0.000001", "--users", "30", "--quiet"]
    return [*fast, "--out", str(out), "--run", str(run), *more]


@pytest.fixture(scope="module")
def measured(tiny_run: Path, stored_int8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the suite's first unit, gone on with to all of it."""
    out = tmp_path_factory.mktemp("suite") / "out"
    half = invoke("run", "compress/batch 1", *options(out, tiny_run, "--with", str(stored_int8)))
    assert half.exit_code == 0, half.output
    assert len(read_any(out / "compress.jsonl")) == 10
    whole = invoke("run", "compress", *options(out, tiny_run, "--with", str(stored_int8), "--resume"))
    assert whole.exit_code == 0, whole.output
    assert "1 units were done before" in whole.output
    return out


@pytest.fixture(scope="module")
def records(measured: Path) -> list[CompressRecord]:
    found = read_any(measured / "compress.jsonl")
    assert all(isinstance(each, CompressRecord) for each in found)
    return [each for each in found if isinstance(each, CompressRecord)]


def test_the_suite_holds_a_run_its_precisions_and_its_compressed_versions(records: list[CompressRecord]) -> None:
    rows = [(row.role, row.run_name, row.steps, row.precision, row.engine) for row in records[:10]]
    assert rows == [
        ("teacher", "run", 4, "float32", "reference"),
        ("baseline", "baseline", None, "float32", "cached"),
        ("teacher", "run", 4, "float32", "cached"),
        ("teacher", "run", 1, "float32", "cached"),
        ("candidate", "run", 1, "bf16", "cached"),
        ("candidate", "run", 1, "int8 table", "cached"),
        ("candidate", "run", 1, "int8", "cached"),
        ("candidate", "run", 1, "int8 bf16", "cached"),
        ("candidate", "run", 1, "int8 dynamic", "cached"),
        ("candidate", "small", 1, records[9].precision, "cached"),
    ]
    # What is stored rounded is measured as it is, once.
    assert "int8" in records[9].precision
    assert [row.batch_sizes_users for row in records] == [[1]] * 10 + [[16]] * 10
    assert [row.timings[0].batch_size_users for row in records] == [1] * 10 + [16] * 10
    assert {row.accuracy.users for row in records if row.accuracy} == {30}
    assert all(len(row.timings[0].round_medians_ms) == row.timings[0].rounds for row in records)


def slower(records: list[CompressRecord], precision: str, factor: float) -> list[CompressRecord]:
    """Records with exact times: 10 ms in every round, ``factor`` times that for one precision."""
    found = []
    for row in records:
        time = 10.0 * (factor if row.precision == precision else 1.0)
        timings = [
            timing.model_copy(update={"round_medians_ms": [time] * 5, "rounds": 5, "latency_ms_p50": time})
            for timing in row.timings
        ]
        machine = row.environment.machine.model_copy(update={"load_one_minute": 0.0})
        environment = row.environment.model_copy(update={"machine": machine})
        found.append(row.model_copy(update={"timings": timings, "environment": environment}))
    return found


def test_two_files_of_the_suite_are_compared(records: list[CompressRecord]) -> None:
    bounds = {"bound": 0.05, "accuracy_bound": 0.01}
    old = rows_of(slower(records, "", 1.0))
    assert len(old) == 20
    same = compare(old, rows_of(slower(records, "", 1.0)), **bounds)  # type: ignore[arg-type]
    assert {pair.time.verdict for pair in same.pairs} == {"no difference"}
    assert all(pair.accuracy is not None and pair.accuracy.paired for pair in same.pairs)
    worse = compare(old, rows_of(slower(records, "int8 dynamic", 1.1)), **bounds)  # type: ignore[arg-type]
    assert {dict(pair.key)["precision"] for pair in worse.regressions} == {"int8 dynamic"}
    assert {dict(pair.key)["batch"] for pair in worse.regressions} == {"1", "16"}
    assert worse.regressions[0].time.ratio is not None
    assert worse.regressions[0].time.ratio.value == pytest.approx(1.1)


def test_a_row_that_fails_now_and_one_without_rounds_say_so(records: list[CompressRecord]) -> None:
    bounds = {"bound": 0.05, "accuracy_bound": 0.01}
    old = slower(records, "", 1.0)
    broken = old[6].model_copy(update={"timings": [], "accuracy": None, "error": "RuntimeError: no"})
    found = compare(rows_of(old), rows_of([*old[:6], broken, *old[7:]]), **bounds)  # type: ignore[arg-type]
    assert [
        (dict(pair.key)["precision"], dict(pair.key)["batch"], pair.time.verdict) for pair in found.regressions
    ] == [("int8", "1", "fails now")]
    timing = old[0].timings[0].model_copy(update={"round_medians_ms": []})
    older = old[0].model_copy(update={"timings": [timing], "batch_sizes_users": []})
    (pair,) = compare(rows_of([older]), rows_of(old), **bounds).pairs  # type: ignore[arg-type]
    assert pair.time.reason == "the old record is of an adrec that kept no rounds; measure it again"


def test_where_int8_takes_longer_is_said(records: list[CompressRecord], tmp_path: Path) -> None:
    even = slower(records, "", 1.0)
    assert slower_sentences(even) == ["No int8 row surely takes longer than float32 or bf16 at its shape."]
    assert slower_sentences(even[:4]) == []
    slow = slower(records, "int8 dynamic", 1.25)
    expected = [
        f"int8 dynamic takes 1.25 times [1.25, 1.25] as long as {plain} at batch {batch} (2+2 x 16 of run, 1 step,"
        " cached); there it saves bytes, not time."
        for batch in (1, 16)
        for plain in ("float32", "bf16")
    ]
    assert slower_sentences(slow) == expected
    text = markdown_table(slow).replace("\\", "")
    assert all(f"\n- {sentence}\n" in text for sentence in expected)
    # Faster than float32 and slower than bf16 is said of bf16 alone.
    fast_bf16 = slower(records, "bf16", 0.5)
    assert {sentence.split(" as long as ")[1].split(" at batch")[0] for sentence in slower_sentences(fast_bf16)} == {
        "bf16"
    }
    assert "round_medians_ms" not in csv_table(slow)
    page = write_report(slow, tmp_path / "out.html")
    for text in (page.read_text(), page.with_suffix(".md").read_text().replace("\\", "")):
        assert all(sentence in text for sentence in expected)


def test_rows_that_were_not_measured_together_are_no_pair(records: list[CompressRecord]) -> None:
    even = slower(records, "", 1.0)
    plain, slow = even[3], slower(records, "int8", 1.5)[6]
    assert (plain.timings[0].batch_size_users, slow.precision) == (1, "int8")
    assert [sentence[:20] for sentence in slower_sentences([plain, slow])] == ["int8 takes 1.50 time"]
    environment = slow.environment
    machines = [
        environment.machine.model_copy(update=change)
        for change in ({"threads": environment.machine.threads + 1}, {"processor": "other"}, {"load_one_minute": 1.5})
    ]
    for change in (
        {"dataset_fingerprint": "other"},
        {"run_fingerprint": "other"},
        {"split": "validation"},
        {"command": "adrec bench compress other"},
        *({"environment": environment.model_copy(update={"machine": machine})} for machine in machines),
    ):
        apart = slow.model_copy(update=change)
        assert slower_sentences([plain, apart]) == [], change
        # Beside the row that it was measured with it is one again, and each keeps its own partner.
        both = [plain, slow, plain.model_copy(update=change), apart]
        assert [sentence[:20] for sentence in slower_sentences(both)] == ["int8 takes 1.50 time"] * 2


def test_a_stored_precision_has_the_name_that_makes_it(tiny_run: Path) -> None:
    run = load_run(tiny_run)
    assert set(NAMES.values()) == set(PRECISIONS)
    for name, stages in PRECISIONS.items():
        draft = Draft(run.model, run.settings, run.model)
        if name != "int4":  # Groups of 32 do not divide the tiny run's layers.
            for stage in read_stages(stages):
                compress_(draft, stage, measure=False)
            assert stored_precision(replace(run, settings=draft.settings)) == name


@pytest.mark.parametrize(
    ("layers", "table", "name"),
    [
        (["int4", "int4"], "int8", "int4"),
        (["int4", "int8"], "int8", "int4"),
        (["int8", "int8"], "int8", "int8"),
        (["int4"], "bf16", "layers int4, table bf16"),
        (["bf16", "int8"], "int8", "layers bf16, int8, table int8"),
        (["fp8"], None, "layers fp8, table float32"),
        ([], "fp8", "layers float32, table fp8"),
    ],
)
def test_a_stored_precision_in_words(tiny_run: Path, layers: list[str], table: str | None, name: str) -> None:
    formats = {
        f"layer.{place}": LayerFormat(format=each, group_size=32 if each == "int4" else None)  # type: ignore[arg-type]
        for place, each in enumerate(layers)
    }
    stored = QuantizationConfig(layers=formats, table=table and TableFormat(format=table))  # type: ignore[arg-type]
    run = load_run(tiny_run)
    assert stored_precision(replace(run, settings=run.settings.model_copy(update={"quantization": stored}))) == name


def test_engines_in_int8_are_held_against_themselves_in_float32(records: list[CompressRecord]) -> None:
    plain, *_ = slower(records, "", 1.0)[3:4]
    fast = plain.model_copy(update={"engine": "onnxruntime"})
    slow = slower([plain.model_copy(update={"engine": "onnxruntime-int8"})], "float32", 1.5)
    (sentence,) = slower_sentences([plain, fast, *slow])
    assert sentence.startswith("onnxruntime-int8 takes 1.50 times [1.50, 1.50] as long as onnxruntime at batch 1 (")


def test_records_without_rounds_are_judged_by_their_intervals(records: list[CompressRecord]) -> None:
    def against_reference(value: float, half: float) -> Any:
        update = {"times_reference": Estimate(value=value, low=value - half, high=value + half), "round_medians_ms": []}
        return records[3].timings[0].model_copy(update=update)

    found = slowdown(against_reference(8.0, 1.0), against_reference(12.0, 1.0))
    assert found is not None
    assert (found.value, found.low, found.high) == (1.5, 11 / 9, 13 / 7)
    # Rounds in pairs: 2, 3 and 4 times as long.
    rounds = [records[3].timings[0].model_copy(update={"round_medians_ms": each}) for each in ([2, 6, 12], [1, 2, 3])]
    paired = slowdown(*rounds)
    assert paired is not None
    assert (paired.value, paired.low, paired.high) == (3.0, 2.0, 4.0)


def test_what_does_not_belong_is_refused(tiny_run: Path, stored_int8: Path, measured: Path, tmp_path: Path) -> None:
    for arguments, kind, message in (
        (options(tmp_path, tiny_run / "baseline", "--with", str(stored_int8)), Exception, "no steps"),
        (options(measured, tiny_run, "--resume"), ConfigError, r"networks: \['\w+'\] -> \[\]"),
        (options(tmp_path, stored_int8, "--with", str(tiny_run)), RunError, "stores .*; give the run that it was made"),
        (["--smoke", "--with", str(stored_int8)], ConfigError, "give the run that it was made from with --run"),
    ):
        with pytest.raises(kind, match=message):
            raise invoke("run", "compress", *arguments).exception


def test_two_runs_of_one_name_are_refused(tiny_run: Path, stored_int8: Path, tmp_path: Path) -> None:
    twin = tmp_path / stored_int8.name
    shutil.copytree(stored_int8, twin)
    assert len(load_networks(load_run(tiny_run), [stored_int8, stored_int8], "--with")) == 1
    with pytest.raises(RunError, match="is RUN itself"):
        load_networks(load_run(tiny_run), [tiny_run], "--with")
    with pytest.raises(RunError, match=f"has the name of .*{stored_int8.name}.*rename one"):
        load_networks(load_run(tiny_run), [stored_int8, twin], "--with")


def test_an_engine_that_fails_is_a_cell(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.compression import held_against

    make = held_against.make_engine

    def failing(name: str, model: Any) -> Any:
        if name == "onnxruntime":
            raise RuntimeError("no such luck")
        return make(name, model)

    monkeypatch.setattr(held_against, "make_engine", failing)
    done = invoke("run", "compress/batch 1", *options(tmp_path / "out", tiny_run, "--engines", "cached,onnxruntime"))
    assert done.exit_code == 1
    errors = {(row.engine, row.error) for row in read_any(tmp_path / "out" / "compress.jsonl") if row.error}  # type: ignore[union-attr]
    assert errors == {("onnxruntime", "RuntimeError: no such luck")}


def test_records_are_written_as_they_are_read(records: list[CompressRecord], tmp_path: Path) -> None:
    path = tmp_path / "again.jsonl"
    path.write_text("".join(map(json_line, records)))
    assert read_any(path) == records


def test_records_of_several_batch_sizes_survive_conversion(records: list[CompressRecord]) -> None:
    """Each batch size is a benchmark of its own; the record lies beside them, once."""
    both = records[3].model_copy(
        update={"batch_sizes_users": [1, 16], "timings": [records[3].timings[0], records[13].timings[0]]}
    )
    content = pytest_json([records[0], both])
    assert [each["params"]["batch"] for each in content["benchmarks"]] == ["1", "1", "16"]
    assert [each["adrec_position"] for each in content[UNTIMED]] == [1]
    assert content["benchmarks"][2]["stats"]["data"] == [each / 1e3 for each in records[13].timings[0].round_medians_ms]
    assert "adrec_record" not in content["benchmarks"][2]["extra_info"]
    assert records_of(content, "x.json") == [records[0], both]
