"""House law: who may import whom, where Triton enters, how long a file may be, and that nothing unpickles code."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "adrec": {"kernels"},
    "compress": {"adrec", "kernels"},
    "bench": {"compress", "adrec", "kernels"},
}
LONGEST_FILE = 400
VAGUE_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}
SOURCES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))

TESTS = sorted((ROOT / "tests").rglob("*.py"))


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Beyond the standard library, what the bottom room may use.
BOTTOM_ROOM = {"torch", "numpy", "triton"}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            assert isinstance(node.args[0], ast.Constant), f"line {node.lineno}: imports a name that no test can read"
            yield node.lineno, str(node.args[0].value)
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import hides the direction"
            yield node.lineno, node.module or ""


def violations(room: str, relative: str, source: str) -> list[str]:
    found = []
    for line, name in imported(ast.parse(source)):
        head = name.split(".")[0]
        if head in MAY_IMPORT and head != room and head not in MAY_IMPORT[room]:
            found.append(f"{relative}:{line}: {room} imports {name}")
        if room == "kernels" and head not in {room, *BOTTOM_ROOM, *sys.stdlib_module_names}:
            found.append(f"{relative}:{line}: kernels imports {name}; allowed: {', '.join(sorted(BOTTOM_ROOM))}")
        if head == "triton" and relative != "kernels/_runtime.py":
            found.append(f"{relative}:{line}: imports {name}; only kernels/_runtime.py may")
        if head in {"pickle", "dill", "cloudpickle", "joblib"} and relative != "adrec/data/authors_pickle.py":
            found.append(f"{relative}:{line}: imports {name}; only the refusing unpickler may")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=identifier)
def test_imports_keep_their_direction(path: Path) -> None:
    relative = identifier(path)
    assert violations(relative.split("/")[0], relative, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("kernels", "import adrec"),
        ("adrec", "from bench.timing import interleave"),
        ("adrec", "def late():\n    import compress"),
        ("compress", "import bench"),
        ("adrec", "import triton.language as tl"),
        ("bench", "import pickle"),
        ("kernels", "import pandas"),
        ("adrec", "import importlib\nimportlib.import_module('bench.timing')"),
    ],
)
def test_the_check_can_fail(room: str, source: str) -> None:
    assert violations(room, f"{room}/module.py", source)


def test_every_room_has_sources() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=identifier)
def test_files_stay_short_and_have_a_docstring(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE
    assert ast.get_docstring(ast.parse(text)), "a module says what it is for"


def test_no_vague_file_names() -> None:
    assert [identifier(path) for path in SOURCES if path.name in VAGUE_NAMES] == []


def test_torch_loads_weights_only() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert safe.get("weights_only") == "True", f"{identifier(path)}:{node.lineno}"
