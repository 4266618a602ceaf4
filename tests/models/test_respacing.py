"""Samplers as tables: closed forms of DDIM and DPM-Solver++(2M), their order of convergence, and spacings."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adrec.config import EarlyStop, ModelConfig, RunConfig, ServingConfig, parse
from adrec.errors import ConfigError
from adrec.noise import ExplicitNoise
from adrec.respacing import (
    ddim_table,
    dpm_solver_table,
    kept_times,
    quadratic_times,
    sampler_name,
    sampling_table,
)
from adrec.sampler import reverse_process
from adrec.schedule import SCHEDULES, DiffusionTable, diffusion_table, named_betas, respace
from kernels.denoise_update import ddim_coefficients

# float32 storage of a table computed in float64: half a unit in the last place of numbers up to 1.
STORED = 6e-8
TRAINED = 32
COLUMNS = ("time", "signal", "noise", "from_x0", "from_xt", "sigma")

plans = st.lists(st.integers(0, TRAINED - 1), min_size=1, max_size=TRAINED, unique=True).map(sorted)
schedules = st.sampled_from(SCHEDULES)


def close(found: Tensor, expected: np.ndarray | list[float], tolerance: float = STORED) -> None:
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=tolerance)


@given(name=schedules, times=plans)
@settings(max_examples=60, deadline=None)
def test_ddpm_over_any_trained_steps_is_the_posterior_between_them(name: str, times: list[int]) -> None:
    """Mean and marginals by Bayes' rule of two Gaussians, row by row; the variance is beta of the jump."""
    betas = named_betas(name, TRAINED)
    alpha_bar = np.cumprod(1.0 - betas)[times]
    table = respace(betas, times)
    close(table.signal, np.sqrt(alpha_bar))
    assert table.time.tolist() == times
    for row in range(1, len(times)):
        after, before = alpha_bar[row], alpha_bar[row - 1]
        jump = after / before
        precision = 1.0 / (1.0 - before) + jump / (1.0 - jump)
        mean = [math.sqrt(before) / (1.0 - before) / precision, math.sqrt(jump) / (1.0 - jump) / precision]
        close(torch.stack([table.from_x0[row], table.from_xt[row]]), mean, 3 * STORED)
        close(table.sigma[row : row + 1] ** 2, [1.0 - jump], 4 * STORED)


@given(name=schedules, times=plans)
@settings(max_examples=60, deadline=None)
def test_ddim_with_eta_one_is_the_ddpm_posterior(name: str, times: list[int]) -> None:
    """Its mean is DDPM's; its variance the posterior's, ``(1 - abar_s) / (1 - abar_t) beta``."""
    betas = named_betas(name, TRAINED)
    alpha_bar = np.cumprod(1.0 - betas)[times]
    before = np.append(1.0, alpha_bar[:-1])
    table, posterior = ddim_table(betas, times, eta=1.0), respace(betas, times)
    close(table.from_x0, posterior.from_x0.double().numpy(), 4 * STORED)
    close(table.from_xt, posterior.from_xt.double().numpy(), 4 * STORED)
    close(table.sigma**2, (1.0 - before) / (1.0 - alpha_bar) * (1.0 - alpha_bar / before), 4 * STORED)


@given(name=schedules, times=plans, eta=st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_ddim_keeps_the_marginals_and_is_what_the_kernels_compute(name: str, times: list[int], eta: float) -> None:
    """From x_t of the forward process the step before has its signal and its variance, whatever eta is."""
    betas = named_betas(name, TRAINED)
    table = ddim_table(betas, times, eta)
    columns = (table.signal, table.noise, table.from_x0, table.from_xt, table.sigma)
    signal, noise, from_x0, from_xt, sigma = (column.double().numpy() for column in columns)
    close(torch.from_numpy(from_x0 + from_xt * signal), np.append(1.0, signal[:-1]), 4 * STORED)
    level = np.append(0.0, noise[:-1])
    np.testing.assert_allclose((from_xt * noise) ** 2 + sigma**2, level**2, rtol=0.0, atol=6 * STORED)
    expected = ddim_coefficients(table.signal, table.noise, eta)
    found = torch.stack([table.from_x0, table.from_xt, table.sigma], 1)
    # The kernels' table starts from float32 levels, whose rounding is divided by the smallest of them.
    torch.testing.assert_close(found, expected, rtol=0.0, atol=4 * STORED / float(table.noise.min()) ** 2)


@given(name=schedules, times=plans)
@settings(max_examples=30, deadline=None)
def test_ddim_without_eta_draws_nothing(name: str, times: list[int]) -> None:
    assert bool((ddim_table(named_betas(name, TRAINED), times).sigma == 0.0).all())


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_trained_step_is_the_trained_table(name: str) -> None:
    betas = named_betas(name, TRAINED)
    trained = diffusion_table(betas)
    for plan in (None, TRAINED, ServingConfig(), ServingConfig(times=tuple(range(TRAINED)))):
        table = sampling_table(betas, plan)
        assert all(torch.equal(getattr(table, column), getattr(trained, column)) for column in COLUMNS)
        assert table.starts_noisy
        assert table.from_previous is None


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m"])
@pytest.mark.parametrize("times", [(31,), (0,), (3, 17)])
def test_the_last_step_returns_x0_hat(sampler: str, times: tuple[int, ...]) -> None:
    plan = ServingConfig.model_validate({"sampler": sampler, "times": times})
    table = sampling_table(named_betas("trunc_lin", TRAINED), plan)
    assert (table.from_x0[0].item(), table.from_xt[0].item(), table.sigma[0].item()) == (1.0, 0.0, 0.0)
    answers = [torch.randn(2, 3, generator=torch.Generator().manual_seed(row)) for row in range(len(times))]
    noise = ExplicitNoise(torch.randn(len(times) + 1, 2, 3))
    assert torch.equal(reverse_process(lambda x_t, row: answers[row], table, noise), answers[0])


def published_multistep(
    denoise: Callable[[Tensor, int], Tensor], alpha_bar: list[float], x: Tensor
) -> tuple[list[Tensor], Tensor]:
    """DPM-Solver++(2M) as algorithm 2 of arXiv 2211.01095 states it, in float64 and in its own variables.

    Returns x at every step of the plan and the last x0_hat. The plan runs from the noisiest step down.
    """
    order = list(reversed(range(len(alpha_bar))))
    signal = [math.sqrt(alpha_bar[row]) for row in order]
    level = [math.sqrt(1.0 - alpha_bar[row]) for row in order]
    half_log_snr = [math.log(a / s) for a, s in zip(signal, level, strict=True)]
    buffer = [denoise(x, order[0])]
    states = [x]
    for i in range(1, len(order)):
        h = half_log_snr[i] - half_log_snr[i - 1]
        direction = buffer[-1]
        if i > 1:
            r = (half_log_snr[i - 1] - half_log_snr[i - 2]) / h
            direction = (1.0 + 1.0 / (2.0 * r)) * buffer[-1] - 1.0 / (2.0 * r) * buffer[-2]
        x = level[i] / level[i - 1] * x - signal[i] * (math.exp(-h) - 1.0) * direction
        states.append(x)
        buffer.append(denoise(x, order[i]))
    return states, buffer[-1]


@given(name=st.sampled_from([name for name in SCHEDULES if name != "beta"]), times=plans, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_multistep_solver_is_the_published_one(name: str, times: list[int], seed: int) -> None:
    betas = named_betas(name, TRAINED)
    start = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def denoise(x_t: Tensor, row: int) -> Tensor:
        return (0.7 * x_t + 0.1 * times[row]).sin()

    seen: list[Tensor] = []

    def watched(x_t: Tensor, row: int) -> Tensor:
        seen.append(x_t)
        return denoise(x_t, row)

    silent = torch.zeros(len(times) + 1, 2, 5, dtype=torch.float64)
    silent[0] = start
    found = reverse_process(watched, dpm_solver_table(betas, times), ExplicitNoise(silent))
    states, expected = published_multistep(denoise, np.cumprod(1.0 - betas)[times].tolist(), start)
    # Coefficients are stored in float32, and an extrapolation far beyond one step enlarges their rounding.
    for mine, theirs in zip(seen, states, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_a_schedule_that_ends_without_signal_has_finite_coefficients() -> None:
    """The beta schedule ends at abar = 0, where the log signal-to-noise ratio is infinite."""
    betas = named_betas("beta", TRAINED)
    assert np.cumprod(1.0 - betas)[-1] == 0.0
    table = dpm_solver_table(betas, [0, 9, 20, 31])
    assert table.from_previous is not None
    for column in (table.from_x0, table.from_xt, table.from_previous):
        assert bool(column.isfinite().all())
    first_order = ddim_table(betas, [0, 9, 20, 31])
    # Nothing can be extrapolated from infinitely far away: the second step is of first order too.
    assert table.from_previous.tolist()[2:] == [0.0, 0.0]
    torch.testing.assert_close(table.from_x0[2:], first_order.from_x0[2:])


@given(name=schedules, times=plans)
@settings(max_examples=40, deadline=None)
def test_up_to_two_steps_the_multistep_solver_is_ddim(name: str, times: list[int]) -> None:
    betas, few = named_betas(name, TRAINED), times[:2]
    solver, ddim = dpm_solver_table(betas, few), ddim_table(betas, few)
    assert solver.from_previous is not None
    assert not bool(solver.from_previous.any())
    close(solver.from_x0, ddim.from_x0.double().numpy(), 4 * STORED)
    close(solver.from_xt, ddim.from_xt.double().numpy(), 4 * STORED)


def end_error(table: DiffusionTable, alpha_bar: np.ndarray) -> float:
    """Distance from the exact solution at the least noisy step kept, for x_0 ~ N(2, .5^2) in one dimension.

    There ``E[x_0 | x_t]`` is linear in x_t, and the probability flow keeps ``(x_t - a m) / sqrt(a^2 v + s^2)``.
    """
    mean, variance = 2.0, 0.25
    kept = alpha_bar[table.time.numpy()]

    def spread(row: int) -> float:
        return math.sqrt(kept[row] * variance + 1.0 - kept[row])

    at_zero: list[Tensor] = []

    def denoise(x_t: Tensor, row: int) -> Tensor:
        if row == 0:
            at_zero.append(x_t)
        signal = math.sqrt(kept[row])
        return mean + signal * variance / spread(row) ** 2 * (x_t - signal * mean)

    start = torch.full((table.steps + 1, 1, 1), 1.3, dtype=torch.float64)
    reverse_process(denoise, table, ExplicitNoise(start))
    quantile = (1.3 - math.sqrt(kept[-1]) * mean) / spread(-1)
    return abs(float(at_zero[0]) - (math.sqrt(kept[0]) * mean + quantile * spread(0)))


def test_orders_of_convergence_on_a_linear_problem() -> None:
    """Twice the steps: DDIM, of first order, halves the error; DPM-Solver++(2M), of second, quarters it."""
    betas = named_betas("cosine", 4000)
    alpha_bar = np.cumprod(1.0 - betas)
    ratio = np.log(alpha_bar / (1.0 - alpha_bar))
    errors: dict[str, list[float]] = {"ddim": [], "dpm++2m": []}
    for steps in (30, 60, 120):
        # Evenly spaced in the log signal-to-noise ratio, between steps where it is moderate.
        wanted = np.linspace(ratio[200], ratio[3800], steps + 1)
        times = np.unique([int(np.abs(ratio - value).argmin()) for value in wanted])
        assert len(times) == steps + 1
        errors["ddim"].append(end_error(ddim_table(betas, times), alpha_bar))
        errors["dpm++2m"].append(end_error(dpm_solver_table(betas, times), alpha_bar))
    orders = {name: np.log2(np.array(found[:-1]) / np.array(found[1:])) for name, found in errors.items()}
    np.testing.assert_allclose(orders["ddim"], 1.0, atol=0.1)
    np.testing.assert_allclose(orders["dpm++2m"], 2.0, atol=0.1)
    assert all(second < first for first, second in zip(errors["ddim"], errors["dpm++2m"], strict=True))


@given(trained=st.integers(1, 1000), data=st.data(), spacing=st.sampled_from(["uniform", "quadratic"]))
@settings(max_examples=120, deadline=None)
def test_spacings_rise_and_hold_both_ends(trained: int, data: st.DataObject, spacing: str) -> None:
    steps = data.draw(st.integers(1, trained))
    times = kept_times(trained, steps, "quadratic" if spacing == "quadratic" else "uniform")
    assert len(times) == steps
    assert times[-1] == trained - 1
    assert steps == 1 or times[0] == 0
    assert bool((np.diff(times) > 0).all())


def test_quadratic_spacing_by_hand() -> None:
    assert quadratic_times(32, 4).tolist() == [0, 3, 14, 31]
    # 31 (i / 8)^2 = 0, .5, 1.9, 4.4, 7.8, ...: the second rounds down to 0, which is taken, and becomes 1.
    assert quadratic_times(32, 9).tolist() == [0, 1, 2, 4, 8, 12, 17, 24, 31]
    assert quadratic_times(5, 5).tolist() == [0, 1, 2, 3, 4]


def test_samplers_have_names() -> None:
    assert [sampler_name(plan) for plan in (3, None, ServingConfig())] == ["ddpm"] * 3
    plan = ServingConfig(sampler="ddim", eta=0.5, start="zero", early_stop=EarlyStop(top=5, patience=2))
    assert sampler_name(plan) == "ddim, eta 0.5, from zero, until the top 5 stays for 2"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"times": [3, 3]}, r"times are \[3, 3\]; allowed: trained steps from 0 on, each above the one before"),
        ({"times": [-1, 3]}, r"times are \[-1, 3\]; allowed: trained steps from 0 on"),
        ({"times": []}, "serving.times is .*at least 1 item"),
        ({"times": [0, 32]}, "serving and model do not fit: times hold 32; allowed: 0 to 31"),
        ({"eta": 0.5}, "eta is 0.5, but only sampler 'ddim' has one; leave it out of 'ddpm'"),
        ({"sampler": "ddim", "eta": 1.5}, "serving.eta is 1.5; allowed: less than or equal to 1"),
        ({"sampler": "euler"}, "serving.sampler is 'euler'; allowed: 'ddpm', 'ddim' or 'dpm\\+\\+2m'"),
        ({"start": "one"}, "serving.start is 'one'; allowed: 'noise' or 'zero'"),
        ({"early_stop": {"top": 6}}, "early_stop.top is 6; allowed: 1 to 5, the size of the catalogue"),
        ({"early_stop": {"patience": 0}}, "serving.early_stop.patience is 0; allowed: greater than or equal to 1"),
        ({"step": 3}, r"unknown key 'serving.step' .*allowed: sampler, eta, times"),
    ],
)
def test_serving_settings_that_fit_no_model_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(RunConfig, {"model": {"items": 5}, "serving": values}, "config.yaml")


def test_a_model_without_steps_takes_no_serving_settings() -> None:
    with pytest.raises(ConfigError, match="a 'sasrec' model has no reverse steps"):
        parse(RunConfig, {"model": {"items": 5, "model": "sasrec"}, "serving": {}}, "config.yaml")
    assert RunConfig(model=ModelConfig(items=5)).serving is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda betas: respace(betas, [4, 2]), r"trained steps kept are \[4, 2\]; allowed: rising, from 0 to 31"),
        (lambda betas: ddim_table(betas, [0, 40]), r"are \[0, 40\]; allowed: rising, from 0 to 31"),
        (lambda betas: dpm_solver_table(betas, []), r"are \[\]; allowed"),
        (lambda betas: ddim_table(betas, [0, 4], eta=-0.1), "eta is -0.1; allowed: 0"),
        (lambda betas: quadratic_times(32, 33), "steps is 33; allowed: 1 to 32"),
    ],
)
def test_bad_plans_name_the_value_and_what_is_allowed(call: Callable[[np.ndarray], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(named_betas("trunc_lin", TRAINED))
