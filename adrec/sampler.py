"""Samplers: functions of a denoiser, a coefficient table and a noise source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adrec.noise import NoiseSource, unit
from adrec.schedule import DiffusionTable

Denoiser = Callable[[Tensor, int], Tensor]


def reverse_process(denoise: Denoiser, table: DiffusionTable, noise: NoiseSource, *, geodesic: bool = False) -> Tensor:
    """Run the reverse steps of a table (paper section 4.3); returns ``x0_hat`` of the last call, `[B, D]`.

    Ancestral sampling with a DDPM table; DDIM and DPM-Solver++(2M) are other tables of `adrec.respacing`.

    denoise: ``(x_t [B, D], row) -> x0_hat [B, D]``, where row indexes ``table``. noise: draw 0 is x_T, draw i the noise
    of the i-th reverse step; none is drawn where its coefficient is 0. geodesic: project to the unit sphere after each
    reverse step, whatever the table, as the released code does with DDPM's.
    """
    update = _Update(table, geodesic)
    x_t, previous = update.start(noise), None
    for row in reversed(range(1, table.steps)):
        x0_hat = denoise(x_t, row)
        x_t, previous = update(row, x0_hat, x_t, previous, noise), x0_hat
    return update.final(denoise(x_t, 0))


@dataclass(frozen=True)
class Sampled:
    """Generated representations. rows: `[B, D]`. steps: `[B]` int64, reverse steps each user took."""

    rows: Tensor
    steps: Tensor


def until_stable(
    narrow: Callable[[Tensor], Denoiser],
    table: DiffusionTable,
    noise: NoiseSource,
    best: Callable[[Tensor], Tensor],
    *,
    patience: int = 1,
    geodesic: bool = False,
) -> Sampled:
    """Run the reverse steps of a table, each user only until its best items stay the same.

    After each step the items of x0_hat are ranked. A user whose list, in order, has been that of the step before
    ``patience`` times in a row stops, and x0_hat is its result, as if the plan had ended there; the others go on
    without it. Who never stops gets what `reverse_process` gives (to rounding, where others left the batch; else to the
    last bit).

    narrow: the denoiser of some users, by index `[R]` int64; asked again whenever users leave. best: ``x0_hat [R, D] ->
    items [R, K]``.
    """
    update = _Update(table, geodesic)
    x_t, previous, listed = update.start(noise), None, None
    users = torch.arange(x_t.shape[0], device=x_t.device)
    denoise = narrow(users)
    rows, taken = torch.empty_like(x_t), torch.full_like(users, table.steps)
    stayed = torch.zeros_like(users)
    for row in reversed(range(1, table.steps)):
        x0_hat = denoise(x_t, row)
        items = best(x0_hat)
        if listed is not None:
            stayed = torch.where((items == listed).all(-1), stayed + 1, 0)
        stops = stayed >= patience
        if bool(stops.any()):
            rows[users[stops]] = update.final(x0_hat[stops])
            taken[users[stops]] = table.steps - row
            goes = (~stops).nonzero().squeeze(1)
            if goes.numel() == 0:
                return Sampled(rows, taken)
            users, x_t, x0_hat, items, stayed = (each[goes] for each in (users, x_t, x0_hat, items, stayed))
            previous = None if previous is None else previous[goes]
            noise, denoise = noise.select(goes), narrow(users)
        x_t, previous, listed = update(row, x0_hat, x_t, previous, noise), x0_hat, items
    rows[users] = update.final(denoise(x_t, 0))
    return Sampled(rows, taken)


class _Update:
    """The arithmetic between two calls of a denoiser."""

    def __init__(self, table: DiffusionTable, geodesic: bool) -> None:
        self.table, self.geodesic = table, geodesic
        self.from_x0, self.from_xt, self.sigma = table.from_x0.tolist(), table.from_xt.tolist(), table.sigma.tolist()
        self.from_previous = None if table.from_previous is None else table.from_previous.tolist()

    def start(self, noise: NoiseSource) -> Tensor:
        return noise(0) if self.table.starts_noisy else noise.zeros()

    def __call__(self, row: int, x0_hat: Tensor, x_t: Tensor, previous: Tensor | None, noise: NoiseSource) -> Tensor:
        x_t = self.from_x0[row] * x0_hat + self.from_xt[row] * x_t
        if previous is not None and self.from_previous is not None:
            x_t = x_t + self.from_previous[row] * previous
        if self.sigma[row] != 0.0:
            x_t = x_t + self.sigma[row] * noise(self.table.steps - row)
        return unit(x_t) if self.geodesic else x_t

    def final(self, x0_hat: Tensor) -> Tensor:
        return unit(x0_hat) if self.geodesic else x0_hat


def guided(conditional: Denoiser, unconditional: Denoiser, scale: float) -> Denoiser:
    """Classifier-free guidance on x0: ``uncond + scale (cond - uncond)``."""

    def denoise(x_t: Tensor, row: int) -> Tensor:
        without = unconditional(x_t, row)
        return without + scale * (conditional(x_t, row) - without)

    return denoise
