"""What pytest-benchmark writes about the machine: our fingerprint, and no host name."""

from __future__ import annotations

from typing import Any

import pytest

from bench.environment import read_environment


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Replace the host name by the machine fingerprint of our records."""
    machine_info["node"] = ""
    machine_info["adrec"] = read_environment().model_dump(mode="json")
