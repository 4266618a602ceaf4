"""One reverse step in one pass: ``x_{t-1} = a x0_hat + b x_t + s eps``, noise drawn inside.

(a, b, s) is a row of any coefficient table: the DDPM posterior (arXiv 2006.11239), DDIM, or what is between them by eta
(arXiv 2010.02502, `ddim_coefficients`). Noise follows the contract of `kernels.philox`: a row's key, the draw and the
dimension decide it, not the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import philox
from kernels._gaussian import normal
from kernels._runtime import (
    cdiv,
    check_seed,
    constant,
    jit,
    kernel_op,
    launch,
    next_power_of_2,
    require,
    runs_triton,
    seed_tensor,
    tl,
)
from kernels._scalars import require_integers
from kernels.inventory import Cost, Entry, Shape

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 1 << philox.DIMENSION_BITS
_TILE = 1024
_DRAW_SHIFT = constant(philox.DIMENSION_BITS)
_KEY_SHIFT = constant(philox.DIMENSION_BITS + philox.DRAW_BITS)


def denoise_update(
    x0_hat: Tensor,
    x_t: Tensor,
    coefficients: Tensor,
    row: int | Tensor = 0,
    *,
    seed: int | Tensor | None = None,
    row_keys: Tensor | None = None,
    draw: int | Tensor | None = None,
    noise: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """Return ``a x0_hat + b x_t + s eps``, `[B, D]` in the dtype of x_t.

    x0_hat, x_t: `[B, D]`, each float32, float16 or bfloat16; arithmetic is float32. coefficients: `[3]` or `[S, 3]`
    float32, (a, b, s) by row; row: which one, int or `[1]` int64 on the device, read there, so that a captured graph
    replays any step. seed: int or `[1]` int64 on the device. row_keys: `[B]` int64 in ``[0, 2^39)``, by default the
    place in the batch. draw: 0..4095, int or `[1]` int64 on the device; by default ``S - row``, the place of the step
    in a walk from row S - 1 down, as `adrec.sampler.reverse_process` counts. noise: eps `[B, D]` instead of drawn
    noise.
    Where s is 0 no noise is drawn or read. in_place: write into x_t (contiguous, without gradient) and return it.

    Gradients go to x0_hat and x_t. D is at most 4096; inputs are made contiguous; values on the device are not checked.
    Raises UnsupportedError. Without Triton, or on a CPU, this is `denoise_update_twin`.
    """
    _check(x0_hat, x_t, coefficients, row, seed, row_keys, draw, noise, in_place)
    tensors = [x0_hat, x_t, coefficients]
    tensors += [value for value in (row, draw, row_keys, noise) if isinstance(value, Tensor)]
    if not runs_triton(*tensors):
        return denoise_update_twin(
            x0_hat, x_t, coefficients, row, seed=seed, row_keys=row_keys, draw=draw, noise=noise, in_place=in_place
        )
    table = coefficients.detach().reshape(-1, 3).contiguous()
    row_tensor, row = (row, 0) if isinstance(row, Tensor) else (None, row)
    draw_tensor, draw = (draw, 0) if isinstance(draw, Tensor) else (None, draw)
    if draw is None and row_tensor is None:
        draw = len(table) - row
    arguments = (
        x0_hat.contiguous(),
        table,
        row_tensor,
        row,
        None if noise is not None or seed is None else seed_tensor(seed, x_t.device),
        None if row_keys is None else row_keys.contiguous(),
        draw_tensor,
        draw,
        None if noise is None else noise.detach().contiguous(),
    )
    if in_place:
        _denoise_update_(x_t, *arguments)
        return x_t
    result: Tensor = _denoise_update(x_t.contiguous(), *arguments)
    return result


def denoise_update_twin(
    x0_hat: Tensor,
    x_t: Tensor,
    coefficients: Tensor,
    row: int | Tensor = 0,
    *,
    seed: int | Tensor | None = None,
    row_keys: Tensor | None = None,
    draw: int | Tensor | None = None,
    noise: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """`denoise_update` in pure torch; waits for the device to know whether s is 0. float64 inputs stay float64."""
    wide = torch.promote_types(x_t.dtype, torch.float32)
    table = coefficients.detach().reshape(-1, 3)
    row = int(row)
    from_x0, from_xt, sigma = table[row].tolist()
    result = from_x0 * x0_hat.to(wide) + from_xt * x_t.to(wide)
    if sigma != 0.0:
        if noise is None:
            assert seed is not None
            keys = torch.arange(len(x_t), device=x_t.device) if row_keys is None else row_keys
            noise = philox.row_noise(int(seed), keys, len(table) - row if draw is None else int(draw), x_t.shape[1])
        result = result + sigma * noise.detach().to(wide)
    return x_t.copy_(result) if in_place else result.to(x_t.dtype)


def ddim_coefficients(signal: Tensor, noise_level: Tensor, eta: float = 0.0) -> Tensor:
    """Coefficients (a, b, s) of DDIM's reverse steps, `[S, 3]` float32 (Song et al., arXiv 2010.02502, equation 12).

    signal, noise_level: `[S]`, sqrt(abar) and sqrt(1 - abar) of the steps kept, from the least noisy on. eta: 0 is
    deterministic, 1 has the variance of the DDPM posterior, 0 to 1. Row 0 steps to x_0: (1, 0, 0). Computed in float64.
    Raises UnsupportedError for another eta.
    """
    require(0.0 <= eta <= 1.0, f"eta is {eta}; allowed: 0 to 1")
    signal, level = signal.double(), noise_level.double()
    before = torch.cat([signal.new_ones(1), signal[:-1]])
    level_before = torch.cat([level.new_zeros(1), level[:-1]])
    # 1 - abar_t / abar_s from what is small of both, so that float32 tables do not cancel.
    beta = torch.where(level**2 < 0.5, (level**2 - level_before**2) / before**2, 1.0 - (signal / before) ** 2)
    beta = beta.clamp(min=0.0)
    sigma = eta * level_before / level * beta.sqrt()
    # Equation 12 has sqrt(level_before^2 - sigma^2) / level; level^2 = beta + (1 - beta) level_before^2 makes it a sum.
    from_xt = level_before / level**2 * ((1.0 - eta**2) * beta + (signal / before * level_before) ** 2).sqrt()
    return torch.stack([before - from_xt * signal, from_xt, sigma], 1).float()


def _check(
    x0_hat: Tensor,
    x_t: Tensor,
    coefficients: Tensor,
    row: int | Tensor,
    seed: int | Tensor | None,
    row_keys: Tensor | None,
    draw: int | Tensor | None,
    noise: Tensor | None,
    in_place: bool,
) -> None:
    require(x_t.dim() == 2, f"x_t has shape {list(x_t.shape)}; expected [B, D]")
    B, D = x_t.shape
    require(1 <= D <= WIDEST, f"x_t has width {D}; allowed: 1 to {WIDEST}")
    shape = list(coefficients.shape)
    require(shape == [3] or (len(shape) == 2 and shape[1] == 3), f"coefficients are {shape}; expected [3] or [S, 3]")
    require(coefficients.dtype == torch.float32, f"coefficients are {coefficients.dtype}; allowed: float32")
    for name, tensor, shape in (("x0_hat", x0_hat, [B, D]), ("row_keys", row_keys, [B]), ("noise", noise, [B, D])):
        if tensor is not None:
            require(list(tensor.shape) == shape, f"{name} has shape {list(tensor.shape)}; expected {shape}")
    for name, tensor in (("x0_hat", x0_hat), ("x_t", x_t), ("noise", noise)):
        if tensor is not None:
            require(tensor.dtype in DTYPES, f"{name} is {tensor.dtype}; allowed: float32, float16, bfloat16")
    if row_keys is not None:
        require(row_keys.dtype == torch.int64, f"row_keys is {row_keys.dtype}; allowed: int64")
    steps = coefficients.numel() // 3
    for name, value, last in (("row", row, steps - 1), ("draw", draw, (1 << philox.DRAW_BITS) - 1)):
        if isinstance(value, Tensor):
            integer = value.dtype == torch.int64 and value.numel() == 1
            require(integer, f"{name} is {value.dtype} of {value.numel()} elements; expected an int or 1 int64")
        elif value is not None or name == "row":
            require_integers(**{name: value})
            assert value is not None
            require(0 <= value <= last, f"{name} is {value}; allowed: 0 to {last}")
    require(draw is not None or steps < 1 << philox.DRAW_BITS, f"draw is None with {steps} rows; allowed: up to 4095")
    check_seed(seed, x_t.device, needed=False)
    require(seed is not None or noise is not None, "seed and noise are None; give one, also where s is 0")
    if in_place:
        require(x_t.is_contiguous(), "x_t is not contiguous; it must be to be written in place")
        needed = torch.is_grad_enabled() and (x_t.requires_grad or x0_hat.requires_grad)
        require(not needed, "in_place has no gradient, but x_t or x0_hat needs one; use torch.no_grad() or a copy")


@jit
def _update_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x0_ptr,
    x_t_ptr,
    table_ptr,
    row_ptr,
    row_16,
    seed_ptr,
    keys_ptr,
    draw_ptr,
    draw_offset,
    noise_ptr,
    B,
    D,
    S,
    ROW_GIVEN: tl.constexpr,
    KEYS: tl.constexpr,
    DRAW_GIVEN: tl.constexpr,
    DRAW_OF_ROW: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = place < B
    mask = inside[:, None] & (columns < D)[None, :]
    row = tl.load(row_ptr) if ROW_GIVEN else row_16 // 16
    from_x0 = tl.load(table_ptr + row * 3)
    from_xt = tl.load(table_ptr + row * 3 + 1)
    sigma = tl.load(table_ptr + row * 3 + 2)
    start = place[:, None] * D
    x0_hat = tl.load((x0_ptr + start) + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    x_t = tl.load((x_t_ptr + start) + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    result = from_x0 * x0_hat + from_xt * x_t
    if sigma != 0.0:
        if NOISE:
            noise = tl.load((noise_ptr + start) + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        else:
            keys = tl.load(keys_ptr + place, mask=inside, other=0) if KEYS else place
            if DRAW_OF_ROW:
                offset = (S - row) << _DRAW_SHIFT
            elif DRAW_GIVEN:
                offset = tl.load(draw_ptr) << _DRAW_SHIFT
            else:
                offset = draw_offset
            noise = normal(tl.load(seed_ptr), ((keys << _KEY_SHIFT) + offset)[:, None] + columns[None, :])
        result += sigma * noise
    tl.store((out_ptr + start) + columns[None, :], result, mask=mask)


def _launch(
    out: Tensor,
    x_t: Tensor,
    x0_hat: Tensor,
    table: Tensor,
    row_tensor: Tensor | None,
    row: int,
    seed: Tensor | None,
    row_keys: Tensor | None,
    draw_tensor: Tensor | None,
    draw: int | None,
    noise: Tensor | None,
) -> None:
    B, D = x_t.shape
    columns = next_power_of_2(D)
    rows = max(1, _TILE // columns)
    # Where an input is absent its pointer is another one's, never read. Triton compiles anew for an integer of 1, for
    # multiples of 16 and for others: as multiples of 16 the row and the draw never make it do so.
    launch(
        _update_kernel,
        (cdiv(B, rows),),
        out,
        x0_hat,
        x_t,
        table,
        table if row_tensor is None else row_tensor,
        row * 16,
        table if seed is None else seed,
        table if row_keys is None else row_keys,
        table if draw_tensor is None else draw_tensor,
        (draw or 0) << philox.DIMENSION_BITS,
        x_t if noise is None else noise,
        B,
        D,
        table.shape[0],
        ROW_GIVEN=row_tensor is not None,
        KEYS=row_keys is not None,
        DRAW_GIVEN=draw_tensor is not None,
        DRAW_OF_ROW=draw is None,
        NOISE=noise is not None,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4 if columns <= _TILE else 8,
        num_stages=1,
    )


@kernel_op("denoise_update", lambda x_t, *_: torch.empty_like(x_t))
def _denoise_update(
    x_t: Tensor,
    x0_hat: Tensor,
    table: Tensor,
    row_tensor: Tensor | None,
    row: int,
    seed: Tensor | None,
    row_keys: Tensor | None,
    draw_tensor: Tensor | None,
    draw: int | None,
    noise: Tensor | None,
) -> Tensor:
    out = torch.empty_like(x_t)
    _launch(out, x_t, x0_hat, table, row_tensor, row, seed, row_keys, draw_tensor, draw, noise)
    return out


@kernel_op("denoise_update_", lambda *_: None, mutates_args=("x_t",))
def _denoise_update_(
    x_t: Tensor,
    x0_hat: Tensor,
    table: Tensor,
    row_tensor: Tensor | None,
    row: int,
    seed: Tensor | None,
    row_keys: Tensor | None,
    draw_tensor: Tensor | None,
    draw: int | None,
    noise: Tensor | None,
) -> None:
    _launch(x_t, x_t, x0_hat, table, row_tensor, row, seed, row_keys, draw_tensor, draw, noise)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x_t, x0_hat, table, row_tensor, ctx.row, *_ = inputs
    ctx.dtypes = x_t.dtype, x0_hat.dtype
    ctx.save_for_backward(table, row_tensor)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    table, row_tensor = ctx.saved_tensors
    used = table[ctx.row] if row_tensor is None else table.index_select(0, row_tensor.reshape(1))[0]
    to_xt, to_x0 = (
        (gradient.float() * used[column]).to(dtype) for column, dtype in zip((1, 0), ctx.dtypes, strict=True)
    )
    return to_xt, to_x0, *[None] * 8


_denoise_update.op.register_autograd(_backward, setup_context=_setup_context)


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    B, D, S = shape["users"], shape["width"], shape["steps"]
    generator = torch.Generator(device=device).manual_seed(0) if device.type != "meta" else None
    x0_hat, x_t = (torch.randn(B, D, generator=generator, device=device).to(dtype) for _ in range(2))
    kept = torch.linspace(0.99, 0.05, S)
    return {
        "x0_hat": x0_hat,
        "x_t": x_t,
        "coefficients": ddim_coefficients(kept.sqrt(), (1.0 - kept).sqrt(), 1.0).to(device),
        "row": S - 1,
        "seed": 1,
        "row_keys": torch.arange(B, device=device),
    }


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """Two arrays in and one out, a key a row; Philox's integers are not counted as arithmetic."""
    B, D = shape["users"], shape["width"]
    return Cost(bytes=3 * B * D * dtype.itemsize + 8 * B, flops=B * D * 15)


ENTRIES = [
    Entry(
        name="denoise_update",
        summary="posterior or DDIM update with its noise drawn inside, in place on request",
        use_when="a denoiser of your own is sampled step by step on a GPU, or inside a CUDA graph",
        avoid_when="the denoiser is ADRec's: denoise_last runs all steps in one launch",
        dtypes=DTYPES,
        shapes={
            "paper": {"users": 512, "width": 128, "steps": 32},
            "width 256": {"users": 4096, "width": 256, "steps": 32},
            "width 32": {"users": 512, "width": 32, "steps": 32},
            "width 64": {"users": 512, "width": 64, "steps": 32},
            "width 96": {"users": 4096, "width": 96, "steps": 1000},
            "width 192": {"users": 512, "width": 192, "steps": 32},
            "widest": {"users": 33, "width": 4096, "steps": 32},
        },
        inputs=_inputs,
        run=denoise_update,
        twin=denoise_update_twin,
        cost=_cost,
    )
]
