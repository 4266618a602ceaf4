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


class AotInductorEngine(ExportedEngine):
    """Runs ``.pt2`` packages of a folder, or of its own compilation, on the CPU; see `ExportedEngine`."""

    name = "aotinductor"
    format: ClassVar[GraphFormat] = "aotinductor"
    # Compiled for any length from here on; padding changes no result.
    narrowest = 3

    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        """CPUs only: a package is compiled for one kind of device."""
        return device.type == "cpu"

    def open(self, path: Path) -> Any:
        try:
            return torch._inductor.aoti_load_package(str(path))
        except Exception as error:
            raise ExportError(f"{path}: torch cannot load the package: {str(error).splitlines()[0]}") from None

    def run(
        self, graph: GraphFile, session: Any, inputs: dict[str, np.ndarray], outputs: tuple[str, ...]
    ) -> dict[str, Tensor]:
        found = session(*(torch.from_numpy(inputs[spec.name]) for spec in graph.inputs))
        named = {spec.name: value for spec, value in zip(graph.outputs, found, strict=True)}
        return {name: named[name] for name in outputs}
