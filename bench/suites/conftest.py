"""What the suites measure (a small model trained first, or a run), and what their JSON says about the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adrec.environment import read_environment
from adrec.errors import AdrecError
from bench.suites.measured import Measured, subject_of_run, trained_run

OF_RUN = pytest.StashKey[Measured]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the engines' suite."""
    group = parser.getgroup("adrec")
    group.addoption("--adrec-run", type=Path, default=None, help="Trained run to measure, with its accuracy.")
    group.addoption("--adrec-data", type=Path, default=None, help="Its data set; default: the one trained on.")
    group.addoption("--adrec-users", type=int, default=None, help="Evaluate a random sample of so many users.")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Load the run before anything is collected, so that a wrong option is one line and not an error a test."""
    run, data, users = (session.config.getoption(f"--adrec-{name}") for name in ("run", "data", "users"))
    if run is None:
        for name, value in (("data", data), ("users", users)):
            if value is not None:
                raise pytest.UsageError(f"--adrec-{name} {value}: says nothing without a run; give --adrec-run RUN too")
        return
    try:
        session.config.stash[OF_RUN] = subject_of_run(run, data, users)
    except AdrecError as error:
        reason = str(error).replace("--data", "--adrec-data").replace("--users", "--adrec-users")
        where = "--adrec-run" if reason.startswith(f"{run}:") else f"--adrec-run {run}:"
        raise pytest.UsageError(f"{where} {reason}") from None


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Model, histories and accuracy of the run, or of one trained on synthetic data."""
    given = request.config.stash.get(OF_RUN, None)
    return given or subject_of_run(trained_run(tmp_path_factory.mktemp("adrec")), None, None)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Replace the host name by the machine fingerprint of our records."""
    machine_info["node"] = ""
    machine_info["adrec"] = read_environment().model_dump(mode="json")
