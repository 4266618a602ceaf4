"""The commands of README and docs run as they stand, on small data and with short training."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from readme_figures import PAGES, pages

from kernels import _runtime

ROOT = Path(__file__).resolve().parents[1]
TEXT = pages()
# Added to a command so that it ends within seconds; what it says stays as it is.
SHORTER = {
    "train": ["--epochs", "2", "--no-progress", "--set", "model.width=16", "--set", "train.main.validate_every=1"],
    "kernels compile": ["--kernel", "denoise_update", "--target", "sm_90", "--shape", "paper"],
    # Of an option that is given twice the last counts.
    "bench tradeoff": ["--steps=1,4", "--batch-sizes=1,8", "--seconds-per-cell", "0.01", "--users", "40", "--quiet"],
    # Two epochs teach nothing whose loss could be measured.
    "compress runs/mine --recipe": ["--max-loss", "90%", "--quiet"],
    "compress runs/mine --budget": ["--seconds", "0.05", "--steps", "1", "--precisions", "float32,int8", "--quiet"],
    "bench run": ["--seconds-per-cell", "0.02", "--quiet"],
    "bench serving": ["--steps", "1", "--seconds", "0.2", "--queries", "20", "--quiet"],
    "bench calibrate": ["--runs", "4", "--seconds-per-cell", "0.02", "--items", "200", "--quiet"],
    "bench profile-steps": ["--steps", "1,2", "--seconds-per-cell", "0.02", "--users", "40", "--quiet"],
    "bench profile runs": ["--seconds", "0.2", "--quiet"],
}
NEEDS_GPU = "bench kernels"
LONG = pytest.mark.slow


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    # What a page repeats of README has been done by then.
    return [shlex.split(line) for line in dict.fromkeys(lines) if line.startswith("adrec ")]


def run(arguments: list[str], folder: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from adrec.cli import main; main()"]
    # As a reader's shell has it: the interpreter is the tests' choice.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [*program, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == status, f"adrec {' '.join(arguments)}\n{result.stdout}\n{result.stderr}"
    return result


def test_readme_has_the_commands_of_the_main_job() -> None:
    assert [command[1] for command in commands()][:4] == ["prepare", "train", "evaluate", "recommend"]


def test_commands_named_in_prose_exist() -> None:
    result = run(["--help"], ROOT)
    for name in set(re.findall(r"`adrec ([a-z-]+)", TEXT)):
        assert name in result.stdout


# Some twenty commands, a process each: minutes on two idle cores, more on busy ones.
@LONG
@pytest.mark.timeout(1800)
def test_commands_run_in_order(tmp_path: Path) -> None:
    run(["synthesize", "--raw", "ratings.csv", "--users", "150", "--items", "60", "--mean-length", "10"], tmp_path)
    (tmp_path / "users.jsonl").write_text('{"user": "a", "history": [1, 2, 3]}\n{"user": "b", "history": []}\n')
    for command in commands():
        arguments = command[1:]
        for name, extra in SHORTER.items():
            if " ".join(arguments).startswith(name):
                arguments = [*arguments, *extra]
        if " ".join(arguments).startswith(NEEDS_GPU):
            if not torch.cuda.is_available():
                assert "torch finds none here" in run(arguments, tmp_path, status=2).stderr.replace("\n", " ")
        elif arguments[0] != "kernels" or _runtime.AVAILABLE:
            run(arguments, tmp_path)
    assert (tmp_path / "recommendations.parquet").stat().st_size > 0
    assert list((tmp_path / "runs/mine/bench").glob("*.html"))
    for block in blocks("python"):
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", block.replace("k=20", "k=5")],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("[") == 4


def test_make_targets_named_in_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make (?:-k )?([a-z][a-z-]*)", TEXT, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_between_pages_exist() -> None:
    for path in PAGES:
        for link in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            if link.startswith("https://"):
                continue
            target, _, anchor = link.partition("#")
            found = (path.parent / target).resolve()
            assert found.is_file(), f"{path.name}: {link}"
            heads = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), flags=re.MULTILINE)
            names = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert not anchor or anchor in names, f"{path.name}: {link}"
    assert sorted((ROOT / "docs").glob("*.md")) == sorted(PAGES[1:])
