"""Noise injection of training by value: the kernel against its twin, the draws against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adrec.noise import noised
from adrec.schedule import diffusion_table, named_betas
from kernels import philox
from kernels import token_noise as module
from kernels._runtime import UnsupportedError, record_launches
from kernels._token_noise_draws import drawn
from kernels.token_noise import ENTRIES, TokenNoised, token_noise, token_noise_twin
from tests.kernels.conftest import assert_matches, embedded, guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TIMESTEPS = 9


def arguments(
    device: torch.device,
    *,
    tokens: int = 37,
    width: int = 20,
    items: int = 11,
    timesteps: int = TIMESTEPS,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> dict[str, Any]:
    """Arguments of `token_noise` with random values between NaN margins; every fifth target is padding."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(1, items + 1, (tokens,), generator=generator)
    targets[4::5] = 0
    table = torch.randn(items + 1, width, generator=generator)
    table[0] = 0.0
    schedule = diffusion_table(named_betas("cosine", timesteps))
    values = {
        "table": table.to(dtype),
        "targets": targets,
        "condition": torch.randn(tokens, width, generator=generator).to(dtype),
        "time_table": torch.randn(timesteps, width, generator=generator).to(dtype),
        "signal": schedule.signal,
        "noise_level": schedule.noise,
    }
    placed = {name: embedded(value.to(device)) for name, value in values.items()}
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in overrides.items()}
    return {**placed, "weight": 0.7, "seed": 5, **given}


def in_float32(values: dict[str, Any]) -> dict[str, Any]:
    """The same numbers as float32, where the twin shows what they should give."""
    return {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in values.items()
    }


def compare(values: dict[str, Any]) -> TokenNoised:
    """Run kernel and twin, and hold z, steps and x_t to each other."""
    with guarded():
        found = token_noise(**values, return_steps=True, return_x_t=True)
    expected = token_noise_twin(**in_float32(values), return_steps=True, return_x_t=True)
    for actual, twin in ((found.z, expected.z), (found.x_t, expected.x_t)):
        assert actual is not None
        assert twin is not None
        assert actual.dtype == values["condition"].dtype
        assert_matches(actual, twin, actual.dtype)
    assert found.steps is not None
    assert expected.steps is not None
    assert torch.equal(found.steps, expected.steps)
    return found


@pytest.mark.parametrize("geodesic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 20, 32, 64, 96, 128, 192, 256])
def test_the_kernel_matches_its_twin(
    kernel_device: torch.device, width: int, dtype: torch.dtype, geodesic: bool
) -> None:
    compare(arguments(kernel_device, width=width, dtype=dtype, geodesic=geodesic))


@pytest.mark.parametrize("geodesic", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"steps": True},
        {"gaussian": True},
        {"steps": True, "gaussian": True, "seed": None},
        {"sequences": True},
        {"sequences": True, "gaussian": True},
        {"seed": 2**62 + 2**33 + 7},
        {"seed": -3},
    ],
    ids=str,
)
def test_what_is_given_replaces_what_is_drawn(
    kernel_device: torch.device, options: dict[str, Any], geodesic: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "steps": torch.randint(TIMESTEPS, (37,), generator=generator),
        "gaussian": torch.randn(37, 20, generator=generator),
        "sequences": torch.arange(37) // 6 + (2**39 - 20),
    }
    given = {name: tensors[name] if value is True else value for name, value in options.items()}
    found = compare(arguments(kernel_device, geodesic=geodesic, **given))
    if "steps" in given:
        assert found.steps is not None
        assert torch.equal(found.steps.cpu(), tensors["steps"])


@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(0, 40),
    width=st.integers(1, 40),
    timesteps=st.integers(1, 40),
    geodesic=st.booleans(),
    shared=st.booleans(),
)
def test_any_shape_matches(
    kernel_device: torch.device, tokens: int, width: int, timesteps: int, geodesic: bool, shared: bool
) -> None:
    sequences = torch.arange(tokens) // 3 if shared else None
    given = {"tokens": tokens, "width": width, "timesteps": timesteps, "geodesic": geodesic, "sequences": sequences}
    compare(arguments(kernel_device, **given))


def test_counters_past_32_bits_and_many_steps(kernel_device: torch.device) -> None:
    """From token 256 on a counter needs its high word; T = 4095 is the most a model may have."""
    values = arguments(kernel_device, tokens=301, width=5, timesteps=4095)
    found = compare(values)
    assert found.steps is not None
    assert int(found.steps.max()) > 4000


def test_no_tokens_and_one(kernel_device: torch.device) -> None:
    for tokens in (0, 1):
        found = compare(arguments(kernel_device, tokens=tokens))
        assert found.z.shape == (tokens, 20)


def test_only_what_is_asked_for_is_returned(kernel_device: torch.device) -> None:
    found = token_noise(**arguments(kernel_device))
    assert found.steps is None
    assert found.x_t is None
    with record_launches() as launches:
        token_noise(**arguments(kernel_device), return_x_t=True, return_steps=True)
    assert len(launches) == 1


def test_each_tensor_has_its_own_storage_dtype(kernel_device: torch.device) -> None:
    """Under autocast c and E are float32 and the time table bf16."""
    values = arguments(kernel_device)
    values["time_table"] = values["time_table"].bfloat16()
    values["table"] = values["table"].half()
    compare(values)


def test_inputs_but_the_table_may_be_strided(kernel_device: torch.device) -> None:
    values = arguments(kernel_device)
    strided = {
        "condition": torch.cat([values["condition"], values["condition"]], 1)[:, :20],
        "time_table": values["time_table"].T.contiguous().T,
        "targets": values["targets"].repeat_interleave(2)[::2],
    }
    assert torch.equal(token_noise(**{**values, **strided}).z, token_noise(**values).z)


def test_draws_are_what_they_are_defined_to_be() -> None:
    """Counters and the integer formula, by plain Python on the Philox words."""
    targets = torch.tensor([3, 0, 7, 1, 2])
    seed, T, D = 2**40 + 11, 1000, 6
    steps, noise = drawn(seed, targets, D, T)
    for token, target in enumerate(targets.tolist()):
        word = int(philox.philox(seed, torch.tensor([(token << 24) + (1 << 12)]))[0])
        assert int(steps[token]) == (word * T // 2**32 if target else 0)
        offsets = torch.tensor([(token << 24) + dimension for dimension in range(D)])
        assert torch.equal(noise[token], philox.randn(seed, offsets))
    sequences = torch.tensor([9, 9, 9, 2**38, 2**38])
    shared, same_noise = drawn(seed, targets, D, T, sequences)
    for token, sequence in enumerate(sequences.tolist()):
        word = int(philox.philox(seed, torch.tensor([(sequence << 24) + (2 << 12)]))[0])
        assert int(shared[token]) == word * T // 2**32
    assert torch.equal(same_noise, noise)


@pytest.mark.parametrize("timesteps", [1, 7, 32, 4095])
def test_steps_are_uniform(timesteps: int) -> None:
    tokens = 40_000
    steps, _ = drawn(3, torch.ones(tokens, dtype=torch.int64), 1, timesteps)
    counts = torch.bincount(steps, minlength=timesteps).double()
    assert len(counts) == timesteps
    expected = tokens / timesteps
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # Four standard deviations of a chi-square of T - 1 degrees of freedom.
    assert abs(chi_square - (timesteps - 1)) <= 4 * (2 * (timesteps - 1)) ** 0.5


def test_a_token_draws_the_same_whatever_follows_it(kernel_device: torch.device) -> None:
    values = arguments(kernel_device)
    whole = token_noise(**values, return_steps=True)
    part = token_noise(
        **{**values, "targets": values["targets"][:13], "condition": values["condition"][:13]}, return_steps=True
    )
    assert whole.steps is not None
    assert part.steps is not None
    assert torch.equal(part.z, whole.z[:13])
    assert torch.equal(part.steps, whole.steps[:13])


def test_a_seed_on_the_device_is_the_same_seed(kernel_device: torch.device) -> None:
    values = arguments(kernel_device)
    tensor = torch.tensor([5], device=kernel_device)
    assert torch.equal(token_noise(**{**values, "seed": tensor}).z, token_noise(**values).z)
    tensor += 1
    assert not torch.equal(token_noise(**{**values, "seed": tensor}).z, token_noise(**values).z)


@pytest.mark.parametrize("geodesic", [False, True])
def test_padding_keeps_its_row(kernel_device: torch.device, geodesic: bool) -> None:
    found = compare(arguments(kernel_device, geodesic=geodesic))
    shared = compare(arguments(kernel_device, geodesic=geodesic, sequences=torch.arange(37) // 37))
    nothing_else = {"targets": torch.zeros(37, dtype=torch.int64)}
    for sequences in (None, torch.arange(37) // 6):
        found_only = compare(arguments(kernel_device, geodesic=geodesic, sequences=sequences, **nothing_else))
        assert found_only.x_t is not None
        assert not bool(found_only.x_t.any())
    padding = arguments(kernel_device)["targets"] == 0
    for result in (found, shared):
        assert result.x_t is not None
        assert bool((result.x_t[padding] == 0.0).all())
    assert found.steps is not None
    assert shared.steps is not None
    assert bool((found.steps[padding] == 0).all())
    assert shared.steps.unique().numel() == 1


@pytest.mark.parametrize("geodesic", [False, True])
def test_the_formula_is_that_of_the_torch_path(geodesic: bool) -> None:
    values = arguments(torch.device("cpu"), tokens=23, geodesic=geodesic)
    values["targets"] = values["targets"].clamp(min=1)
    found = token_noise_twin(**values, return_x_t=True)
    steps, gaussian = drawn(values["seed"], values["targets"], 20, TIMESTEPS)
    clean = values["table"][values["targets"]]
    if geodesic:
        clean = torch.nn.functional.normalize(clean, dim=-1)
    x_t = noised(clean, steps, gaussian, diffusion_table(named_betas("cosine", TIMESTEPS)), geodesic)
    assert found.x_t is not None
    torch.testing.assert_close(found.x_t, x_t, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.z, values["condition"] + 0.7 * (x_t + values["time_table"][steps]))


def test_a_row_of_zeros_has_no_direction_and_gives_no_nan(kernel_device: torch.device) -> None:
    values = arguments(kernel_device, geodesic=True, gaussian=torch.zeros(37, 20))
    values["table"] = torch.zeros_like(values["table"])
    found = compare(values)
    assert found.x_t is not None
    assert bool((found.x_t == 0.0).all())


def test_without_triton_the_twin_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    values = arguments(torch.device("cpu"))
    monkeypatch.setattr(module, "runs_triton", lambda *tensors: False)
    monkeypatch.setattr(module, "_token_noise", None)
    assert torch.equal(token_noise(**values).z, token_noise_twin(**values).z)


def test_every_entry_launches_on_tensors_without_values() -> None:
    for entry in ENTRIES:
        for shape in entry.shapes.values():
            for dtype in entry.dtypes:
                with record_launches() as launches:
                    entry.run(**entry.inputs(shape, dtype, torch.device("meta")))
                assert launches
                cost = entry.cost(shape, dtype)
                assert cost.bytes > 0
                assert cost.flops > 0


def test_entries_run_and_match_at_a_small_shape(kernel_device: torch.device) -> None:
    shape = {"tokens": 19, "width": 24, "items": 7, "timesteps": 5}
    for extra in ({}, {"geodesic": 1}, {"sequences": 1}, {"sparse": 1}):
        for entry in ENTRIES:
            values = entry.inputs({**shape, **extra}, torch.float32, kernel_device)
            for actual, twin in zip(entry.run(**values), entry.twin(**values), strict=True):
                assert (actual is None) == (twin is None)
                if actual is not None:
                    assert_matches(actual, twin)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"table": torch.zeros(12)}, r"table has shape \[12\]; expected \[N \+ 1, D\]"),
    ({"table": torch.zeros(3, 0)}, "table has width 0; allowed: 1 to 4096"),
    ({"table": torch.zeros(3, 4097)}, "table has width 4097; allowed: 1 to 4096"),
    ({"table": torch.zeros(20, 12).T}, "table is not contiguous"),
    ({"table": torch.zeros(12, 20).double()}, "table is torch.float64; allowed: float32, float16, bfloat16"),
    ({"time_table": torch.zeros(0, 20)}, r"time_table is \[0, 20\]; expected \[T, 20\]"),
    ({"time_table": torch.zeros(9, 21)}, r"time_table has shape \[9, 21\]; expected \[9, 20\]"),
    ({"signal": torch.zeros(8)}, r"signal has shape \[8\]; expected \[9\]"),
    ({"signal": torch.zeros(9).half()}, "signal is torch.float16; allowed: float32"),
    ({"noise_level": torch.zeros(9).double()}, "noise_level is torch.float64; allowed: float32"),
    ({"condition": torch.zeros(36, 20)}, r"condition has shape \[36, 20\]; expected \[37, 20\]"),
    ({"targets": torch.zeros(37, dtype=torch.int32)}, "targets is torch.int32; allowed: int64"),
    ({"steps": torch.zeros(36, dtype=torch.int64)}, r"steps has shape \[36\]; expected \[37\]"),
    ({"gaussian": torch.zeros(37, 20, dtype=torch.int64)}, "gaussian is torch.int64; allowed: float32"),
    ({"sequences": torch.zeros(37)}, "sequences is torch.float32; allowed: int64"),
    ({"seed": None}, "seed is None; give steps and gaussian"),
    ({"seed": torch.tensor([1.0])}, "seed is torch.float32 of 1 elements"),
    (
        {"steps": torch.zeros(37, dtype=torch.int64), "sequences": torch.zeros(37, dtype=torch.int64)},
        "steps and sequences are both given",
    ),
]


@pytest.mark.parametrize(("changed", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_is_not_supported_is_named(kernel_device: torch.device, changed: dict[str, Any], message: str) -> None:
    values = arguments(kernel_device)
    placed = {name: value.to(kernel_device) if isinstance(value, Tensor) else value for name, value in changed.items()}
    with pytest.raises(UnsupportedError, match=message):
        token_noise(**{**values, **placed})


def test_tensors_on_two_devices_are_refused() -> None:
    values = arguments(torch.device("cpu"))
    values["condition"] = values["condition"].to("meta")
    with pytest.raises(UnsupportedError, match="tensors are on cpu, meta; expected one device"):
        token_noise(**values)
