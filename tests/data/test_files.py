"""Files are written whole or not at all, with the usual rights, and places that cannot be written are named early."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from adrec.errors import ConfigError
from adrec.files import check_output, check_output_folder, replacing, write_bytes, write_text


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    write_text(path, "längs\r\n")
    assert path.read_bytes() == "längs\r\n".encode()
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("old")

    def fails() -> None:
        with replacing(path) as temporary:
            assert temporary.parent == tmp_path
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fails()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "text"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_mode_is_that_of_any_new_file(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "file") as temporary:
            temporary.touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_an_error_names_the_file_and_not_its_temporary_sibling(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        write_text(tmp_path / "none" / "file", "text")
    assert caught.value.filename == str(tmp_path / "none" / "file")


def test_the_files_of_a_run_are_not_replaced(tmp_path: Path) -> None:
    for name in ("run.json", "config.yaml", "notes.json"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "config.yaml")
    check_output(tmp_path / "notes.json", "--json")
    for name in ("run.json", "config.yaml", "link"):
        with pytest.raises(ConfigError, match=f"{name}: a file of the run {tmp_path.name}; give another name"):
            check_output(tmp_path / name, "--json")


def test_the_files_of_a_data_set_are_not_replaced(tmp_path: Path) -> None:
    names = ("dataset.json", "items.parquet", "users.parquet", "sequences.parquet")
    for name in names[1:]:
        (tmp_path / name).touch()
    # Without dataset.json beside it, a file of such a name is any file.
    check_output(tmp_path / "items.parquet", "--out")
    (tmp_path / "dataset.json").touch()
    check_output(tmp_path / "recommendations.parquet", "--out")
    for name in names:
        with pytest.raises(ConfigError, match=f"{name}: a file of the data set {tmp_path.name}; give another name"):
            check_output(tmp_path / name, "--out")


def test_neither_an_export_nor_what_is_read_is_replaced(tmp_path: Path) -> None:
    for name in ("export.json", "request-fp32-s1.onnx", "users.jsonl", "verified.json"):
        (tmp_path / name).touch()
    check_output(tmp_path / "verified.json", "--json")
    for name in ("export.json", "request-fp32-s1.onnx"):
        with pytest.raises(ConfigError, match=f"{name}: a file of the export {tmp_path.name}; give another name"):
            check_output(tmp_path / name, "--json")
    users = tmp_path / "users.jsonl"
    check_output(users, "--out")
    with pytest.raises(ConfigError, match=r"users\.jsonl: the file that is read; give another name"):
        check_output(tmp_path / ".." / tmp_path.name / "users.jsonl", "--out", inputs=[users])


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    check_output(tmp_path / "file", "--out")
    check_output(tmp_path / "new", "--out")
    check_output(tmp_path / "a" / "b" / "new", "--out", make_folder=True)
    check_output_folder(tmp_path / "a" / "b", "--out")
    assert os.listdir(tmp_path) == ["file"]
    for path, make_folder, message in (
        (tmp_path, False, "--out is .*: a folder"),
        (Path(os.devnull), False, "not a regular file"),
        (tmp_path / "none" / "new", False, "the folder .*none does not exist"),
        (tmp_path / "file" / "new", False, "the folder .*file does not exist"),
        (tmp_path / "file" / "new", True, "file is a file, not a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_output(path, "--out", make_folder)
    for folder in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(ConfigError, match="file is a file, not a folder; choose another --out"):
            check_output_folder(folder, "--out")

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"cannot be written \(Permission denied\); choose another --raw"):
        check_output(tmp_path / "new", "--raw")
    with pytest.raises(ConfigError, match="Permission denied"):
        check_output_folder(tmp_path / "new", "--out")
