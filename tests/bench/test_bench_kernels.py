"""`adrec bench kernels`: rows of kernels and engines on a counting clock, errors that stay in their row, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_kernels
import typer
from typer.testing import CliRunner

from adrec.engines import make_engine
from adrec.errors import AdrecError, ConfigError, DataError, NotSupportedError
from bench.cli import register
from bench.kernels import engine_paths, engine_sweep
from bench.kernels.catalogues import RandomCatalogue, random_histories, random_model
from bench.kernels.engine_sweep import Axes, EngineSweep, check_memory, request_cost
from bench.kernels.measure import (
    COMPILED,
    COPY,
    INPUT_BYTES,
    INPUTS,
    KERNEL,
    TWIN,
    KernelBench,
    Timer,
    compare_results,
)
from bench.kernels.records import EngineRecord, KernelRecord, append_record, read_kernel_records
from bench.kernels.selection import choose_cases
from bench.timing import Clock, TimingProtocol
from kernels import _runtime
from kernels.inventory import Case, Cost

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(not _runtime.AVAILABLE, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that torch can use")


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of kernels is that of the toys."""
    monkeypatch.setattr("bench.kernels.selection.entries", lambda: toy_kernels.ENTRIES)


@pytest.fixture
def timer(tiny_protocol: TimingProtocol, counting_clock: Clock) -> Timer:
    return Timer(CPU, tiny_protocol, counting_clock, "adrec bench")


def silent(stage: str, done: float, expected: float) -> None:
    """No progress."""


def rows_of(
    timer: Timer, cases: list[Case], compile_twin: Callable[..., Any] = lambda twin: twin
) -> list[KernelRecord]:
    return list(KernelBench(timer, compile_twin).rows(cases, silent))


@needs_triton
def test_each_path_of_a_kernel_is_a_row(timer: Timer) -> None:
    rows = rows_of(timer, choose_cases("scale", dtype="fp32"))
    assert [(row.shape_name, row.path) for row in rows] == [
        (shape, path) for shape in ("paper", "odd, small") for path in (KERNEL, TWIN, COMPILED, COPY)
    ]
    for row in rows:
        assert row.error is None
        assert row.timing is not None
        # The clock counts a millisecond a call.
        assert (row.timing.latency_us_p50, row.timing.rounds) == (1000.0, timer.protocol.rounds)
        assert row.timing.time_ratio_to_baseline is not None
        assert row.timing.time_ratio_to_baseline.value == 1.0
        count = math.prod(row.shape.values())
        assert (row.roof.least_bytes, row.roof.least_flops) == (8 * count, count)
        assert row.roof.gigabytes_per_second == pytest.approx(8 * count / 1e-3 / 1e9)
        # No data sheet knows this machine.
        assert (row.roof.gpu, row.roof.floor_us, row.roof.floor_fraction) == (None, None, None)
        assert (row.rms_ratio is None) == (row.path == COPY)
        assert (row.rms_ratio or 0.0) < 1e-6


@needs_triton
def test_a_kernel_takes_several_inputs_in_turn_unless_they_are_large(timer: Timer) -> None:
    (case,) = choose_cases("scale", shape="odd, small", dtype="fp32")
    bench = KernelBench(timer, lambda twin: twin)
    calls = bench._calls(case, Cost(bytes=8, flops=1))
    places = {call.keywords["x"].data_ptr() for call in calls[TWIN]}  # type: ignore[attr-defined]
    assert len(places) == len(calls[KERNEL]) == len(calls[COMPILED]) == INPUTS
    assert len(bench._calls(case, Cost(bytes=INPUT_BYTES // 2, flops=1))[KERNEL]) == 2


def test_a_failing_path_keeps_its_error_and_the_others_go_on(timer: Timer) -> None:
    def broken(twin: object) -> Callable[..., object]:
        def run(**inputs: object) -> object:
            raise RuntimeError("this twin cannot be compiled")

        return run

    rows = rows_of(timer, choose_cases("scale", shape="odd, small", dtype="fp32"), broken)
    errors = {row.path: row.error for row in rows}
    assert errors[COMPILED] == "RuntimeError: this twin cannot be compiled"
    assert [path for path, error in errors.items() if error is None] == [KERNEL, TWIN, COPY]


def test_a_kernel_that_fails_or_differs_is_an_error_of_its_row(timer: Timer) -> None:
    def wrong(x: torch.Tensor) -> torch.Tensor:
        return x + 1.0

    failing = toy_kernels.make_entry("failing", toy_kernels.refused, dtypes=(torch.float32,), twin=wrong)
    other = toy_kernels.make_entry("other", lambda x: x[:1], dtypes=(torch.float32,), twin=wrong)
    off = toy_kernels.make_entry("off", lambda x: x + 2.0, dtypes=(torch.float32,), twin=wrong)
    unmade = toy_kernels.make_entry("unmade", wrong, lambda *where: {}[0], dtypes=(torch.float32,))
    cases = [Case(entry, "paper", entry.shapes["paper"], torch.float32) for entry in (failing, other, off, unmade)]
    rows = {(row.kernel, row.path): row for row in rows_of(timer, cases)}
    assert rows["failing", KERNEL].error == "ValueError: this shape is not for me"
    assert rows["failing", TWIN].timing is not None
    assert rows["failing", TWIN].timing.time_ratio_to_baseline is None
    assert "results are [(1, 128)], the twin's [(128, 128)]" in str(rows["other", KERNEL].error)
    assert rows["off", KERNEL].rms_ratio == pytest.approx(0.5)
    assert str(rows["unmade", KERNEL].error).startswith("inputs: KeyError")
    assert [path for kernel, path in rows if kernel == "unmade"] == [KERNEL]


def test_results_are_compared_by_kind() -> None:
    ids, values = torch.tensor([1, 2, 3, 4]), torch.tensor([3.0, 4.0, -math.inf])
    other = torch.tensor([3.0, 4.5, -math.inf])
    assert compare_results((ids, None, [other]), (ids.flip(0), None, [values])) == (pytest.approx(0.1), 1.0)
    assert compare_results(values[:0], values[:0]) == (None, None)
    assert compare_results(torch.ones(2), torch.zeros(2)) == (pytest.approx(math.sqrt(2)), None)
    with pytest.raises(ValueError, match="not finite in other places"):
        compare_results(torch.tensor([1.0, math.nan]), torch.ones(2))
    with pytest.raises(ValueError, match="a result is a str"):
        compare_results("x", "x")


@needs_triton
def test_records_are_read_back_and_bad_lines_are_named(timer: Timer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = rows_of(timer, choose_cases("scale", shape="odd, small", dtype="fp32"))
    for row in rows:
        append_record(path, row)
    assert read_kernel_records([path]) == rows
    for line, message in (
        ('{"schema_version":1', "line 5: not valid JSON"),
        ('{"schema_version":7}', "line 5: schema version 7, this adrec reads 1; it was written by a newer adrec"),
        ('{"schema_version":1,"kind":"tradeoff"}', "line 5: a record of kind 'tradeoff'; allowed here: kernel, engine"),
        ('{"schema_version":1,"kind":"kernel"}', "line 5: field 'kernel.measured_at_utc'"),
    ):
        damaged = tmp_path / "damaged.jsonl"
        damaged.write_text(path.read_text() + line + "\n")
        with pytest.raises(DataError, match=message):
            read_kernel_records([path, damaged])
    with pytest.raises(DataError, match="no such file of records"):
        read_kernel_records([tmp_path / "none"])


def test_engines_are_measured_against_the_first(timer: Timer) -> None:
    axes = Axes(
        ("cached", "reference", "cached-graph"), batch_sizes=(1, 3), steps=(1, 2), catalogues=(RandomCatalogue(30, 16),)
    )
    rows = list(EngineSweep(timer, axes).rows(silent))
    cells = [(row.batch_size_users, row.steps, row.path) for row in rows]
    assert cells == [(batch, steps, path) for batch in (1, 3) for steps in (1, 2) for path in axes.paths]
    for row in rows:
        if row.path == "cached-graph":
            assert row.error == "ConfigError: path cached-graph needs a CUDA device; the model is on cpu"
            continue
        assert row.error is None
        assert row.timing is not None
        assert row.timing.time_ratio_to_baseline is not None
        assert (row.baseline, row.overlap_with, row.noise) == ("cached", "reference", "drawn")
        assert row.top20_overlap_fraction == 1.0
        assert row.history_tokens == random_histories(row.batch_size_users, 30).values.numel()


def test_the_compiled_engine_recommends_what_the_engine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine_paths.COMPILE_OPTIONS, "cpu", {"backend": "aot_eager", "dynamic": False})
    torch.compiler.reset()
    model = random_model(40, 16, 4, CPU)
    request = engine_paths.Request(random_histories(3, 40), steps=3, k=7)
    engine = engine_paths.path_engine("cached-compiled", model)
    assert engine.model.table is model.table
    (call,), noise = engine_paths.path_calls("cached-compiled", engine, [request])
    expected = make_engine("cached", model).recommend(request.histories, 7, steps=3).items
    assert noise == "given"
    for _ in range(2):
        assert torch.equal(call(), expected)


def test_a_state_is_copied_whole() -> None:
    engine = make_engine("cached", random_model(40, 16, 4, CPU))
    first, other = (engine.encode(random_histories(users, 40)) for users in (3, 3))
    kept = list(engine_paths.state_tensors(first))
    # The order, the last tokens, and keys, values and biases of each block and group.
    groups = len(first.caches[0].caches[0])
    assert len(kept) == 2 + len(first.caches[0].blocks) * 3 * groups
    assert all(torch.equal(one, two) for one, two in zip(kept, engine_paths.state_tensors(other), strict=True))


def test_a_catalogue_that_does_not_fit_is_an_error_of_its_rows(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_sweep, "free_bytes", lambda device: 4 * 2**30)
    with pytest.raises(MemoryError, match=r"10000000 items of 128 need about 8.7 GiB on cpu, and 4.0 GiB are free"):
        check_memory(10_000_000, 128, ("triton", "triton-bf16-graph", "cached-compiled"), CPU)
    check_memory(1_000_000, 128, ("triton", "triton-bf16"), CPU)
    axes = Axes(
        ("cached",), batch_sizes=(1,), steps=(1,), catalogues=(RandomCatalogue(10_000_000), RandomCatalogue(30))
    )
    large, small = EngineSweep(timer, axes).rows(silent)
    assert str(large.error).startswith("MemoryError: 10000000 items")
    assert small.error is None


def test_the_least_work_of_a_request_is_that_of_the_design() -> None:
    # One user of 8.5 tokens and 32 steps: about 40 MFLOP, one step about 16 (with a quarter for the prefix).
    steps32, steps1 = (request_cost(85, 10, steps, 0, 128, torch.bfloat16).flops / 10 for steps in (32, 1))
    assert 34e6 < steps32 < 42e6
    assert 9e6 < steps1 < 17e6
    scoring = request_cost(85, 10, 1, 12_000, 128, torch.bfloat16).flops / 10 - steps1
    assert scoring == pytest.approx(2 * 12_000 * 128)


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["bench", "kernels", *arguments])


def error_of(*arguments: str) -> AdrecError:
    found = invoke(*arguments).exception
    assert isinstance(found, AdrecError)
    return found


def test_the_list_needs_no_gpu() -> None:
    done = invoke("--list", "--kernel", "scale")
    assert done.exit_code == 0
    assert "never: it is a toy" in done.output


def test_without_a_gpu_kernels_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "rows.jsonl"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wrong = error_of(*out)
    assert isinstance(wrong, NotSupportedError)
    assert "torch finds none here" in str(wrong)
    assert "the kernels' twins: --device cpu" in str(wrong)
    assert "--engines --device cpu" in str(error_of("--engines", *out))
    assert not list(tmp_path.iterdir())


def test_interpreted_kernels_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(_runtime, "AVAILABLE", True)
    monkeypatch.setattr(_runtime, "INTERPRETED", True)
    assert "TRITON_INTERPRET=1 is set" in str(error_of("--out", str(tmp_path / "rows.jsonl")))
    monkeypatch.setattr(_runtime, "AVAILABLE", False)
    assert "Triton is not installed" in str(error_of("--out", str(tmp_path / "rows.jsonl")))


SMOKE = ("--engines", "--device", "cpu", "--steps", "1", "--items", "30", "--width", "16", "--seconds-per-path", "1e-6")


def test_engines_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "new" / "rows.jsonl"
    done = invoke(*SMOKE, "--paths", "reference,cached", "--batch-sizes", "1,2", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "on a CPU this is a smoke run" in done.output
    assert "100.00% same items" in done.output
    rows = read_kernel_records([out])
    assert all(isinstance(row, EngineRecord) for row in rows)
    assert [row.path for row in rows] == ["reference", "cached"] * 2
    failed = invoke(*SMOKE, "--paths", "cached,cached-graph", "--batch-sizes", "1", "--append", "--out", str(out))
    assert failed.exit_code == 1
    assert "failed: 30 items, batch 1, 1 steps, cached-graph: ConfigError: path cached-graph needs" in failed.output
    assert len(read_kernel_records([out])) == 6
    assert [path.name for path in out.parent.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--paths", "cahced"), r"--paths cahced is not known \(did you mean 'cached'\?\); there are: triton,"),
        (("--paths", "cached", "--steps", "0"), "--steps holds 0"),
        (("--paths", "cached", "--items", "x"), "--items is 'x'"),
        (("--paths", "cached", "--seconds-per-path", "nan"), "--seconds-per-path nan"),
    ],
)
def test_bad_options_are_refused(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        raise error_of(*SMOKE, *arguments, "--out", str(tmp_path / "rows.jsonl"))


@pytest.mark.gpu
@needs_gpu
def test_kernels_are_timed_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ("--kernel", "scale", "--shape", "paper", "--cuda-graph", "--seconds-per-path", "0.05")
    done = invoke(*arguments, "--out", str(out))
    assert done.exit_code == 0, done.output
    rows = read_kernel_records([out])
    assert len(rows) == 2 * 5
    for row in rows:
        assert isinstance(row, KernelRecord)
        assert row.timing is not None
        assert row.timing.time_ratio_to_baseline is not None
        assert (row.rms_ratio or 0.0) < 1e-3


@pytest.mark.gpu
@needs_gpu
@pytest.mark.timeout(1800)
def test_every_path_of_the_engines_runs_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ("--engines", "--batch-sizes", "4", "--steps", "3", "--items", "500", "--seconds-per-path", "0.05")
    done = invoke(*arguments, "--out", str(out))
    assert done.exit_code == 0, done.output
    rows = read_kernel_records([out])
    assert [row.path for row in rows] == list(engine_paths.PATHS)
    for row in rows:
        assert isinstance(row, EngineRecord)
        # Sixteen-bit weights may swap items of nearly equal score.
        assert (row.top20_overlap_fraction or 0.0) > (0.8 if "16" in row.precision else 0.98)


def test_a_failed_run_keeps_the_records_of_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "engines.jsonl"
    assert invoke(*SMOKE, "--paths", "cached", "--batch-sizes", "1", "--out", str(out)).exit_code == 0
    before = out.read_bytes()
    monkeypatch.setattr(_runtime, "INTERPRETED", False)
    done = invoke(*SMOKE, "--paths", "triton", "--batch-sizes", "1", "--out", str(out))
    assert done.exit_code == 1
    assert out.read_bytes() == before
    assert len(read_kernel_records([out.with_name("engines.jsonl.partial")])) == 1


def test_no_other_file_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "notes.txt"
    out.write_text("mine\n", encoding="utf-8")
    done = invoke(*SMOKE, "--paths", "cached", "--batch-sizes", "1", "--out", str(out))
    assert isinstance(done.exception, DataError)
    assert out.read_text(encoding="utf-8") == "mine\n"


def test_a_width_that_the_heads_do_not_divide_is_refused(tmp_path: Path) -> None:
    done = invoke(*SMOKE, "--width", "33", "--out", str(tmp_path / "rows.jsonl"))
    assert isinstance(done.exception, ConfigError)
    assert "--width 33: allowed are multiples of 4" in str(done.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engines", "--shape", "paper"], "--shape: read only where kernels are measured, not with --engines"),
        (["--engines", "--kernel", "score_topk", "--cuda-graph"], "--kernel, --cuda-graph: read only where kernels"),
        (["--steps", "1"], "--steps: read only where --engines is given"),
        (["--batch-sizes", "1", "--width", "64"], "--batch-sizes, --width: read only where --engines is given"),
    ],
)
def test_an_option_of_the_other_mode_is_refused(options: list[str], message: str, tmp_path: Path) -> None:
    done = invoke(*options, "--out", str(tmp_path / "rows.jsonl"))
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)


def test_what_an_interrupted_run_measured_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    left = tmp_path / "rows.jsonl.partial"
    left.write_text("measured\n", encoding="utf-8")
    done = invoke(*SMOKE, "--paths", "cached", "--batch-sizes", "1", "--out", str(out))
    assert isinstance(done.exception, ConfigError)
    assert f"{left} holds what an interrupted or failed run measured; rename it" in str(done.exception)
    assert left.read_text(encoding="utf-8") == "measured\n"
    assert not out.exists()
