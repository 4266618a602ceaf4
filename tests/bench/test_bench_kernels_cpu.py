"""Kernels on a CPU: their twins are measured, and nothing that is written takes them for kernels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_kernels
import typer
from typer.testing import CliRunner

from adrec.errors import ConfigError
from bench.archive import read_any
from bench.cli import register
from bench.comparing.comparison import compare
from bench.comparing.rows import rows_of
from bench.comparing.tables import markdown_of
from bench.kernels.engine_paths import PATHS, default_paths
from bench.kernels.measure import COMPILED, COPY, TWIN, KernelBench, Timer
from bench.kernels.records import CPU_NOTE, KernelRecord
from bench.kernels.selection import choose_cases, choose_twins
from bench.report import write_report
from bench.running import registry
from bench.running.unit import Context
from bench.timing import Clock, TimingProtocol
from kernels import _runtime

CPU = torch.device("cpu")
WITHOUT_NOISE = {"encode_prefix", "score_topk", "score_topk.exclude"}


@pytest.fixture
def timer(tiny_protocol: TimingProtocol, counting_clock: Clock) -> Timer:
    return Timer(CPU, tiny_protocol, counting_clock, "adrec bench")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled twin is the twin, since compiling takes long."""
    monkeypatch.setattr("bench.kernels.measure.compile_for_cpu", lambda twin: twin)


def rows_of_all(timer: Timer, **options: Any) -> list[KernelRecord]:
    return list(KernelBench.on_a_cpu(timer, **options).rows(choose_twins(small=True), lambda *progress: None))


@pytest.mark.usefixtures("uncompiled")
def test_every_twin_is_measured_and_compiled_unless_it_draws_noise(timer: Timer) -> None:
    rows = rows_of_all(timer)
    assert [row.error for row in rows if row.error] == []
    assert {row.kernel for row in rows} == {case.entry.name for case in choose_cases()}
    assert {(row.dtype, row.shape_name, row.note, row.baseline) for row in rows} == {
        ("float32", "small", CPU_NOTE, COPY)
    }
    for kernel in {row.kernel for row in rows}:
        paths = [row.path for row in rows if row.kernel == kernel]
        assert paths == ([TWIN, COMPILED, COPY] if kernel in WITHOUT_NOISE else [TWIN, COPY])
    assert {row.rms_ratio for row in rows if row.path == TWIN} == {0.0}
    assert all(row.timing and row.timing.time_ratio_to_baseline for row in rows)
    assert {row.path for row in rows_of_all(timer, compiled=False)} == {TWIN, COPY}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler for CPUs needs a C++ compiler")
def test_torchs_compiler_takes_the_twins_that_draw_no_noise(timer: Timer) -> None:
    rows = [row for row in rows_of_all(timer) if row.path == COMPILED]
    assert {row.kernel for row in rows} == WITHOUT_NOISE
    for row in rows:
        assert row.error is None
        assert (row.rms_ratio or 0.0) < 1e-5
        assert (row.different_integers or 0.0) < 0.01


def test_dropout_of_nothing_is_no_noise(timer: Timer) -> None:
    bench = KernelBench.on_a_cpu(timer)
    cases = choose_cases("prefix_attention", "inference,paper", "float32")
    calls = {case.shape_name: bench._calls(case, case.entry.cost(case.shape, case.dtype)) for case in cases}
    assert {name: COMPILED in each for name, each in calls.items()} == {"inference": True, "paper": False}


def context_of(device: str, *, smoke: bool) -> Context:
    return Context(Path(), torch.device(device), "adrec bench run", smoke=smoke)


def test_the_suite_runs_twins_on_a_cpu_and_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    (suite,) = [each for each in registry.SUITES if each.name == "kernels"]
    assert suite.obstacle(context_of("cpu", smoke=True)) is None
    names = {smoke: [unit.name for unit in suite.units(context_of("cpu", smoke=smoke))] for smoke in (True, False)}
    kernels = [case.entry.name for case in choose_twins()]
    assert names[True] == [f"kernels/{kernel}/small/float32" for kernel in kernels]
    assert names[False] == [f"kernels/{kernel}/paper/float32" for kernel in kernels]
    monkeypatch.setattr("bench.timing.clock_for", lambda device: None)
    on_a_gpu = suite.units(context_of("cuda", smoke=False))
    assert len(on_a_gpu) == len(choose_cases())
    monkeypatch.setattr(_runtime, "AVAILABLE", False)
    assert suite.obstacle(context_of("cuda", smoke=False)) == "needs Triton, not interpreted"


def add_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1.0


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, uncompiled: None, tmp_path: Path) -> tuple[Any, Path]:
    """What `adrec bench kernels --device cpu` says and writes for the toys."""
    both = (torch.float32, torch.float16)
    toys = [toy_kernels.make_entry("toy", toy_kernels.refused, dtypes=both, twin=add_one, shapes=toy_kernels.SHAPES)]
    monkeypatch.setattr("bench.kernels.selection.entries", lambda: toys)
    out = tmp_path / "rows.jsonl"
    done = invoke("--device", "cpu", "--seconds-per-path", "1e-6", "--out", str(out))
    assert done.exit_code == 0, done.output
    return done, out


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["bench", "kernels", *arguments])


def test_no_reader_takes_a_twin_for_a_kernel(measured: tuple[Any, Path], tmp_path: Path) -> None:
    done, out = measured
    # In the note before, and above the table.
    assert done.output.count(CPU_NOTE) == 2
    rows = read_any(out)
    assert [(row.path, row.note) for row in rows if isinstance(row, KernelRecord)] == [
        (path, CPU_NOTE) for path in (TWIN, COMPILED, COPY)
    ]
    page = write_report(rows, tmp_path / "page.html")
    for text in (page.read_text(), page.with_suffix(".md").read_text()):
        assert f"Kernels ({CPU_NOTE})" in text.replace("\\", "")
        # The heading, and each row.
        assert text.count(CPU_NOTE) >= 1 + len(rows)
    found = compare(rows_of(rows), rows_of(rows), bound=0.05, accuracy_bound=0.01)
    assert f"note {CPU_NOTE}" in markdown_of(found, "old", "new")


def test_options_of_a_gpu_are_refused(measured: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--cuda-graph: there are none with --device cpu"):
        raise invoke("--device", "cpu", "--cuda-graph", "--out", str(tmp_path / "other.jsonl")).exception


@pytest.mark.parametrize(
    ("options", "cells"),
    [((), {("paper", "float32")}), (("--dtype", "float16", "--shape", "odd, small"), {("odd, small", "float16")})],
)
def test_the_paper_in_float32_unless_something_else_is_chosen(
    options: tuple[str, ...], cells: set[tuple[str, str]], measured: Any, tmp_path: Path
) -> None:
    out = tmp_path / "chosen.jsonl"
    assert invoke("--device", "cpu", "--seconds-per-path", "1e-6", *options, "--out", str(out)).exit_code == 0
    assert {(row.shape_name, row.dtype) for row in read_any(out) if isinstance(row, KernelRecord)} == cells


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shape", "users=0"), "--shape users=0: allowed is 1 or more, such as users=512"),
        (("--shape", "users=8,users=9"), "--shape users=8,users=9: users is given twice"),
        (("--shape", "width=130"), "--shape width=130: prefix_attention has 4 heads, which do not divide its width of"),
        (("--kernel", "encode*", "--shape", "heads=3"), "encode_prefix has 3 heads.*allowed are multiples of 3, such"),
        (("--shape", "papr"), "there are: .*; guided, geodesic; .*; paper; "),
    ],
)
def test_shapes_that_cannot_be_are_refused_before_anything_runs(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        raise invoke("--device", "cpu", *options, "--out", str(tmp_path / "rows.jsonl")).exception
    assert not list(tmp_path.iterdir())


def test_what_a_kernel_can_go_without_may_be_zero() -> None:
    (case,) = choose_twins("prefix_attention", "pads=0,dropout_percent=0,width=96,heads=3")
    assert [case.shape[name] for name in ("pads", "dropout_percent", "width", "heads")] == [0, 0, 96, 3]


def test_the_default_paths_run_on_the_device() -> None:
    names = ("reference", "cached", "cached-compiled", "reference-compiled", "sasrec-reference", "sasrec-cached")
    assert default_paths(torch.device("cpu")) == names
    assert default_paths(torch.device("cuda")) == PATHS
