"""Every kernel, compiled for every target, against the committed table: all rows, no spills, no regression.

In a process where kernels are compiled instead of interpreted; every shape of a target is a slow test of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.kernels.compiled_table import read_table
from bench.kernels.selection import choose_cases, dtype_name
from kernels import _runtime
from kernels.inventory import entries
from kernels.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "bench" / "records" / "kernels-compiled.json"
COMMAND = "import typer; from bench.kernels.commands import register; app = typer.Typer(); register(app); app()"

needs_triton = pytest.mark.skipif(not _runtime.AVAILABLE, reason="Triton is not installed")


def check(*options: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = ["kernels", "compile", "--check", str(RECORD), "--jobs", "1", "--quiet", *options]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_the_first_shape_of_every_kernel_is_the_papers() -> None:
    assert {next(iter(entry.shapes)) for entry in entries()} == {"paper"}


def test_the_record_has_every_kernel_shape_dtype_and_target_and_all_of_them_fit() -> None:
    rows = read_table(RECORD).rows
    cases = choose_cases()
    assert {(row.entry, row.shape, row.dtype, row.target) for row in rows} == {
        (case.entry.name, case.shape_name, dtype_name(case.dtype), target) for case in cases for target in TARGETS
    }
    for row in rows:
        assert row.spills == 0, row.name
        assert row.shared <= row.shared_limit == TARGETS[row.target].shared_per_block, row.name
        assert 0 < row.warps_bound <= row.warps_limit, row.name


@needs_triton
@pytest.mark.timeout(1800)
def test_every_block_size_compiles_as_recorded() -> None:
    """Each set of block sizes that a plan chooses for any recorded shape, once for each kernel, dtype and target."""
    check("--each-block-size")


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", TARGETS)
def test_every_shape_compiles_as_recorded(target: str) -> None:
    check("--target", target)
