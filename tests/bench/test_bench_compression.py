"""Searches on a tiny run with toy techniques, the rows that compressed runs are held against, and their tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from toy_techniques import TOYS, ForgetConfig, IdleConfig, ScaleConfig, ServeConfig

from adrec.checkpoint import load_run
from adrec.config import ServingConfig
from adrec.data.dataset import Dataset
from adrec.engines import CachedEngine
from adrec.errors import ConfigError, DataError
from adrec.evaluation import evaluate, kept_percent, top_overlap
from bench.archive import read_any
from bench.compression.held_against import HeldAgainst
from bench.compression.networks import file_bytes, network_name
from bench.compression.receipts import front_table, receipt_table, slower_notes, technique_table
from bench.compression.record import CompressRecord
from bench.compression.session import CANDIDATES, TRAINED, SearchSession, check_engines
from bench.compression.stopwatch import Stopwatch
from bench.compression.tables import csv_table, markdown_table
from bench.json_lines import json_line
from bench.timing import TimingProtocol
from compress.api import compress_run, read_compression
from compress.budget import Budget, Timing
from compress.candidates import Option, Space
from compress.recipe import Recipe
from compress.technique import Change, Reading, Receipt, Skip


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry holds the toy techniques only."""
    monkeypatch.setattr("compress.recipe._registry", lambda: dict(TOYS))


SPACE = Space(
    students=(Option("teacher"), Option("forgetful", (ForgetConfig(keep=39),), frozenset({"teacher"}))),
    precisions=(Option("float32"), Option("scaled", (ScaleConfig(),), frozenset({"float32"}))),
    step_stages={1: (ServeConfig(times=(0,)),), 4: (ServeConfig(times=(0, 1, 2, 3)),)},
    engines=("cached", "reference"),
)


def session(run: Path, out: Path, protocol: TimingProtocol, clock: Any, **more: Any) -> SearchSession:
    loaded = load_run(run)
    settings = {"budget": Budget.parse("p99<=1e9ms@batch=2"), "max_loss": 99.0, "prune": False, **more}
    console = Console(file=io.StringIO(), width=200)
    dataset = Dataset.load(loaded.data_path)
    return SearchSession(loaded, dataset, out, SPACE, console=console, protocol=protocol, clock=clock, **settings)


def shown(session: SearchSession) -> str:
    assert isinstance(session.console.file, io.StringIO)
    return session.console.file.getvalue()


def rendered(*tables: Any) -> str:
    console = Console(file=io.StringIO(), width=250)
    for table in tables:
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_search_writes_a_run_with_its_story(
    tiny_run: Path, tmp_path: Path, tiny_protocol: TimingProtocol, counting_clock: Any
) -> None:
    out = tmp_path / "out"
    first = session(tiny_run, out, tiny_protocol, counting_clock)
    search, records = first.go(quiet=True)
    assert [record.status for record in records] == ["measured"] * 16
    chosen = search.choose(records)
    made = first.write(chosen)
    run = load_run(out)
    assert (made.engine, read_compression(out)) == (chosen.candidate.engine, made)
    assert [receipt.technique for receipt in made.receipts] == [
        stage.technique for stage in SPACE.stages(chosen.candidate)
    ]
    examples = Dataset.load(load_run(tiny_run).data_path).examples("validation")
    found = evaluate(CachedEngine(run.model), examples, steps=run.settings.serving)
    accuracy = made.receipts[-1].accuracy
    assert accuracy is not None
    assert accuracy.metrics["NDCG@20"].value == found.metrics["NDCG@20"].value
    # What was trained is a run of its own, with receipts.
    (trained,) = (out / TRAINED).iterdir()
    assert load_run(trained).model.table[1:].abs().sum(1).ne(0).sum() == 39
    assert len((out / CANDIDATES).read_text().splitlines()) == 16


def test_a_second_search_trains_and_measures_nothing(
    tiny_run: Path, tmp_path: Path, tiny_protocol: TimingProtocol, counting_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = session(tiny_run, out, tiny_protocol, counting_clock)
    _, records = first.go(quiet=True)
    first.write(records[-1])

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is trained or measured twice")

    monkeypatch.setattr(SearchSession, "measure", forbidden)
    monkeypatch.setattr(SearchSession, "assess", forbidden)
    monkeypatch.setitem(TOYS, "forget", type(TOYS["forget"])(ForgetConfig, forbidden, trains=True))
    second = session(tiny_run, out, tiny_protocol, counting_clock)
    assert second.go(quiet=True)[1] == records
    made = second.write(records[-1])
    assert made.receipts[0].technique == "forget"
    assert "forget: trained already, read from" in shown(second)
    # Other threads, another seed or another time to measure are other measurements.
    monkeypatch.undo()
    monkeypatch.setattr("compress.recipe._registry", lambda: dict(TOYS))
    third = session(tiny_run, out, tiny_protocol, counting_clock, seed=1)
    assert third.fingerprint(records[0].candidate) != second.fingerprint(records[0].candidate)


def test_the_front_and_what_is_slower_are_shown(
    tiny_run: Path, tmp_path: Path, tiny_protocol: TimingProtocol, counting_clock: Any
) -> None:
    search, records = session(tiny_run, tmp_path / "out", tiny_protocol, counting_clock).go(quiet=True)
    assert slower_notes(search, records) == [], "the counting clock finds all equally fast"
    chosen = search.choose(records)
    text = rendered(front_table(search, records, chosen))
    assert text.count("*") == 2, "the title's and the chosen row's"
    assert "p99, batch 2 (ms)" in text
    place = next(place for place, record in enumerate(records) if record.candidate.precision == "scaled")
    slow = Timing(batch=2, p50_ms=3, p95_ms=3, p99_ms=3, calls=3, ratio=Reading(value=3.0, low=2.9, high=3.1))
    records[place] = records[place].model_copy(update={"timings": {2: slow}})
    assert slower_notes(search, records) == [
        "teacher, 1 step, scaled, cached takes 3.00 times as long as float32 here (batch 2)"
    ]


def test_a_half_written_record_is_said(
    tiny_run: Path, tmp_path: Path, tiny_protocol: TimingProtocol, counting_clock: Any
) -> None:
    out = tmp_path / "out"
    _, records = session(tiny_run, out, tiny_protocol, counting_clock).go(quiet=True)
    content = (out / CANDIDATES).read_bytes()
    (out / CANDIDATES).write_bytes(content[:-30])
    again = session(tiny_run, out, tiny_protocol, counting_clock)
    again.go(quiet=True)
    assert "half-written last line" in shown(again)
    assert len((out / CANDIDATES).read_text().splitlines()) == len(records)


def test_a_folder_of_something_else_is_refused(tiny_run: Path, tmp_path: Path, tiny_protocol: TimingProtocol) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not the folder of a search"):
        session(tiny_run, tmp_path, tiny_protocol, None)
    with pytest.raises(ConfigError, match="already holds a run"):
        session(tiny_run, tiny_run, tiny_protocol, None)


@pytest.mark.parametrize(
    ("engines", "message"), [(["cache"], r"did you mean 'cached'"), (["triton"], r"does not run on a CPU|cached")]
)
def test_engines_that_cannot_be_used_are_named(engines: list[str], message: str) -> None:
    if engines == ["triton"] and torch.cuda.is_available():
        pytest.skip("triton runs here")
    from adrec.engines import ENGINES

    if engines == ["triton"] and ENGINES["triton"].runs_on(torch.device("cpu")):
        check_engines(engines)
        return
    with pytest.raises(ConfigError, match=message):
        check_engines(engines)


def test_a_timing_is_interleaved_with_its_partner(tiny_run: Path, tiny_protocol: TimingProtocol) -> None:
    run = load_run(tiny_run)
    histories = Dataset.load(run.data_path).examples("validation").histories
    order: list[str] = []

    class Named:
        """An engine that notes its name and takes a known time."""

        def __init__(self, name: str, milliseconds: float) -> None:
            self.name, self.milliseconds, self.model = name, milliseconds, run.model

        def recommend(self, batch: Any, k: int, steps: Any, seed: int) -> float:
            assert (len(batch), k, steps, seed) == (8, 20, 1, 3)
            order.append(self.name)
            return self.milliseconds

    class Told:
        name = "told"

        def time_ms(self, call: Callable[[int], Any], number: int) -> float:
            return float(call(number))

    fast, slow = Named("own", 2.0), Named("partner", 8.0)
    watch = Stopwatch(histories, lambda: (slow, 1), tiny_protocol, seed=3, clock=Told())  # type: ignore[arg-type]
    timing = watch.measure((fast, 1), [8])[8]  # type: ignore[arg-type]
    assert (timing.batch, timing.p50_ms, timing.p99_ms, timing.users_per_second) == (8, 2.0, 2.0, 4000.0)
    assert timing.ratio is not None
    assert (timing.ratio.value, timing.ratio.low, timing.ratio.high) == (0.25, 0.25, 0.25)
    assert order == ["own", "partner", "own", "partner", "own", "partner"], "one warm-up, two rounds"


@pytest.fixture(scope="module")
def compressed(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with a scaled table, served with one step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.recipe._registry", lambda: dict(TOYS))
        out = tmp_path_factory.mktemp("compressed") / "scaled"
        compress_run(tiny_run, Recipe(stages=["scale", "serve"], max_loss=99), out)
    return out


@pytest.fixture(scope="module")
def records(tiny_run: Path, compressed: Path, tiny_protocol: TimingProtocol, counting_clock: Any) -> list[Any]:
    run = load_run(tiny_run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.recipe._registry", lambda: dict(TOYS))
        toy = {"float32": [], "tiny": [{"technique": "idle"}], "broken": [{"technique": "break"}]}
        patch.setattr("bench.compression.held_against.PRECISIONS", toy)
        return HeldAgainst(
            run, [load_run(compressed)], Dataset.load(run.data_path), "test", [1], ["float32", "tiny", "broken"],
            ["cached"], [1, 8], tiny_protocol, "adrec bench compress", clock=counting_clock,
        ).records()  # fmt: skip


def test_the_table_has_every_row(records: list[CompressRecord], compressed: Path) -> None:
    rows = [(row.role, row.network, row.run_name, row.steps, row.precision, row.engine) for row in records]
    teacher, own = ("2+2 x 16", "run"), ("2+2 x 16", compressed.name)
    assert rows == [
        ("teacher", *teacher, 4, "float32", "reference"),
        ("baseline", "sasrec+", "baseline", None, "float32", "cached"),
        ("teacher", *teacher, 4, "float32", "cached"),
        ("teacher", *teacher, 1, "float32", "cached"),
        ("candidate", *teacher, 1, "tiny", "cached"),
        ("candidate", *teacher, 1, "broken", "cached"),
        ("candidate", *own, 1, "float32", "cached"),
        ("candidate", *own, 1, "tiny", "cached"),
        ("candidate", *own, 1, "broken", "cached"),
    ]


def test_rows_hold_the_accuracy_of_the_library(records: list[CompressRecord], tiny_run: Path, compressed: Path) -> None:
    teacher, other = load_run(tiny_run), load_run(compressed)
    examples = Dataset.load(teacher.data_path).examples("test")
    exact = evaluate(CachedEngine(teacher.model), examples, steps=None)
    for row, model, steps in (
        (records[0], teacher.model, None),
        (records[3], teacher.model, 1),
        (records[6], other.model, ServingConfig(times=(0,))),
    ):
        found = evaluate(CachedEngine(model), examples, steps=steps)
        kept = kept_percent(found.ranks, exact.ranks)
        assert row.accuracy is not None
        assert row.accuracy.ndcg20_kept_percent is not None
        assert kept is not None
        assert row.accuracy.ndcg20_percent.value == found.metrics["NDCG@20"].value
        assert row.accuracy.hr20_percent.low == found.metrics["HR@20"].low
        assert row.accuracy.ndcg20_kept_percent.value == kept.value
        assert row.accuracy.top20_overlap_fraction == float(top_overlap(found.top_items, exact.top_items).mean())
    assert records[0].accuracy is not None
    assert records[0].accuracy.top20_overlap_fraction == 1.0


def test_ratios_are_to_reference_and_to_the_baseline(records: list[CompressRecord]) -> None:
    for row in records:
        if row.precision == "broken":
            assert (row.accuracy, row.timings, row.file_bytes) == (None, [], None)
            assert row.error == "CompressionError: the model is quantised already; start from the original run"
            continue
        assert row.error is None
        assert [timing.batch_size_users for timing in row.timings] == [1, 8]
        for timing in row.timings:
            # The counting clock says that every call takes a millisecond.
            assert timing.times_reference is not None
            assert timing.times_reference.value == 1.0
            assert timing.throughput_users_per_second == 1000.0 * timing.batch_size_users
            assert (timing.latency_to_sasrec is None) == (row.engine == "reference")
    assert records[4].skipped == ["encoder.0: its SQNR would be 3.1 dB"]


def test_sizes_are_those_of_the_files(records: list[CompressRecord], tiny_run: Path, compressed: Path) -> None:
    teacher, other = (path / "model.safetensors" for path in (tiny_run, compressed))
    assert records[0].file_bytes == records[0].teacher_file_bytes == teacher.stat().st_size
    assert records[6].file_bytes == other.stat().st_size == file_bytes(load_run(compressed).model)
    assert network_name(load_run(tiny_run / "baseline")) == "2+0 x 16"


def test_records_are_read_back(records: list[CompressRecord], tmp_path: Path) -> None:
    path = tmp_path / "compress.jsonl"
    path.write_text("".join(map(json_line, records)))
    assert read_any(path) == records
    path.write_text(json.dumps(json.loads(json_line(records[0])) | {"schema_version": 2}) + "\n")
    with pytest.raises(DataError, match=r"line 1: schema version 2, this adrec reads 1"):
        read_any(path)


def test_tables_show_what_the_records_hold(records: list[CompressRecord]) -> None:
    text = markdown_table(records)
    head, rule, *rows = text.split("\n\n")[0].splitlines()
    titles = [title.strip() for title in head.strip("|").split("|")]
    assert len(rows) == len(records)
    assert {line.count("|") for line in (head, rule, *rows)} == {len(titles) + 1}
    accuracy = records[3].accuracy
    assert accuracy is not None
    value = accuracy.ndcg20_percent
    assert f"{value.value:.2f} \\[{value.low:.2f}, {value.high:.2f}\\]" in rows[3]
    assert "interleaved in one process" in text
    read = list(csv.DictReader(io.StringIO(csv_table(records))))
    assert len(read) == len(records)
    assert float(read[3]["ndcg20_percent"]) == value.value
    assert float(read[3]["batch_8_times_reference_low"]) == 1.0
    assert read[5]["error"].startswith("CompressionError")


def test_a_receipt_shows_changes_skips_sizes_and_losses() -> None:
    changes = tuple(
        Change(what=f"layer {i}", before="fp32", after="int8", detail={"sqnr_db": 40.0 + i / 4}) for i in range(20)
    )
    changes += (Change(what="table", before="fp32", after="int4", detail={"sqnr_db": 20.5, "why": "asked"}),)
    skips = tuple(Skip(what=f"head [{i}]", why="31 dB") for i in range(20))
    receipt = Receipt(
        settings={"technique": "quantize"}, changed=changes, skipped=skips,
        bytes_before=2**21, bytes_after=2**20, parameters_before=9, parameters_after=9, notes=("slower here",),
    )  # fmt: skip
    text = " ".join(rendered(receipt_table([receipt], "[title]")).split())
    assert "20 parts, layer 0 to layer 19: fp32 -> int8 (sqnr_db 40 to 44.75)" in text
    for part in (
        "[title]",
        "1 quantize",
        "table: fp32 -> int4 (sqnr_db 20.5; why asked)",
        "2.00 -> 1.00",
        "slower here",
    ):
        assert part in text
    assert "head [0]: 31 dB" in text, "brackets are no markup"
    assert "... and 9 more" in text


def test_every_technique_and_setting_is_listed() -> None:
    text = rendered(*technique_table(TOYS, {"small": "stages: []"}))
    for part in ("forget", "keep", "items that keep their row", "Skips everything.", "max_loss", "small"):
        assert part in text
    assert IdleConfig().technique in text
