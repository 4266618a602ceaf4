"""The fingerprint says enough to compare machines and nothing about who owns them."""

from __future__ import annotations

import getpass
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from adrec import environment
from adrec.environment import printable_command, read_environment


def test_fingerprint_names_versions_and_threads() -> None:
    found = read_environment()
    assert found.machine.threads == torch.get_num_threads()
    assert found.versions["torch"] is not None
    assert {"python", "adrec", "torch", "triton", "numpy", "onnxruntime", "tensorrt"} <= set(found.versions)
    assert found.machine.processor


def test_fingerprint_has_no_user_host_or_path() -> None:
    text = read_environment().model_dump_json()
    assert f'"{socket.gethostname()}"' not in text
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    assert f'"{getpass.getuser()}"' not in text
    assert ":/" not in text.replace('":', "")


def _repository(folder: Path) -> None:
    for command in (
        ["init", "-q"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty", "-m", "first"],
    ):
        subprocess.run(["git", "-C", str(folder), *command], check=True, capture_output=True)


def test_revision_of_a_checkout_and_of_a_package_inside_another_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _repository(tmp_path)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "adrec" / "environment.py"))
    clean = read_environment().revision
    assert clean.git is not None
    assert len(clean.git) == 40
    assert clean.dirty is False
    (tmp_path / "new.txt").write_text("x")
    assert read_environment().revision.dirty is True
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "site-packages" / "adrec" / "environment.py"))
    (tmp_path / "site-packages").mkdir()
    assert read_environment().revision.git is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["/opt/x/bin/adrec", "bench", "tradeoff", "/home/me/proj/runs/baby"],
            "adrec bench tradeoff runs/baby",
        ),
        (["adrec", "--data=/secret/place/data", "~/runs/a b"], "adrec --data=data 'a b'"),
        (["adrec", "runs/baby", "--steps", "1,2"], "adrec runs/baby --steps 1,2"),
        (["-c", "/secret/baby"], "python -c ... baby"),
        ([""], "python"),
        (["/opt/x/lib/pytest/__main__.py", "bench/suites"], "python -m pytest bench/suites"),
    ],
)
def test_commands_lose_absolute_paths(words: list[str], expected: str) -> None:
    assert printable_command(words, Path("/home/me/proj")) == expected
