"""`denoise_last` as an operator: registration, compilation, errors, its inventory entry, and what needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import _runtime
from kernels._denoise_last_op import block_sizes, denoise_last_op
from kernels._runtime import UnsupportedError, record_launches
from kernels.denoise_last import ENTRIES, denoise_last, denoise_last_twin
from tests.kernels.conftest import COMPILE_BACKEND, assert_matches
from tests.kernels.denoise_cases import DTYPES, LENGTHS, OPTIONS, arguments, check


def op_arguments(values: dict[str, Any]) -> tuple[Any, ...]:
    device = values["condition"].device
    tensors = [values[name] for name in ("keys_values", "pads", "offsets", "times", "coefficients")]
    seed = torch.zeros(1, dtype=torch.int64, device=device) if values["noise"] is None else None
    options = (values["mix_weight"], values["heads"], values["max_length"], values.get("guidance_scale", 1.0), False)
    return (
        values["condition"], *values["weights"], *tensors, seed, values["row_keys"], values["noise"], *options
    )  # fmt: skip


@pytest.mark.parametrize("option", ["one pad row", "guided, pad rows", "given noise", "masked padding"])
def test_the_operator_is_registered_well(kernel_device: torch.device, option: str) -> None:
    values = arguments([2, 3], kernel_device, **{"width": 16, "blocks": 1, **OPTIONS[option]})
    values["coefficients"][0] = 0.0
    torch.library.opcheck(denoise_last_op.op, op_arguments(values))  # type: ignore[attr-defined]


def test_it_compiles_without_graph_breaks(kernel_device: torch.device) -> None:
    values = arguments([2, 3], kernel_device, width=16, blocks=1)
    compiled = torch.compile(
        lambda condition: denoise_last(**{**values, "condition": condition, "noise": None}),
        fullgraph=True,
        backend=COMPILE_BACKEND,
    )
    check(values, compiled(values["condition"]))


def test_inputs_that_need_not_be_contiguous(kernel_device: torch.device) -> None:
    values = arguments(LENGTHS, kernel_device, width=16, blocks=1, noise=True)
    strided = {name: values[name].mT.contiguous().mT for name in ("condition", "noise")}
    assert not strided["condition"].is_contiguous()
    assert torch.equal(denoise_last(**{**values, **strided}), check(values))


def test_without_a_kernel_it_is_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    values = arguments(LENGTHS, torch.device("cpu"), width=16, blocks=1)
    monkeypatch.setattr(_runtime, "AVAILABLE", False)
    assert torch.equal(denoise_last(**values), denoise_last_twin(**values))


def test_the_entry_records_one_launch_and_costs_something() -> None:
    (entry,) = ENTRIES
    for shape in entry.shapes.values():
        for dtype in entry.dtypes:
            with record_launches() as launches:
                entry.run(**entry.inputs(shape, dtype, torch.device("meta")))
            assert len(launches) == 1
            cost = entry.cost(shape, dtype)
            assert cost.bytes > 0
            assert cost.flops > 0
    small = {**entry.shapes["paper"], "users": 3, "width": 16, "heads": 2, "steps": 2, "length": 5}
    for extra in ({}, {"guided": 1, "geodesic": 1}, {"pads": 50}, {"pads": 0}):
        values = entry.inputs({**small, **extra}, torch.float32, torch.device("cpu"))
        assert_matches(entry.run(**values), entry.twin(**values))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scratch_memory_is_what_it_says(dtype: torch.dtype) -> None:
    for shape in ENTRIES[0].shapes.values():
        with record_launches() as launches:
            denoise_last(**ENTRIES[0].inputs(shape, dtype, torch.device("meta")))
        found, sizes = launches[0].arguments[20:22], launches[0].options
        width, heads = sizes["WIDTH"], sizes["HEAD_COUNT"] * sizes["HEAD_WIDTH"]
        rows = 32 if dtype != torch.float32 and shape["width"] <= 128 and shape["users"] > 2048 else 16
        users = -(-shape["users"] // rows) * rows
        assert sum(each.nbytes for each in found) == users * (4 * (3 * heads + width) + 2 * dtype.itemsize * width)


def test_the_cost_of_one_token_is_what_it_says() -> None:
    shape = dict(ENTRIES[0].shapes["paper"], users=1, length=1, steps=1, pads=0)
    # Two blocks of 12 D^2 products, and attention of the new token to itself.
    assert ENTRIES[0].cost(shape, torch.float32).flops == 2 * (24 * 128**2 + 4 * 128)


def test_large_batches_have_larger_tiles() -> None:
    assert [block_sizes(users, 128, torch.bfloat16).rows for users in (1, 2048, 2049)] == [16, 16, 32]
    assert {
        block_sizes(10**6, width, dtype).rows for width, dtype in ((256, torch.bfloat16), (128, torch.float32))
    } == {16}


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "condition": ({"condition": torch.zeros(32)}, r"condition has shape \[32\]; expected \[B, D\]"),
    "width": ({"condition": torch.zeros(2, 512)}, "width is 512; allowed: 8 to 256; use engine 'cached' otherwise"),
    "condition dtype": (
        {"condition": torch.zeros(2, 32).double()},
        "condition is torch.float64; allowed: float32, flo",
    ),
    "times": ({"times": torch.zeros(2, 31)}, r"times has shape \[2, 31\]; expected \[2, 32\]"),
    "no steps": ({"times": torch.zeros(0, 32)}, "times has 0 steps; allowed: 1 to 4095"),
    "steps": ({"times": torch.zeros(4096, 32)}, "times has 4096 steps; allowed: 1 to 4095"),
    "times dtype": ({"times": torch.zeros(2, 32).half()}, "times is torch.float16; allowed: float32"),
    "coefficients": ({"coefficients": torch.zeros(2, 2)}, r"coefficients has shape \[2, 2\]; expected \[2, 3\]"),
    "row_keys": ({"row_keys": torch.zeros(3, dtype=torch.int64)}, r"row_keys has shape \[3\]; expected \[2\]"),
    "row_keys dtype": ({"row_keys": torch.zeros(2)}, "row_keys is torch.float32; allowed: int64"),
    "noise": ({"noise": torch.zeros(2, 2, 32)}, r"noise has shape \[2, 2, 32\]; expected \[3, 2, 32\]"),
    "heads": ({"heads": 5}, "heads is 5; allowed: divisors of the width 32"),
    "head width": ({"heads": 8}, r"heads are 4 wide \(32 / 8\); allowed: 8 to 128; change heads"),
    "max_length": ({"max_length": 0}, "max_length is 0; allowed: 1 or more"),
    "guidance": (
        {"guidance_scale": 2.0},
        "keys_values has 1 branches; guidance_scale 2.0 needs 2: encode with unconditional=True",
    ),
    "keys_values": ({"keys_values": torch.zeros(2, 2, 5, 32)}, r"keys_values has shape \[2, 2, 5, 32\]; expected \[br"),
    "blocks": ({"keys_values": torch.zeros(1, 3, 2, 5, 32)}, r"expected \[1, 2, 2, 5, 32\]"),
    "storage": ({"keys_values": torch.zeros(1, 2, 2, 5, 32).half()}, "keys_values is torch.float16; allowed: float32"),
    "pads": ({"pads": torch.zeros(1, 2, 2, 3, 32)}, r"pads has shape \[1, 2, 2, 3, 32\]; expected \[1, 2, 2, 20, 32\]"),
    "offsets": ({"offsets": torch.zeros(2, dtype=torch.int64)}, r"offsets has shape \[2\]; expected \[3\]"),
    "no tokens of a user": (
        {"offsets": torch.tensor([0, 5, 5])},
        r"\[0, 5, 5\]; expected to rise from 0 to 5 or less, ea",
    ),
    "beyond the tokens": (
        {"offsets": torch.tensor([0, 2, 6])},
        r"offsets is \[0, 2, 6\]; expected to rise from 0 to 5",
    ),
    "strides": ({"times": torch.zeros(32, 2).t()}, r"times is not contiguous; keep times.contiguous\(\) between calls"),
    "devices": (
        {"offsets": torch.zeros(3, dtype=torch.int64, device="meta")},
        "tensors are on cpu, meta; expected one",
    ),
    "seed": ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed is torch.int64 of 2 elements on cpu; expected 1 int64"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_says_what_is_wrong(mistake: str, kernel_device: torch.device) -> None:
    changes, message = MISTAKES[mistake]
    if kernel_device.type == "cuda" and mistake in ("seed", "devices"):
        pytest.skip("CPU tensors run the twin here")
    with pytest.raises(UnsupportedError, match=message):
        denoise_last(**{**arguments([2, 3], torch.device("cpu")), **changes})


def test_it_says_which_weight_is_wrong() -> None:
    values = arguments([2, 3], torch.device("cpu"))
    weights = values["weights"]
    for change, message in (
        ({"down": weights.up}, r"weights.down has shape \[2, 128, 32\]; expected \[2, 32, 128\]"),
        ({"up": weights.up.half()}, "weights.up is torch.float16; allowed: float32"),
        ({"qkv": weights.qkv.double()}, "weights.qkv is torch.float64; allowed: float32, float16, bfloat16"),
        ({"qkv_bias": weights.qkv_bias.half()}, "weights.qkv_bias is torch.float16; allowed: float32"),
        ({"qkv": weights.qkv[:0]}, "weights hold no block; expected 1 or more"),
        ({"out": weights.out.mT}, "weights.out is not contiguous"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            denoise_last(**{**values, "weights": weights._replace(**change)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ENTRIES[0].shapes, ids=lambda name: name.replace(" ", "-"))
def test_natively_at_every_shape(shape: str, dtype: torch.dtype) -> None:
    values = ENTRIES[0].inputs(ENTRIES[0].shapes[shape], dtype, torch.device("cuda"))
    for mix_weight in (0.001, 1.0):
        check({**values, "mix_weight": mix_weight})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_draws_by_the_seed_on_the_device() -> None:
    device = torch.device("cuda")
    values = arguments(LENGTHS, device, torch.bfloat16)
    values["seed"] = torch.zeros(1, dtype=torch.int64, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        denoise_last(**values)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = denoise_last(**values)
    for seed in (0, 7):
        values["seed"].fill_(seed)
        graph.replay()
        assert torch.equal(found, denoise_last(**{**values, "seed": seed}))
