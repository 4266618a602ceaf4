"""Wrong options of `pytest bench/suites` are pytest's usage errors: one line that names the option, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.suites import conftest
from bench.suites.measured import ITEMS, subject_of_run, trained_run

ROOT = Path(__file__).resolve().parents[2]


def start(**options: Any) -> Any:
    """What pytest does before it collects."""
    given = {"run": None, "data": None, "users": None, "device": "cpu"} | options
    stash = pytest.Stash()
    config = SimpleNamespace(getoption=lambda name: given[name.removeprefix("--adrec-")], stash=stash)
    conftest.pytest_sessionstart(SimpleNamespace(config=config))  # type: ignore[arg-type]
    return stash


def test_a_run_is_loaded_before_anything_is_collected(tiny_run: Path) -> None:
    measured = start(run=tiny_run, users=9)[conftest.OF_RUN]
    assert len(measured.subject.examples.histories) == 9
    assert conftest.OF_RUN not in start()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": Path("x")}, r"^--adrec-data x: says nothing without a run; give --adrec-run RUN too$"),
        ({"users": 3}, r"^--adrec-users 3: says nothing without a run"),
        ({"run": "none"}, r"^--adrec-run \S+none: not a finished run"),
        ({"run": "run", "users": 0}, r"^--adrec-run \S+run: --adrec-users 0: at least 1 user is needed"),
        ({"run": "run", "data": "none"}, r"^--adrec-run \S+run: \S+none: .*"),
        ({"device": "gpu"}, r"^--adrec-device: device is 'gpu'; allowed: cpu, cuda, or cuda:N"),
        ({"run": "run/baseline"}, r"^--adrec-run \S+baseline: a run of 'sasrec' has no steps"),
    ],
)
def test_wrong_options_are_usage_errors(tiny_run: Path, options: dict[str, Any], message: str) -> None:
    folder = tiny_run.parent
    given = {
        name: folder / value if isinstance(value, str) and name != "device" else value
        for name, value in options.items()
    }
    with pytest.raises(pytest.UsageError, match=message) as caught:
        start(**given)
    assert "\n" not in str(caught.value)
    assert " --data" not in str(caught.value)


def test_without_a_run_a_small_one_is_trained(tmp_path: Path) -> None:
    found = subject_of_run(trained_run(tmp_path), None, None)
    record = found.record("cached", 32, 1)
    assert record.accuracy is not None
    # A list drawn at random holds a tenth of the targets.
    assert record.accuracy.metrics_percent["HR@20"].low > 100 * 20 / ITEMS
    assert (record.steps, record.exact_steps, record.precision) == (32, 32, "float32")
    assert found.accuracy("cached", 32) is record.accuracy


def test_pytest_prints_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/suites", "--benchmark-only"]
    # A worker of pytest-xdist hands its variables on, and benchmarks are off where it sees them.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, f"--adrec-run={tmp_path}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    text = (done.stdout + done.stderr).strip()
    assert text.startswith(f"ERROR: --adrec-run {tmp_path}: not a finished run")
    assert len(text.splitlines()) == 1
