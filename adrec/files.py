"""Writing a file so that it is either complete or as it was, and refusing early what cannot be written."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from adrec.errors import ConfigError

OF_A_RUN = {
    "config.yaml", "run.json", "model.safetensors", "items.parquet", "metrics.json", "job.yaml", "compression.json",
}  # fmt: skip
"""Files without which a run is none: no report or record may take their place."""

OF_A_DATA_SET = {"dataset.json", "items.parquet", "users.parquet", "sequences.parquet"}
"""Files of a prepared data set, protected likewise."""

OF_AN_EXPORT = {"export.json", "tensorrt.json"}
"""Files of a folder of exports, protected likewise; so are those with these endings."""

EXPORTED = {".onnx", ".data", ".pt2", ".plan"}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling for the block to write; it becomes ``path`` when the block ends without an exception.

    On any exception (an interrupt too) the sibling is removed and ``path`` is as it was. A link is followed. The file
    gets the rights that any new file has.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield temporary
        temporary.chmod(usual_mode(0o666))
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all, line ends as they are."""
    write_bytes(path, text.encode("utf-8"))


def check_output(path: Path, option: str, make_folder: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Raise ConfigError, before any work, when a file cannot be written at ``path``, or must not be.

    ``make_folder`` says that the caller makes missing folders above it; else the folder must exist. ``inputs``: what is
    read, and may not be replaced.
    """
    if path.is_dir():
        raise ConfigError(f"{option} is {path}: a folder; give the name of a file, new or to be replaced")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{option} is {path}: not a regular file; give the name of a file, new or to be replaced")
    place = path.resolve()
    if path.exists() and any(place == each.resolve() for each in inputs):
        raise ConfigError(f"{option} is {path}: the file that is read; give another name")
    for kind, mark, files in (
        ("run", "run.json", OF_A_RUN),
        ("data set", "dataset.json", OF_A_DATA_SET),
        ("export", "export.json", OF_AN_EXPORT),
    ):
        own = place.name in files or (kind == "export" and place.suffix in EXPORTED)
        if path.exists() and own and (place.parent / mark).is_file():
            raise ConfigError(f"{option} is {path}: a file of the {kind} {place.parent.name}; give another name")
    if make_folder:
        _check_folder(path.parent, path, option)
    elif not path.parent.is_dir():
        raise ConfigError(f"{option} is {path}: the folder {path.parent} does not exist; make it or choose another")
    else:
        _check_writable(path.parent, path, option)


def check_output_folder(path: Path, option: str) -> None:
    """Raise ConfigError, before any work, when no folder can be made or written at ``path``."""
    _check_folder(path, path, option)


def usual_mode(mode: int) -> int:
    """Return the rights a new file or directory gets; `tempfile` makes private ones."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask


def _check_folder(folder: Path, path: Path, option: str) -> None:
    nearest = next(each for each in (folder, *folder.resolve().parents) if each.exists())
    if not nearest.is_dir():
        raise ConfigError(f"{option} is {path}: {nearest} is a file, not a folder; choose another {option}")
    _check_writable(nearest, path, option)


def _check_writable(folder: Path, path: Path, option: str) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option} is {path}: {folder} cannot be written ({error.strerror}); choose another {option}"
        ) from None
