"""Noise schedules as tables: betas of the forward process, coefficients of the reverse process, respacing.

Source: ADRec (arXiv 2505.19544), the DDPM posterior (Ho et al., arXiv 2006.11239) and respacing (Nichol & Dhariwal,
arXiv 2102.09672, section 4). Everything is computed in float64 and stored in float32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from adrec.errors import ConfigError, nearest

ScheduleName = Literal["linear", "cosine", "sqrt", "trunc_cos", "trunc_lin", "pw_lin", "beta"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)

_PIECEWISE_HEAD = 10


def named_betas(name: str, steps: int) -> np.ndarray:
    """Return the betas of a named schedule, `[steps]` float64.

    Schedules: linear, cosine, sqrt, trunc_cos, trunc_lin (ADRec's default), pw_lin and beta (abar at share u of the way
    is the 1 - u quantile of Beta(.3, 10)). ``trunc_lin`` changes its end value when steps <= 20 and then warns: train
    with more steps and `respace` when sampling instead. Raises ConfigError for an unknown name or too few steps.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"unknown schedule '{name}'{nearest(name, SCHEDULES)}; allowed: {', '.join(SCHEDULES)}")
    if steps < 1:
        raise ConfigError(f"schedule '{name}' was asked for {steps} steps; allowed: 1 or more")
    scale = 1000.0 / steps
    if name == "linear":
        return np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)
    if name == "cosine":
        return _from_alpha_bar(steps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)
    if name == "sqrt":
        return _from_alpha_bar(steps, lambda u: 1.0 - math.sqrt(u + 1e-4))
    if name == "trunc_cos":
        curve = _truncated_cosine
        return np.concatenate([[min(1.0 - curve(0.0), 0.999)], _from_alpha_bar(steps, curve)[: steps - 1]])
    if name == "trunc_lin":
        end = scale * 0.02 + 0.01
        if end > 1.0:
            end = scale * 0.001 + 0.01
            warnings.warn(
                f"schedule 'trunc_lin' at {steps} steps (20 or fewer) ends at beta {end:.3f} and keeps about half of"
                " the signal; train with 32 steps and sample with fewer instead",
                # Said of this line, whoever asks, so that a process says it once.
                stacklevel=1,
            )
        return np.linspace(scale * 1e-4 + 0.01, end, steps, dtype=np.float64)
    if name == "pw_lin":
        if steps <= _PIECEWISE_HEAD:
            raise ConfigError(f"schedule 'pw_lin' was asked for {steps} steps; allowed: {_PIECEWISE_HEAD + 1} or more")
        head = np.linspace(scale * 1e-4 + 0.01, scale * 1e-4, _PIECEWISE_HEAD, dtype=np.float64)
        return np.concatenate([head, np.linspace(scale * 1e-4, scale * 0.02, steps - _PIECEWISE_HEAD)])
    return _from_alpha_bar(steps, lambda u: _beta_quantile(1.0 - u, 0.3, 10), largest=1.0)


def _truncated_cosine(u: float) -> float:
    return math.cos((u + 0.1) / 1.1 * math.pi / 2) ** 2


def _from_alpha_bar(steps: int, alpha_bar: Callable[[float], float], largest: float = 0.999) -> np.ndarray:
    grid = [alpha_bar(index / steps) for index in range(steps + 1)]
    return np.array([min(1.0 - after / before, largest) for before, after in pairwise(grid)])


def _beta_quantile(probability: float, a: float, b: int) -> float:
    """Quantile of the Beta(a, b) distribution for a whole number b, by bisection of its closed-form CDF."""
    if probability in (0.0, 1.0):
        return probability
    # The bisection runs in x^a, in which the CDF is nearly linear, so that tiny quantiles keep their relative accuracy.
    low, high = 0.0, 1.0
    for _ in range(64):
        middle = 0.5 * (low + high)
        term, total, rest = 1.0, 0.0, 1.0 - middle ** (1.0 / a)
        for index in range(b):
            total += term
            term *= (a + index) / (index + 1) * rest
        low, high = (middle, high) if middle * total < probability else (low, middle)
    return high ** (1.0 / a)


@dataclass(frozen=True)
class DiffusionTable:
    """Coefficients of ``S`` reverse steps; row `i` is the i-th least noisy of the steps kept.

    time: `[S]` int64, the trained step each row stands for (what the time embedding is given).
    signal, noise: `[S]` float32, sqrt(abar) and sqrt(1 - abar).
    from_x0, from_xt, sigma: `[S]` float32; ``x_{t-1} = from_x0 x0_hat + from_xt x_t + sigma eps``.
    trained_steps: T of the schedule that was respaced. starts_noisy: x_T is noise; else zero, its mean.
    from_previous: `[S]` float32, what a multistep sampler adds of the x0_hat one step before; None for all others.
    """

    time: Tensor
    signal: Tensor
    noise: Tensor
    from_x0: Tensor
    from_xt: Tensor
    sigma: Tensor
    trained_steps: int
    starts_noisy: bool = True
    from_previous: Tensor | None = None

    @property
    def steps(self) -> int:
        return self.time.numel()

    @cached_property
    def draws(self) -> tuple[int, ...]:
        """Draws of noise that sampling reads, in its order: 0 for x_T, i for the i-th step unless its sigma is 0."""
        later = [self.steps - row for row in reversed(range(1, self.steps)) if float(self.sigma[row]) != 0.0]
        return (0, *later) if self.starts_noisy else tuple(later)


def diffusion_table(
    betas: np.ndarray, time: np.ndarray | None = None, trained_steps: int | None = None
) -> DiffusionTable:
    """Build the DDPM table of a beta schedule.

    The variance is the released code's: ``log([posterior_variance[1], beta[1:]])``, and no noise at the last step.
    Raises ConfigError when a beta is not in (0, 1], which makes abar negative (the linear schedule below 21 steps).
    """
    if not np.all((betas > 0.0) & (betas <= 1.0)):
        worst = float(betas[np.argmax(np.abs(betas - 0.5))])
        raise ConfigError(
            f"a schedule of {len(betas)} steps has beta {worst:.4g}; allowed: above 0, at most 1."
            " Use more steps or another schedule"
        )
    alpha_bar = np.cumprod(1.0 - betas)
    before = np.append(1.0, alpha_bar[:-1])
    # With beta = 1 at the last step 1 - abar is 1, so the divisions are safe for every valid schedule.
    from_x0 = betas * np.sqrt(before) / (1.0 - alpha_bar)
    from_xt = (1.0 - before) * np.sqrt(1.0 - betas) / (1.0 - alpha_bar)
    sigma = np.sqrt(np.append(0.0, betas[1:]))
    steps = len(betas)
    return DiffusionTable(
        time=torch.arange(steps) if time is None else torch.from_numpy(time.astype(np.int64)),
        signal=_float(np.sqrt(alpha_bar)),
        noise=_float(np.sqrt(1.0 - alpha_bar)),
        from_x0=_float(from_x0),
        from_xt=_float(from_xt),
        sigma=_float(sigma),
        trained_steps=steps if trained_steps is None else trained_steps,
    )


def spaced_times(trained_steps: int, steps: int) -> np.ndarray:
    """Return ``steps`` evenly spaced trained steps in rising order, always with T - 1; from 2 steps on also with 0."""
    if not 1 <= steps <= trained_steps:
        raise ConfigError(
            f"steps is {steps}; allowed: 1 to {trained_steps} (the model was trained with {trained_steps})"
        )
    if steps == 1:
        return np.array([trained_steps - 1])
    return np.round(np.linspace(0, trained_steps - 1, steps)).astype(np.int64)


def respace(betas: np.ndarray, steps: int | Sequence[int] | np.ndarray) -> DiffusionTable:
    """Sample a schedule trained with T steps in fewer of them: ``beta'_i = 1 - abar[t_i] / abar[t_(i-1)]``.

    steps: how many, evenly spaced, or which, rising. All T give the trained table itself. Raises ConfigError outside
    1..T, and for trained steps that do not rise or lie outside 0..T - 1.
    """
    trained = len(betas)
    time = spaced_times(trained, steps) if isinstance(steps, int) else np.asarray(steps, dtype=np.int64)
    if len(time) == 0 or time[0] < 0 or time[-1] >= trained or not np.all(np.diff(time) > 0):
        raise ConfigError(f"the trained steps kept are {time.tolist()}; allowed: rising, from 0 to {trained - 1}")
    if len(time) == trained:
        return diffusion_table(betas)
    alpha_bar = np.cumprod(1.0 - betas)[time]
    return diffusion_table(1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1]), time, trained_steps=trained)


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
