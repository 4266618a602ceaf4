"""House law: who may import whom, where Triton enters, how long a file may be, and that nothing unpickles code."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
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


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other when they are loaded, so that the order of imports decides whether they can be."""
    waits: dict[str, set[str]] = {}
    for name, source in sources.items():
        waits[name] = set()
        for node in ast.parse(source).body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for wanted in (f"{module}{alias.name}".split(".") for alias in node.names):
                packages = {".".join(wanted[: depth + 1]) for depth in range(len(wanted))}
                # A package is already loading when it loads a module of its own.
                waits[name] |= {each for each in packages & set(sources) if not f"{name}.".startswith(f"{each}.")}
    try:
        TopologicalSorter(waits).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_module_can_be_imported_first() -> None:
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES}
    assert circle({name.removesuffix(".__init__"): path.read_text("utf-8") for path, name in names.items()}) == []


def test_a_circle_of_imports_is_found() -> None:
    straight = {"a": "from a import c", "a.b": "import d", "a.c": "", "d": "from a.c import x"}
    # Importing a.c loads package a first, which loads a.b, which needs d.
    assert set(circle({**straight, "a": "from a.b import x"})) == {"a", "a.b", "d"}
    assert circle({**straight, "a": ""}) == []


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
