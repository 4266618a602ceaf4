"""What a user chooses for an engine, beside the graph: memory, compatibility, how weights are stored."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from adrec.config import StrictModel

MEBIBYTE = 1 << 20
HardwareCompatibility = Literal["none", "same_compute_capability", "ampere_plus"]
Weights = Literal["fixed", "refit", "stripped"]


class BuildOptions(StrictModel):
    """Builder options. Precision is none of them: it lives in the graph, and networks are strongly typed.

    Every field is part of a plan's fingerprint.
    """

    workspace_mib: int = Field(4096, ge=1, description="most scratch memory a kernel may ask for, MiB")
    tf32: bool = Field(False, description="round float32 products to TF32: faster, and no longer float32")
    weights: Weights = Field(
        "fixed",
        description="refit: exchangeable in place; stripped: not in the plan, filled from the ONNX file at load",
    )
    version_compatible: bool = Field(False, description="also for newer TensorRT of the same major version; slower")
    hardware_compatibility: HardwareCompatibility = Field("none", description="GPUs beside the one built on; slower")
    optimization_level: int = Field(3, ge=0, le=5, description="how long the builder searches")

    def as_record(self) -> dict[str, Any]:
        return self.model_dump(mode="json")
