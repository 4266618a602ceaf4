"""Compile kernels for GPUs that are not there, and read what the compiler made of them.

An entry's Triton path runs on tensors of the meta device, where its launches are recorded (`record_launches`); each is
specialised as Triton's launcher would specialise it and compiled to machine code for a target. Registers and spills are
read from that code by ``cuobjdump``, which comes with Triton; shared memory is what Triton asks of the launcher.

Multiply-add fusion is always on, whatever TRITON_DEFAULT_FP_FUSION says: counts depend on it.
"""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import _runtime
from kernels._runtime import record_launches
from kernels._specialisation import ALIGNMENT, Variant, specialise
from kernels.inventory import Case
from kernels.targets import TARGETS, WARP_THREADS, Occupancy, Target, occupancy


class CompilationError(RuntimeError):
    """Kernels cannot be compiled here; the message says what to change."""


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses. spills: bytes of local memory a thread. shared: bytes a block, static and dynamic.

    seconds: what compiling took; next to nothing where Triton had it in its cache (TRITON_ALWAYS_COMPILE=1 ignores it).
    """

    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    tensor_columns: int
    seconds: float


@dataclass(frozen=True)
class CompiledKernel:
    """One launch of one entry, compiled for one target; ``resources`` is None where ``error`` says why.

    launch: how many different launches of that kernel the same run recorded before. constants: its block sizes and
    other constexpr parameters.
    """

    entry: str
    shape: str
    dtype: torch.dtype
    kernel: str
    launch: int
    constants: Mapping[str, Any]
    target: Target
    resources: Resources | None
    error: str | None = None

    @property
    def occupancy(self) -> Occupancy | None:
        """Bound from registers, shared memory, tensor memory and warps."""
        if (used := self.resources) is None:
            return None
        return occupancy(self.target, used.warps, used.registers, used.shared, used.tensor_columns)

    @property
    def problems(self) -> list[str]:
        """Why this kernel must not be shipped; empty when it may be."""
        if (used := self.resources) is None:
            return [str(self.error)]
        found = []
        if used.spills:
            found.append(f"spills {used.spills} bytes a thread")
        if used.shared > self.target.shared_per_block:
            found.append(f"{used.shared} bytes of shared memory; {self.target.name} has {self.target.shared_per_block}")
        elif occupancy(self.target, used.warps, used.registers, used.shared, used.tensor_columns).warps == 0:
            found.append(f"no block of {used.warps} warps with {used.registers} registers a thread fits")
        return found


Report = Callable[[int, int, str], None]
"""Progress: compilations done, compilations in all, name of the kernel just compiled."""


def check_compiler() -> None:
    """Raise CompilationError where kernels cannot be compiled: no Triton, its interpreter, or no cuobjdump."""
    if not _runtime.AVAILABLE:
        raise CompilationError("Triton is not installed: pip install 'adrec[triton]' (Linux) to compile kernels")
    if _runtime.INTERPRETED:
        raise CompilationError(
            "TRITON_INTERPRET=1 is set: kernels are then interpreted functions, which no compiler takes; unset it"
        )
    _cuobjdump()


def compile_cases(
    cases: Iterable[Case],
    targets: Sequence[Target] = tuple(TARGETS.values()),
    *,
    once_per_blocks: bool = False,
    jobs: int | None = None,
    report: Report | None = None,
) -> list[CompiledKernel]:
    """Compile every launch of every case for every target; the order is that of cases, targets and launches.

    What Triton cannot express on a target (e4m3 floats before compute capability 8.9) is left out. A launch that does
    not compile, or a case that does not run, is a result with an ``error``. once_per_blocks: of the launches of a
    kernel that differ only in model sizes and flags, compile the first of each dtype. jobs: processes (default: one
    a core). Raises CompilationError where nothing can be compiled at all.
    """
    check_compiler()
    planned: list[tuple[CompiledKernel, Variant | None]] = []
    for case in cases:
        variants = _variants(case)
        for target in targets:
            planned.extend(_planned(case, target, variants))
    if once_per_blocks:
        planned = _first_of_each(planned)
    units = {(variant, kernel.target.name): None for kernel, variant in planned if variant is not None}
    found = _compile_all(list(units), jobs or os.cpu_count() or 1, report or (lambda *_: None))
    results = []
    for kernel, variant in planned:
        if variant is None:
            results.append(kernel)
            continue
        outcome = found[variant, kernel.target.name]
        resources, error = (outcome, None) if isinstance(outcome, Resources) else (None, outcome)
        results.append(
            CompiledKernel(
                kernel.entry, kernel.shape, kernel.dtype, kernel.kernel, kernel.launch, kernel.constants,
                kernel.target, resources, error,
            )
        )  # fmt: skip
    return results


def compile_variant(variant: Variant, target: Target) -> Resources:
    """Compile one specialised kernel in this process. Raises what Triton raises, and CompilationError."""
    started = time.perf_counter()
    compiled = compiled_kernel(variant, target)
    seconds = time.perf_counter() - started
    metadata = compiled.metadata
    usage = resource_usage(compiled.asm["cubin"], metadata.name)
    return Resources(
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        registers=usage["REG"],
        spills=usage["LOCAL"] + usage["STACK"],
        shared=metadata.shared + max(0, usage["SHARED"] - target.shared_in_code),
        tensor_columns=getattr(metadata, "tmem_size", None) or 0,
        seconds=seconds,
    )


def compiled_kernel(variant: Variant, target: Target) -> Any:
    """Triton's compiled kernel (``asm``, ``metadata``) of a variant. Raises what Triton raises; CompilationError."""
    check_compiler()
    triton = _runtime.triton
    kernel = pkgutil.resolve_name(variant.kernel)
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=dict(variant.signature),
        constexprs={places[name]: value for name, value in variant.constants},
        attrs={places[name]: [["tt.divisibility", ALIGNMENT]] for name in variant.aligned},
    )
    return triton.compile(
        source,
        target=triton.backends.compiler.GPUTarget("cuda", target.capability, WARP_THREADS),
        options={**dict(variant.options), "enable_fp_fusion": True},
    )


def resource_usage(cubin: bytes, kernel: str) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL and the rest of what ``cuobjdump -res-usage`` prints for one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([_cuobjdump(), "-res-usage", str(path)], capture_output=True, text=True, check=False)
    line = re.search(rf"Function {re.escape(kernel)}:\s*(.*)", done.stdout)
    if line is None:
        raise CompilationError(f"cuobjdump says nothing of {kernel}: {(done.stderr or done.stdout).strip()}")
    return {name: int(count) for name, count in re.findall(r"([A-Z]+(?:\[\d+\])?):(\d+)", line[1])}


def _cuobjdump() -> str:
    try:
        return str(_runtime.triton.knobs.nvidia.cuobjdump.path)
    except RuntimeError as error:
        raise CompilationError(
            f"{error}: the Triton wheel brings cuobjdump; install it again or set TRITON_CUOBJDUMP_PATH"
        ) from None


def _variants(case: Case) -> list[Variant] | str:
    """Different launches of a case in their order, or the error that it ended with."""
    try:
        with record_launches() as launches:
            case.entry.run(**case.entry.inputs(case.shape, case.dtype, torch.device("meta")))
        return list(dict.fromkeys(specialise(launch) for launch in launches))
    except Exception as error:
        return f"recording the launches failed: {_describe(error)}"


def _planned(
    case: Case, target: Target, variants: list[Variant] | str
) -> Iterator[tuple[CompiledKernel, Variant | None]]:
    where = (case.entry.name, case.shape_name, case.dtype)
    if not variants:
        variants = "the run launched no kernel"
    if isinstance(variants, str):
        yield CompiledKernel(*where, "", 0, {}, target, None, variants), None
        return
    counts: dict[str, int] = {}
    for variant in variants:
        place = counts.setdefault(variant.name, 0)
        counts[variant.name] += 1
        declared = {name: value for name, value in variant.constants if isinstance(value, int | float | str)}
        if variant.compiles_for(target):
            yield CompiledKernel(*where, variant.name, place, declared, target, None), variant


def _first_of_each(
    planned: list[tuple[CompiledKernel, Variant | None]],
) -> list[tuple[CompiledKernel, Variant | None]]:
    found: dict[object, tuple[CompiledKernel, Variant | None]] = {}
    for place, (kernel, variant) in enumerate(planned):
        key = place if variant is None else (variant.blocks, kernel.dtype, kernel.target.name)
        found.setdefault(key, (kernel, variant))
    return list(found.values())


Unit = tuple[Variant, str]
"""What one process compiles at a time: a variant, and the name of a target."""


def _compile_all(units: Sequence[Unit], jobs: int, report: Report) -> dict[Unit, Resources | str]:
    found: dict[Unit, Resources | str] = {}
    if jobs == 1:
        for unit in units:
            found[unit] = _compile_unit(unit)
            report(len(found), len(units), unit[0].name)
        return found
    with _workers(min(jobs, len(units) or 1)) as pool:
        futures = {pool.submit(_compile_unit, unit): unit for unit in units}
        for future in as_completed(futures):
            # A compiler that crashes takes its process and with it the whole pool along.
            if not isinstance(future.exception(), BrokenProcessPool):
                found[futures[future]] = future.result()
                report(len(found), len(units), futures[future][0].name)
    for unit in units:
        if unit not in found:
            with _workers(1) as alone:
                try:
                    found[unit] = alone.submit(_compile_unit, unit).result()
                except BrokenProcessPool:
                    found[unit] = "the compiler crashed"
            report(len(found), len(units), unit[0].name)
    return found


def _workers(count: int) -> ProcessPoolExecutor:
    # Forked copies of a process with torch's threads may hang; a fresh interpreter never does.
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def _compile_unit(unit: Unit) -> Resources | str:
    variant, target = unit
    try:
        return compile_variant(variant, TARGETS[target])
    except Exception as error:
        return _describe(error)


def _describe(error: BaseException) -> str:
    # Triton says where on the first line and why on the last, with the kernel's source between them.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {' '.join(dict.fromkeys((lines[0], lines[-1])))}"
