"""The wheel holds everything that the commands need, and runs outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("adrec", "bench", "compress", "kernels")
FILES = (*ROOMS, "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, installed without its dependencies into a folder."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    for name in FILES:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder)]
    subprocess.run(build, check=True, capture_output=True, text=True, timeout=200)
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    install = [*pip, "install", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True, timeout=200)
    return target


def run(installed: Path, folder: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(installed)
    check = "import adrec, sys; assert adrec.__file__.startswith(sys.argv.pop(1)), adrec.__file__"
    result = subprocess.run(
        [sys.executable, "-c", f"{check}; from adrec.cli import main; main()", str(installed), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


def test_commands_of_every_room_run_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    for room in ROOMS:
        assert (installed / room / "py.typed").is_file()
    assert all(
        name in run(installed, tmp_path, "--help") for name in ("train", "bench", "compress", "export", "kernels")
    )
    # Recipes are files beside the code.
    assert "fast" in run(installed, tmp_path, "compress", "--list")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_demo_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    shown = run(installed, tmp_path, "demo", "--seconds-per-cell", "0.05")
    assert (tmp_path / "demo" / "report.html").stat().st_size > 0
    assert "report.html" in shown.splitlines()[-1]
