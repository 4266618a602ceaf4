"""Every kernel at its smallest shape: `pytest bench/suites --benchmark-only`.

With --adrec-device cuda the kernel and its eager twin; on a CPU the twin alone, since kernels run there in Triton's
interpreter only. Time is the host's, so that a kernel's row holds its launch too; `adrec bench kernels` times the
device.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
import torch

from adrec.environment import printable_command, read_environment
from bench.conversion.pytest_json import describe_benchmark
from bench.kernels.measure import compare_results, now_utc
from bench.kernels.records import CPU_NOTE, KernelRecord, Roof
from bench.kernels.selection import dtype_name
from bench.suites.measured import measuring
from kernels.inventory import Case, Cost, entries

SLOW_SECONDS = 0.3


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


@pytest.mark.parametrize("case", smallest_cases(), ids=identifier)
def test_kernel(benchmark: Any, device: torch.device, case: Case, path: str) -> None:
    """Time one path; `extra_info` holds the setting, the least work, and the kernel's difference to its twin."""
    inputs = case.entry.inputs(case.shape, case.dtype, device)
    function = case.entry.run if path == "kernel" else case.entry.twin
    cost = case.entry.cost(case.shape, case.dtype)

    def call() -> Any:
        result = function(**inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result

    started = time.perf_counter()
    found = call()
    slow = time.perf_counter() - started > SLOW_SECONDS
    ratio, different = compare_results(found, case.entry.twin(**inputs) if path == "kernel" else found)
    describe_benchmark(benchmark, row(case, path, device, cost, ratio, different))
    # Its first call was the warm-up.
    benchmark.pedantic(call, rounds=3 if slow else 5)


def row(
    case: Case, path: str, device: torch.device, cost: Cost, ratio: float | None, different: float | None
) -> KernelRecord:
    """The row of a case without its timing, which pytest-benchmark measures."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
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
        protocol=measuring(str(device), name),
        environment=read_environment(),
        command=printable_command(sys.argv),
        kernel=case.entry.name,
        shape_name=case.shape_name,
        shape=dict(case.shape),
        dtype=dtype_name(case.dtype),
        rms_ratio=ratio,
        different_integers=different,
        note=CPU_NOTE if device.type == "cpu" else None,
    )  # fmt: skip
