"""Compilation without a GPU: what the launcher would compile, what is read from it, and that bad kernels are caught.

Kernels are interpreted in the test process, so that everything that compiles runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toy_kernels

from kernels import _runtime
from kernels.compilation import CompilationError, check_compiler, compile_cases, resource_usage
from kernels.targets import TARGETS, occupancy

TESTS = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(not _runtime.AVAILABLE, reason="Triton is not installed")


@pytest.fixture(scope="module")
def native() -> dict[str, Any]:
    """What `toy_kernels.report` finds in a process where kernels are compiled, through JSON."""
    script = "import json, toy_kernels; print(json.dumps(toy_kernels.report(jobs=2)))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def compiled(native: dict[str, Any]) -> list[dict[str, Any]]:
    """Every toy compiled for sm_86 and sm_90 by two processes."""
    found = native["compiled"]
    done, total, _ = found["progress"][-1]
    assert done == total == len(found["progress"])
    return list(found["rows"])


def rows(compiled: list[dict[str, Any]], entry: str) -> list[dict[str, Any]]:
    return [row for row in compiled if row["entry"] == entry]


@needs_triton
def test_rows_come_in_the_order_of_cases_and_targets(compiled: list[dict[str, Any]]) -> None:
    cells = [
        [entry.name, shape, str(dtype), target]
        for entry in toy_kernels.ENTRIES
        for shape in entry.shapes
        for dtype in entry.dtypes
        for target in ("sm_86", "sm_90")
    ]
    # Triton cannot convert e4m3 before compute capability 8.9.
    cells.remove(["scale_fp8", "paper", "torch.float8_e4m3fn", "sm_86"])
    assert [row["cell"] for row in compiled] == cells


@needs_triton
def test_a_good_kernel_has_no_problems(compiled: list[dict[str, Any]]) -> None:
    for row in [*rows(compiled, "scale"), *rows(compiled, "scale_fp8")]:
        registers, spills, shared, warps, _ = row["usage"]
        assert row["problems"] == []
        assert 8 <= registers <= 32
        assert (spills, shared, warps) == (0, 0, 4)
        assert row["constants"] == {"BLOCK": 256}
        assert row["occupancy"] == TARGETS[row["cell"][-1]].warps


@needs_triton
def test_a_kernel_that_spills_is_caught(compiled: list[dict[str, Any]]) -> None:
    for row in rows(compiled, "spill"):
        assert row["usage"][1] > 0
        assert row["problems"] == [f"spills {row['usage'][1]} bytes a thread"]


@needs_triton
def test_too_much_shared_memory_is_caught_on_the_target_that_lacks_it(compiled: list[dict[str, Any]]) -> None:
    small, large = rows(compiled, "product")
    assert small["usage"][2] == large["usage"][2] == 4 * (128 * 64 + 64 * 128) * 3
    assert small["problems"] == ["196608 bytes of shared memory; sm_86 has 101376"]
    assert small["occupancy"] == 0
    assert large["problems"] == []


@needs_triton
def test_what_does_not_compile_or_run_is_a_row_with_its_error(compiled: list[dict[str, Any]]) -> None:
    expected = {
        "broken": "incompatible dimensions",
        "refused": "this shape is not for me",
        "idle": "launched no kernel",
    }
    for entry, message in expected.items():
        assert len(rows(compiled, entry)) == 2
        for row in rows(compiled, entry):
            assert row["usage"] is None
            assert message in row["problems"][0]


@needs_triton
def test_arguments_are_specialised_as_the_launcher_does(native: dict[str, Any]) -> None:
    found = native["specialised"]
    assert len(found) > 40
    for value, ours, theirs in found:
        assert ours == theirs, value


@needs_triton
def test_a_compiler_that_crashes_takes_only_its_own_kernel_along(native: dict[str, Any]) -> None:
    assert native["with a crash"] == ["the compiler crashed", "compiled"]


def test_where_nothing_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runtime, "AVAILABLE", True)
    monkeypatch.setattr(_runtime, "INTERPRETED", True)
    with pytest.raises(CompilationError, match=r"TRITON_INTERPRET=1 is set.*unset it"):
        compile_cases([])
    monkeypatch.setattr(_runtime, "AVAILABLE", False)
    with pytest.raises(CompilationError, match="Triton is not installed: pip install"):
        compile_cases([])

    class Nvidia:
        @property
        def cuobjdump(self) -> Any:
            raise RuntimeError("Cannot find cuobjdump")

    monkeypatch.setattr(_runtime, "AVAILABLE", True)
    monkeypatch.setattr(_runtime, "INTERPRETED", False)
    monkeypatch.setattr(_runtime, "triton", SimpleNamespace(knobs=SimpleNamespace(nvidia=Nvidia())))
    with pytest.raises(CompilationError, match=r"Cannot find cuobjdump.*TRITON_CUOBJDUMP_PATH"):
        check_compiler()


@needs_triton
def test_machine_code_that_cuobjdump_cannot_read() -> None:
    with pytest.raises(CompilationError, match="cuobjdump says nothing of scale_kernel"):
        resource_usage(b"no machine code", "scale_kernel")


@pytest.mark.parametrize(
    ("target", "usage", "warps", "limited_by"),
    [
        # 64 registers x 32 threads = 2048 a warp: 8 warps in each of four partitions of 16384.
        ("sm_90", {"warps": 8, "registers": 64, "shared": 0}, 32, "registers"),
        # 65 registers are rounded up to 72 (2304 a warp): 7 a partition, so 28 warps, so 3 blocks of 8.
        ("sm_90", {"warps": 8, "registers": 65, "shared": 0}, 24, "registers"),
        ("sm_86", {"warps": 4, "registers": 32, "shared": 0}, 48, "warps"),
        # Sixteen blocks a multiprocessor at most.
        ("sm_86", {"warps": 1, "registers": 32, "shared": 0}, 16, "blocks"),
        # 48 KiB and the 1 KiB that a block keeps for the system: three times in 164 KiB.
        ("sm_80", {"warps": 4, "registers": 32, "shared": 48 * 1024}, 12, "shared memory"),
        ("sm_90", {"warps": 8, "registers": 32, "shared": 227 * 1024}, 8, "shared memory"),
        ("sm_90", {"warps": 8, "registers": 32, "shared": 227 * 1024 + 1}, 0, "shared memory"),
        ("sm_100", {"warps": 4, "registers": 32, "shared": 0, "tensor_columns": 256}, 8, "tensor memory"),
        # 16 warps of 255 registers need more than the 64 K of a multiprocessor.
        ("sm_90", {"warps": 16, "registers": 255, "shared": 0}, 0, "registers"),
    ],
)
def test_occupancy_bound(target: str, usage: dict[str, int], warps: int, limited_by: str) -> None:
    found = occupancy(TARGETS[target], **usage)
    assert (found.warps, found.limited_by) == (warps, limited_by)
    assert found.fraction == warps / TARGETS[target].warps


def test_toys_compute_what_their_twins_do(kernel_device: torch.device) -> None:
    values = torch.randn(3, 5, device=kernel_device)
    torch.testing.assert_close(toy_kernels.scale(values, 3.0), toy_kernels.scale_twin(values, 3.0))
