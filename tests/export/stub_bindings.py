"""TensorRT's own Python bindings over shared objects whose every function returns nothing: importable without TensorRT.

    python tests/export/stub_bindings.py 11.4.0.106 FOLDER

leaves a FOLDER to be put on PYTHONPATH, with FOLDER/lib on LD_LIBRARY_PATH. No engine can be built with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent / "stub" / "tensorrt_stub.c"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
DISTRIBUTION = "tensorrt-cu13-bindings"
# What NVIDIA's `tensorrt` wheel adds to its bindings: the name.
ALIAS = """\
import sys
from tensorrt_bindings import *
from tensorrt_bindings import __version__
import tensorrt_bindings as _bindings

__path__ = list(_bindings.__path__)
"""


class UnavailableError(RuntimeError):
    """The bindings cannot be installed here; the message says why."""


def install(version: str, folder: Path) -> None:
    """Install a version of the bindings into a folder, over stub libraries. Raises UnavailableError."""
    if shutil.which("gcc") is None:
        raise UnavailableError("gcc is not installed, which compiles the stub libraries")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run(
        [*command, f"{DISTRIBUTION}=={version}"], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise UnavailableError(f"pip cannot install {DISTRIBUTION}=={version}: {lines[-1]}")
    (folder / "tensorrt").mkdir(exist_ok=True)
    (folder / "tensorrt" / "__init__.py").write_text(ALIAS, encoding="utf-8")
    (folder / "lib").mkdir(exist_ok=True)
    for library in LIBRARIES:
        name = f"lib{library}.so.{version.split('.')[0]}"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / "lib" / name), str(SOURCE)],
            check=True,
        )


def environment(folder: Path) -> dict[str, str]:
    """Environment of a process that imports the bindings of `install`."""
    found = dict(os.environ)
    for variable, path in (("PYTHONPATH", folder), ("LD_LIBRARY_PATH", folder / "lib")):
        found[variable] = os.pathsep.join(part for part in (str(path), found.get(variable, "")) if part)
    return found


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    install(sys.argv[1], Path(sys.argv[2]))
