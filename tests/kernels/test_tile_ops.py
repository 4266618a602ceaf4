"""The pieces that kernels share: layer norm, activations, rounding and products, one small kernel for each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels._runtime import jit, launch, tl
from kernels._tile_ops import dot, gelu_tanh, layer_norm, silu, to_storage
from tests.kernels.conftest import assert_matches, embedded

ROWS, WIDTH = 16, 32
EXTREMES = [0.0, -0.0, 1e-30, -1e-30, 1.0, -1.0, 30.0, -30.0, 1e4, -1e4, 1e12, -1e12]


@jit
def norm_kernel(x_ptr, out_ptr, gain_ptr, shift_ptr, D, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    places = tl.arange(0, ROWS)[:, None] * WIDTH + columns[None, :]
    inside = (columns < D)[None, :]
    x = tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * D + columns[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + places, layer_norm(x, gain_ptr, shift_ptr, columns, D, eps))


@jit
def activation_kernel(x_ptr, gelu_ptr, silu_ptr, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    x = tl.load(x_ptr + places)
    tl.store(gelu_ptr + places, gelu_tanh(x))
    tl.store(silu_ptr + places, silu(x))


@jit
def storage_kernel(x_ptr, out_ptr, COUNT: tl.constexpr):
    places = tl.arange(0, COUNT)
    tl.store(out_ptr + places, to_storage(tl.load(x_ptr + places), out_ptr.dtype.element_ty))


@jit
def dot_kernel(a_ptr, b_ptr, c_ptr, out_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = dot(tl.load(a_ptr + places), tl.load(b_ptr + places), tl.load(c_ptr + places))
    tl.store(out_ptr + places, product)


@pytest.mark.parametrize("width", [1, 7, 24, 32])
@pytest.mark.parametrize("epsilon", [1e-12, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_layer_norm_masks_what_is_beyond_the_width(
    kernel_device: torch.device, width: int, epsilon: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(width)
    x = embedded((3.0 * torch.randn(ROWS, width, generator=generator) + 5.0).to(kernel_device))
    x[0] = 2.5
    gain, shift = (embedded(torch.randn(width, generator=generator).to(dtype).to(kernel_device)) for _ in range(2))
    out = torch.full((ROWS, WIDTH), torch.nan, device=kernel_device)
    launch(norm_kernel, (1,), x, out, gain, shift, width, epsilon, ROWS=ROWS, WIDTH=WIDTH)
    # In float64 too a row of one value stays near its shift only if its mean is exact, as 2.5 is.
    wanted = F.layer_norm(x.double(), (width,), gain.double(), shift.double(), epsilon)
    assert_matches(out[:, :width], wanted, torch.float32)
    assert not out[:, width:].any()


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_activations_at_small_large_and_extreme_values(kernel_device: torch.device) -> None:
    x = torch.cat([torch.tensor(EXTREMES), torch.linspace(-12.0, 12.0, 256 - len(EXTREMES))]).to(kernel_device)
    gelu, sigmoid = torch.empty_like(x), torch.empty_like(x)
    launch(activation_kernel, (1,), x, gelu, sigmoid, COUNT=256)
    for found, wanted in (
        (gelu, F.gelu(x.double(), approximate="tanh")),
        (sigmoid, F.silu(x.double())),
    ):
        assert found.isfinite().all()
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_casts_round_to_the_nearest(kernel_device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ties = 1.0 + torch.arange(1, 16) / 256.0
    x = torch.cat([torch.tensor([0.0, -0.0, torch.inf, -torch.inf]), ties, -ties])
    x = torch.cat([x, torch.randn(256 - x.numel(), generator=generator)]).to(kernel_device)
    out = torch.empty(256, dtype=dtype, device=kernel_device)
    launch(storage_kernel, (1,), x, out, COUNT=256)
    assert torch.equal(out, x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lifted", [False, True], ids=["stored", "float32"])
def test_dot_rounds_its_first_operand_and_accumulates_in_float32(
    kernel_device: torch.device, dtype: torch.dtype, lifted: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(16, 16, generator=generator).to(kernel_device) for _ in range(3))
    a, b = (a if lifted else a.to(dtype)), b.to(dtype)
    out = torch.empty(16, 16, device=kernel_device)
    launch(dot_kernel, (1,), a, b, c, out, SIZE=16)
    assert_matches(out, a.to(dtype).double() @ b.double() + c.double(), torch.float32)
