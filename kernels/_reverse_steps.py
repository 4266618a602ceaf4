"""Reverse steps on the host: checks of what `denoise_last` and `denoise_last_mlp` are given, and their twins' loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import philox
from kernels._runtime import require

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NARROWEST, WIDEST = 8, 256
NARROWEST_HEAD, WIDEST_HEAD = 8, 128
MOST_STEPS = (1 << philox.DRAW_BITS) - 1
Requirement = tuple[str, Tensor | None, Sequence[int], Sequence[torch.dtype]]


def check_tensors(requirements: Sequence[Requirement]) -> None:
    """Raise UnsupportedError for a tensor of another shape or dtype than required; None is always allowed."""
    for name, tensor, shape, dtypes in requirements:
        if tensor is not None:
            require(list(tensor.shape) == list(shape), f"{name} has shape {list(tensor.shape)}; expected {list(shape)}")
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            require(tensor.dtype in dtypes, f"{name} is {tensor.dtype}; allowed: {allowed}")


def check_contiguous(tensors: dict[str, Tensor | None]) -> None:
    """Raise UnsupportedError for a tensor that a kernel reads in place and that is not contiguous."""
    for name, tensor in tensors.items():
        require(
            tensor is None or tensor.is_contiguous(),
            f"{name} is not contiguous; keep {name}.contiguous() between calls",
        )


def check_steps(
    condition: Tensor, times: Tensor, coefficients: Tensor, row_keys: Tensor | None, noise: Tensor | None
) -> None:
    """Raise UnsupportedError unless widths, steps and noise fit; see `kernels.denoise_last`."""
    require(condition.dim() == 2, f"condition has shape {list(condition.shape)}; expected [B, D]")
    B, D = condition.shape
    require(NARROWEST <= D <= WIDEST, f"width is {D}; allowed: {NARROWEST} to {WIDEST}; use engine 'cached' otherwise")
    require(times.dim() == 2, f"times has shape {list(times.shape)}; expected [S, {D}]")
    S = times.shape[0]
    require(1 <= S <= MOST_STEPS, f"times has {S} steps; allowed: 1 to {MOST_STEPS}")
    check_tensors(
        (
            ("condition", condition, [B, D], DTYPES),
            ("times", times, [S, D], DTYPES[:1]),
            ("coefficients", coefficients, [S, 3], DTYPES[:1]),
            ("row_keys", row_keys, [B], (torch.int64,)),
            ("noise", noise, [S + 1, B, D], DTYPES),
        )
    )


def reverse_steps(
    denoise: Callable[[Tensor, int], Tensor],
    rows: int,
    times: Tensor,
    coefficients: Tensor,
    dtype: torch.dtype,
    *,
    seed: int | Tensor,
    row_keys: Tensor | None,
    noise: Tensor | None,
    mix_weight: float,
    guidance_scale: float,
    geodesic: bool,
) -> Tensor:
    """All reverse steps in pure torch; returns x0_hat `[rows, D]` in ``dtype``.

    denoise: ``(mix_weight (x_t + e_t) [rows, D], branch) -> x0_hat``, branch 0 with the condition and 1 without.
    """
    S, D = times.shape
    # Where noise is given nothing is drawn: reading a seed from the device would wait for it.
    key = 0 if noise is not None else int(seed)
    keys = torch.arange(rows, device=times.device) if row_keys is None else row_keys

    def gaussian(draw: int) -> Tensor:
        drawn = philox.row_noise(key, keys, draw, D) if noise is None else noise[draw]
        return drawn.to(dtype)

    def x0(x_t: Tensor, row: int) -> Tensor:
        mixed = mix_weight * (x_t + times[row].to(dtype))
        conditional = denoise(mixed, 0)
        if guidance_scale == 1.0:
            return conditional
        without = denoise(mixed, 1)
        return without + guidance_scale * (conditional - without)

    def projected(values: Tensor) -> Tensor:
        return F.normalize(values, dim=-1) if geodesic else values

    table = coefficients.to(dtype)
    x_t = gaussian(0)
    for row in range(S - 1, 0, -1):
        from_x0, from_xt, sigma = table[row]
        x_t = projected(from_x0 * x0(x_t, row) + from_xt * x_t + sigma * gaussian(S - row))
    return projected(x0(x_t, 0))
