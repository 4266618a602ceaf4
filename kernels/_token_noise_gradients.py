"""Gradients of `kernels.token_noise`: to the item table (dense, or one row a token), and to the time table.

Every sum has a fixed order. Tokens are sorted by item (or by step, stable) and one program adds up all tokens of an
item in that order; nothing is added atomically, so equal inputs give equal bits. Time of the longest run of equal items
is serial: it is as many tokens as use the most popular item of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._runtime import cdiv, kernel_op, launch, runs_triton, seed_tensor
from kernels._token_noise_checks import check_arguments
from kernels._token_noise_draws import drawn, noised_rows
from kernels._token_noise_kernels import blocks, steps_kernel, table_gradient_kernel, time_gradient_kernel

_STEP_BLOCK = 256
# Columns of one program that adds up a row of the time table: four programs share a row of 128.
_TIME_WIDTH = 32
_TIME_TOKENS = 32


@kernel_op("token_noise_steps", lambda targets, seed, sequences, timesteps: torch.empty_like(targets))
def draw_token_steps(targets: Tensor, seed: Tensor, sequences: Tensor | None, timesteps: int) -> Tensor:
    """Steps `[M]` int64 of `kernels.token_noise`, as `drawn` defines them."""
    steps, M = torch.empty_like(targets), targets.numel()
    launch(
        steps_kernel,
        (cdiv(M, _STEP_BLOCK),),
        steps,
        targets,
        seed,
        targets if sequences is None else sequences,
        M,
        timesteps,
        SEQUENCES=sequences is not None,
        BLOCK=_STEP_BLOCK,
        num_warps=4,
        num_stages=1,
    )
    return steps


@kernel_op(
    "token_noise_time_gradient",
    lambda grad_z, steps, weight, timesteps, dtype: grad_z.new_empty(timesteps, grad_z.shape[1], dtype=dtype),
)
def time_gradient(grad_z: Tensor, steps: Tensor, weight: float, timesteps: int, dtype: torch.dtype) -> Tensor:
    """``weight`` times the sum of the rows of `grad_z` `[M, D]` that share a step, `[T, D]`."""
    D = grad_z.shape[1]
    out = torch.empty((timesteps, D), dtype=dtype, device=grad_z.device)
    ordered, order = torch.sort(steps, stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(timesteps + 1, device=steps.device))
    launch(
        time_gradient_kernel,
        (timesteps, cdiv(D, _TIME_WIDTH)),
        out,
        bounds,
        order,
        grad_z,
        D,
        weight,
        TOKENS=_TIME_TOKENS,
        COLUMNS=_TIME_WIDTH,
        num_warps=4,
        num_stages=2,
    )
    return out


def _table_fake(
    grad_z: Tensor,
    grad_x: Tensor | None,
    table: Tensor | None,
    targets: Tensor,
    steps: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    seed: Tensor | None,
    gaussian: Tensor | None,
    items: int,
    dtype: torch.dtype,
    weight: float,
    sparse: bool,
) -> Tensor:
    return grad_z.new_empty(targets.numel() if sparse else items, grad_z.shape[1], dtype=dtype)


@kernel_op("token_noise_table_gradient", _table_fake)
def table_gradient(
    grad_z: Tensor,
    grad_x: Tensor | None,
    table: Tensor | None,
    targets: Tensor,
    steps: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    seed: Tensor | None,
    gaussian: Tensor | None,
    items: int,
    dtype: torch.dtype,
    weight: float,
    sparse: bool,
) -> Tensor:
    """Gradient to the item table, `[items, D]`, or with `sparse` to the row of each token, `[M, D]`.

    grad_x: `[M, D]`, gradient to x_t besides ``weight * grad_z``. table: given where the walk is geodesic; the noise is
    then regenerated from the seed, or read from `gaussian`.
    """
    M, D = grad_z.shape
    rows, columns, warps = blocks(D)
    if sparse:
        out = torch.empty((M, D), dtype=dtype, device=grad_z.device)
        keys = order = ends = targets
    else:
        out = torch.zeros((items, D), dtype=dtype, device=grad_z.device)
        keys, order = torch.sort(targets, stable=True)
        ends = torch.searchsorted(keys, keys, right=True)
    launch(
        table_gradient_kernel,
        (cdiv(M, rows) if sparse else M,),
        out,
        keys,
        order,
        ends,
        grad_z,
        grad_z if grad_x is None else grad_x,
        grad_z if table is None else table,
        steps,
        signal,
        noise_level,
        targets if seed is None else seed,
        grad_z if gaussian is None else gaussian,
        M,
        D,
        weight,
        SPARSE=sparse,
        GRAD_X=grad_x is not None,
        GEODESIC=table is not None,
        GAUSSIAN=gaussian is not None,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=warps,
        num_stages=1,
    )
    return out


def token_noise_gradients(
    grad_z: Tensor,
    table: Tensor,
    targets: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    *,
    weight: float,
    seed: int | Tensor | None = None,
    steps: Tensor | None = None,
    gaussian: Tensor | None = None,
    sequences: Tensor | None = None,
    grad_x_t: Tensor | None = None,
    geodesic: bool = False,
    sparse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of `kernels.token_noise` to E and the time table, each in its dtype as stored by E and `grad_z`.

    grad_z, grad_x_t: `[M, D]`, float32, float16 or bfloat16. seed: needed unless steps are given, and where geodesic
    gaussian too. Other arguments, their dtypes and D as there. Returns `[N + 1, D]`, or `[M, D]` with `sparse`, and
    `[T, D]`. For measurements; training reaches this through autograd.

    The table must be contiguous; other inputs are made so. Raises UnsupportedError. Without Triton, or on a CPU, this
    is `token_noise_gradients_twin`.
    """
    check_arguments(
        table, targets, signal, noise_level, weight=weight, seed=seed, steps=steps, gaussian=gaussian,
        sequences=sequences, needs_noise=geodesic, grad_z=grad_z, grad_x_t=grad_x_t,
    )  # fmt: skip
    given = [tensor for tensor in (steps, gaussian, sequences, grad_x_t) if tensor is not None]
    if not runs_triton(grad_z, table, targets, signal, noise_level, *given):
        return token_noise_gradients_twin(
            grad_z,
            table,
            targets,
            signal,
            noise_level,
            weight=weight,
            seed=seed,
            steps=steps,
            gaussian=gaussian,
            sequences=sequences,
            grad_x_t=grad_x_t,
            geodesic=geodesic,
            sparse=sparse,
        )

    def packed(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous()

    grad_z, targets, signal, noise_level = (tensor.contiguous() for tensor in (grad_z, targets, signal, noise_level))
    seed, steps = None if seed is None else seed_tensor(seed, grad_z.device), packed(steps)
    if steps is None:
        steps = draw_token_steps(targets, seed, packed(sequences), signal.numel())
    rows = table_gradient(
        grad_z,
        packed(grad_x_t),
        table if geodesic else None,
        targets,
        steps,
        signal,
        noise_level,
        seed,
        packed(gaussian),
        table.shape[0],
        table.dtype,
        float(weight),
        sparse,
    )
    return rows, time_gradient(grad_z, steps, float(weight), signal.numel(), grad_z.dtype)


def token_noise_gradients_twin(
    grad_z: Tensor,
    table: Tensor,
    targets: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    *,
    weight: float,
    seed: int | Tensor | None = None,
    steps: Tensor | None = None,
    gaussian: Tensor | None = None,
    sequences: Tensor | None = None,
    grad_x_t: Tensor | None = None,
    geodesic: bool = False,
    sparse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`token_noise_gradients` in pure torch (on a GPU its sums have no fixed order)."""
    wide = torch.promote_types(grad_z.dtype, torch.float32)
    if steps is None or (geodesic and gaussian is None):
        assert seed is not None
        own_steps, own_noise = drawn(seed, targets, table.shape[1], signal.numel(), sequences)
        steps = own_steps if steps is None else steps
        gaussian = own_noise if gaussian is None else gaussian
    to_mixed = weight * grad_z.to(wide)
    time = to_mixed.new_zeros(signal.numel(), table.shape[1]).index_add(0, steps, to_mixed)
    gradient = to_mixed if grad_x_t is None else to_mixed + grad_x_t.to(wide)
    if geodesic:
        assert gaussian is not None
        stored = table[targets].detach().to(wide).requires_grad_()
        with torch.enable_grad():
            x_t = noised_rows(stored, targets, steps, gaussian, signal, noise_level, True)
        (gradient,) = torch.autograd.grad(x_t, stored, gradient)
    else:
        gradient = signal[steps, None].to(wide) * gradient
    gradient = gradient.masked_fill((targets == 0)[:, None], 0.0)
    if not sparse:
        gradient = gradient.new_zeros(table.shape).index_add(0, targets, gradient)
    return gradient.to(table.dtype), time.to(grad_z.dtype)
