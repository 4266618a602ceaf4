"""Samplers: functions of a denoiser, a coefficient table and a noise source."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from adrec.noise import NoiseSource, unit
from adrec.schedule import DiffusionTable

Denoiser = Callable[[Tensor, int], Tensor]


def ddpm(denoise: Denoiser, table: DiffusionTable, noise: NoiseSource, *, geodesic: bool = False) -> Tensor:
    """Ancestral sampling of one vector per row (paper section 4.3); returns ``x0_hat`` of the last call, `[B, D]`.

    denoise: ``(x_t [B, D], row) -> x0_hat [B, D]``, where row indexes ``table``. noise: draw 0 is x_T, draw i the noise
    of the i-th reverse step; the last step adds none. geodesic: project to the unit sphere after each reverse step.
    """
    from_x0, from_xt, sigma = table.from_x0.tolist(), table.from_xt.tolist(), table.sigma.tolist()
    x_t = noise(0)
    for draw, row in enumerate(reversed(range(1, table.steps)), start=1):
        x_t = from_x0[row] * denoise(x_t, row) + from_xt[row] * x_t + sigma[row] * noise(draw)
        if geodesic:
            x_t = unit(x_t)
    x0_hat = denoise(x_t, 0)
    return unit(x0_hat) if geodesic else x0_hat


def guided(conditional: Denoiser, unconditional: Denoiser, scale: float) -> Denoiser:
    """Classifier-free guidance on x0: ``uncond + scale (cond - uncond)``."""

    def denoise(x_t: Tensor, row: int) -> Tensor:
        without = unconditional(x_t, row)
        return without + scale * (conditional(x_t, row) - without)

    return denoise
