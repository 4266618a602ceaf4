"""Fewer reverse steps from a trained schedule: which trained steps are kept, and the coefficients of each sampler.

Every sampler is a `DiffusionTable`, so whatever runs a table runs all of them; DPM-Solver++(2M) reads one column more.
Respacing: Nichol & Dhariwal (arXiv 2102.09672, section 4). DDIM: Song et al. (arXiv 2010.02502, equations 12 and 16;
quadratic spacing, appendix D.2). DPM-Solver++(2M) for x0-prediction: Lu et al. (arXiv 2211.01095, algorithm 2).
Everything is computed in float64 and stored in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from adrec.config import ModelConfig, ServingConfig
from adrec.errors import ConfigError
from adrec.schedule import DiffusionTable, diffusion_table, respace, spaced_times

Steps = int | ServingConfig | None
"""How a run is sampled: a count (DDPM, evenly spaced), settings, or None for DDPM as trained."""
Spacing = Literal["uniform", "quadratic"]


def quadratic_times(trained_steps: int, steps: int) -> np.ndarray:
    """Return ``steps`` trained steps ``(T - 1) (i / (S - 1))^2`` in rising order: dense where little noise is left.

    Where rounding would repeat a step, the next one is taken. One step is T - 1. Raises ConfigError outside 1..T.
    """
    times = spaced_times(trained_steps, steps)
    if steps == 1:
        return times
    places = np.arange(steps)
    wanted = np.round((trained_steps - 1) * (places / (steps - 1)) ** 2).astype(np.int64)
    return np.maximum.accumulate(wanted - places) + places


def kept_times(trained_steps: int, steps: int, spacing: Spacing) -> np.ndarray:
    """Trained steps of a spacing by name, rising; see `spaced_times` and `quadratic_times`."""
    return quadratic_times(trained_steps, steps) if spacing == "quadratic" else spaced_times(trained_steps, steps)


def sampling_table(betas: np.ndarray, steps: Steps) -> DiffusionTable:
    """Coefficients of a plan over the schedule ``betas`` `[T]`; see `Steps`.

    Raises ConfigError for a count outside 1..T or a trained step beyond T - 1.
    """
    if steps is None:
        return diffusion_table(betas)
    if isinstance(steps, int):
        return respace(betas, steps)
    times = np.arange(len(betas)) if steps.times is None else np.array(steps.times, dtype=np.int64)
    if steps.sampler == "ddim":
        table = ddim_table(betas, times, steps.eta)
    elif steps.sampler == "dpm++2m":
        table = dpm_solver_table(betas, times)
    else:
        table = respace(betas, times)
    return replace(table, starts_noisy=steps.start == "noise")


def step_count(steps: Steps, model: ModelConfig) -> int | None:
    """Reverse steps of a plan, at most; None for a model without any."""
    if model.model != "adrec":
        return None
    if isinstance(steps, ServingConfig):
        return steps.count(model.timesteps)
    return model.timesteps if steps is None else steps


def sampler_name(steps: Steps) -> str:
    """A plan's sampler in words, such as ``ddim, eta 0.5, from zero``."""
    if not isinstance(steps, ServingConfig):
        return "ddpm"
    parts: list[str] = [steps.sampler]
    if steps.eta:
        parts.append(f"eta {steps.eta:g}")
    if steps.start == "zero":
        parts.append("from zero")
    if steps.early_stop is not None:
        parts.append(f"until the top {steps.early_stop.top} stays for {steps.early_stop.patience}")
    return ", ".join(parts)


def ddim_table(betas: np.ndarray, times: Sequence[int] | np.ndarray, eta: float = 0.0) -> DiffusionTable:
    """DDIM over the trained steps ``times`` (rising): eta 0 is deterministic, 1 has the DDPM posterior's variance.

    ``sigma = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s)`` from step t to the kept step s below it.
    """
    if not 0.0 <= eta <= 1.0:
        raise ConfigError(f"eta is {eta}; allowed: 0 (deterministic) to 1 (the variance of the DDPM posterior)")
    alpha_bar, before = _levels(betas, times)
    sigma = eta * np.sqrt((1.0 - before) / (1.0 - alpha_bar) * (1.0 - alpha_bar / before))
    from_xt = np.sqrt(np.maximum(1.0 - before - sigma**2, 0.0) / (1.0 - alpha_bar))
    return _table(betas, times, np.sqrt(before) - from_xt * np.sqrt(alpha_bar), from_xt, sigma)


def dpm_solver_table(betas: np.ndarray, times: Sequence[int] | np.ndarray) -> DiffusionTable:
    """DPM-Solver++(2M) over the trained steps ``times`` (rising): deterministic, of second order.

    It extrapolates from the last two x0_hat, so the first step is of first order, which is DDIM's; the last returns
    x0_hat. Up to two steps this is DDIM.
    """
    alpha_bar, before = _levels(betas, times)
    signal_to_noise = np.sqrt(alpha_bar / (1.0 - alpha_bar))
    # exp(-h) of the half-log signal-to-noise ratios h apart; no logarithm of abar = 0, where a schedule may end.
    shrink = np.append(0.0, signal_to_noise[1:] / signal_to_noise[:-1])
    weight = np.sqrt(before) * (1.0 - shrink)
    from_xt = np.sqrt((1.0 - before) / (1.0 - alpha_bar))
    extrapolation = np.zeros(len(weight))
    if len(weight) > 2:
        step = -np.log(shrink[1:-1])
        # From a step without signal h is infinite and nothing is extrapolated: 1 / inf is 0.
        with np.errstate(divide="ignore"):
            step_before = -np.log(shrink[2:])
        extrapolation[1:-1] = step / (2.0 * step_before)
    table = _table(betas, times, weight * (1.0 + extrapolation), from_xt, np.zeros(len(weight)))
    return replace(table, from_previous=torch.from_numpy((-weight * extrapolation).astype(np.float32)))


def _levels(betas: np.ndarray, times: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """abar of each kept step, and of the kept step below it (1 below the first)."""
    alpha_bar = np.cumprod(1.0 - betas)[respace(betas, times).time.numpy()]
    return alpha_bar, np.append(1.0, alpha_bar[:-1])


def _table(
    betas: np.ndarray, times: Sequence[int] | np.ndarray, from_x0: np.ndarray, from_xt: np.ndarray, sigma: np.ndarray
) -> DiffusionTable:
    """The respaced table with another sampler's coefficients."""
    x0, xt, noise = (torch.from_numpy(column.astype(np.float32)) for column in (from_x0, from_xt, sigma))
    return replace(respace(betas, times), from_x0=x0, from_xt=xt, sigma=noise)
