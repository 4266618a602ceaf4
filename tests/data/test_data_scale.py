"""25 million interactions prepare within 4 GiB of memory; the time is printed.

Run alone, with the figures shown: ``pytest -m slow -s tests/data/test_data_scale.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adrec.data.dataset import Dataset

PROGRAM = "import typer; from adrec.commands.prepare import register; app = typer.Typer(); register(app); app()"
SIZE = ("--users", "1000000", "--items", "200000", "--mean-length", "25")


def measured(*arguments: str) -> tuple[float, float]:
    """Run a command in a process of its own; return seconds and peak resident memory in GiB."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in the unit that Linux reports")
def test_25_million_interactions(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw.csv", tmp_path / "out"
    measured("synthesize", "--raw", str(raw), *SIZE)
    seconds, peak = measured("prepare", str(raw), "--out", str(out), "--deduplicate")
    print(f"prepared {raw.stat().st_size / 2**20:.0f} MiB of CSV in {seconds:.1f} s, peak {peak:.2f} GiB")
    assert Dataset.load(out).info.protocol["rows_read"] == pytest.approx(25_000_000, rel=0.01)
    assert peak < 4
