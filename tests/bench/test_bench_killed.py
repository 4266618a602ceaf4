"""`adrec bench run` killed with SIGKILL, in the middle of what it writes, goes on without counting anything twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from adrec.errors import ConfigError
from bench.archive import read_any
from bench.cli import register
from bench.json_lines import json_line
from bench.kernels.records import EngineRecord
from bench.running.journal import Journal, Settings

SETTINGS = Settings(
    smoke=True, run_fingerprint="r", dataset_fingerprint="d", users=None, seconds=0.1, engines=["cached"], device="cpu",
    threads=1, processor="p", adrec="0",
)  # fmt: skip
KILLER = """
import os, signal, sys
from bench.running.journal import Journal

append, written, dies_at = Journal._append, 0, int(sys.argv[1])

def killed(self, path, text):
    global written
    written += 1
    if written == dies_at:
        append(self, path, text[: len(text) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return append(self, path, text)

Journal._append = killed
sys.argv = ["adrec", *sys.argv[2:]]
from adrec.cli import main
main()
"""

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL is not there")


def arguments(folder: Path, *options: str) -> list[str]:
    """The engines' suite, as short as it can be."""
    fast = ["--smoke", "--quiet", "--engines", "cached", "--seconds-per-cell", "0.000001", "--threads", "1"]
    return ["bench", "run", "engines", *fast, "--out", str(folder), *options]


def kill(folder: Path, dies_at: int, *options: str) -> int:
    """Exit status of a run whose process kills itself half-way through its ``dies_at``-th write."""
    command = [sys.executable, "-c", KILLER, str(dies_at), *arguments(folder, *options)]
    return subprocess.run(command, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


def units(folder: Path) -> list[str]:
    """Units that the journal has as done; a line cut short is none."""
    lines = [line for line in (folder / "journal.jsonl").read_text().split("\n")[:-1] if line]
    return [content["unit"] for content in map(json.loads, lines) if content["kind"] == "done"]


@pytest.mark.slow
def test_a_killed_run_goes_on_without_counting_twice(tmp_path: Path) -> None:
    """Killed amid the records of the second unit, then amid the line of the next."""
    out = tmp_path / "out"
    # Writes are: the settings of a new run; then for each unit its records and its line.
    assert kill(out, 4) == -signal.SIGKILL
    assert len(units(out)) == 1
    assert len((out / "engines.jsonl").read_text().splitlines()) == 2, "one record, and half of another"
    assert kill(out, 2, "--resume") == -signal.SIGKILL
    assert len(units(out)) == 1
    assert len((out / "engines.jsonl").read_text().splitlines()) == 2, "the record of a unit without its line"
    app = typer.Typer()
    register(app)
    done = CliRunner().invoke(app, arguments(out, "--resume"))
    assert done.exit_code == 0, done.output
    assert "1 units were done before" in done.output
    assert Counter(units(out)) == {
        f"engines/2000 items/batch {batch}/{steps} steps": 1 for batch in (1, 16) for steps in (1, 4)
    }
    cells = Counter(
        (each.batch_size_users, each.steps)
        for each in read_any(out / "engines.jsonl")
        if isinstance(each, EngineRecord)
    )
    assert cells == {(batch, steps): 1 for batch in (1, 16) for steps in (1, 4)}


def test_a_journal_whose_first_line_was_cut_short_is_none(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text(json_line(SETTINGS)[:-40])
    with pytest.raises(ConfigError, match="holds no journal of an earlier run; leave --resume out"):
        Journal(tmp_path, SETTINGS, ["engines"], resume=True)
    assert Journal(tmp_path, SETTINGS, ["engines"], resume=False).done == {}
    assert (tmp_path / "journal.jsonl").read_text() == json_line(SETTINGS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "journal.jsonl").write_text("a diary")
    with pytest.raises(ConfigError, match="already holds results"):
        Journal(tmp_path / "other", SETTINGS, ["engines"], resume=False)
    assert (tmp_path / "other" / "journal.jsonl").read_text() == "a diary"
