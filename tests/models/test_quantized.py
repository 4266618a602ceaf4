"""Stored formats by value: closed forms, exact integer products, and layers against their float32 twins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adrec.config import LayerFormat, ModelConfig, QuantizationConfig
from adrec.errors import ConfigError
from adrec.models import build_model, quantization_of
from adrec.models.quantized import (
    FLOAT8,
    LARGEST,
    Packed,
    QuantizedLinear,
    int8_matmul,
    outputs_from,
    pack,
    pack_int4,
    round_rows,
    sqnr_db,
    unpack,
    unpack_int4,
)

FORMATS = [("int8", None), ("int8-dynamic", None), ("int4", 4), ("fp8", None), ("bf16", None)]


def random_matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def layer_of(weight: torch.Tensor, name: str, group: int | None = None) -> QuantizedLinear:
    bias = torch.linspace(-1.0, 1.0, weight.shape[0])
    return QuantizedLinear(pack(weight, name, group), bias, LayerFormat(format=name, group_size=group))


def test_int8_by_hand() -> None:
    packed = pack(torch.tensor([[1.27, -0.01, 0.004], [0.0, 0.0, 0.0], [-2.54, 2.54, 0.03]]), "int8")
    assert packed.scale is not None
    torch.testing.assert_close(packed.scale, torch.tensor([0.01, 1.0, 0.02]))
    assert packed.values.tolist() == [[127, -1, 0], [0, 0, 0], [-127, 127, 2]]
    expected = torch.tensor([[1.27, -0.01, 0.0], [0.0, 0.0, 0.0], [-2.54, 2.54, 0.04]])
    torch.testing.assert_close(unpack(packed, "int8"), expected)


def test_int4_by_hand() -> None:
    packed = pack(torch.tensor([[7.0, -3.4, 0.7, -0.1]]), "int4", 2)
    assert packed.scale is not None
    torch.testing.assert_close(packed.scale, torch.tensor([[1.0, 0.1]]))
    # Halves of a byte, the even column low: -3 is 13 in four bits, -1 is 15.
    assert packed.values.tolist() == [[7 + 16 * 13, 7 + 16 * 15]]
    torch.testing.assert_close(unpack(packed, "int4"), torch.tensor([[7.0, -3.0, 0.7, -0.1]]))


def test_every_int4_pair_survives_packing() -> None:
    pairs = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    packed = pack_int4(pairs)
    assert packed.unique().numel() == 256
    assert torch.equal(unpack_int4(packed), pairs)


def test_fp8_reaches_its_largest_number_and_keeps_powers_of_two() -> None:
    packed = pack(torch.tensor([[448.0, 1.0, -0.5, 2.0**-6]]), "fp8")
    assert packed.values.dtype == FLOAT8
    assert unpack(packed, "fp8").tolist() == [[448.0, 1.0, -0.5, 2.0**-6]]


@given(rows=st.integers(1, 9), groups=st.integers(1, 5), group=st.sampled_from([2, 4, 6]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_no_number_moves_by_more_than_half_a_step(rows: int, groups: int, group: int, seed: int) -> None:
    matrix = random_matrix(rows, groups * group, seed) * 10.0 ** (seed % 7 - 3)
    matrix[0] = 0.0
    for name in ("int8", "int4"):
        packed = pack(matrix, name, group if name == "int4" else None)
        found = unpack(packed, name)
        assert packed.scale is not None
        step = packed.scale[:, None].expand_as(matrix) if name == "int8" else packed.scale.repeat_interleave(group, 1)
        assert bool(((found - matrix).abs() <= 0.5001 * step).all())
        assert bool((found[0] == 0.0).all())
        # What is stored stands for itself: rounding once more changes nothing but the last bit of a scale.
        torch.testing.assert_close(unpack(pack(found, name, group if name == "int4" else None), name), found)
        largest = packed.values if name == "int8" else unpack_int4(packed.values)
        assert int(largest.abs().max()) <= LARGEST[name]


@pytest.mark.parametrize("name", ["int8", "fp8", "bf16"])
def test_numbers_that_are_not_finite_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not finite"):
        pack(torch.tensor([[1.0, float("nan")]]), name)


@pytest.mark.parametrize("group", [3, 5, 32])
def test_a_group_that_does_not_divide_is_refused(group: int) -> None:
    with pytest.raises(ConfigError, match=f"group_size is {group}; allowed: what divides 16"):
        pack(torch.ones(2, 16), "int4", group)


@given(rows=st.integers(1, 40), inputs=st.integers(1, 70), outputs=st.integers(1, 33), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_integer_products_are_exact(rows: int, inputs: int, outputs: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    one = generator.integers(-127, 128, (rows, inputs)).astype(np.int8)
    other = generator.integers(-127, 128, (outputs, inputs)).astype(np.int8)
    found = int8_matmul(torch.from_numpy(one), torch.from_numpy(other))
    assert np.array_equal(found.numpy(), one.astype(np.int64) @ other.astype(np.int64).T)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 2), (8, 1, 17), (3, 2, 1), (1, 128, 1)])
def test_integer_products_of_thin_matrices_are_exact(rows: int, inputs: int, outputs: int) -> None:
    one = torch.arange(-60, -60 + rows * inputs, dtype=torch.int8).view(rows, inputs)
    other = torch.arange(-9, -9 + outputs * inputs, dtype=torch.int8).view(outputs, inputs)
    assert torch.equal(int8_matmul(one, other).long(), one.long() @ other.long().T)


def test_integer_products_do_not_saturate() -> None:
    """512 products of 127 x 127 overflow 16-bit sums, which instructions before VNNI had."""
    extreme = torch.full((3, 512), 127, dtype=torch.int8)
    assert int8_matmul(extreme, -extreme).unique().tolist() == [-512 * 127 * 127]


def test_what_a_row_becomes_depends_on_the_row_alone() -> None:
    rows = random_matrix(5, 33)
    together, scale = round_rows(rows)
    for place in range(5):
        alone, own = round_rows(rows[place : place + 1])
        assert torch.equal(alone[0], together[place])
        assert torch.equal(own[0], scale[place])
    zero, _ = round_rows(torch.zeros(2, 8))
    assert bool((zero == 0).all())


@pytest.mark.parametrize(("name", "group"), FORMATS)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 1, 4), (0,), (1030,)])
def test_a_layer_is_its_float32_twin(name: str, group: int | None, shape: tuple[int, ...]) -> None:
    """Over the numbers it stores; a dynamic layer also over the rounded inputs."""
    weight, rows = random_matrix(11, 12), random_matrix(int(torch.tensor(shape).prod()), 12, 1).view(*shape, 12)
    layer = layer_of(weight, name, group)
    seen = rows
    if layer.dynamic:
        whole, scale = round_rows(rows.reshape(-1, 12))
        seen = (whole * scale).view_as(rows)
    expected = nn.functional.linear(seen.double(), layer.weight.double(), layer.bias.double())
    torch.testing.assert_close(layer(rows), expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs_from(layer, rows, 4), expected[..., 4:].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "least", "weights"), [("int8", 35.0, 40.0), ("int8-dynamic", 35.0, 40.0), ("bf16", 50.0, 50.0)]
)
def test_signal_to_noise_of_a_layer(name: str, least: float, weights: float) -> None:
    twin = nn.Linear(128, 512)
    nn.init.xavier_normal_(twin.weight)
    layer = QuantizedLinear(pack(twin.weight, name), twin.bias, LayerFormat(format=name))
    rows = random_matrix(400, 128)
    assert sqnr_db(twin.weight, layer.weight) > weights
    assert sqnr_db(twin(rows), layer(rows)) > least


@pytest.mark.parametrize("name", ["int8", "bf16"])
def test_a_layer_that_computes_in_bfloat16(name: str) -> None:
    weight, rows = random_matrix(24, 64), random_matrix(9, 64, 1)
    bias = torch.linspace(-1.0, 1.0, 24)
    layer = QuantizedLinear(pack(weight, name), bias, LayerFormat(format=name, compute="bfloat16"))
    exact = QuantizedLinear(pack(weight, name), bias, LayerFormat(format=name))
    assert torch.equal(layer.weight, exact.weight)
    found = layer(rows)
    assert found.dtype == torch.float32
    product = rows.bfloat16().double() @ layer.weight.bfloat16().double().T
    # The product is rounded to 8 bits, the bias is not.
    torch.testing.assert_close(found.double() - bias.double(), product, rtol=2.0**-8, atol=1e-6)
    torch.testing.assert_close(outputs_from(layer, rows, 10), found[:, 10:])
    assert sqnr_db(exact(rows), found) > 40.0


def test_signal_to_noise_by_hand() -> None:
    assert sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(20.0)
    assert sqnr_db(torch.ones(2), torch.ones(2)) == float("inf")


def test_formats_are_given_and_read_back() -> None:
    config = ModelConfig(items=40, width=16, heads=2)
    wanted = QuantizationConfig.model_validate(
        {
            "layers": {
                "encoder.blocks.0.attention.qkv": {"format": "int8"},
                "time_embedding.up": {"format": "int4", "group_size": 8},
            },
            "table": {"format": "int4", "group_size": 4},
        }
    )
    model = build_model(config, wanted)
    assert quantization_of(model) == wanted
    assert quantization_of(build_model(config)) is None
    assert model.state_dict()["time_embedding.up.values"].shape == (64, 8)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"encoder.blocks.7.attention.qkv": {"format": "int8"}}, r"names 'encoder\.blocks\.7\.attention\.qkv'"),
        ({"encoder.blocks.0.attention_norm": {"format": "int8"}}, "names 'encoder.blocks.0.attention_norm'"),
        (
            {"time_embedding.up": {"format": "int4", "group_size": 6}},
            r"quantization\.layers\.time_embedding\.up: group_size is 6; allowed: what divides 16",
        ),
    ],
)
def test_formats_that_do_not_fit_are_refused(layers: dict[str, object], message: str) -> None:
    wanted = QuantizationConfig.model_validate({"layers": layers})
    with pytest.raises(ConfigError, match=message):
        build_model(ModelConfig(items=40, width=16, heads=2), wanted)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "neither layers nor table"),
        ({"table": {"format": "int3"}}, "'int8', 'int4', 'fp8' or 'bf16'"),
        ({"table": {"format": "int4"}}, "int4 needs group_size"),
        ({"table": {"format": "int8", "group_size": 4}}, "only int4 has groups"),
        ({"layers": {"a": {"format": "int8-dynamic", "compute": "bfloat16"}}}, "computes with integers"),
        (
            {"layers": {"a": {"format": "int4-dynamic"}}},
            "'int8', 'int8-dynamic', 'int4', 'fp8', 'fp8-dynamic' or 'bf16'",
        ),
    ],
)
def test_settings_that_contradict_themselves_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationConfig.model_validate(values)


def test_loading_replaces_what_a_layer_stands_for() -> None:
    source = layer_of(random_matrix(6, 8), "int8")
    target = QuantizedLinear.empty(8, 6, LayerFormat(format="int8"))
    assert bool((target.weight == 0.0).all())
    target.load_state_dict(source.state_dict())
    rows = random_matrix(3, 8, 2)
    assert torch.equal(target(rows), source(rows))
    assert set(source.state_dict()) == {"values", "scale", "bias"}


def test_packed_is_what_unpack_reads() -> None:
    values = torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)
    assert unpack(Packed(values, torch.tensor([0.5, 2.0])), "int8").tolist() == [[0.5, 1.0], [6.0, 8.0]]
