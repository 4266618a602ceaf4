"""Packages compiled ahead of time by AOTInductor as an engine: no tracing, no compiler and none of this code in them.

A package holds native code: load only those you trust. Any program with libtorch can run one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from adrec.engines.exported import ExportError, GraphFile, GraphFormat
from adrec.engines.exported_engine import ExportedEngine
from kernels import _runtime


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
    """Kind of device that a package was compiled for, and of a GPU its compute capability, such as ``("cuda", "90")``.

    Read without loading any of its code. Raises ExportError for what is no package.
    """
    try:
        # Torch's stubs lack the method.
        loader: Any = torch._C._aoti.AOTIModelPackageLoader
        said = loader.load_metadata_from_package(str(path), "model")
        return said["AOTI_DEVICE_KEY"], said.get("AOTI_COMPUTE_CAPABILITY", "")
    except Exception as error:
        raise _unreadable(path, error) from None


def check_package(path: Path, device: torch.device) -> None:
    """Raise ExportError for a package of another kind of device, or of a GPU of another compute capability."""
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


def compute_capability(device: torch.device) -> str:
    """Of a CUDA device, as packages name it: ``90`` for 9.0."""
    return "".join(map(str, torch.cuda.get_device_capability(device)))


def _unreadable(path: Path, error: Exception) -> ExportError:
    return ExportError(f"{path}: torch cannot load the package: {str(error).strip().splitlines()[0]}")
