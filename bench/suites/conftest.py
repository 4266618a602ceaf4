"""What the suites measure (a small model trained first, or a run), where, and what their JSON says of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adrec.devices import check_device
from adrec.environment import read_environment
from adrec.errors import AdrecError
from bench.running.registry import engines_here
from bench.suites.measured import Measured, kernel_paths, subject_of_run, trained_run

OF_RUN = pytest.StashKey[Measured]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the suites."""
    group = parser.getgroup("adrec")
    group.addoption("--adrec-run", type=Path, default=None, help="Trained run to measure, with its accuracy.")
    group.addoption("--adrec-data", type=Path, default=None, help="Its data set; default: the one trained on.")
    group.addoption("--adrec-users", type=int, default=None, help="Evaluate a random sample of so many users.")
    group.addoption("--adrec-device", default="cpu", help="cpu, cuda or cuda:N; default: cpu.")


def device_of(config: pytest.Config) -> torch.device:
    """The device to measure on; pytest's usage error for one that is not there."""
    try:
        return check_device(config.getoption("--adrec-device"))
    except AdrecError as error:
        raise pytest.UsageError(f"--adrec-device: {error}") from None


def pytest_sessionstart(session: pytest.Session) -> None:
    """Load the run before anything is collected, so that a wrong option is one line and not an error a test."""
    device = device_of(session.config)
    run, data, users = (session.config.getoption(f"--adrec-{name}") for name in ("run", "data", "users"))
    if run is None:
        for name, value in (("data", data), ("users", users)):
            if value is not None:
                raise pytest.UsageError(f"--adrec-{name} {value}: says nothing without a run; give --adrec-run RUN too")
        return
    try:
        session.config.stash[OF_RUN] = subject_of_run(run, data, users, device)
    except AdrecError as error:
        reason = str(error).replace("--data", "--adrec-data").replace("--users", "--adrec-users")
        where = "--adrec-run" if reason.startswith(f"{run}:") else f"--adrec-run {run}:"
        raise pytest.UsageError(f"{where} {reason}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The engines that run on the device, and the paths of a kernel there."""
    if "engine_name" in metafunc.fixturenames:
        metafunc.parametrize("engine_name", engines_here(device_of(metafunc.config)))
    if "path" in metafunc.fixturenames:
        metafunc.parametrize("path", kernel_paths(device_of(metafunc.config)))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """What is measured on."""
    return device_of(request.config)


@pytest.fixture(scope="session")
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, device: torch.device
) -> Measured:
    """Model, histories and accuracy of the run, or of one trained on synthetic data."""
    given = request.config.stash.get(OF_RUN, None)
    return given or subject_of_run(trained_run(tmp_path_factory.mktemp("adrec")), None, None, device, small=True)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Replace the host name by the machine fingerprint of our records."""
    machine_info["node"] = ""
    machine_info["adrec"] = read_environment().model_dump(mode="json")
