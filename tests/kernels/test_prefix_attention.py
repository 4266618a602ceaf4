"""Attention over packed histories by value: the kernel against its twin, the twin against the definition, dropout."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from kernels import _prefix_attention_op as operators
from kernels import philox
from kernels._runtime import UnsupportedError, record_launches, seed_tensor
from kernels.prefix_attention import (
    ENTRIES,
    dropout_factors,
    prefix_attention,
    prefix_attention_twin,
    supports,
    token_users,
)
from tests.kernels.conftest import COMPILE_BACKEND, RMS_RATIO, assert_matches, rms_ratio
from tests.kernels.prefix_cases import DTYPES, LENGTHS, PADDING, arguments, compare, widened

CPU = torch.device("cpu")


def by_definition(values: dict[str, Any]) -> Tensor:
    """Each user, head and token by itself, as the formula is written; without dropout."""
    qkv, offsets, pads = values["qkv"], values["offsets"].tolist(), values.get("pads")
    out = torch.zeros_like(qkv[:, 0])
    for user, (start, end) in enumerate(itertools.pairwise(offsets)):
        for head in range(qkv.shape[2]):
            for row in range(start, end):
                keys, mixed, bias = qkv[start : row + 1, 1, head], qkv[start : row + 1, 2, head], []
                if pads is not None:
                    own = pads[:, user if pads.shape[1] > 1 else 0, head]
                    count = values["max_length"] - (end - start)
                    seen = min(count, own.shape[1])
                    keys, mixed = torch.cat([keys, own[0, :seen]]), torch.cat([mixed, own[1, :seen]])
                    bias = [math.log(max(count, 1)) if own.shape[1] == 1 else 0.0] * seen
                scores = keys @ qkv[row, 0, head] / math.sqrt(qkv.shape[3])
                scores[row + 1 - start :] += torch.tensor(bias, dtype=scores.dtype)
                out[row, head] = scores.softmax(0) @ mixed
    return out


@pytest.mark.parametrize("padding", ["masked", "one", "one of each user", "positions", "positions of each user"])
def test_the_twin_is_the_definition(padding: str) -> None:
    values = widened(arguments(CPU, width=9, **PADDING[padding]), torch.float64)
    assert_matches(prefix_attention_twin(**values), by_definition(values), torch.float32)


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.0), *((dtype, 0.3) for dtype in DTYPES)])
@pytest.mark.parametrize("padding", PADDING)
def test_the_kernel_matches_its_twin(
    kernel_device: torch.device, padding: str, dtype: torch.dtype, dropout: float
) -> None:
    compare(arguments(kernel_device, dtype=dtype, dropout=dropout, **PADDING[padding]))


@pytest.mark.parametrize(("heads", "width"), [(1, 128), (3, 24), (1, 48), (2, 9), (2, 64), (5, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_any_width_match(kernel_device: torch.device, heads: int, width: int, dtype: torch.dtype) -> None:
    compare(arguments(kernel_device, (5, 17, 1), heads=heads, width=width, dtype=dtype, dropout=0.1, max_length=20))


@pytest.mark.parametrize("lengths", [(1,), (70,), (33, 31, 2), (16, 16, 32), (1,) * 40, (0, 0, 3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_histories_of_any_length_match(
    kernel_device: torch.device, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    compare(arguments(kernel_device, lengths, heads=1, dtype=dtype, dropout=0.2, max_length=max(lengths) + 3))


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.bfloat16))],
)
def test_histories_of_200_tokens_match(kernel_device: torch.device, dtype: torch.dtype) -> None:
    compare(arguments(kernel_device, (200, 3, 180), heads=2, width=32, pads=200, dtype=dtype, dropout=0.1))


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 17), max_size=7).map(tuple),
    heads=st.integers(1, 3),
    width=st.integers(8, 20),
    padding=st.sampled_from(list(PADDING)),
    dropout=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_shape_matches(
    kernel_device: torch.device,
    lengths: tuple[int, ...],
    heads: int,
    width: int,
    padding: str,
    dropout: float,
    seed: int,
) -> None:
    options = {"heads": heads, "width": width, "max_length": 18, **PADDING[padding]}
    compare(arguments(kernel_device, lengths, dropout=dropout, seed=seed, **options))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("padding", ["masked", "one", "positions of each user"])
def test_no_tokens_give_no_rows(kernel_device: torch.device, lengths: tuple[int, ...], padding: str) -> None:
    values = arguments(kernel_device, lengths, max_length=18, dropout=0.1, **PADDING[padding])
    assert compare(values).shape == (0, 2, 8)


@pytest.mark.parametrize("pads", [1, 18])
def test_a_history_without_padding_does_not_see_it(kernel_device: torch.device, pads: int) -> None:
    """The 18 tokens of the longest history fill max_length; so do, by definition, those of a longer one."""
    values = arguments(kernel_device, (18, 22, 2), pads=pads, max_length=18)
    full = prefix_attention(**values)
    without = prefix_attention(values["qkv"], values["offsets"])
    assert rms_ratio(full[:40], without[:40]) <= RMS_RATIO[torch.float32]
    assert rms_ratio(full[40:], without[40:]) > 0.01
    compare(values)


def test_huge_numbers_of_one_user_stay_there(kernel_device: torch.device) -> None:
    """A tile holds several users."""
    values = arguments(kernel_device, (5, 4, 12, 3), max_length=40)
    expected = prefix_attention(**values)
    start, end = values["offsets"][1:3].tolist()
    values["qkv"][start:end] = 1e17
    others = torch.ones(len(expected), dtype=torch.bool)
    others[start:end] = False
    assert torch.equal(prefix_attention(**values)[others], expected[others])


def test_large_scores_do_not_overflow(kernel_device: torch.device) -> None:
    values = arguments(kernel_device)
    values["qkv"] *= 100.0
    compare(values)


def test_users_given_and_a_seed_on_the_device_change_nothing(kernel_device: torch.device) -> None:
    values = arguments(kernel_device, dropout=0.4, seed=77)
    users = token_users(values["offsets"], len(values["qkv"]))
    assert users.tolist() == [user for user, length in enumerate(LENGTHS) for _ in range(length)]
    seed = torch.tensor(77, device=kernel_device)
    expected = prefix_attention(**values)
    assert torch.equal(prefix_attention(**{**values, "seed": seed, "users": users}), expected)
    seed.fill_(78)
    assert not torch.equal(prefix_attention(**{**values, "seed": seed, "users": users}), expected)


def test_pads_with_gaps_between_rows_are_read_right(kernel_device: torch.device) -> None:
    """As `CausalTransformer.pad_states` makes them: heads and positions swapped in memory."""
    values = arguments(kernel_device, pads=18)
    expected = prefix_attention(**values)
    swapped = values["pads"].transpose(2, 3).contiguous().transpose(2, 3)
    assert not swapped.is_contiguous()
    assert torch.equal(prefix_attention(**{**values, "pads": swapped}), expected)


def test_dropout_is_by_the_counters_that_are_promised() -> None:
    """`dropout_factors` against Philox's words taken one by one."""
    rows, keys, heads, pads, dropped = torch.tensor([[5, 6, 7]]), torch.tensor([[4, 5, 6, 7]]), 2, 6, round(0.3 * 2**16)
    found = dropout_factors(rows, keys, heads, pads, 0.3, seed=9)
    for place, row in enumerate(rows[0].tolist()):
        for head in range(heads):
            quads = [(pad // 4, pad % 4) for pad in range(pads)]
            quads += [(2**15 + row // 4 - key // 4, key % 4) for key in keys[0].tolist()]
            for column, (quad, lane) in enumerate(quads):
                words = philox.philox(9, torch.tensor((row * heads + head) * 2**16 + quad))
                kept = (int(words[lane // 2]) >> (16 * (lane % 2))) % 2**16 >= dropped
                assert float(found[0, head, place, column]) == pytest.approx(kept * 2**16 / (2**16 - dropped))


def test_dropout_keeps_the_mean_and_draws_apart() -> None:
    rows = torch.arange(4 * 50).view(4, 50)
    factors = dropout_factors(rows, rows, 3, 8, 0.25, seed=1)
    seen = torch.ones(50, 50).tril().bool()
    tokens = factors[..., 8:][..., seen]
    for part in (tokens, factors[..., :8]):
        deviation = (0.25 / 0.75 / part.numel()) ** 0.5
        assert abs(float(part.mean()) - 1.0) < 4.0 * deviation
    assert factors.unique().tolist() == pytest.approx([0.0, 4.0 / 3.0])
    # Neither neighbouring rows, heads, users nor keys share their draws.
    for one, other in ((tokens[0], tokens[1]), (tokens[:, 0], tokens[:, 1]), (tokens[..., 1:], tokens[..., :-1])):
        assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.06


@pytest.mark.parametrize("padding", ["masked", "one"])
def test_the_operators_pass_opcheck(kernel_device: torch.device, padding: str) -> None:
    values = arguments(kernel_device, (3, 2), heads=1, max_length=5, **PADDING[padding])
    offsets, users = values["offsets"], token_users(values["offsets"], 5)
    rest = (None, values.get("max_length", 0), 6554, seed_tensor(3, kernel_device))
    inputs = [values["qkv"], values.get("pads")]
    given = [None if value is None else value.clone().requires_grad_() for value in inputs]
    opcheck(operators.attention.op, (given[0], offsets, users, given[1], *rest))
    output, log_sum = operators.attention(inputs[0], offsets, users, inputs[1], *rest)
    given = (output.clone(), inputs[0], offsets, users, inputs[1], rest[0], output, log_sum, *rest[1:])
    opcheck(operators.attention_gradients.op, (*given, padding == "one"))


def test_it_compiles_whole(kernel_device: torch.device) -> None:
    values = arguments(kernel_device, (3, 9), dropout=0.3, seed=torch.tensor([5], device=kernel_device), max_length=12)
    values["qkv"].requires_grad_()
    compiled = torch.compile(prefix_attention, fullgraph=True, backend=COMPILE_BACKEND)
    expected, found = prefix_attention(**values), compiled(**values)
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found.square().sum(), values["qkv"])
    (wanted,) = torch.autograd.grad(expected.square().sum(), values["qkv"])
    assert torch.equal(gradient, wanted)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"qkv": torch.zeros(46, 3, 8)}, r"expected \[M, 3, H, d\]"),
        ({"qkv": torch.zeros(46, 2, 2, 8)}, r"expected \[M, 3, H, d\]"),
        ({"qkv": torch.zeros(46, 3, 2, 8, dtype=torch.int32)}, r"qkv is torch.int32; supported: torch.float32"),
        ({"qkv": torch.zeros(40, 3, 2, 8, dtype=torch.float64)}, "float64: prefix_attention_twin"),
        ({"qkv": torch.zeros(40, 3, 2, 7)}, "head width is 7; allowed: 8 to 128"),
        ({"qkv": torch.zeros(40, 3, 2, 129)}, "head width is 129; allowed: 8 to 128"),
        ({"qkv": torch.zeros(40, 3, 8, 2).transpose(2, 3)}, r"call .contiguous\(\)"),
        ({"offsets": torch.zeros(10, dtype=torch.int32)}, r"expected contiguous int64 \[B \+ 1\]"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, r"expected contiguous int64 \[B \+ 1\]"),
        ({"users": torch.zeros(39, dtype=torch.int64)}, r"contiguous int64 \[M\]"),
        ({"dropout": 1.0}, "dropout is 1.0; allowed: 0 to"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"pads": torch.zeros(2, 3, 2, 1, 8)}, r"expected \[2, 1 or 9, 2, P, 8\]"),
        ({"pads": torch.zeros(2, 1, 1, 1, 8)}, r"expected \[2, 1 or 9, 2, P, 8\]"),
        ({"pads": torch.zeros(2, 1, 2, 0, 8)}, r"expected \[2, 1 or 9, 2, P, 8\]"),
        ({"pads": torch.zeros(2, 1, 2, 1, 8).half()}, "pads is torch.float16 and qkv torch.float32"),
        ({"pads": torch.zeros(2, 1, 2, 5, 8)}, "5 pad rows for max_length 18; allowed: 1, or max_length"),
        ({"max_length": None}, "pads need one of max_length and pad_bias"),
        ({"pad_bias": torch.zeros(9, 1)}, "pads need one of max_length and pad_bias"),
        ({"max_length": None, "pad_bias": torch.zeros(1, 9)}, r"expected floating point \[9, 1\]"),
        ({"seed": torch.zeros(2, dtype=torch.int64), "dropout": 0.5}, "expected 1 int64"),
    ],
)
def test_what_is_not_supported_is_said(kernel_device: torch.device, overrides: dict[str, Any], message: str) -> None:
    values = arguments(kernel_device)
    given = {name: value.to(kernel_device) if isinstance(value, Tensor) else value for name, value in overrides.items()}
    with pytest.raises(UnsupportedError, match=message):
        prefix_attention(**{**values, **given})


def test_it_says_what_it_supports(kernel_device: torch.device) -> None:
    qkv = torch.zeros(4, 3, 2, 8, device=kernel_device)
    assert supports(qkv)
    assert not supports(qkv.double())
    assert not supports(qkv[..., :7])


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_entries_record_without_a_device_and_match_their_twins(kernel_device: torch.device, entry: Any) -> None:
    for shape in entry.shapes.values():
        for dtype in entry.dtypes:
            with record_launches() as launches:
                entry.run(**entry.inputs(shape, dtype, torch.device("meta")))
            assert launches
            cost = entry.cost(shape, dtype)
            assert cost.bytes > 0
            assert cost.flops > 0
    for shape in entry.shapes.values():
        small = {**shape, "users": 5, "longest": 3, "pads": min(shape["pads"], 5)}
        small["max_length"] = 5 if small["pads"] > 1 else shape["max_length"]
        inputs = entry.inputs(small, torch.float32, kernel_device)
        found, expected = entry.run(**inputs), entry.twin(**inputs)
        pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
        for actual, wanted in pairs:
            assert_matches(actual, wanted)


@pytest.mark.parametrize("offsets", [[0, 2, 9], [0, 4, 2, 6], [0, 2, 4], [1, 6], [0]])
def test_offsets_that_do_not_divide_the_tokens_are_refused(offsets: list[int]) -> None:
    with pytest.raises(UnsupportedError, match=r"offsets is \[.*\]; expected to rise from 0 to 6"):
        prefix_attention(torch.randn(6, 3, 2, 8), torch.tensor(offsets))
