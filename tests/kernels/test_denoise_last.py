"""`denoise_last` by value against its twin, and the twin against what the models' own engine samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adrec.data.jagged import Jagged
from adrec.engines.cached import CachedEngine, CachedState
from adrec.engines.packing import block_weights, pad_rows
from adrec.models.adrec import ADRec, MLPDenoiser
from adrec.models.base import SequenceModel
from adrec.noise import ExplicitNoise, PhiloxNoise
from kernels import _denoise_last_op as op_module
from kernels import philox
from kernels.denoise_last import denoise_last, denoise_last_twin
from tests.kernels.conftest import assert_matches
from tests.kernels.denoise_cases import DTYPES, LENGTHS, OPTIONS, arguments, check

ModelFactory = Callable[..., SequenceModel]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS, ids=lambda name: name.replace(" ", "-"))
def test_it_matches_the_twin(kernel_device: torch.device, option: str, dtype: torch.dtype) -> None:
    check(arguments(LENGTHS, kernel_device, dtype, **OPTIONS[option]))


@pytest.mark.parametrize(
    ("width", "heads"),
    [(8, 1), (20, 2), (40, 5), (64, 4), (72, 8), (96, 3), (96, 8), (128, 4), (128, 1), (192, 6), (256, 8), (153, 9)],
    ids=str,
)
def test_any_width_and_number_of_heads(kernel_device: torch.device, width: int, heads: int) -> None:
    small = {"blocks": 1, "steps": 2, "width": width, "heads": heads}
    check(arguments([2, 7, 1], kernel_device, torch.float16, **small))
    if width in (20, 64, 96, 128, 192, 256):
        check(arguments([2, 7, 1], kernel_device, **small))


@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), max_size=20),
    heads=st.integers(1, 3),
    head_width=st.sampled_from([8, 11, 16]),
    pads=st.sampled_from([0, 1, 24]),
    steps=st.integers(1, 3),
    branches=st.integers(1, 2),
)
def test_any_shape(
    kernel_device: torch.device, lengths: list[int], heads: int, head_width: int, pads: int, steps: int, branches: int
) -> None:
    size = {"width": heads * head_width, "heads": heads, "pads": pads, "max_length": 24, "steps": steps, "blocks": 1}
    guidance = {"branches": branches, "guidance_scale": 1.0 if branches == 1 else 1.5}
    check(arguments(lengths, kernel_device, torch.float16, **size, **guidance))


@pytest.mark.parametrize("users", [15, 16, 17, 33])
@pytest.mark.parametrize("large", [False, True])
def test_tiles_at_their_edges(
    kernel_device: torch.device, users: int, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(op_module, "LARGE_BATCH", 0)
    lengths = [1 + user * 7 % 11 for user in range(users)]
    check(arguments(lengths, kernel_device, torch.float16, width=16, blocks=1, spare=9))


@pytest.mark.parametrize("pads", [0, 1, 20])
def test_histories_of_one_item(kernel_device: torch.device, pads: int) -> None:
    """No prefix: the new token sees its padding and itself, or only itself."""
    check(arguments([1, 1, 1], kernel_device, pads=pads))


def test_histories_as_long_as_allowed_have_no_padding(kernel_device: torch.device) -> None:
    for pads in (1, 6):
        full = arguments([6, 6, 2], kernel_device, max_length=6, pads=pads)
        changed = denoise_last(**{**full, "pads": full["pads"] + 1.0})
        found = check(full)
        assert torch.equal(found[:2], changed[:2])
        assert not torch.allclose(found[2], changed[2], atol=1e-3)


def test_long_histories_and_long_padding(kernel_device: torch.device) -> None:
    small = {"width": 16, "blocks": 1, "steps": 2, "max_length": 200}
    for pads in (1, 200):
        check(arguments([200, 1, 77], kernel_device, torch.float16, **small, pads=pads))


def test_keys_and_values_beyond_31_bits(kernel_device: torch.device) -> None:
    """Those of the last of three blocks, of many more tokens than the users have; other pages are never touched."""
    if kernel_device.type != "cpu":
        pytest.skip("allocates 5 GiB")
    small = arguments([2, 7, 1], kernel_device, torch.float16, blocks=3, steps=1)
    tokens = small["keys_values"].shape[3]
    # The values of the last block, the sixth plane, start at the element 2^31.
    keys_values = torch.empty(1, 3, 2, -(-(2**31) // (5 * 32)), 32, dtype=torch.float16)
    keys_values[:, :, :, :tokens] = small["keys_values"]
    assert torch.equal(denoise_last(**{**small, "keys_values": keys_values}), denoise_last(**small))


def test_no_users(kernel_device: torch.device) -> None:
    assert check(arguments([], kernel_device)).shape == (0, 32)


def select(values: dict[str, Any], users: list[int]) -> dict[str, Any]:
    """The arguments of some users, in that order."""
    bounds = values["offsets"].tolist()
    tokens = torch.tensor([token for user in users for token in range(bounds[user], bounds[user + 1])])
    lengths = [0, *(bounds[user + 1] - bounds[user] for user in users)]
    return {
        **values,
        "condition": values["condition"][users],
        "keys_values": values["keys_values"][:, :, :, tokens],
        "offsets": torch.tensor(lengths, device=values["offsets"].device).cumsum(0),
        "row_keys": values["row_keys"][users],
    }


@pytest.mark.parametrize("option", ["one pad row", "guided, pad rows"])
def test_a_user_depends_on_no_other_user(kernel_device: torch.device, option: str) -> None:
    lengths = [1 + user * 5 % 13 for user in range(18)]
    values = arguments(lengths, kernel_device, width=16, blocks=1, **OPTIONS[option])
    together = check(values)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(1)).tolist()
    for users in (order, order[:1], order[1:12]):
        torch.testing.assert_close(denoise_last(**select(values, users)), together[users], atol=1e-5, rtol=1e-5)


def test_noise_is_that_of_the_contract(kernel_device: torch.device) -> None:
    """Draws 0 .. S - 1 of each row key, whether they are given or drawn; the seed may lie on the device."""
    values = arguments(LENGTHS, kernel_device, width=16, blocks=1)
    for seed in (0, -3, 2**62 + 2**33 + 7):
        drawn = denoise_last(**{**values, "seed": torch.tensor([seed], device=kernel_device)})
        assert torch.equal(drawn, denoise_last(**{**values, "seed": seed}))
        rows = [philox.row_noise(seed, values["row_keys"], draw, 16) for draw in range(3)]
        given = denoise_last(**{**values, "seed": 99, "noise": torch.stack(rows)})
        torch.testing.assert_close(given, drawn, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(drawn, denoise_last(**{**values, "seed": 1}), atol=1e-3)
    assert not torch.allclose(drawn, denoise_last(**{**values, "seed": seed, "row_keys": None}), atol=1e-3)


VARIANTS: dict[str, dict[str, Any]] = {
    "released": {},
    "masked": {"padding": "masked", "positions": "learned"},
    "positions on padding": {"positions": "released"},
    "lambda .1": {"lambda_uncertainty": 0.1},
    "lambda 1": {"lambda_uncertainty": 1.0},
    "guidance": {"condition_dropout": 0.3, "guidance_scale": 2.0, "lambda_uncertainty": 1.0},
    "geodesic": {"geodesic": True, "lambda_uncertainty": 0.5},
    "three blocks": {"denoiser_blocks": 3, "lambda_uncertainty": 1.0},
}


def packed_prefix(state: CachedState, offsets: Tensor, width: int) -> Tensor:
    """The prefix of `CachedEngine` as kernels read it, ``[branches, n, 2, M, D]``; rows of last tokens are zero."""
    n = len(state.caches[0].blocks)
    out = torch.zeros(len(state.caches), n, 2, int(offsets[-1]), width)
    for branch, cache in enumerate(state.caches):
        for block, groups in enumerate(cache.caches):
            for group in groups:
                # Before the prefix stand the pads, behind it the place of the new token.
                skip = group.keys.shape[2] - int(offsets.diff()[group.users].max())
                for place, user in enumerate(range(group.users.start, group.users.stop)):
                    first, last = int(offsets[user]), int(offsets[user + 1]) - 1
                    rows = slice(skip, skip + last - first)
                    out[branch, block, 0, first:last] = group.keys[place, :, rows].transpose(0, 1).flatten(1)
                    out[branch, block, 1, first:last] = group.values[place, :, rows].transpose(0, 1).flatten(1)
    return out


def packed_pads(model: ADRec) -> Tensor | None:
    rows = model.pad_rows()
    if rows is None:
        return None
    assert not isinstance(model.denoiser, MLPDenoiser)
    output, start = model.encoder.pad_states(rows).output, torch.zeros(1, dtype=torch.int64)
    guided = model.config.guidance_scale != 1.0
    inputs = [output, torch.zeros_like(output)] if guided else [output]
    states = [model.denoiser.pad_states(model.mix_pads(values, start)) for values in inputs]
    return torch.stack([pad_rows(state, torch.float32) for state in states])


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda name: name.replace(" ", "-"))
def test_the_twin_computes_what_the_cached_engine_samples(tiny_model: ModelFactory, variant: str) -> None:
    size = {"width": 32, "heads": 2, "max_length": 20, "timesteps": 32, "schedule": "sqrt"}
    model = tiny_model(**{**size, **VARIANTS[variant]})
    assert isinstance(model, ADRec)
    assert not isinstance(model.denoiser, MLPDenoiser)
    generator = torch.Generator().manual_seed(0)
    histories = Jagged.from_lists([torch.randint(1, 41, (n,), generator=generator).tolist() for n in LENGTHS])
    engine = CachedEngine(model)
    with torch.inference_mode():
        state = engine.encode(histories)
        offsets = histories.select(state.order).offsets
        keys_values, pads = packed_prefix(state, offsets, 32), packed_pads(model)
        for steps in (1, 4, 32):
            table = engine.table(steps)
            assert table is not None
            row_keys = torch.arange(len(LENGTHS)) * 1000
            values = {
                "condition": state.last,
                "weights": block_weights(model.denoiser, torch.float32),
                "keys_values": keys_values,
                "pads": pads,
                "offsets": offsets,
                "times": model.time_embedding(table.time),
                "coefficients": torch.stack([table.from_x0, table.from_xt, table.sigma], 1),
                "mix_weight": model.config.lambda_uncertainty,
                "heads": 2,
                "max_length": 20,
                "guidance_scale": model.config.guidance_scale,
                "geodesic": model.config.geodesic,
            }
            expected = engine.sample(state, table, PhiloxNoise(3, row_keys, 32))[state.order]
            found = denoise_last_twin(**values, seed=3, row_keys=row_keys[state.order])
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            noise = torch.randn(steps + 1, len(LENGTHS), 32, generator=generator)
            expected = engine.sample(state, table, ExplicitNoise(noise))[state.order]
            found = denoise_last_twin(**values, noise=noise[:, state.order])
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_twin_in_float64_and_float32_agree() -> None:
    values = arguments(LENGTHS, torch.device("cpu"), torch.float64, branches=2, guidance_scale=1.5)
    double = denoise_last_twin(**{**values, "condition": values["condition"].double()})
    assert_matches(denoise_last_twin(**values), double, torch.float32)
