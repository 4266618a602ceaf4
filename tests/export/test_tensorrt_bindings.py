"""API SHAPE ONLY: TensorRT's real bindings, over stub libraries, take our registrations. No engine can be built so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plugin_cases import OUTPUT_TYPES
from strict_tensorrt import FOLDER
from stub_bindings import UnavailableError, environment, install

from kernels import _runtime

ROOT = FOLDER.parents[1]
VERSIONS = ("10.16.1.11", "11.1.0.106", "11.4.0.106")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the stub libraries are ELF"),
    pytest.mark.skipif(not _runtime.AVAILABLE, reason="Triton is not installed"),
]


@pytest.fixture(scope="module", params=VERSIONS)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `bindings_checks` saw of the real bindings; skips where they cannot be installed."""
    folder = tmp_path_factory.mktemp("bindings")
    try:
        install(request.param, folder)
    except (UnavailableError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"TensorRT's bindings cannot be installed here: {error}")
    variables = environment(folder)
    variables["PYTHONPATH"] = os.pathsep.join([variables["PYTHONPATH"], str(ROOT), str(FOLDER)])
    variables.pop("TRITON_INTERPRET", None)
    result = folder / "found.json"
    command = [sys.executable, str(FOLDER / "bindings_checks.py"), str(result)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Any] = json.loads(Path(result).read_text())
    return loaded


def test_the_committed_surface_is_that_of_the_bindings(found: dict[str, Any]) -> None:
    version = "_".join(found["version"].split(".")[:2])
    assert found["version"] in VERSIONS
    assert found["surface"] == json.loads((FOLDER / f"tensorrt_surface_{version}.json").read_text())


def test_a_logger_of_ours_is_one_of_theirs(found: dict[str, Any]) -> None:
    assert found["messages"] == ["error: an error"]
    # STRONGLY_TYPED is member 1 in TensorRT 10 and 0 in 11, where EXPLICIT_BATCH is gone.
    assert found["flags"] == (0b11 if found["version"].startswith("10.") else 0b1)


def test_a_library_that_returns_nothing_is_an_error(found: dict[str, Any]) -> None:
    assert found["refused"].startswith("TensorRT cannot start: ")


def test_every_operator_is_registered(found: dict[str, Any]) -> None:
    assert found["creators"] == [["denoise_last", "adrec"], ["merge_splits", "adrec"], ["score_splits", "adrec"]]


def test_dtypes_are_known_before_sizes_are(found: dict[str, Any]) -> None:
    assert found["unknown"] == OUTPUT_TYPES


@pytest.mark.parametrize("name", OUTPUT_TYPES)
def test_symbolic_launches_are_those_of_integers(found: dict[str, Any], name: str) -> None:
    for launch in found["launches"][name]:
        assert launch["outputs"] == launch["expected"]
        assert launch["grid"] == launch["expected_grid"]
        assert launch["integers"] == launch["expected_integers"]
        assert launch["threads"] in (128, 256)
        assert launch["shared"] <= 48 * 1024
        assert launch["entry"]
