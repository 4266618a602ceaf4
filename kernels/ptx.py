"""PTX of a kernel as another runtime loads it: with the parameters it declares and no more, no GPU needed.

Triton appends pointers to scratch memory of its own to every entry. A launcher that is not Triton's does not pass them,
so kernels that need them are refused, and the parameters are cut from the others.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels import _runtime
from kernels.compilation import CompilationError, Variant, compiled_kernel
from kernels.plugin_kernels import MOST_SHARED, PluginKernel
from kernels.targets import TARGETS, WARP_THREADS, Target

# PTX ISA of CUDA 12.8, which knows all targets: what newer Triton emits by itself, older drivers cannot read.
PTX_VERSION = 87
_PARAMETER = re.compile(r"^\s*\.param .*?\b(\w+_param_\d+),?\s*$")


@dataclass(frozen=True)
class Ptx:
    """A kernel ready to be loaded. name: of its entry. threads: of a block. shared: dynamic shared memory, bytes."""

    name: str
    text: str
    threads: int
    shared: int


def target_of(capability: str) -> Target:
    """The target of a compute capability such as ``"8.9"``. Raises CompilationError for one that is not known."""
    name = "sm_" + capability.replace(".", "")
    if name not in TARGETS:
        raise CompilationError(f"compute capability is {capability}; kernels are made for {', '.join(TARGETS)}")
    return TARGETS[name]


def plugin_ptx(plugin: PluginKernel, types: dict[str, str], target: Target) -> Ptx:
    """Compile a plugin's kernel. types: of each pointer, as Triton names them (``*fp32``).

    Raises CompilationError for a kernel that spills, or that needs scratch or more shared memory than any block has.
    """
    signature = {}
    for name in plugin.kernel.arg_names:
        signature[name] = "constexpr" if name in plugin.constants else types.get(name, "i32")
    variant = Variant(
        kernel=f"{plugin.kernel.fn.__module__}:{plugin.kernel.fn.__qualname__}",
        signature=tuple(signature.items()),
        constants=tuple(plugin.constants.items()),
        aligned=tuple(types),
        options=(*plugin.options.items(), ("ptx_version", PTX_VERSION)),
    )
    compiled = compiled_kernel(variant, target)
    metadata = compiled.metadata
    for name in ("global_scratch_size", "profile_scratch_size", "tmem_size"):
        if getattr(metadata, name, None):
            raise CompilationError(f"{metadata.name} needs {name} {getattr(metadata, name)}; a plugin has no scratch")
    if metadata.shared > MOST_SHARED:
        raise CompilationError(
            f"{metadata.name} needs {metadata.shared} bytes of shared memory; allowed: {MOST_SHARED}"
        )
    declared = len(plugin.inputs) + len(plugin.integers) + len(plugin.outputs)
    text = strip_hidden(compiled.asm["ptx"], metadata.name, declared)
    assemble(text, target)
    return Ptx(metadata.name, text, metadata.num_warps * WARP_THREADS, metadata.shared)


def strip_hidden(ptx: str, kernel: str, declared: int) -> str:
    """Cut the parameters of an entry beyond those declared. Raises CompilationError where the kernel reads one."""
    head, mark, rest = ptx.partition(f".entry {kernel}(")
    listed, close, body = rest.partition(")")
    if not mark or not close:
        raise CompilationError(f"the PTX has no entry {kernel}")
    lines = [line for line in listed.splitlines() if line.strip()]
    names = [match[1] for match in map(_PARAMETER.match, lines) if match]
    if len(names) != len(lines) or len(names) < declared:
        raise CompilationError(f"{kernel} has {len(names)} parameters in its PTX; expected {declared} or more")
    for name in names[declared:]:
        if re.search(rf"\b{name}\b", body):
            raise CompilationError(f"{kernel} reads {name}, a parameter that only Triton's launcher passes")
    kept = ",\n".join(line.rstrip().rstrip(",") for line in lines[:declared])
    return f"{head}{mark}\n{kept}\n{close}{body}"


def assemble(ptx: str, target: Target) -> bytes:
    """Machine code of PTX by Triton's ``ptxas``. Raises CompilationError with what it says."""
    architecture = f"sm_{target.capability}" + ("a" if target.capability >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx, encoding="utf-8")
        command = [_assembler(target).path, f"--gpu-name={architecture}", str(source), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompilationError(f"ptxas refuses the kernel: {(done.stderr or done.stdout).strip()[-400:]}")
        return output.read_bytes()


def assembler_version(target: Target) -> str:
    """Version of the ``ptxas`` that Triton compiles with for a target, such as 12.8; "unknown" without Triton."""
    return str(_assembler(target).version) if _runtime.AVAILABLE else "unknown"


def _assembler(target: Target) -> Any:
    knobs = _runtime.triton.knobs.nvidia
    return knobs.ptxas_blackwell if target.capability >= 100 and hasattr(knobs, "ptxas_blackwell") else knobs.ptxas
