"""What GPUs could do at best, by their makers' data sheets, and the floor that this sets under a kernel's time.

A floor is the longer of two times: the least bytes at the full memory bandwidth, and the least operations at the peak
of the arithmetic. No launch overhead, no cache, no tail: a kernel at twice its floor is a good one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from kernels.inventory import Cost

Bound = Literal["memory", "compute"]


@dataclass(frozen=True)
class Gpu:
    """One product. Bandwidth in GB/s (10^9 bytes); peaks in TFLOPS (TOPS for int8), dense, that is without sparsity.

    Float32 is the peak without tensor cores, which is what exact float32 products run on; the others are tensor cores'.
    pattern: what torch calls the device.
    """

    name: str
    pattern: str
    bandwidth: float
    peaks: Mapping[torch.dtype, float]
    source: str

    def peak(self, dtype: torch.dtype) -> float:
        """TFLOPS at which values of a storage dtype can be multiplied; 16-bit where the GPU has no unit for it."""
        return self.peaks.get(dtype, self.peaks[torch.float16])

    def floor(self, cost: Cost, dtype: torch.dtype) -> Floor:
        """Least time of a kernel on this GPU."""
        memory, compute = cost.bytes / self.bandwidth / 1e3, cost.flops / self.peak(dtype) / 1e6
        return Floor(max(memory, compute), "memory" if memory >= compute else "compute")


@dataclass(frozen=True)
class Floor:
    """Microseconds below which no kernel can be, and what sets them."""

    microseconds: float
    bound: Bound


def _peaks(float32: float, half: float, int8: float, float8: float | None = None) -> dict[torch.dtype, float]:
    found = {torch.float32: float32, torch.float16: half, torch.bfloat16: half, torch.int8: int8}
    return found if float8 is None else {**found, torch.float8_e4m3fn: float8}


# Figures with sparsity, as the sheets from Hopper on print them, are halved.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "A100", r"A100-SXM4-80GB", 2039.0, _peaks(19.5, 312.0, 624.0),
            "NVIDIA A100 Tensor Core GPU data sheet, column 80GB SXM",
        ),
        Gpu(
            "H100", r"H100 80GB HBM3", 3350.0, _peaks(67.0, 989.5, 1979.0, 1979.0),
            "NVIDIA H100 Tensor Core GPU data sheet, column H100 SXM",
        ),
        Gpu(
            "H200", r"H200$", 4800.0, _peaks(67.0, 989.5, 1979.0, 1979.0),
            "NVIDIA H200 Tensor Core GPU data sheet, column H200 SXM",
        ),
        Gpu(
            "B200", r"B200$", 8000.0, _peaks(80.0, 2250.0, 4500.0, 4500.0),
            "NVIDIA Blackwell Architecture Technical Brief, HGX B200, one GPU",
        ),
        Gpu(
            "L4", r"L4$", 300.0, _peaks(30.3, 121.0, 242.5, 242.5),
            "NVIDIA L4 Tensor Core GPU data sheet",
        ),
    )
}  # fmt: skip


def gpu_of_device(name: str) -> Gpu | None:
    """The product that torch calls ``name``, or None for one without figures here."""
    return next((gpu for gpu in GPUS.values() if re.search(rf"\b{gpu.pattern}", name)), None)
