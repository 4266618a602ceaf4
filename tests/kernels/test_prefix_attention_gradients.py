"""Gradients of prefix attention: against the twin's by autograd, the twin's against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels._runtime import UnsupportedError
from kernels.prefix_attention import ENTRIES, prefix_attention, prefix_attention_gradients, prefix_attention_twin
from tests.kernels.conftest import small_inputs
from tests.kernels.prefix_cases import DTYPES, PADDING, arguments, compare, compare_gradients, widened

CPU = torch.device("cpu")
GIVEN = small_inputs(ENTRIES[1])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("padding", [{"pads": 0}, {"pads": 1}, {"pads": 4, "own": True}], ids=str)
def test_the_twin_passes_gradcheck(padding: dict[str, Any], dropout: float) -> None:
    values = arguments(CPU, (2, 0, 3, 1), max_length=4, dropout=dropout, **padding)
    values = widened(values, torch.float64)
    names = [name for name in ("qkv", "pads") if name in values]

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        return prefix_attention_twin(**{**values, **dict(zip(names, inputs, strict=True))})

    assert torch.autograd.gradcheck(function, [values[name].requires_grad_() for name in names])


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.0), *((dtype, 0.3) for dtype in DTYPES)])
@pytest.mark.parametrize("padding", PADDING)
def test_every_gradient_matches_the_twin(
    kernel_device: torch.device, padding: str, dtype: torch.dtype, dropout: float
) -> None:
    compare_gradients(arguments(kernel_device, dtype=dtype, dropout=dropout, **PADDING[padding]))


@pytest.mark.parametrize(("heads", "width"), [(1, 128), (3, 24), (1, 48), (2, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_of_any_width_match(kernel_device: torch.device, heads: int, width: int, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"heads": heads, "width": width, "dtype": dtype, "dropout": 0.1, "max_length": 20}
    for padding in ({"pads": 1}, {"pads": 20}):
        compare_gradients(arguments(kernel_device, (5, 17, 1), **options, **padding))


@pytest.mark.parametrize("lengths", [(1,), (70,), (33, 31, 2), (16, 16, 32), (1,) * 40, (0, 0, 3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_histories_of_any_length_match(
    kernel_device: torch.device, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    compare_gradients(arguments(kernel_device, lengths, heads=1, dtype=dtype, dropout=0.2, max_length=max(lengths) + 3))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pads", [1, 200])
def test_histories_of_200_tokens_match(kernel_device: torch.device, dtype: torch.dtype, pads: int) -> None:
    """More rows than one program sums for shared padding (256), too."""
    options: dict[str, Any] = {"heads": 2, "width": 32, "pads": pads, "dtype": dtype, "dropout": 0.1}
    compare_gradients(arguments(kernel_device, (200, 3, 180), max_length=200, **options))


@settings(max_examples=7, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 17), max_size=6).map(tuple),
    heads=st.integers(1, 3),
    width=st.integers(8, 20),
    padding=st.sampled_from(list(PADDING)),
    dropout=st.sampled_from([0.0, 0.1, 0.9]),
)
def test_any_shape_matches(
    kernel_device: torch.device, lengths: tuple[int, ...], heads: int, width: int, padding: str, dropout: float
) -> None:
    options = {"heads": heads, "width": width, "max_length": 18, **PADDING[padding]}
    compare_gradients(arguments(kernel_device, lengths, dropout=dropout, **options))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("padding", ["one", "positions", "positions of each user"])
def test_without_tokens_padding_gets_a_gradient_of_zero(
    kernel_device: torch.device, lengths: tuple[int, ...], padding: str
) -> None:
    values = arguments(kernel_device, lengths, max_length=18, dropout=0.1, **PADDING[padding])
    pads = values["pads"].requires_grad_()
    (gradient,) = torch.autograd.grad(prefix_attention(**values).sum(), pads)
    assert torch.equal(gradient, torch.zeros_like(pads))


def test_padding_that_needs_no_gradient_gets_none(kernel_device: torch.device) -> None:
    for padding in ("one", "positions"):
        values = arguments(kernel_device, **PADDING[padding])
        values["qkv"].requires_grad_()
        prefix_attention(**values).sum().backward()
        assert values["pads"].grad is None
        expected = compare_gradients({**values, "qkv": values["qkv"].detach()})[0]
        assert expected.shape == values["qkv"].grad.shape


def test_a_gradient_with_gaps_between_rows_is_read_right(kernel_device: torch.device) -> None:
    values = arguments(kernel_device)
    qkv = values["qkv"].requires_grad_()
    weights = torch.randn(2, 8, len(qkv), device=kernel_device).permute(2, 0, 1)
    found = torch.autograd.grad(prefix_attention(**values), qkv, weights)[0]
    expected = torch.autograd.grad(prefix_attention(**values), qkv, weights.contiguous())[0]
    assert torch.equal(found, expected)


def test_the_gradient_function_takes_gradients_with_gaps_between_rows(kernel_device: torch.device) -> None:
    values = {name: value.to(kernel_device) if hasattr(value, "to") else value for name, value in GIVEN.items()}
    strided = {name: values[name].mT.contiguous().mT for name in ("gradient", "output", "log_sum")}
    found, expected = prefix_attention_gradients(**{**values, **strided}), prefix_attention_gradients(**values)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient": torch.zeros(3, 4, 31)}, r"gradient is torch.float32 \[3, 4, 31\]; expected .* \[3, 4, 32\]"),
        ({"output": torch.zeros(3, 4, 32).half()}, r"output is torch.float16 .*; expected torch.float32"),
        ({"log_sum": torch.zeros(3, 4)}, r"log_sum is torch.float32 \[3, 4\]; expected torch.float32 \[4, 3\]"),
        ({"qkv": torch.zeros(3, 3, 4, 32).int()}, "qkv is torch.int32; supported: torch.float32"),
        ({"qkv": torch.zeros(3, 3, 4, 7)}, "head width is 7; allowed: 8 to 128"),
        ({"qkv": torch.zeros(3, 3, 32, 4).transpose(2, 3)}, r"call .contiguous\(\)"),
    ],
)
def test_what_the_gradient_function_does_not_take_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        prefix_attention_gradients(**{**GIVEN, **changes})


def test_results_are_the_same_bit_for_bit_every_time(kernel_device: torch.device) -> None:
    for padding in ("one", "positions"):
        values = arguments(kernel_device, heads=1, dropout=0.3, **PADDING[padding])
        first, again = ([compare(values), *compare_gradients(values)] for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", PADDING)
def test_a_whole_batch_matches_on_a_gpu(kernel_device: torch.device, padding: str, dtype: torch.dtype) -> None:
    lengths = tuple(user * 7 % 27 for user in range(700))
    values = arguments(kernel_device, lengths, heads=4, width=32, dtype=dtype, dropout=0.1, **PADDING[padding])
    compare(values)
    first, again = compare_gradients(values), compare_gradients(values)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.gpu
def test_a_captured_graph_draws_by_the_seed_that_it_reads(kernel_device: torch.device) -> None:
    seed = torch.tensor([5], device=kernel_device)
    values = {**arguments(kernel_device, dropout=0.3), "seed": seed}
    qkv, pads = values["qkv"].requires_grad_(), values["pads"].requires_grad_()
    weights = torch.randn_like(qkv[:, 0])

    def step() -> list[torch.Tensor]:
        output = prefix_attention(**values)
        return [output, *torch.autograd.grad(output, (qkv, pads), weights)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for number in (5, 6):
        seed.fill_(number)
        graph.replay()
        for found, expected in zip(captured, step(), strict=True):
            assert torch.equal(found, expected)
