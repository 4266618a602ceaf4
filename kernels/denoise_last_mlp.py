"""All reverse steps of a diffusion recommender with an MLP denoiser, in one launch.

``x0_hat = LN(down(silu(up(c + mix_weight (x_t + e_t)))))``, no history; then the same update as `kernels.denoise_last`
(ADRec, KDD 2025, arXiv 2505.19544).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._denoise_last_mlp_kernel import denoise_last_mlp_kernel
from kernels._reverse_steps import DTYPES, check_contiguous, check_steps, check_tensors, reverse_steps
from kernels._runtime import cdiv, check_seed, kernel_op, launch, next_power_of_2, require, runs_triton, seed_tensor
from kernels._scalars import require_numbers
from kernels.inventory import Cost, Entry, Shape


def denoise_last_mlp(
    condition: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    norm: Tensor,
    times: Tensor,
    coefficients: Tensor,
    *,
    norm_epsilon: float = 1e-5,
    mix_weight: float,
    seed: int | Tensor = 0,
    row_keys: Tensor | None = None,
    noise: Tensor | None = None,
    guidance_scale: float = 1.0,
    geodesic: bool = False,
) -> Tensor:
    """Run every reverse step of B users; returns x0_hat of the last one, `[B, D]` float32.

    condition: `[B, D]`. up: `[4 D, D]`, down: `[D, 4 D]`, both float32 (multiplied exactly), float16 or bfloat16
    (float32 accumulation). up_bias: `[4 D]`, down_bias: `[D]`, norm: `[2, D]`, gain and shift, float32. norm_epsilon is
    added to the variance. times, coefficients, seed, row_keys, noise, guidance_scale and geodesic: see
    `kernels.denoise_last.denoise_last`; with guidance the second pass has no condition.

    D is 8 to 256, S up to 4095. up, up_bias, down, down_bias, norm, times and coefficients must be contiguous; other
    inputs are made so. Scratch memory: D, rounded up to a power of two, elements of the dtype of ``up`` for each user,
    their number rounded up to a multiple of 16. Inference only: no gradients. Raises UnsupportedError. Without Triton,
    or on a CPU, this is `denoise_last_mlp_twin`.
    """
    require_numbers(norm_epsilon=norm_epsilon, mix_weight=mix_weight, guidance_scale=guidance_scale)
    check_seed(seed, condition.device, needed=noise is None)
    check_steps(condition, times, coefficients, row_keys, noise)
    D = condition.shape[1]
    require(up.dtype in DTYPES, f"up is {up.dtype}; allowed: float32, float16, bfloat16")
    check_tensors(
        (
            ("up", up, [4 * D, D], (up.dtype,)),
            ("up_bias", up_bias, [4 * D], DTYPES[:1]),
            ("down", down, [D, 4 * D], (up.dtype,)),
            ("down_bias", down_bias, [D], DTYPES[:1]),
            ("norm", norm, [2, D], DTYPES[:1]),
        )
    )
    read = (up, up_bias, down, down_bias, norm, times, coefficients)
    names = ("up", "up_bias", "down", "down_bias", "norm", "times", "coefficients")
    check_contiguous(dict(zip(names, read, strict=True)))
    if not runs_triton(condition, *read, *(tensor for tensor in (row_keys, noise) if tensor is not None)):
        return denoise_last_mlp_twin(
            condition,
            *read,
            norm_epsilon=norm_epsilon,
            mix_weight=mix_weight,
            seed=seed,
            row_keys=row_keys,
            noise=noise,
            guidance_scale=guidance_scale,
            geodesic=geodesic,
        )
    return _denoise_last_mlp(
        condition.contiguous(),
        *read,
        seed_tensor(seed, condition.device) if noise is None else None,
        None if row_keys is None else row_keys.contiguous(),
        None if noise is None else noise.contiguous(),
        float(norm_epsilon),
        float(mix_weight),
        float(guidance_scale),
        geodesic,
    )


@torch.no_grad()
def denoise_last_mlp_twin(
    condition: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    norm: Tensor,
    times: Tensor,
    coefficients: Tensor,
    *,
    norm_epsilon: float = 1e-5,
    mix_weight: float,
    seed: int | Tensor = 0,
    row_keys: Tensor | None = None,
    noise: Tensor | None = None,
    guidance_scale: float = 1.0,
    geodesic: bool = False,
) -> Tensor:
    """`denoise_last_mlp` in pure torch, in float32; a float64 condition is computed and returned in float64."""
    dtype = torch.promote_types(condition.dtype, torch.float32)
    up, up_bias, down, down_bias, norm = (tensor.to(dtype) for tensor in (up, up_bias, down, down_bias, norm))

    def denoise(mixed: Tensor, branch: int) -> Tensor:
        rows = mixed + condition.to(dtype) if branch == 0 else mixed
        rows = F.linear(F.silu(F.linear(rows, up, up_bias)), down, down_bias)
        return F.layer_norm(rows, norm[0].shape, norm[0], norm[1], norm_epsilon)

    return reverse_steps(
        denoise,
        condition.shape[0],
        times,
        coefficients,
        dtype,
        seed=seed,
        row_keys=row_keys,
        noise=noise,
        mix_weight=mix_weight,
        guidance_scale=guidance_scale,
        geodesic=geodesic,
    )


def _fake(
    condition: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    norm: Tensor,
    times: Tensor,
    coefficients: Tensor,
    seed: Tensor | None,
    row_keys: Tensor | None,
    noise: Tensor | None,
    norm_epsilon: float,
    mix_weight: float,
    guidance_scale: float,
    geodesic: bool,
) -> Tensor:
    return condition.new_empty(condition.shape, dtype=torch.float32)


@kernel_op("denoise_last_mlp", _fake)
def _denoise_last_mlp(
    condition: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    norm: Tensor,
    times: Tensor,
    coefficients: Tensor,
    seed: Tensor | None,
    row_keys: Tensor | None,
    noise: Tensor | None,
    norm_epsilon: float,
    mix_weight: float,
    guidance_scale: float,
    geodesic: bool,
) -> Tensor:
    B, D = condition.shape
    width = max(16, next_power_of_2(D))
    rows, hidden, columns, warps, stages = block_sizes(width, up.dtype)
    programs = cdiv(B, rows)
    result = condition.new_empty((B, D), dtype=torch.float32)
    scratch = condition.new_empty((programs, rows, width), dtype=up.dtype)
    # Where an input is absent its pointer is another one's, never read.
    launch(
        denoise_last_mlp_kernel,
        (programs,),
        result,
        condition,
        up,
        up_bias,
        down,
        down_bias,
        norm,
        times,
        coefficients,
        coefficients if seed is None else seed,
        coefficients if row_keys is None else row_keys,
        condition if noise is None else noise,
        scratch,
        B,
        times.shape[0],
        norm_epsilon,
        mix_weight,
        guidance_scale,
        D=D,
        WIDTH=width,
        ROWS=rows,
        HIDDEN=hidden,
        SLICE=columns,
        KEYED=row_keys is not None,
        NOISE=noise is not None,
        GUIDED=guidance_scale != 1.0,
        GEODESIC=geodesic,
        num_warps=warps,
        num_stages=stages,
        # Left to itself, ptxas spills some registers to fit a second program on a multiprocessor.
        maxnreg=255,
    )
    return result


def block_sizes(width: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """ROWS, HIDDEN, SLICE (see `denoise_last_mlp_kernel`), warps and stages for a ``width`` that is a power of two."""
    small = width <= 128
    if dtype == torch.float32:
        return 16, 64 if small else 32, min(32, width), 8, 2
    return 16, 32, width, 8, 4 if small else 3


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `denoise_last_mlp` at a named shape; without values on the meta device."""
    B, D, S = (shape[name] for name in ("users", "width", "steps"))
    generator = None if device.type == "meta" else torch.Generator(device=device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0, kind: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * scale).to(kind)

    return {
        "condition": normal(B, D),
        "up": normal(4 * D, D, scale=D**-0.5, kind=dtype),
        "up_bias": normal(4 * D),
        "down": normal(D, 4 * D, scale=(4 * D) ** -0.5, kind=dtype),
        "down_bias": normal(D),
        "norm": normal(2, D),
        "times": normal(S, D),
        "coefficients": torch.full((S, 3), 0.5, device=device),
        "mix_weight": 0.001,
        "seed": torch.zeros(1, dtype=torch.int64, device=device),
        "row_keys": torch.arange(B, device=device),
        "guidance_scale": 1.5 if shape.get("guided") else 1.0,
        "geodesic": bool(shape.get("geodesic")),
    }


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """Weights once, though they are read again from the second-level cache in every step."""
    B, D, S = (shape[name] for name in ("users", "width", "steps"))
    flops = S * (1 + shape.get("guided", 0)) * 16 * B * D * D
    return Cost(bytes=8 * D * D * dtype.itemsize + 4 * (2 * B + S) * D, flops=flops)


_PAPER = {"users": 512, "width": 128, "steps": 32}
_SHAPES: dict[str, Shape] = {
    "paper": _PAPER,
    "width 256": _PAPER | {"width": 256},
    "one user": _PAPER | {"users": 1},
    "guided, geodesic": _PAPER | {"guided": 1, "geodesic": 1},
    "width 256, guided, geodesic": _PAPER | {"width": 256, "guided": 1, "geodesic": 1},
    "width 32": _PAPER | {"width": 32},
    "width 64": _PAPER | {"width": 64},
    "width 96": _PAPER | {"width": 96},
    "width 192": _PAPER | {"width": 192},
}

ENTRIES = [
    Entry(
        name="denoise_last_mlp",
        summary="all reverse steps of the MLP denoiser, noise drawn inside",
        use_when="sampling on a GPU with the MLP denoiser",
        avoid_when="wider than 256, or gradients are needed",
        dtypes=DTYPES,
        shapes=_SHAPES,
        inputs=_inputs,
        run=denoise_last_mlp,
        twin=denoise_last_mlp_twin,
        cost=_cost,
    ),
]
