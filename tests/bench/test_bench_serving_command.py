"""`adrec bench serving`: what it says and writes, and options that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from adrec.errors import AdrecError
from bench.archive import read_any
from bench.cli import register


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["bench", "serving", *arguments])


def test_serving_command(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "serving.jsonl"
    shared = [str(tiny_run), "--steps", "1", "--users", "9", "--quiet", "--out", str(out), "--batch-most", "2"]
    late = invoke(*shared, "--queries", "4", "--seconds", "0", "--rate", "500", "--bound-ms", "1e-6")
    assert late.exit_code == 1
    assert "0.0% of the queries, of at least 99%" in " ".join(late.output.split())
    done = invoke(*shared, "--seconds", "0", "--queries", "4", "--rate", "500", "--bound-ms", "1e6")
    # Whether the server kept up with its arrivals depends on the machine; that the exit status says so does not.
    assert done.exit_code == int("it did not keep up" in " ".join(done.output.split())), done.output
    assert "100.0% in 1e+06 ms" in done.output
    assert len(read_any(out)) == 3
    short = invoke(*shared, "--queries", "100000", "--seconds-most", "0.01", "--scenarios", "offline")
    assert short.exit_code == 1
    assert "of at least 100000 queries" in " ".join(short.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "0"], "--rate 0.0: must be above 0"),
        (["--scenarios", "streaming"], "--scenarios streaming is not known"),
        (["--steps", "9"], "allowed: 1 to 4"),
        (["--wait-ms", "-1"], "--wait-ms -1.0: must be 0 or more"),
        (["--rate", "1e12"], "are 6e\\+13 arrivals; allowed are 10000000: give a lower --rate"),
        (["--queries", "20000000"], "are 2e\\+07 arrivals; allowed are"),
        (["--engines", ""], "--engines: a name is empty; there are: "),
        (["--scenarios", "offline", "--bound-ms", "9"], "--bound-ms: read by scenario server only.*leave it out"),
        (["--scenarios", "offline", "--load", "1", "--rate", "9"], "--rate, --load: read by scenario .*leave them out"),
        (["--rate", "9", "--load", "0.5"], "--load 0.5: not read with --rate"),
    ],
)
def test_wrong_options_are_refused(tiny_run: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    out = tmp_path / "serving.jsonl"
    with pytest.raises(AdrecError, match=message):
        raise invoke(str(tiny_run), "--users", "9", "--quiet", "--out", str(out), *arguments).exception
    assert not out.exists()
