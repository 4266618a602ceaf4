"""Noise and angles inside kernels: Triton's own normals by value, sine and cosine against float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kernels._gaussian import normal, sine_cosine
from kernels._runtime import cdiv, jit, launch, tl

STORED = Path(__file__).resolve().parent / "triton_randn.npz"
# What kernels/philox.py promises of its agreement with tl.randn; the kernels must keep it.
TRITON_TOLERANCE = 5e-7
BLOCK = 1024


@jit
def normal_kernel(out_ptr, seed_ptr, offset_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    offset = tl.load(offset_ptr + place, mask=inside, other=0)
    tl.store(out_ptr + place, normal(tl.load(seed_ptr), offset), mask=inside)


@jit
def sine_cosine_kernel(sine_ptr, cosine_ptr, angle_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    sine, cosine = sine_cosine(tl.load(angle_ptr + place, mask=inside, other=0.0))
    tl.store(sine_ptr + place, sine, mask=inside)
    tl.store(cosine_ptr + place, cosine, mask=inside)


def test_normals_are_tritons(kernel_device: torch.device) -> None:
    stored = np.load(STORED)
    offsets = torch.from_numpy(stored["offsets"]).to(kernel_device)
    for seed, expected in zip(stored["seeds"].tolist(), stored["values"], strict=True):
        out = torch.empty(offsets.numel(), device=kernel_device)
        grid = (cdiv(offsets.numel(), BLOCK),)
        launch(normal_kernel, grid, out, torch.tensor([seed], device=kernel_device), offsets, len(offsets), BLOCK=BLOCK)
        assert np.abs(out.cpu().numpy() - expected).max() <= TRITON_TOLERANCE, f"seed {seed}"


@pytest.mark.parametrize("largest", [2 * torch.pi, 100.0, 8192.0])
def test_sine_and_cosine_are_those_of_float64(kernel_device: torch.device, largest: float) -> None:
    generator = torch.Generator().manual_seed(0)
    angles = (torch.rand(20_000, generator=generator) * 2.0 - 1.0) * largest
    quarters = torch.arange(-40, 41) * (torch.pi / 4)
    angles = torch.cat([angles, torch.zeros(1), quarters, quarters.nextafter(torch.tensor(torch.inf))]).to(
        kernel_device
    )
    sine, cosine = torch.empty_like(angles), torch.empty_like(angles)
    launch(sine_cosine_kernel, (cdiv(len(angles), BLOCK),), sine, cosine, angles, len(angles), BLOCK=BLOCK)
    for found, exact in ((sine, angles.double().sin()), (cosine, angles.double().cos())):
        assert float((found.double() - exact).abs().max()) < 1.5e-7


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_angle_that_is_not_a_number_stays_none(kernel_device: torch.device) -> None:
    angles = torch.tensor([torch.nan, torch.inf], device=kernel_device)
    sine, cosine = torch.empty_like(angles), torch.empty_like(angles)
    launch(sine_cosine_kernel, (1,), sine, cosine, angles, 2, BLOCK=BLOCK)
    assert bool(sine.isnan().all())
    assert bool(cosine.isnan().all())
