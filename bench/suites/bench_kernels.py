"""Every kernel at its smallest shape: `pytest bench/suites --benchmark-only`.

On a GPU the kernel and its eager twin; on a CPU the twin alone, since kernels run there in Triton's interpreter only.
Time is the host's, so that a kernel's row holds its launch too: `adrec bench kernels` times the device.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from adrec.environment import printable_command, read_environment
from bench.conversion.pytest_json import describe_benchmark
from bench.kernels.measure import compare_results, now_utc
from bench.kernels.records import CPU_NOTE, KernelRecord, Roof
from bench.kernels.selection import dtype_name
from bench.suites.measured import measuring
from kernels import _runtime
from kernels.inventory import Case, Cost, entries

NATIVE = torch.cuda.is_available() and _runtime.AVAILABLE and not _runtime.INTERPRETED
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def smallest_cases() -> list[Case]:
    """Each kernel and dtype at the shape that moves the fewest bytes."""
    found = []
    for entry in entries():
        for dtype in entry.dtypes:
            name = min(entry.shapes, key=lambda name: entry.cost(entry.shapes[name], dtype).bytes)
            found.append(Case(entry, name, entry.shapes[name], dtype))
    return found


def identifier(case: Case) -> str:
    """Name of a case in the report."""
    return f"{case.entry.name}-{case.shape_name}-{dtype_name(case.dtype)}"


@pytest.mark.parametrize("path", ["kernel", "eager twin"] if NATIVE else ["eager twin"])
@pytest.mark.parametrize("case", smallest_cases(), ids=identifier)
def test_kernel(benchmark: Any, case: Case, path: str) -> None:
    """Time one path; `extra_info` holds the setting, the least work, and the kernel's difference to its twin."""
    inputs = case.entry.inputs(case.shape, case.dtype, DEVICE)
    function = case.entry.run if path == "kernel" else case.entry.twin
    cost = case.entry.cost(case.shape, case.dtype)
    ratio, different = compare_results(function(**inputs), case.entry.twin(**inputs))

    def call() -> Any:
        result = function(**inputs)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)
        return result

    describe_benchmark(benchmark, row(case, path, cost, ratio, different))
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


def row(case: Case, path: str, cost: Cost, ratio: float | None, different: float | None) -> KernelRecord:
    """The row of a case without its timing, which pytest-benchmark measures."""
    name = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else ""
    return KernelRecord(
        measured_at_utc=now_utc(),
        path=path,
        baseline=path,
        timing=None,
        roof=Roof(
            least_bytes=cost.bytes, least_flops=cost.flops, gpu=None, floor_us=None, bound=None,
            floor_fraction=None, gigabytes_per_second=None,
        ),
        error=None,
        protocol=measuring(str(DEVICE), name),
        environment=read_environment(),
        command=printable_command(sys.argv),
        kernel=case.entry.name,
        shape_name=case.shape_name,
        shape=dict(case.shape),
        dtype=dtype_name(case.dtype),
        rms_ratio=ratio,
        different_integers=different,
        note=CPU_NOTE if DEVICE.type == "cpu" else None,
    )  # fmt: skip
