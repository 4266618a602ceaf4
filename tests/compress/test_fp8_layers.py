"""Layers in fp8: what they compute against a twin, the product that GPUs have, and what a receipt says of CPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from adrec.config import LayerFormat
from adrec.errors import NotSupportedError
from adrec.models.quantized import FLOAT8, FP8_CAPABILITY, fp8_matmul, round_rows, sqnr_db
from compress import quantize
from compress.quantize import QuantizeConfig
from compress.rounding import quantized_linear
from compress.technique import Draft

pytest.importorskip("torchao")


def fp8_twin(layer: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    """Rows and weights rounded to e4m3, each row by its largest magnitude over 448; sums in float64."""
    parts = []
    for matrix in (rows, layer.weight.detach()):
        scale = (matrix.abs().amax(1, keepdim=True) / 448.0).float()
        parts.append((matrix / scale).to(torch.float8_e4m3fn).double() * scale)
    return (parts[0] @ parts[1].T + layer.bias.detach()).float()


def test_fp8_layers_multiply_rounded_rows_by_rounded_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(48, 32)
    rows = torch.randn(5, 48, generator=generator) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 0.0])[:, None]
    found = quantized_linear(layer, LayerFormat(format="fp8-dynamic"))
    torch.testing.assert_close(found(rows[:4]), fp8_twin(layer, rows[:4]), rtol=1e-5, atol=1e-6)
    assert torch.equal(found(rows)[4], layer.bias.detach()), "a row of zeros stays zero"
    assert torch.equal(found(rows, 16), found(rows)[:, 16:])
    assert 20.0 < sqnr_db(layer(rows), found(rows)) < 35.0


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < FP8_CAPABILITY,
    reason="needs a GPU that multiplies fp8",
)
@pytest.mark.parametrize("count", [1, 7, 513])
def test_fp8_layers_on_a_gpu_give_what_a_cpu_gives(count: int) -> None:
    layer = nn.Linear(128, 384)
    rows = torch.randn(count, 128, generator=torch.Generator().manual_seed(0))
    found = quantized_linear(layer, LayerFormat(format="fp8-dynamic"))
    # Tensor cores may keep fewer bits of a sum than float32 has.
    assert sqnr_db(found(rows), found.cuda()(rows.cuda()).cpu()) > 60.0
    with pytest.raises(
        NotSupportedError, match=r"an fp8 matrix of 24 x 128 .*multiples of 16\. Quantise .* with 'fp8'"
    ):
        fp8_matmul(rows.cuda().to(FLOAT8), torch.zeros(24, 128, device="cuda").to(FLOAT8))


def test_the_fp8_product_takes_what_a_gpu_gives_it() -> None:
    """The call for CUDA devices, made here: torch's own product of fp8 matrices, of any number of rows."""
    layer = nn.Linear(48, 32)
    rows, _ = round_rows(torch.randn(7, 48, generator=torch.Generator().manual_seed(0)), "fp8")
    packed = quantized_linear(layer, LayerFormat(format="fp8-dynamic"))
    one = torch.ones(())
    found = torch._scaled_mm(rows, packed.values.T, scale_a=one, scale_b=one, out_dtype=torch.float32)
    torch.testing.assert_close(found, fp8_matmul(rows, packed.values), rtol=1e-5, atol=1e-1)


@pytest.mark.parametrize("name", ["fp8", "fp8-dynamic", "int4"])
def test_the_receipt_says_what_a_cpu_does_instead(tiny_model: Any, name: str) -> None:
    group = {"group_size": 8} if name == "int4" else {}
    config = QuantizeConfig.model_validate({"format": name} | group)
    (note,) = [note for note in quantize.apply(Draft.of(tiny_model()), config).notes if "a CPU" in note]
    assert note.startswith(f"a CPU has no product with {name.removesuffix('-dynamic')}: ")
    assert ("multiplied in float32" in note) == (name == "fp8-dynamic")
