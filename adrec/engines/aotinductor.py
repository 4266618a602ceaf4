"""Packages compiled ahead of time by AOTInductor as an engine: no tracing, no compiler and none of this code in them.

A package holds native code: load only those you trust. Any program with libtorch can run one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from adrec.engines.exported import ExportError, GraphFile, GraphFormat
from adrec.engines.exported_engine import ExportedEngine
from kernels import _runtime

_CAPABILITY_KEYS = {"cuda": "AOTI_COMPUTE_CAPABILITY", "cpu": "AOTI_CPU_ISA"}
# By Inductor's names, those that would end the process where they are missing.
_INSTRUCTIONS: dict[str, Callable[[], bool]] = {
    "avx2": torch.cpu._is_avx2_supported,
    "avx512": torch.cpu._is_avx512_supported,
    "avx512_vnni": torch.cpu._is_vnni_supported,
    "amx_tile": torch.cpu._is_amx_tile_supported,
}


class AotInductorEngine(ExportedEngine):
    """Runs ``.pt2`` packages of a folder, or of its own compilation, where its model is; see `ExportedEngine`."""

    name = "aotinductor"
    format: ClassVar[GraphFormat] = "aotinductor"
    # Compiled for any length from here on; padding changes no result.
    narrowest = 3

    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        """A CPU, or a CUDA device with Triton, which compiles for it."""
        return device.type == "cpu" or (device.type == "cuda" and _runtime.AVAILABLE)

    def open(self, path: Path) -> Any:
        check_package(path, self.device)
        try:
            index = -1 if self.device.index is None else self.device.index
            return torch._inductor.aoti_load_package(str(path), device_index=index)
        except Exception as error:
            raise _unreadable(path, error) from None

    def run(
        self, graph: GraphFile, session: Any, inputs: dict[str, np.ndarray], outputs: tuple[str, ...]
    ) -> dict[str, Tensor]:
        found = session(*(torch.from_numpy(inputs[spec.name]).to(self.device) for spec in graph.inputs))
        named = {spec.name: value for spec, value in zip(graph.outputs, found, strict=True)}
        return {name: named[name].cpu() for name in outputs}


def package_target(path: Path) -> tuple[str, str]:
    """What a package was compiled for: kind of device, and what it can do.

    Of a GPU its compute capability, ``("cuda", "90")``; of a CPU its vector instructions, ``("cpu", "avx2")``. Read
    without loading any of its code. Raises ExportError for what is no package.
    """
    try:
        # Torch's stubs lack the method.
        loader: Any = torch._C._aoti.AOTIModelPackageLoader
        said = loader.load_metadata_from_package(str(path), "model")
    except Exception as error:
        raise _unreadable(path, error) from None
    kind = said.get("AOTI_DEVICE_KEY")
    if kind is None:
        raise ExportError(f"{path}: does not say what device it was compiled for; export again")
    return kind, said.get(_CAPABILITY_KEYS.get(kind, ""), "").lower()


def check_package(path: Path, device: torch.device) -> None:
    """Raise ExportError for a package of another kind of device, or of one that can do other things."""
    kind, capability = package_target(path)
    if kind != device.type:
        raise ExportError(
            f"{path}: was compiled for '{kind}', but the model is on '{device}'; load it on '{kind}', or export again"
            f" with --device {device.type}"
        )
    if kind == "cuda" and capability != (here := compute_capability(device)):
        raise ExportError(
            f"{path}: was compiled for GPUs of compute capability {capability}, but '{device}' has {here}; export again"
            " on this GPU"
        )
    missing = [name for name in capability.split() if name in _INSTRUCTIONS and not _INSTRUCTIONS[name]()]
    if kind == "cpu" and missing:
        raise ExportError(
            f"{path}: was compiled for processors with {', '.join(missing)}, which this one has not; export again here"
        )


def compute_capability(device: torch.device) -> str:
    """Of a CUDA device, as packages name it: ``90`` for 9.0."""
    return "".join(map(str, torch.cuda.get_device_capability(device)))


def _unreadable(path: Path, error: Exception) -> ExportError:
    return ExportError(f"{path}: torch cannot load the package: {(str(error).strip() or repr(error)).splitlines()[0]}")
