"""`adrec kernels`: choosing cases, the table of compiled kernels, and the comparison that must be able to fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_kernels
import typer
from typer.testing import CliRunner

from adrec.errors import AdrecError, ConfigError, DataError, NotSupportedError
from adrec.versions import installed_versions
from bench.kernels.commands import register
from bench.kernels.compiled_table import CompiledTable, compiled_row, read_table, regressions, write_table
from bench.kernels.selection import choose_cases, choose_entries
from kernels import _runtime
from kernels.compilation import CompiledKernel, Resources
from kernels.targets import TARGETS

TESTS = Path(__file__).resolve().parents[1]
USAGE = Resources(warps=4, stages=2, registers=64, spills=0, shared=2048, tensor_columns=0, seconds=0.5)


def kernel(usage: Resources | None = USAGE, target: str = "sm_90", **changes: Any) -> CompiledKernel:
    made = CompiledKernel(
        "scale", "paper", torch.float32, "scale_kernel", 0, {"BLOCK": 256, "KEYED": True}, TARGETS[target], usage,
        None if usage else "RuntimeError: no",
    )  # fmt: skip
    return replace(made, **changes)


def table_of(triton: str) -> CompiledTable:
    """An empty table as earlier versions wrote it."""
    return CompiledTable(triton=triton, rows=[])


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of kernels is that of the toys."""
    monkeypatch.setattr("bench.kernels.compiled_table.entries", lambda: toy_kernels.ENTRIES)
    monkeypatch.setattr("bench.kernels.selection.entries", lambda: toy_kernels.ENTRIES)


@pytest.fixture
def canned(monkeypatch: pytest.MonkeyPatch) -> list[CompiledKernel]:
    """What compiling gives, whatever is asked for."""
    found = [kernel(), kernel(target="sm_80")]
    monkeypatch.setattr("kernels.compilation.compile_cases", lambda *arguments, **options: list(found))
    return found


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["kernels", *arguments])


def error_of(*arguments: str) -> AdrecError:
    found = invoke(*arguments).exception
    assert isinstance(found, AdrecError)
    return found


def test_cases_are_chosen_by_glob_shape_and_dtype() -> None:
    assert [entry.name for entry in choose_entries("s*")] == ["scale", "scale_fp8", "spill"]
    found = choose_cases("scale", dtype="fp16,float32")
    assert [(case.shape_name, case.dtype) for case in found] == [
        (name, dtype) for name in ("paper", "odd, small") for dtype in (torch.float32, torch.float16)
    ]
    assert [case.entry.name for case in choose_cases("scale*", shape="odd, small")] == ["scale", "scale"]
    custom = choose_cases("scale", shape="rows=7", dtype="fp32")
    assert [(case.shape_name, case.shape) for case in custom] == [("custom", {"rows": 7, "width": 128})]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "scael"}, r"--kernel scael matches no kernel \(did you mean scale"),
        ({"kernel": "nothing*"}, "there are: scale, scale_fp8, spill"),
        ({"dtype": "fp64"}, "--dtype fp64 is not known.*there are: float32"),
        ({"shape": "papre"}, r"--shape papre is not known \(did you mean 'paper'\?\)"),
        ({"shape": "row=3"}, r"size row is not known \(did you mean 'rows'\?\)"),
        ({"shape": "rows=x"}, "--shape rows=x: expected a whole number, such as rows=512"),
        ({"kernel": "spill", "dtype": "float32", "shape": "odd, small"}, "--shape odd is not known; there are: paper"),
        ({"kernel": "s*", "dtype": "int8", "shape": "odd, small"}, "no kernel matches.*together"),
    ],
)
def test_choices_that_match_nothing_name_what_there_is(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_cases(**options)


def test_list_gives_advice() -> None:
    done = invoke("list", "--kernel", "scale*")
    assert done.exit_code == 0
    for text in ("scale_fp8", "scale a matrix", "never: it is a toy", "always", "float16"):
        assert text in done.output
    assert "spill" not in done.output


def test_a_table_is_written_and_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    head = CompiledTable(command="adrec kernels compile", triton="3.7.1", ptxas={"sm_90": "12.8"}, rows=[])
    write_table(path, head, [kernel(), kernel(None), kernel(target="sm_86")])
    table = read_table(path)
    assert table.model_copy(update={"rows": []}) == head
    assert table.rows == [compiled_row(kernel()), compiled_row(kernel(target="sm_86"))]
    # A difference of two versions of the file shows the kernels that changed.
    assert path.read_text().count("\n") == 2 + 2
    assert table.rows[0].constants == {"BLOCK": 256, "KEYED": True}
    assert table.rows[0].constants["KEYED"] is True
    assert (table.rows[0].warps_bound, table.rows[0].limited_by) == (32, "registers")


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}', '{"schema_version": 2, "triton": "3", "rows": []}'])
def test_an_unusable_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(DataError, match="`adrec kernels compile --out FILE` writes one"):
        read_table(path)
    with pytest.raises(DataError, match="no such table"):
        read_table(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ([kernel(replace(USAGE, spills=8))], "spills 8 bytes a thread"),
        ([kernel(replace(USAGE, shared=300_000))], "300000 bytes of shared memory, limit 232448"),
        ([kernel(replace(USAGE, registers=72))], "at most 28 resident warps, record 32: 72 registers (record: 64)"),
        ([kernel(replace(USAGE, shared=60_000))], "at most 12 resident warps, record 32"),
        ([kernel(None)], "in the record, but not compiled"),
        ([], "in the record, but not compiled"),
        ([kernel(), kernel(dtype=torch.float16)], "float16, sm_90: not in the record"),
    ],
)
def test_every_kind_of_regression_is_named(now: Sequence[CompiledKernel], message: str) -> None:
    before = compiled_row(kernel())
    assert before is not None
    found = regressions(now, [before], same_compiler=False)
    assert len(found) == 1
    assert found[0].startswith("scale (scale_kernel), paper, float")
    assert message in found[0]


def test_what_is_no_regression_of_another_compiler() -> None:
    before = compiled_row(kernel())
    assert before is not None
    for usage in (USAGE, replace(USAGE, registers=60), replace(USAGE, shared=9000), replace(USAGE, registers=63)):
        assert regressions([kernel(usage)], [before], same_compiler=False) == []


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (kernel(replace(USAGE, registers=63)), "registers 63 (record: 64);"),
        (kernel(replace(USAGE, shared=2064)), "shared 2064 (record: 2048);"),
        (kernel(replace(USAGE, stages=3)), "stages 3 (record: 2);"),
        (kernel(replace(USAGE, warps=2)), "warps 2 (record: 4);"),
        (kernel(constants={"BLOCK": 128, "KEYED": True}), "'BLOCK': 128, 'KEYED': True} (record: {'BLOCK': 256"),
    ],
)
def test_any_change_counts_where_the_compiler_is_the_same(now: CompiledKernel, message: str) -> None:
    before = compiled_row(kernel())
    assert before is not None
    (found,) = regressions([now], [before], same_compiler=True)
    assert "not as recorded: " in found
    assert message in found
    assert "`adrec kernels compile --update --out FILE` records it" in found
    assert regressions([kernel()], [before], same_compiler=True) == []


@pytest.mark.skipif(not _runtime.AVAILABLE, reason="Triton is not installed")
def test_compile_writes_a_table_and_checks_against_it(
    canned: list[CompiledKernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    monkeypatch.setattr("sys.argv", ["/opt/bin/adrec", "kernels", "compile", "--out", str(path)])
    done = invoke("compile", "--kernel", "scale", "--dtype", "fp32", "--out", str(path))
    assert done.exit_code == 0, done.output
    assert "32 of 64 warps" in done.output
    table = read_table(path)
    assert len(table.rows) == 2
    assert table.command == "adrec kernels compile --out table.json"
    assert table.triton == installed_versions()["triton"]
    assert table.compiled_at_utc is not None
    assert datetime.fromisoformat(table.compiled_at_utc).utcoffset() == timedelta(0)
    assert table.environment is not None
    assert table.environment.versions == installed_versions()
    assert table.ptxas is not None
    assert list(table.ptxas) == list(TARGETS)
    assert all(re.fullmatch(r"\d+\.\d+", version) for version in table.ptxas.values())
    assert invoke("compile", "--check", str(path)).exit_code == 0
    canned[1] = kernel(replace(USAGE, registers=128), "sm_80")
    worse = invoke("compile", "--check", str(path), "--quiet")
    assert worse.exit_code == 1
    assert "worse: scale (scale_kernel), paper, float32, sm_80: at most 16 resident warps" in worse.output
    content = json.loads(path.read_text()) | {"triton": "2.0.0"}
    path.write_text(json.dumps(content))
    assert "note: the record is of Triton 2.0.0" in invoke("compile", "--check", str(path)).output


def test_the_check_looks_at_the_chosen_rows_only(canned: list[CompiledKernel], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    gone = kernel(entry="gone", dtype=torch.float16)
    write_table(path, table_of("3.7.1"), [*canned, gone])
    assert "gone (scale_kernel)" in invoke("compile", "--check", str(path)).output
    assert invoke("compile", "--check", str(path), "--kernel", "scale*").exit_code == 0
    assert invoke("compile", "--check", str(path), "--dtype", "fp32").exit_code == 0
    del canned[0]
    assert invoke("compile", "--check", str(path), "--kernel", "scale").exit_code == 1
    assert invoke("compile", "--check", str(path), "--kernel", "scale", "--target", "sm_80").exit_code == 0


@pytest.mark.parametrize("usage", [replace(USAGE, spills=4), replace(USAGE, shared=10**6), None])
def test_compile_fails_for_a_bad_kernel(canned: list[CompiledKernel], usage: Resources | None) -> None:
    canned[0] = kernel(usage)
    done = invoke("compile", "--quiet")
    assert done.exit_code == 1
    assert "bad: scale scale_kernel, paper, float32, sm_90: " in done.output


def test_bad_options_are_refused(canned: list[CompiledKernel], tmp_path: Path) -> None:
    wrong = error_of("compile", "--target", "sm_91")
    assert isinstance(wrong, ConfigError)
    assert "--target sm_91 is not known" in str(wrong)
    assert "there are: sm_80, sm_86, sm_89, sm_90, sm_100" in str(wrong)
    assert "named shapes only" in str(error_of("compile", "--check", "x.json", "--shape", "rows=3"))
    assert "a folder" in str(error_of("compile", "--out", str(tmp_path)))


def test_interpreted_kernels_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runtime, "AVAILABLE", True)
    monkeypatch.setattr(_runtime, "INTERPRETED", True)
    wrong = error_of("compile", "--kernel", "scale")
    assert isinstance(wrong, NotSupportedError)
    assert "TRITON_INTERPRET=1 is set" in str(wrong)


SCRIPT = """
import sys, typer, toy_kernels, kernels.inventory
kernels.inventory.entries = lambda: toy_kernels.ENTRIES
from adrec.versions import installed_versions
from bench.kernels.commands import register
app = typer.Typer()
register(app)
app()
"""


def natively(*arguments: str) -> tuple[int, str]:
    """Exit status and output of the command, in a process where kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, "kernels", "compile", "--jobs", "1", "--target", "sm_86", *arguments]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.skipif(not _runtime.AVAILABLE, reason="Triton is not installed")
def test_the_command_catches_a_kernel_that_spills_and_one_that_is_too_large(tmp_path: Path) -> None:
    table, one = str(tmp_path / "table.json"), ("--shape", "paper", "--dtype", "fp32")
    status, output = natively("--kernel", "s[cp]*l*", *one, "--out", table)
    assert status == 1
    assert "bad: spill spilling_kernel, paper, float32, sm_86: spills" in output
    assert [row.entry for row in read_table(Path(table)).rows] == ["scale", "spill"]
    status, output = natively("--kernel", "product")
    assert status == 1
    assert "196608 bytes of shared memory; sm_86 has 101376" in output
    status, output = natively("--kernel", "scale", *one, "--check", table)
    assert status == 0, output


def test_a_part_of_a_table_is_written_anew(
    tmp_path: Path, canned: list[CompiledKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that were not chosen stay as they are; those of a chosen kernel that are gone go."""
    monkeypatch.setattr("sys.argv", ["adrec", "kernels", "compile", "--update"])
    path = tmp_path / "table.json"
    other, gone = kernel(entry="spill"), kernel(kernel="old_kernel", launch=1)
    now = str(installed_versions()["triton"])
    head = CompiledTable(command="adrec kernels compile", triton=now, ptxas={"sm_80": "1.0", "sm_70": "1.1"}, rows=[])
    write_table(path, head, [gone, kernel(replace(USAGE, registers=9)), other])
    update = ("compile", "--kernel", "scale", "--target", "sm_80,sm_90", "--update", "--out", str(path), "--quiet")
    for _ in range(2):
        done = invoke(*update)
        assert done.exit_code == 0
    table = read_table(path)
    # Each command stands once; assemblers of targets that were not compiled now are kept.
    assert table.command == "adrec kernels compile && adrec kernels compile --update"
    assert table.environment is not None
    assert table.ptxas is not None
    assert table.ptxas["sm_70"] == "1.1"
    assert table.ptxas["sm_80"] != "1.0"
    assert table.rows == [compiled_row(each) for each in [*canned, other]]
    write_table(path, table_of(now), canned)
    invoke(*update)
    assert read_table(path).command is None
    assert "3 rows" in done.stderr
    assert "1 of them kept" in done.stderr


def test_a_part_of_another_compilers_table_is_not_replaced(tmp_path: Path, canned: list[CompiledKernel]) -> None:
    path = tmp_path / "table.json"
    write_table(path, table_of("0.1"), canned)
    before = path.read_bytes()
    error = error_of("compile", "--kernel", "scale", "--update", "--out", str(path))
    assert "is of Triton 0.1" in str(error)
    assert path.read_bytes() == before
    assert "--out FILE, which is not given" in str(error_of("compile", "--update"))
    assert "leaves out most rows" in str(error_of("compile", "--each-block-size", "--out", str(path)))
