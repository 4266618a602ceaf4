"""Suites: selection by pattern, resumption without double counting, errors as cells, and the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

from adrec.engines import ENGINES
from adrec.errors import ConfigError, DataError, NotSupportedError
from bench.archive import read_any
from bench.cli import register
from bench.progress import SweepProgress
from bench.running import registry
from bench.running.journal import NAME, Journal, Settings
from bench.running.registry import SUITES, Suite
from bench.running.runner import run_units, select
from bench.running.unit import Context, Report, Unit
from bench.serving.records import ServingRecord

SETTINGS = Settings(
    smoke=True, run_fingerprint="r", dataset_fingerprint="d", users=None, seconds=0.1, engines=["cached"], device="cpu",
    threads=1, processor="p", adrec="0",
)  # fmt: skip
NAMES = ("first", "second", "third")


class Cell(BaseModel):
    """A record of the toy suites."""

    name: str
    error: str | None = None


class Toys:
    """Toy suites that count what is measured; ``stop_at`` is interrupted, ``broken`` raises."""

    def __init__(self) -> None:
        self.measured: list[str] = []
        self.stop_at = self.broken = self.failing = ""

    def suites(self) -> list[Suite]:
        return [
            Suite("first", "", lambda context: [self.unit(f"first/{n}") for n in ("a", "b", "c")]),
            Suite("second", "", lambda context: [self.unit(f"second/{n}") for n in ("a", "b")]),
            Suite("third", "", lambda context: [self.unit("third/a")], lambda context: "needs a moon"),
        ]

    def unit(self, name: str) -> Unit:
        def measure(report: Report) -> Iterable[BaseModel]:
            self.measured.append(name)
            report(0.5, 1.0)
            yield Cell(name=f"{name} 1")
            if name == self.stop_at:
                raise KeyboardInterrupt
            if name == self.broken:
                raise RuntimeError("no such luck")
            yield Cell(name=f"{name} 2", error="bad" if name == self.failing else None)

        return Unit(name, 1.0, measure)

    def run(self, folder: Path, *patterns: str, resume: bool = False, settings: Settings = SETTINGS) -> Any:
        units, left_out = select(patterns, context_of(folder), self.suites())
        journal = Journal(folder, settings, NAMES, resume=resume)
        with SweepProgress(quiet=True) as progress:
            return run_units(units, journal, progress, lambda message: None, left_out)


def context_of(folder: Path, **options: Any) -> Context:
    return Context(folder, torch.device("cpu"), "adrec bench run", smoke=True, **options)


def rows(folder: Path, suite: str) -> list[str]:
    path = folder / f"{suite}.jsonl"
    return [json.loads(line)["name"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["first"], ["first/a", "first/b", "first/c"]),
        (["*"], ["first/a", "first/b", "first/c", "second/a", "second/b"]),
        (["*/a"], ["first/a", "second/a"]),
        (["second/b", "first/[ab]"], ["first/a", "first/b", "second/b"]),
        (["first", "first/a"], ["first/a", "first/b", "first/c"]),
        (["f*"], ["first/a", "first/b", "first/c"]),
        (["[fs]*/b"], ["first/b", "second/b"]),
    ],
)
def test_patterns_select_units_in_the_order_of_the_registry(patterns: list[str], names: list[str]) -> None:
    units, left_out = select(patterns, context_of(Path()), Toys().suites())
    assert [unit.name for unit in units] == names
    assert left_out == ({"third": "needs a moon"} if any(each.startswith("*") for each in patterns) else {})


def test_patterns_that_select_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'secnd' matches no suite and no unit \(did you mean 'second'"):
        select(["secnd"], context_of(Path()), Toys().suites())
    with pytest.raises(ConfigError, match="'first/z' matches no suite"):
        select(["first", "first/z"], context_of(Path()), Toys().suites())
    with pytest.raises(NotSupportedError, match="third: needs a moon"):
        select(["third"], context_of(Path()), Toys().suites())


def test_an_interrupted_run_goes_on_without_counting_twice(tmp_path: Path) -> None:
    toys = Toys()
    toys.stop_at = "first/b"
    with pytest.raises(KeyboardInterrupt):
        toys.run(tmp_path, "first", "second")
    assert rows(tmp_path, "first") == ["first/a 1", "first/a 2"]
    toys.stop_at = ""
    outcome = toys.run(tmp_path, "first", "second", resume=True)
    assert [each.unit for each in outcome.done_before] == ["first/a"]
    assert toys.measured == ["first/a", "first/b", "first/b", "first/c", "second/a", "second/b"]
    assert rows(tmp_path, "first") == [f"first/{name} {n}" for name in "abc" for n in (1, 2)]
    assert rows(tmp_path, "second") == [f"second/{name} {n}" for name in "ab" for n in (1, 2)]
    again = toys.run(tmp_path, "first", resume=True)
    assert again.measured == []
    assert len(again.done_before) == 3
    assert len(rows(tmp_path, "first")) == 6


@pytest.mark.parametrize("cut", [1, 30, 4000])
def test_what_a_crash_left_behind_is_cut_off(tmp_path: Path, cut: int) -> None:
    """A crash between the records and their line in the journal, or amid that line."""
    Toys().run(tmp_path, "first/a", "first/b")
    journal = tmp_path / NAME
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]) + lines[-1][:-cut])
    with (tmp_path / "first.jsonl").open("a") as stream:
        stream.write('{"name":"half of a rec')
    toys = Toys()
    toys.run(tmp_path, "first", "second/a", resume=True)
    assert toys.measured == ["first/b", "first/c", "second/a"]
    assert rows(tmp_path, "first") == [f"first/{name} {n}" for name in "abc" for n in (1, 2)]
    assert len(journal.read_text().splitlines()) == 1 + 4


def test_records_of_a_first_unit_without_its_line_are_cut_off(tmp_path: Path) -> None:
    Toys().run(tmp_path, "second/a")
    (tmp_path / "first.jsonl").write_text('{"name":"orphan"}\n')
    (tmp_path / "notes.jsonl").write_text("mine\n")
    Toys().run(tmp_path, "first/a", resume=True)
    assert rows(tmp_path, "first") == ["first/a 1", "first/a 2"]
    assert (tmp_path / "notes.jsonl").read_text() == "mine\n"


def test_an_error_is_a_cell_and_the_run_goes_on(tmp_path: Path) -> None:
    toys = Toys()
    toys.broken, toys.failing = "first/a", "second/a"
    outcome = toys.run(tmp_path, "*")
    assert [(each.unit, each.failed, each.error) for each in outcome.failed] == [
        ("first/a", 1, "RuntimeError: no such luck"),
        ("second/a", 1, None),
    ]
    assert toys.measured == ["first/a", "first/b", "first/c", "second/a", "second/b"]
    assert rows(tmp_path, "first") == ["first/b 1", "first/b 2", "first/c 1", "first/c 2"]
    again = Toys()
    mended = again.run(tmp_path, "*", resume=True)
    assert (mended.failed, again.measured) == ([], ["first/a", "second/a"])
    assert sorted(rows(tmp_path, "first")) == [f"first/{name} {n}" for name in "abc" for n in (1, 2)]
    assert sorted(rows(tmp_path, "second")) == [f"second/{name} {n}" for name in "ab" for n in (1, 2)]
    assert len(Toys().run(tmp_path, "*", resume=True).done_before) == 5


def test_failed_records_are_dropped_whole_even_after_a_crash_amid_that(tmp_path: Path) -> None:
    toys = Toys()
    toys.failing = "first/b"
    toys.run(tmp_path, "first")
    before = (tmp_path / NAME).read_text()
    Toys().run(tmp_path, "first/a", resume=True)
    assert rows(tmp_path, "first") == [f"first/{name} {n}" for name in "ac" for n in (1, 2)]
    # As if the file of records had been written, and the journal not yet.
    (tmp_path / NAME).write_text(before)
    again = Toys()
    again.run(tmp_path, "first", resume=True)
    assert again.measured == ["first/b"]
    assert rows(tmp_path, "first") == [f"first/{name} {n}" for name in "acb" for n in (1, 2)]
    with (tmp_path / "first.jsonl").open("r+b") as stream:
        stream.truncate(10)
    with pytest.raises(DataError, match="is gone or shorter"):
        Toys().run(tmp_path, "first", resume=True)


class Summary(BaseModel):
    """Of a scenario."""

    valid: bool


class Scenario(BaseModel):
    """A record whose figures may not count."""

    name: str
    summary: Summary | None
    error: str | None = None


def test_figures_that_do_not_count_are_failures(tmp_path: Path) -> None:
    found = [Scenario(name=str(valid), summary=Summary(valid=valid)) for valid in (True, False)]
    unit = Unit("first/a", 1.0, lambda report: [*found, Scenario(name="none", summary=None)])
    journal = Journal(tmp_path, SETTINGS, NAMES, resume=False)
    with SweepProgress(quiet=True) as progress:
        outcome = run_units([unit], journal, progress, lambda message: None)
    assert [each.failed for each in outcome.failed] == [1]
    assert len(rows(tmp_path, "first")) == 3


def test_journals_are_not_mixed_up(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(ConfigError, match="holds no journal"):
        Toys().run(folder, "first", resume=True)
    Toys().run(folder, "first")
    with pytest.raises(ConfigError, match="already holds results; pass --resume"):
        Toys().run(folder, "first")
    other = SETTINGS.model_copy(update={"threads": 7})
    with pytest.raises(ConfigError, match=r"measured with other settings \(threads: 1 -> 7\)"):
        Toys().run(folder, "first", resume=True, settings=other)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "first.jsonl").write_text("mine\n")
    with pytest.raises(ConfigError, match=r"first\.jsonl: is not of a run of this kind"):
        Toys().run(taken, "first")


def _empty(folder: Path) -> None:
    (folder / NAME).write_text("")


def _garbage(folder: Path) -> None:
    (folder / NAME).write_bytes(b"\xff\xfe\n")


def _other(folder: Path) -> None:
    (folder / NAME).write_text('{"kind":"tradeoff"}\n')


def _gone(folder: Path) -> None:
    (folder / "first.jsonl").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_empty, "not a journal"),
        (_garbage, "not a journal"),
        (_other, "not a journal"),
        (_gone, "is gone or shorter"),
    ],
)
def test_damaged_results_are_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    Toys().run(tmp_path, "first")
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        Toys().run(tmp_path, "first", resume=True)


def test_the_registry_lists_what_there_is() -> None:
    names = [suite.name for suite in SUITES]
    assert len(names) == len(set(names))
    assert {"kernels", "engines", "tradeoff", "serving"} <= set(names)
    for suite in SUITES:
        for smoke in (True, False):
            context = Context(Path(), torch.device("cpu"), "", smoke=smoke)
            if suite.obstacle(context) is None:
                units = suite.units(context)
                assert units
                assert {unit.suite for unit in units} == {suite.name}
                assert len({unit.name for unit in units}) == len(units)
                assert all(unit.seconds > 0 for unit in units)


def test_the_suite_of_engines_takes_every_engine_that_runs_here_unless_some_are_named() -> None:
    cpu = torch.device("cpu")
    here = registry.engines_here(cpu)
    assert {"reference", "cached"} <= set(here) <= set(ENGINES)
    assert not [name for name in here if name.startswith(("triton", "tensorrt", "aotinductor"))]
    assert ("onnxruntime-int8" in here) == ENGINES["onnxruntime-int8"].runs_on(cpu)
    seconds = {
        named: sum(unit.seconds for unit in registry._engines(Context(Path(), cpu, "", engines_named=named)))
        for named in (True, False)
    }
    paths = registry.engine_paths_of(Context(Path(), cpu, ""))
    assert set(here) < set(paths)
    assert seconds[False] / seconds[True] == pytest.approx(len(paths) / 2)


def test_catalogues_beyond_the_memory_are_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context(Path(), torch.device("cpu"), "")
    monkeypatch.setattr("bench.kernels.engine_sweep.free_bytes", lambda device: 2 * 2**30)
    assert registry._that_fit([10_000, 300_000, 3_000_000, 10_000_000], 128, context) == [10_000, 300_000]
    (notice,) = context.notices
    assert notice.startswith("suite scaling leaves out catalogues of 3000000 items and more: 3000000 items of 128 need")
    monkeypatch.setattr("bench.kernels.engine_sweep.free_bytes", lambda device: 2**40)
    assert registry._that_fit([10_000, 10_000_000], 128, context) == [10_000, 10_000_000]


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["bench", *arguments])


def test_command_line(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = invoke("list", "--units", "--smoke")
    assert listed.exit_code == 0
    assert "engines/2000 items/batch 1/1 steps" in listed.output
    out = tmp_path / "out"
    options = ["--smoke", "--seconds-per-cell", "0.000001", "--quiet", "--out", str(out), "--users", "9"]
    options += ["--run", str(tiny_run), "--engines", "cached"]
    done = invoke("run", "engines/*/batch 1/1 steps", "tradeoff/popularity", *options)
    assert done.exit_code == 0, done.output
    assert len(read_any(out / "engines.jsonl")) == 1
    assert re.search(r"^2 units measured in \d+ s$", done.output, re.MULTILINE)
    more = invoke("run", "tradeoff", *options, "--resume")
    assert more.exit_code == 0, more.output
    assert "1 units were done before" in more.output
    # Popularity once; cached at 1 and 4 steps, and the baseline, at two batch sizes.
    kept = read_any(out / "tradeoff.jsonl")
    assert len(kept) == 1 + 2 * 3
    with pytest.raises(ConfigError, match="already holds results"):
        raise invoke("run", "tradeoff", *options).exception

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(ConfigError, match="--engines: a name is empty; there are: "):
        raise invoke("run", "tradeoff", "--engines", "", "--out", str(tmp_path / "none")).exception
    monkeypatch.setattr("bench.running.runner.run_units", stop)
    stopped = invoke("run", "engines", *options, "--resume")
    assert stopped.exit_code == 130
    assert "interrupted: 1 of 4 units kept" in stopped.output


def test_a_failing_cell_sets_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toys = Toys()
    toys.failing = "first/b"
    monkeypatch.setattr(registry, "SUITES", tuple(toys.suites()))
    monkeypatch.setattr("bench.running.runner.select.__defaults__", (tuple(toys.suites()),))
    failed = invoke("run", "first", "third", "--smoke", "--quiet", "--out", str(tmp_path))
    assert failed.exit_code == 1
    assert "left out: third: needs a moon" in failed.output
    assert "failed: first/b: 1 of 2 cells" in failed.output
    assert "1 of 3 units hold an error, or figures that do not count" in failed.output


def test_without_a_run_an_untrained_model_is_measured(tmp_path: Path) -> None:
    context = context_of(tmp_path, engines=("cached",), users=9)
    (unit,) = [unit for unit in registry._tradeoff(context) if unit.name == "tradeoff/popularity"]
    (record,) = unit.measure(lambda done, expected: None)
    assert record.model_dump()["error"] is None
    assert "accuracies mean nothing" in context.notices[0]
    first = (tmp_path / "untrained-run" / "run" / "run.json").read_text()
    assert context_of(tmp_path, users=9).subject.run.fingerprint in first


def test_a_smoke_run_of_everything(tmp_path: Path) -> None:
    done = invoke("run", "*", "--smoke", "--quiet", "--out", str(tmp_path / "out"))
    records = [each for path in (tmp_path / "out").glob("*.jsonl") if path.name != NAME for each in read_any(path)]
    assert [each for each in records if getattr(each, "error", None)] == [], done.output
    # Whether a scenario's figures count depends on the machine; that the exit status says so does not.
    invalid = [each for each in records if isinstance(each, ServingRecord) and each.summary and not each.summary.valid]
    assert done.exit_code == int(bool(invalid)), done.output
    for suite in SUITES:
        path = tmp_path / "out" / f"{suite.name}.jsonl"
        if suite.obstacle(context_of(tmp_path)) is None:
            assert len(read_any(path)) >= 2
