"""Every kernel, compiled for every target, against the committed table: no spills, no regression.

Each target is a test of its own, in a process where kernels are compiled instead of interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import _runtime
from kernels.inventory import entries
from kernels.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "bench" / "records" / "kernels-compiled.json"
COMMAND = "import typer; from bench.kernels.commands import register; app = typer.Typer(); register(app); app()"

pytestmark = pytest.mark.skipif(not _runtime.AVAILABLE, reason="Triton is not installed")


def check(target: str, *options: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = ["kernels", "compile", "--target", target, "--check", str(RECORD), "--jobs", "1", "--quiet", *options]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_the_first_shape_of_every_kernel_is_the_papers() -> None:
    assert {next(iter(entry.shapes)) for entry in entries()} == {"paper"}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
def test_every_block_size_compiles_as_recorded(target: str) -> None:
    """Each set of block sizes that a plan chooses for any recorded shape, once for each kernel and storage dtype."""
    check(target, "--each-block-size")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", TARGETS)
def test_every_shape_compiles_as_recorded(target: str) -> None:
    check(target)
