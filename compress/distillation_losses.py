"""What a student is taught by: distances between its answers and its teacher's, as pure functions.

Sources: Hinton et al. (arXiv 1503.02531) for the divergence at a temperature; Xia et al. (ICML 2008) for the likelihood
of a ranking (Plackett-Luce), cut off after its first k places; Salimans & Ho (arXiv 2202.00512) for the weight of a
noise level and the target of progressive distillation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ranking_divergence(student_scores: Tensor, teacher_scores: Tensor, temperature: float = 1.0) -> Tensor:
    """``t^2 KL(softmax(teacher / t) || softmax(student / t))``, a mean over rows.

    student_scores, teacher_scores: `[M, C]` over the same items. t^2 keeps the size of its gradient at any temperature.
    """
    student = (student_scores / temperature).log_softmax(-1)
    teacher = (teacher_scores / temperature).log_softmax(-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1).mean()


def listwise_loss(student_scores: Tensor, teacher_scores: Tensor, places: int) -> Tensor:
    """Minus the log-likelihood of the teacher's first ``places`` items in its order, a mean over rows and places.

    Each place is won against all items that are not placed above it, the unplaced among them. Both are `[M, C]`; with
    fewer items than places, all are placed.
    """
    order = teacher_scores.argsort(dim=-1, descending=True, stable=True)
    scores = student_scores.gather(-1, order)
    remaining = scores.flip(-1).logcumsumexp(-1).flip(-1)
    return (remaining - scores)[:, :places].mean()


def catalogue_sample(targets: Tensor, items: int, count: int | None) -> Tensor | None:
    """Draw the part of the catalogue on which rankings are compared: the targets and ``count`` items more.

    targets: `[M]` int64 in 1..N. Returns rising item ids without repetition, from torch's global generator, or None
    where the whole catalogue is no larger or asked for (count None).
    """
    if count is None or count >= items:
        return None
    chosen = torch.randperm(items, device=targets.device)[:count] + 1
    return torch.cat([chosen, targets]).unique()


def ddim_step(
    x_t: Tensor, x0_hat: Tensor, signal: Tensor, noise: Tensor, signal_to: Tensor, noise_to: Tensor
) -> Tensor:
    """Deterministic step (DDIM, arXiv 2010.02502) from ``(signal, noise)`` to a less noisy level.

    ``signal_to x0_hat + noise_to (x_t - signal x0_hat) / noise``; levels are scalars or `[M, 1]`, sqrt(abar) and
    sqrt(1 - abar).
    """
    return signal_to * x0_hat + noise_to / noise * (x_t - signal * x0_hat)


def halving_target(
    x_t: Tensor, x_to: Tensor, signal: Tensor, noise: Tensor, signal_to: Tensor, noise_to: Tensor
) -> Tensor:
    """The x0 with which one deterministic step leads from x_t to x_to (arXiv 2202.00512, appendix G).

    ``(x_to - noise_to / noise x_t) / (signal_to - noise_to / noise signal)``.
    """
    ratio = noise_to / noise
    return (x_to - ratio * x_t) / (signal_to - ratio * signal)


def level_weight(signal: Tensor, noise: Tensor) -> Tensor:
    """``max(signal^2 / noise^2, 1)``: the signal-to-noise ratio, truncated (arXiv 2202.00512, section 4)."""
    return (signal / noise).square().clamp(min=1.0)


def weighted_error(rows: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared error of `[M, D]` rows, a mean over rows and width; weight: `[M]` or `[M, 1]`."""
    error = (rows - targets).square().mean(-1, keepdim=True)
    return error.mean() if weight is None else (weight.view(-1, 1) * error).mean()
