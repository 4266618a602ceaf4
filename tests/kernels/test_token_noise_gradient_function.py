"""`token_noise_gradients`, which measurements call: by value, whatever the strides, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels._runtime import UnsupportedError
from kernels.token_noise import token_noise_gradients, token_noise_gradients_twin, token_noise_twin
from tests.kernels.conftest import assert_matches, guarded
from tests.kernels.test_token_noise import arguments
from tests.kernels.test_token_noise_gradients import gradients, upstream


@pytest.mark.parametrize("geodesic", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_gradient_function_matches_its_twin_and_autograd(
    kernel_device: torch.device, sparse: bool, geodesic: bool
) -> None:
    values = arguments(kernel_device, geodesic=geodesic)
    to_z, to_x = upstream(values)
    table, _, time = gradients(token_noise_twin, values, to_z, to_x)
    del values["condition"], values["time_table"]
    options = {"grad_x_t": to_x, "sparse": sparse}
    for function in (token_noise_gradients, token_noise_gradients_twin):
        with guarded():
            found = list(function(to_z, **values, **options))
        if sparse:
            found[0] = torch.zeros_like(values["table"]).index_add(0, values["targets"], found[0])
        assert table is not None
        assert time is not None
        assert_matches(found[0], table)
        assert_matches(found[1], time)


def test_the_gradient_function_takes_inputs_with_gaps_between_rows(kernel_device: torch.device) -> None:
    values = arguments(kernel_device, geodesic=True, gaussian=torch.ones(37, 20))
    del values["condition"], values["time_table"]
    to_z, to_x = upstream(arguments(kernel_device))
    expected = token_noise_gradients(to_z, **values, grad_x_t=to_x)
    strided = {
        "grad_x_t": to_x.mT.contiguous().mT,
        "gaussian": values["gaussian"].mT.contiguous().mT,
        "targets": values["targets"].repeat_interleave(2)[::2],
    }
    found = token_noise_gradients(to_z.mT.contiguous().mT, **{**values, **strided})
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"grad_z": torch.zeros(37, 21)}, r"grad_z has shape \[37, 21\]; expected \[37, 20\]"),
    ({"grad_z": torch.zeros(37, 20).double()}, "grad_z is torch.float64; allowed: float32, float16, bfloat16"),
    ({"grad_x_t": torch.zeros(37, 20).double()}, "grad_x_t is torch.float64; allowed: float32, float16, bfloat16"),
    ({"table": torch.zeros(3, 4097)}, "table has width 4097; allowed: 1 to 4096"),
    ({"table": torch.zeros(20, 12).T}, "table is not contiguous"),
    ({"table": torch.zeros(12, 20).double()}, "table is torch.float64; allowed: float32, float16, bfloat16"),
    ({"signal": torch.zeros(0)}, r"signal has shape \[0\]; expected \[T\]"),
    ({"noise_level": torch.zeros(8)}, r"noise_level has shape \[8\]; expected \[9\]"),
    ({"seed": None}, "seed is None; give steps$"),
    ({"seed": None, "geodesic": True}, "seed is None; give steps and gaussian"),
]


@pytest.mark.parametrize(("changed", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_the_gradient_function_does_not_take_is_named(changed: dict[str, Any], message: str) -> None:
    values = arguments(torch.device("cpu"))
    values["grad_z"] = values.pop("condition")
    del values["time_table"]
    with pytest.raises(UnsupportedError, match=message):
        token_noise_gradients(**{**values, **changed})
