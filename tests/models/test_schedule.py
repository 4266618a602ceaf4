"""Noise schedules: the authors' betas, the laws of the reverse coefficients, respacing, and bad requests."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from adrec.errors import ConfigError
from adrec.noise import ExplicitNoise, noised
from adrec.sampler import reverse_process
from adrec.schedule import SCHEDULES, DiffusionTable, diffusion_table, named_betas, respace, spaced_times

# float32 storage of a table computed in float64: half a unit in the last place of numbers up to 1.
STORED = 6e-8

schedules = st.sampled_from(SCHEDULES)


def betas_or_skip(name: str, steps: int) -> np.ndarray:
    """Betas of a schedule whose table can be built: enough steps, and no beta above 1 (linear below 21 steps)."""
    assume(name != "pw_lin" or steps > 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        betas = named_betas(name, steps)
    assume(bool((betas <= 1.0).all()))
    return betas


def test_betas_are_the_authors(golden_path: Callable[[str], Path]) -> None:
    stored = np.load(golden_path("betas.npz"))
    seen = set()
    for key in stored.files:
        name, steps = key.rsplit("_", 1)
        seen.add(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = named_betas(name, int(steps))
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, stored[key], rtol=0.0, atol=1e-12, err_msg=key)
    assert seen == set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_turns_signal_into_noise(name: str) -> None:
    table = diffusion_table(named_betas(name, 32))
    assert bool((table.signal[1:] <= table.signal[:-1]).all())
    torch.testing.assert_close(table.signal**2 + table.noise**2, torch.ones(32), rtol=0.0, atol=2e-7)
    assert table.signal[-1] < 0.75
    assert table.trained_steps == table.steps == 32
    assert table.time.tolist() == list(range(32))


@given(name=schedules, steps=st.integers(1, 200))
@settings(max_examples=80, deadline=None)
def test_the_posterior_mean_keeps_the_signal_of_the_step_before(name: str, steps: int) -> None:
    """With x_t = signal[t] x_0 the reverse step must give signal[t - 1] x_0; the first row gives x_0 itself."""
    table = diffusion_table(betas_or_skip(name, steps))
    assert (table.from_x0[0].item(), table.from_xt[0].item(), table.sigma[0].item()) == (1.0, 0.0, 0.0)
    kept = table.from_x0[1:].double() + table.from_xt[1:].double() * table.signal[1:].double()
    torch.testing.assert_close(kept, table.signal[:-1].double(), rtol=0.0, atol=3 * STORED)


@given(name=schedules, steps=st.integers(1, 120), data=st.data())
@settings(max_examples=80, deadline=None)
def test_respaced_rows_keep_the_marginals_of_the_times_kept(name: str, steps: int, data: st.DataObject) -> None:
    betas = betas_or_skip(name, steps)
    fewer = data.draw(st.integers(1, steps))
    trained, table = diffusion_table(betas), respace(betas, fewer)
    assert (table.steps, table.trained_steps) == (fewer, steps)
    torch.testing.assert_close(table.signal, trained.signal[table.time], rtol=0.0, atol=2 * STORED)
    torch.testing.assert_close(table.noise, trained.noise[table.time], rtol=0.0, atol=2 * STORED)
    assert (table.from_x0[0].item(), table.from_xt[0].item(), table.sigma[0].item()) == (1.0, 0.0, 0.0)
    kept = table.from_x0[1:].double() + table.from_xt[1:].double() * table.signal[1:].double()
    torch.testing.assert_close(kept, table.signal[:-1].double(), rtol=0.0, atol=3 * STORED)


@pytest.mark.parametrize("name", SCHEDULES)
def test_sampling_as_trained_uses_the_trained_table(name: str) -> None:
    betas = named_betas(name, 33)
    trained, same = diffusion_table(betas), respace(betas, 33)
    assert same.trained_steps == trained.trained_steps == 33
    for column in ("time", "signal", "noise", "from_x0", "from_xt", "sigma"):
        assert torch.equal(getattr(same, column), getattr(trained, column)), column


@given(trained=st.integers(1, 1000), data=st.data())
@settings(max_examples=150, deadline=None)
def test_kept_times_rise_and_hold_both_ends(trained: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, trained))
    times = spaced_times(trained, steps)
    assert len(times) == steps
    assert times[-1] == trained - 1
    assert steps == 1 or times[0] == 0
    assert bool((np.diff(times) > 0).all())


@given(name=schedules, steps=st.integers(2, 40), data=st.data())
@settings(max_examples=40, deadline=None)
def test_an_oracle_recovers_x0_at_every_number_of_steps(name: str, steps: int, data: st.DataObject) -> None:
    table = respace(betas_or_skip(name, steps), data.draw(st.integers(1, steps)))
    generator = torch.Generator().manual_seed(steps)
    x_0 = torch.randn(3, 5, generator=generator)
    noise = torch.randn(table.steps + 1, 3, 5, generator=generator)
    assert torch.equal(reverse_process(lambda x_t, row: x_0, table, ExplicitNoise(noise)), x_0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [32, 7, 2])
def test_without_noise_the_reverse_process_walks_back_along_the_forward_one(name: str, steps: int) -> None:
    """An oracle of x_0 and silent noise: every x_t on the way is signal[t] x_0 when it starts there."""
    table = respace(named_betas(name, 32), steps)
    x_0 = torch.randn(2, 7, generator=torch.Generator().manual_seed(1))
    silent = torch.zeros(steps + 1, 2, 7)
    silent[0] = table.signal[-1] * x_0
    visited: dict[int, Tensor] = {}

    def oracle(x_t: Tensor, row: int) -> Tensor:
        visited[row] = x_t
        return x_0

    reverse_process(oracle, table, ExplicitNoise(silent))
    assert sorted(visited) == list(range(steps))
    for row, x_t in visited.items():
        torch.testing.assert_close(x_t, table.signal[row] * x_0, rtol=0.0, atol=5e-6)


def test_variance_is_beta_of_the_step_and_none_at_the_last() -> None:
    betas = named_betas("trunc_lin", 32)
    sigma = diffusion_table(betas).sigma.double().numpy()
    np.testing.assert_allclose(sigma[1:] ** 2, betas[1:], rtol=2e-7)
    assert sigma[0] == 0.0


@pytest.mark.parametrize("geodesic", [False, True])
def test_forward_noise_by_hand(geodesic: bool) -> None:
    table: DiffusionTable = diffusion_table(named_betas("cosine", 9))
    clean = torch.nn.functional.normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(2)), dim=-1)
    gaussian = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    steps = torch.tensor([8, 0, 3, 3])
    out = noised(clean, steps, gaussian, table, geodesic)
    for row, step in enumerate(steps.tolist()):
        expected = table.signal[step] * clean[row] + table.noise[step] * gaussian[row]
        if geodesic:
            angle = expected.square().sum().sqrt()
            expected = torch.cos(angle) * clean[row] + torch.sin(angle) * expected / angle
        torch.testing.assert_close(out[row], expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: named_betas("trunc_line", 32), r"unknown schedule 'trunc_line' \(did you mean 'trunc_lin'\?\)"),
        (lambda: named_betas("cosin", 32), r"did you mean 'cosine'.*allowed: linear, cosine, sqrt"),
        (lambda: named_betas("cosine", 0), "asked for 0 steps; allowed: 1 or more"),
        (lambda: named_betas("pw_lin", 10), "'pw_lin' was asked for 10 steps; allowed: 11 or more"),
        (lambda: diffusion_table(named_betas("linear", 19)), r"19 steps has beta 1\.053; allowed: above 0, at most 1"),
        (lambda: spaced_times(32, 0), r"steps is 0; allowed: 1 to 32"),
        (lambda: respace(named_betas("trunc_lin", 32), 0), r"steps is 0; allowed: 1 to 32"),
        (lambda: respace(named_betas("trunc_lin", 32), 33), r"steps is 33; allowed: 1 to 32 .*trained with 32"),
    ],
)
def test_bad_requests_name_the_value_and_what_is_allowed(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_piecewise_schedule_of_eleven_steps_can_be_built() -> None:
    assert len(named_betas("pw_lin", 11)) == 11


def test_trunc_lin_warns_where_it_changes_its_end() -> None:
    with pytest.warns(UserWarning, match="'trunc_lin' at 20 steps") as caught:
        changed = named_betas("trunc_lin", 20)
    assert "train with 32 steps and sample with fewer" in str(caught[0].message)
    assert changed[-1] == pytest.approx(0.06)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert named_betas("trunc_lin", 21)[-1] == pytest.approx(20 / 21 + 0.01)
