"""What the suites measure (an untrained model, or a run of one's own), and what their JSON says about the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.environment import read_environment
from bench.suites.measured import Measured, random_subject, subject_of_run


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the engines' suite."""
    group = parser.getgroup("adrec")
    group.addoption("--adrec-run", type=Path, default=None, help="Trained run to measure, with its accuracy.")
    group.addoption("--adrec-data", type=Path, default=None, help="Its data set; default: the one trained on.")
    group.addoption("--adrec-users", type=int, default=None, help="Evaluate a random sample of so many users.")


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Measured:
    """Model, histories and accuracy of the run, or a random model of the paper's size without an accuracy."""
    run = request.config.getoption("--adrec-run")
    if run is None:
        return random_subject()
    return subject_of_run(run, request.config.getoption("--adrec-data"), request.config.getoption("--adrec-users"))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Replace the host name by the machine fingerprint of our records."""
    machine_info["node"] = ""
    machine_info["adrec"] = read_environment().model_dump(mode="json")
