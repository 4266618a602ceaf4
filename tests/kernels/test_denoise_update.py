"""One reverse step by value: the kernel against its twin and a sampler, its noise, DDIM's coefficients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from adrec.noise import PhiloxNoise
from adrec.sampler import reverse_process
from adrec.schedule import DiffusionTable, named_betas, respace
from kernels import denoise_update as module
from kernels import philox
from kernels._runtime import UnsupportedError, record_launches
from kernels.denoise_update import ENTRIES, ddim_coefficients, denoise_update, denoise_update_twin
from tests.kernels.conftest import COMPILE_BACKEND, assert_matches, embedded, guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = 7


def table_of(steps: int = ROWS) -> DiffusionTable:
    return respace(named_betas("trunc_lin", 32), steps)


def coefficients_of(table: DiffusionTable) -> Tensor:
    return torch.stack([table.from_x0, table.from_xt, table.sigma], 1)


def arguments(
    device: torch.device, *, users: int = 13, width: int = 20, dtype: torch.dtype = torch.float32, **overrides: Any
) -> dict[str, Any]:
    """Arguments of `denoise_update` with random values between NaN margins."""
    generator = torch.Generator().manual_seed(0)
    values = {
        "x0_hat": torch.randn(users, width, generator=generator).to(dtype),
        "x_t": torch.randn(users, width, generator=generator).to(dtype),
        "coefficients": coefficients_of(table_of()),
        "row_keys": torch.randperm(users, generator=generator) + (2**39 - users),
    }
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in overrides.items()}
    return {**{name: embedded(value.to(device)) for name, value in values.items()}, "row": 3, "seed": 5, **given}


def compare(values: dict[str, Any]) -> Tensor:
    """Hold the kernel, copying and in place, to the twin in float32 on the same numbers."""
    wide = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in values.items()
    }
    expected = denoise_update_twin(**wide)
    with guarded():
        found = denoise_update(**values)
    assert found.dtype == values["x_t"].dtype
    assert_matches(found, expected, found.dtype)
    with guarded():
        x_t = torch.empty_like(values["x_t"]).copy_(values["x_t"])
        assert denoise_update(**{**values, "x_t": x_t}, in_place=True) is x_t
    assert torch.equal(x_t, found)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [9, 20, 32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("users", [1, 67])
def test_the_kernel_matches_its_twin(kernel_device: torch.device, users: int, width: int, dtype: torch.dtype) -> None:
    compare(arguments(kernel_device, users=users, width=width, dtype=dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"row": 0},
        {"row": ROWS - 1, "draw": 0},
        {"row": torch.tensor([4])},
        {"row": torch.tensor([0])},
        {"row": torch.tensor(5), "draw": torch.tensor(4095)},
        {"row": 2, "draw": torch.tensor([9])},
        {"row_keys": None},
        {"seed": 2**62 + 2**33 + 7},
        {"seed": None, "noise": torch.linspace(-2.0, 2.0, 13 * 20).view(13, 20)},
        {"noise": torch.linspace(-2.0, 2.0, 13 * 20).view(13, 20).bfloat16()},
        {"coefficients": torch.tensor([0.3, 0.6, 0.2]), "row": 0, "draw": 4},
    ],
    ids=str,
)
def test_every_option_matches_the_twin(kernel_device: torch.device, options: dict[str, Any]) -> None:
    compare(arguments(kernel_device, **options))


@settings(max_examples=12, deadline=None)
@given(
    users=st.integers(0, 40),
    width=st.integers(1, 40),
    row=st.integers(0, ROWS - 1),
    draw=st.none() | st.integers(0, 4095),
    coefficients=st.lists(st.floats(-2.0, 2.0, width=32), min_size=3, max_size=3),
)
def test_any_shape_and_coefficients_match(
    kernel_device: torch.device, users: int, width: int, row: int, draw: int | None, coefficients: list[float]
) -> None:
    table = torch.zeros(ROWS, 3)
    table[row] = torch.tensor(coefficients)
    # The kernel and its twin may cancel differently, so an offset keeps the result away from zero.
    table[row, 0] += 4.0
    compare(arguments(kernel_device, users=users, width=width, row=row, draw=draw, coefficients=table))


def test_storage_dtypes_may_differ(kernel_device: torch.device) -> None:
    values = arguments(kernel_device, dtype=torch.float16)
    values["x0_hat"] = values["x0_hat"].float()
    compare(values)


def test_no_users_give_no_rows(kernel_device: torch.device) -> None:
    assert compare(arguments(kernel_device, users=0)).shape == (0, 20)


def test_a_device_row_and_draw_are_the_same_numbers(kernel_device: torch.device) -> None:
    values = arguments(kernel_device)
    for row in range(ROWS):
        tensor = torch.tensor([row], device=kernel_device)
        expected = denoise_update(**{**values, "row": row})
        assert torch.equal(denoise_update(**{**values, "row": tensor}), expected)
        explicit = {"row": row, "draw": torch.tensor([ROWS - row], device=kernel_device)}
        assert torch.equal(denoise_update(**{**values, **explicit}), expected)


def test_a_sigma_of_zero_draws_and_reads_no_noise(kernel_device: torch.device) -> None:
    """x_0 itself is the last step's result, to the bit, whatever the noise would have been."""
    values = arguments(kernel_device, row=0)
    assert torch.equal(denoise_update(**values), values["x0_hat"])
    poisoned = torch.full((13, 20), torch.nan, device=kernel_device)
    for function in (denoise_update, denoise_update_twin):
        found = function(**{**values, "seed": None, "noise": poisoned})
        assert torch.equal(found, values["x0_hat"])


def test_noise_follows_the_contract(kernel_device: torch.device) -> None:
    """eps is that of the row's key and the draw, wherever the row is in the batch."""
    values = arguments(kernel_device, coefficients=torch.tensor([0.0, 0.0, 1.0]), row=0, draw=6)
    found = denoise_update(**values)
    expected = philox.row_noise(5, values["row_keys"], 6, 20)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=5e-7)
    order = torch.tensor([11, 0, 5], device=kernel_device)
    some = {name: values[name][order] for name in ("x0_hat", "x_t", "row_keys")}
    assert torch.equal(denoise_update(**{**values, **some}), found[order])


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_walk_of_updates_is_the_sampler(kernel_device: torch.device, steps: int) -> None:
    table, width = table_of(steps), 12
    keys = torch.tensor([4, 2**38, 9], device=kernel_device)
    noise = PhiloxNoise(2**40 + 3, keys, width)

    def denoise(x_t: Tensor, row: int) -> Tensor:
        return (0.5 * x_t + row).sin()

    expected = reverse_process(denoise, table, noise)
    coefficients = coefficients_of(table).to(kernel_device)
    x_t = noise(0).clone()
    for row in reversed(range(steps)):
        x0_hat = denoise(x_t, row)
        denoise_update(x0_hat, x_t, coefficients, row, seed=noise.seed, row_keys=keys, in_place=True)
    torch.testing.assert_close(x_t, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5, 32])
@pytest.mark.parametrize("name", ["trunc_lin", "cosine", "sqrt"])
def test_ddim_keeps_the_marginals_at_any_eta(name: str, steps: int) -> None:
    """From x_t = signal x_0 + level eps a step gives the signal and the variance of the step before (equation 12)."""
    table = respace(named_betas(name, 32), steps)
    signal, level = table.signal.double(), table.noise.double()
    before = torch.cat([torch.ones(1).double(), signal[:-1]])
    for eta in (0.0, 0.3, 1.0):
        from_x0, from_xt, sigma = ddim_coefficients(table.signal, table.noise, eta).double().unbind(1)
        torch.testing.assert_close(from_x0 + from_xt * signal, before, rtol=0.0, atol=2e-7)
        variance = (from_xt * level) ** 2 + sigma**2
        torch.testing.assert_close(variance, 1.0 - before**2, rtol=0.0, atol=1e-6)
        assert bool((sigma == 0.0).all()) == (eta == 0.0 or steps == 1)
        assert (from_x0[0].item(), from_xt[0].item(), sigma[0].item()) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("steps", [2, 9, 32])
def test_ddim_at_eta_one_is_the_ddpm_posterior(steps: int) -> None:
    """Same mean as the table of the sampler; the variance is the posterior's, not the released code's."""
    table = respace(named_betas("trunc_lin", 32), steps)
    found = ddim_coefficients(table.signal, table.noise, 1.0)
    torch.testing.assert_close(found[:, 0], table.from_x0, rtol=0.0, atol=2e-6)
    torch.testing.assert_close(found[:, 1], table.from_xt, rtol=0.0, atol=2e-6)
    level = table.noise.double()
    before = torch.cat([torch.zeros(1).double(), level[:-1]])
    beta = 1.0 - (table.signal.double() / torch.cat([torch.ones(1).double(), table.signal.double()[:-1]])) ** 2
    torch.testing.assert_close(found[:, 2].double(), before / level * beta.sqrt(), rtol=0.0, atol=2e-6)


def test_ddim_without_noise_walks_straight_to_an_oracles_x0(kernel_device: torch.device) -> None:
    """With the true x_0 the implied noise never changes, so every x_t on the way is known."""
    table = table_of(5)
    x_0, eps = arguments(kernel_device)["x0_hat"], arguments(kernel_device)["x_t"]
    coefficients = ddim_coefficients(table.signal, table.noise).to(kernel_device)
    x_t = table.signal[4].item() * x_0 + table.noise[4].item() * eps
    for row in range(4, 0, -1):
        x_t = denoise_update(x_0, x_t, coefficients, row, seed=0)
        expected = table.signal[row - 1].item() * x_0 + table.noise[row - 1].item() * eps
        torch.testing.assert_close(x_t, expected, rtol=0.0, atol=2e-6)
    assert torch.equal(denoise_update(x_0, x_t, coefficients, 0, seed=0), x_0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [0, 3, torch.tensor([3])], ids=str)
def test_gradients_match_the_twins(kernel_device: torch.device, row: int | Tensor, dtype: torch.dtype) -> None:
    values = arguments(kernel_device, dtype=dtype, row=row)
    upstream = torch.randn(13, 20, generator=torch.Generator().manual_seed(3)).to(kernel_device, dtype)
    results = []
    for function, kind in ((denoise_update, dtype), (denoise_update_twin, torch.float32)):
        leaves = {name: values[name].detach().to(kind).requires_grad_() for name in ("x0_hat", "x_t")}
        out = function(**{**values, **leaves})
        results.append(torch.autograd.grad(out, list(leaves.values()), upstream.to(kind)))
    for actual, twin in zip(*results, strict=True):
        assert actual.dtype == dtype
        assert_matches(actual, twin, dtype)


def test_the_twins_gradients_are_those_of_finite_differences() -> None:
    values = arguments(torch.device("cpu"), users=3, width=4)
    leaves = tuple(values.pop(name).double().requires_grad_() for name in ("x0_hat", "x_t"))
    assert torch.autograd.gradcheck(lambda x0_hat, x_t: denoise_update_twin(x0_hat, x_t, **values), leaves)


def operator_arguments(values: dict[str, Any], **options: Any) -> tuple[Any, ...]:
    device = values["x_t"].device
    given = {"row_tensor": None, "row": 3, "seed": torch.tensor([5], device=device), "row_keys": None}
    given |= {"draw_tensor": None, "draw": 4, "noise": None, **options}
    return (values["x_t"], values["x0_hat"], values["coefficients"], *given.values())


def test_operators_keep_their_contract(kernel_device: torch.device) -> None:
    values = arguments(kernel_device)
    place = torch.tensor([2], device=kernel_device)
    opcheck(module._denoise_update_.op, operator_arguments(values))
    for options in ({}, {"row_tensor": place, "draw": None, "row_keys": values["row_keys"]}, {"draw_tensor": place}):
        leaves = {name: values[name].detach().requires_grad_() for name in ("x_t", "x0_hat")}
        opcheck(module._denoise_update.op, operator_arguments({**values, **leaves}, **options))


@pytest.mark.parametrize("in_place", [False, True])
def test_it_compiles_without_a_break(kernel_device: torch.device, in_place: bool) -> None:
    values = arguments(kernel_device)
    expected = denoise_update(**values) * 2.0

    def step(x_t: Tensor) -> Tensor:
        return denoise_update(**{**values, "x_t": x_t}, in_place=in_place) * 2.0

    x_t = values["x_t"].clone()
    compiled = torch.compile(step, fullgraph=True, backend=COMPILE_BACKEND)
    assert torch.equal(compiled(x_t), expected)
    assert torch.equal(x_t * 2.0, expected) == in_place


def test_without_triton_the_twin_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    values = arguments(torch.device("cpu"))
    monkeypatch.setattr(module, "runs_triton", lambda *tensors: False)
    monkeypatch.setattr(module, "_denoise_update", None)
    assert torch.equal(denoise_update(**values), denoise_update_twin(**values))
    x_t = values["x_t"].clone()
    assert denoise_update(**{**values, "x_t": x_t}, in_place=True) is x_t
    assert torch.equal(x_t, denoise_update_twin(**values))


def test_every_entry_launches_once_on_tensors_without_values(kernel_device: torch.device) -> None:
    (entry,) = ENTRIES
    for shape in entry.shapes.values():
        for dtype in entry.dtypes:
            with record_launches() as launches:
                entry.run(**entry.inputs(shape, dtype, torch.device("meta")))
            assert len(launches) == 1
            assert entry.cost(shape, dtype).bytes > 0
    values = entry.inputs({"users": 5, "width": 24, "steps": 4}, torch.float32, kernel_device)
    assert_matches(entry.run(**values), entry.twin(**values))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x_t": torch.zeros(13)}, r"x_t has shape \[13\]; expected \[B, D\]"),
    ({"x_t": torch.zeros(13, 4097)}, "x_t has width 4097; allowed: 1 to 4096"),
    ({"x_t": torch.zeros(13, 0)}, "x_t has width 0; allowed: 1 to 4096"),
    ({"x_t": torch.zeros(13, 20).double()}, "x_t is torch.float64; allowed: float32, float16, bfloat16"),
    ({"x0_hat": torch.zeros(13, 21)}, r"x0_hat has shape \[13, 21\]; expected \[13, 20\]"),
    ({"noise": torch.zeros(12, 20)}, r"noise has shape \[12, 20\]; expected \[13, 20\]"),
    ({"row_keys": torch.zeros(12, dtype=torch.int64)}, r"row_keys has shape \[12\]; expected \[13\]"),
    ({"row_keys": torch.zeros(13)}, "row_keys is torch.float32; allowed: int64"),
    ({"coefficients": torch.zeros(4)}, r"coefficients are \[4\]; expected \[3\] or \[S, 3\]"),
    ({"coefficients": torch.zeros(7, 3).double()}, "coefficients are torch.float64; allowed: float32"),
    ({"coefficients": torch.zeros(4096, 3)}, "draw is None with 4096 rows; allowed: up to 4095"),
    ({"row": 7}, "row is 7; allowed: 0 to 6"),
    ({"row": -1}, "row is -1; allowed: 0 to 6"),
    ({"draw": 4096}, "draw is 4096; allowed: 0 to 4095"),
    ({"row": torch.tensor([1.0])}, "row is torch.float32 of 1 elements; expected an int or 1 int64"),
    ({"draw": torch.tensor([1, 2])}, "draw is torch.int64 of 2 elements; expected an int or 1 int64"),
    ({"seed": None}, "seed and noise are None; give one, also where s is 0"),
    ({"x_t": torch.zeros(20, 13).T, "in_place": True}, "x_t is not contiguous; it must be to be written in place"),
    ({"x_t": torch.zeros(13, 20, requires_grad=True), "in_place": True}, "in_place has no gradient"),
]


@pytest.mark.parametrize(("changed", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_is_not_supported_is_named(kernel_device: torch.device, changed: dict[str, Any], message: str) -> None:
    values = arguments(kernel_device, **changed)
    with pytest.raises(UnsupportedError, match=message):
        denoise_update(**values)


def test_eta_is_between_ddim_and_ddpm() -> None:
    with pytest.raises(UnsupportedError, match=r"eta is 1\.5; allowed: 0 to 1"):
        ddim_coefficients(torch.ones(3), torch.ones(3), 1.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that torch can use")
def test_one_captured_step_replays_a_whole_walk() -> None:
    """The row is read on the device, so the graph of one step runs all of them with fresh noise."""
    device = torch.device("cuda")
    table = table_of(ROWS)
    coefficients = coefficients_of(table).to(device)
    keys = torch.arange(33, device=device)
    noise = PhiloxNoise(11, keys, 128)
    row, seed = torch.tensor([ROWS - 1], device=device), torch.tensor([11], device=device)
    x_t = noise(0).clone()

    def step() -> None:
        x0_hat = (0.5 * x_t).sin()
        denoise_update(x0_hat, x_t, coefficients, row, seed=seed, row_keys=keys, in_place=True)
        row.sub_(1)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    x_t.copy_(noise(0))
    row.fill_(ROWS - 1)
    for _ in range(ROWS):
        graph.replay()
    expected = reverse_process(lambda x, _: (0.5 * x).sin(), table, noise)
    torch.testing.assert_close(x_t, expected, rtol=1e-5, atol=1e-5)
