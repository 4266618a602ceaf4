"""Writing a directory so that it is either complete or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adrec.errors import DataError
from adrec.files import OF_A_DATA_SET, check_output_folder, usual_mode


def check_destination(out: Path, overwrite: bool) -> None:
    """Refuse a destination that cannot be written or must not be replaced, before any work is done.

    An empty directory is fine. A prepared data set is replaced only with ``overwrite``; a directory that
    holds any file adrec did not write is never replaced. Raises: `DataError`, `ConfigError`.
    """
    if not out.exists():
        check_output_folder(out, "--out")
        return
    if not out.is_dir():
        raise DataError(f"{out}: is a file; --out must be a directory, new, empty or a data set")
    present = {entry.name for entry in out.iterdir()}
    foreign = sorted(present - OF_A_DATA_SET)
    if foreign:
        raise DataError(f"{out}: holds {foreign[0]!r}, which adrec did not write; choose a new or empty directory")
    if present and not overwrite:
        raise DataError(f"{out}: already holds a prepared data set; pass --overwrite or choose another --out")


@contextmanager
def staged_directory(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of ``out`` that becomes ``out`` when the block ends without an exception.

    On any exception (an interrupt too) the temporary directory, and every parent made for it, is removed and
    ``out`` is as it was. Raises: `DataError` for a destination that `check_destination` refuses or that
    cannot be written.
    """
    out = out.resolve()
    check_destination(out, overwrite)
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    try:
        yield staged
        _move_into_place(staged, out, overwrite)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


@contextmanager
def work_directory(out: Path) -> Iterator[Path]:
    """Yield a scratch directory that is always removed, on the disk that holds ``out``.

    It is a sibling of the nearest existing parent of ``out``, because decompressed input can exceed what a
    memory-backed temporary directory holds.
    """
    parent = next(parent for parent in out.resolve().parents if parent.is_dir())
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".work", dir=parent))
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _move_into_place(staged: Path, out: Path, overwrite: bool) -> None:
    staged.chmod(usual_mode(0o777))
    check_destination(out, overwrite)
    replaced = None
    if out.exists():
        replaced = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".replaced", dir=out.parent))
        os.replace(out, replaced)
    try:
        os.replace(staged, out)
    except BaseException:
        if replaced is not None:
            os.replace(replaced, out)
        raise
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
