"""Writing a folder of exported graphs whole or not at all."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adrec.engines.exported import MANIFEST, ExportError
from adrec.errors import ConfigError
from adrec.files import check_output_folder, usual_mode
from compress.export.tensorrt.build import own_files

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # pragma: no cover
    # Without locks a live export cannot be told from a killed one, so nothing of either is removed.
    flock = None  # type: ignore[assignment]


def check_folder(out: Path, overwrite: bool) -> None:
    """Raise ConfigError or ExportError, before any work, when ``out`` cannot be written or must not be replaced.

    An empty folder is fine; with ``overwrite`` also one that holds nothing but an earlier export.
    """
    check_output_folder(out, "--out")
    present = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if not present:
        return
    if foreign := sorted(present - _own_files(out)):
        raise ExportError(f"{out}: holds {foreign[0]!r}, which no export wrote; choose a new or empty folder")
    if not overwrite:
        raise ConfigError(f"{out}: already holds an export; pass --overwrite or choose another --out")


@contextmanager
def export_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of ``out`` that takes its place when the block ends without an exception.

    What a killed export into the same place left behind is removed first, or put back where it was ``out`` itself.
    """
    out = out.resolve()
    _clear_leftovers(out)
    check_folder(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    lock = _lock(staged)
    try:
        yield staged
        staged.chmod(usual_mode(0o777))
        check_folder(out, overwrite)
        if out.is_dir():
            replaced = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".replaced", dir=out.parent))
            os.replace(out, replaced)
            try:
                os.replace(staged, out)
            except BaseException:
                os.replace(replaced, out)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _clear_leftovers(out: Path) -> None:
    """Remove what killed exports to ``out`` left beside it, unless one is under way."""
    pattern = f".{glob.escape(out.name)}.*"
    for staged in out.parent.glob(f"{pattern}.partial"):
        lock = _lock(staged)
        if lock is None:
            return
        shutil.rmtree(staged, ignore_errors=True)
        os.close(lock)
    for replaced in sorted(out.parent.glob(f"{pattern}.replaced")):
        # Killed between the two renames: the earlier export is whole, and its place is empty.
        if not out.exists() and any(replaced.iterdir()):
            os.replace(replaced, out)
        else:
            shutil.rmtree(replaced, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """A lock that ends with this process, as a file descriptor; None where another process holds it."""
    if flock is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        flock(descriptor, LOCK_EX | LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _own_files(out: Path) -> set[str]:
    try:
        graphs = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["graphs"]
        names = {name for graph in graphs for name in (graph["file"], graph["data"]) if name is not None}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {MANIFEST, *names, *own_files(out, names)}
