"""Noise injection of training in one launch: ``z = c + weight (x_t + e_t)`` with its own steps and noise.

For the token at place i with target y: ``x_0 = E[y]`` (over its length when geodesic), a step t, Gaussian noise eps,
``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps``; when geodesic, with v that sum, ``x_t = cos|v| x_0 + sin|v| v / |v|``
(ADRec, arXiv 2505.19544; DimeRec, arXiv 2408.12153). Padding (target 0) keeps x_0.
Steps and noise are functions of a seed and the token's place (`kernels._token_noise_draws`), so the backward pass draws
them again and nothing random is stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._runtime import cdiv, kernel_op, launch, runs_triton, seed_tensor
from kernels._token_noise_checks import DTYPES, check_arguments
from kernels._token_noise_draws import drawn, noised_rows
from kernels._token_noise_gradients import (
    draw_token_steps,
    table_gradient,
    time_gradient,
    token_noise_gradients,
    token_noise_gradients_twin,
)
from kernels._token_noise_kernels import blocks, forward_kernel
from kernels.inventory import Cost, Entry, Shape


class TokenNoised(NamedTuple):
    """z: `[M, D]`, dtype of the condition. steps: `[M]` int64, or None. x_t: `[M, D]`, dtype of z, or None."""

    z: Tensor
    steps: Tensor | None
    x_t: Tensor | None


def token_noise(
    table: Tensor,
    targets: Tensor,
    condition: Tensor,
    time_table: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    *,
    weight: float,
    seed: int | Tensor | None = None,
    steps: Tensor | None = None,
    gaussian: Tensor | None = None,
    sequences: Tensor | None = None,
    geodesic: bool = False,
    sparse: bool = False,
    return_steps: bool = False,
    return_x_t: bool = False,
) -> TokenNoised:
    """Noise the targets of M packed tokens and mix them with their condition, ``z = c + weight (x_t + e_t)``.

    table: item table E `[N + 1, D]`, row 0 the padding. targets: `[M]` int64 in 0..N. condition: c `[M, D]`.
    time_table: `[T, D]`, row t is e_t. These three are float32, float16 or bfloat16 each; arithmetic is float32.
    signal, noise_level: `[T]` float32, sqrt(abar_t) and sqrt(1 - abar_t).
    seed: int or `[1]` int64 on the device; needed unless steps and gaussian are both given. steps: `[M]` int64 in
    0..T-1, instead of drawn ones; gaussian: `[M, D]`, likewise. sequences: `[M]` int64, the sequence of each token, for
    one drawn step a sequence; otherwise each token draws its own, and padding has step 0. sparse: give E a
    `torch.sparse_coo` gradient, one row a token, as ``nn.Embedding(sparse=True)`` does (rows of padding are kept, as
    zeros). return_steps, return_x_t: what to return besides z.

    Gradients go to E (none to its padding row), c and the time table, also through x_t; none to signal, noise_level and
    gaussian. Their sums have a fixed order: equal inputs give equal bits. Values of ids and steps are not checked, as
    that would wait for the device. The table must be contiguous; other inputs are made so. D is at most 4096.
    Raises UnsupportedError. Without Triton, or on a CPU, this is `token_noise_twin`.
    """
    check_arguments(
        table, targets, signal, noise_level, weight=weight, seed=seed, steps=steps, gaussian=gaussian,
        sequences=sequences, time_table=time_table, condition=condition,
    )  # fmt: skip
    tensors = (table, targets, condition, time_table, signal, noise_level)
    if not runs_triton(*tensors, *(tensor for tensor in (steps, gaussian, sequences) if tensor is not None)):
        return token_noise_twin(
            *tensors,
            weight=weight,
            seed=seed,
            steps=steps,
            gaussian=gaussian,
            sequences=sequences,
            geodesic=geodesic,
            sparse=sparse,
            return_steps=return_steps,
            return_x_t=return_x_t,
        )
    z, drawn_steps, x_t = _token_noise(
        table,
        *(tensor.contiguous() for tensor in tensors[1:]),
        None if seed is None else seed_tensor(seed, table.device),
        None if steps is None else steps.contiguous(),
        None if gaussian is None else gaussian.detach().contiguous(),
        None if sequences is None else sequences.contiguous(),
        float(weight),
        geodesic,
        sparse,
        return_steps and steps is None,
        return_x_t,
    )
    found = drawn_steps if steps is None else steps
    return TokenNoised(z, found if return_steps else None, x_t if return_x_t else None)


def token_noise_twin(
    table: Tensor,
    targets: Tensor,
    condition: Tensor,
    time_table: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    *,
    weight: float,
    seed: int | Tensor | None = None,
    steps: Tensor | None = None,
    gaussian: Tensor | None = None,
    sequences: Tensor | None = None,
    geodesic: bool = False,
    sparse: bool = False,
    return_steps: bool = False,
    return_x_t: bool = False,
) -> TokenNoised:
    """`token_noise` in pure torch, differentiable by autograd; float64 inputs are computed in float64."""
    wide = torch.promote_types(torch.promote_types(table.dtype, condition.dtype), torch.float32)
    if steps is None or gaussian is None:
        assert seed is not None
        own_steps, own_noise = drawn(seed, targets, table.shape[1], time_table.shape[0], sequences)
        steps = own_steps if steps is None else steps
        gaussian = own_noise if gaussian is None else gaussian
    rows = F.embedding(targets, table, padding_idx=0, sparse=sparse).to(wide)
    x_t = noised_rows(rows, targets, steps, gaussian, signal, noise_level, geodesic)
    z = condition.to(wide) + weight * (x_t + F.embedding(steps, time_table).to(wide))
    out = z.to(condition.dtype), steps if return_steps else None, x_t.to(condition.dtype) if return_x_t else None
    return TokenNoised(*out)


def _outputs(condition: Tensor, targets: Tensor, steps: bool, x_t: bool) -> tuple[Tensor, Tensor, Tensor]:
    """z, steps and x_t; empty where not asked for, since an operator cannot return None."""
    empty = torch.empty_like
    return (
        empty(condition),
        empty(targets) if steps else targets.new_empty(0),
        empty(condition) if x_t else condition.new_empty(0),
    )


def _fake(
    table: Tensor,
    targets: Tensor,
    condition: Tensor,
    time_table: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    seed: Tensor | None,
    steps: Tensor | None,
    gaussian: Tensor | None,
    sequences: Tensor | None,
    weight: float,
    geodesic: bool,
    sparse: bool,
    return_steps: bool,
    return_x_t: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(condition, targets, return_steps, return_x_t)


@kernel_op("token_noise", _fake)
def _token_noise(
    table: Tensor,
    targets: Tensor,
    condition: Tensor,
    time_table: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    seed: Tensor | None,
    steps: Tensor | None,
    gaussian: Tensor | None,
    sequences: Tensor | None,
    weight: float,
    geodesic: bool,
    sparse: bool,
    return_steps: bool,
    return_x_t: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    M, D = condition.shape
    z, steps_out, x_t = _outputs(condition, targets, return_steps, return_x_t)
    rows, columns, warps = blocks(D)
    # Where an input is absent its pointer is another one's, never read.
    launch(
        forward_kernel,
        (cdiv(M, rows),),
        z,
        steps_out if return_steps else targets,
        x_t if return_x_t else z,
        table,
        targets,
        condition,
        time_table,
        signal,
        noise_level,
        targets if seed is None else seed,
        targets if steps is None else steps,
        condition if gaussian is None else gaussian,
        targets if sequences is None else sequences,
        M,
        D,
        time_table.shape[0],
        weight,
        STEPS=steps is not None,
        GAUSSIAN=gaussian is not None,
        SEQUENCES=sequences is not None,
        GEODESIC=geodesic,
        WRITE_STEPS=return_steps,
        WRITE_X_T=return_x_t,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=warps,
        num_stages=1,
    )
    return z, steps_out, x_t


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    table, targets, _, time_table, signal, noise_level, seed, steps, gaussian, sequences, *options = inputs
    ctx.weight, ctx.geodesic, ctx.sparse, _, _ = options
    ctx.table_size, ctx.table_dtype, ctx.time_dtype = table.shape, table.dtype, time_table.dtype
    ctx.set_materialize_grads(False)
    # Only the geodesic gradient reads the table and the noise.
    walk = (table, gaussian) if ctx.geodesic else (None, None)
    ctx.save_for_backward(targets, signal, noise_level, seed, steps, sequences, *walk)


def _backward(ctx: Any, grad_z: Tensor | None, _: Any, grad_x: Tensor | None) -> tuple[Tensor | None, ...]:
    targets, signal, noise_level, seed, steps, sequences, table, gaussian = ctx.saved_tensors
    to_table = to_time = None
    weight, first, second = ctx.weight, grad_z, grad_x
    if grad_z is None:
        weight, first, second = 1.0, grad_x, None
    if first is not None:
        first, second = first.contiguous(), None if second is None else second.contiguous()
        if steps is None:
            steps = draw_token_steps(targets, seed, sequences, signal.numel())
        if ctx.needs_input_grad[0]:
            items, kind = ctx.table_size[0], ctx.table_dtype
            walk = (signal, noise_level, seed, gaussian)
            to_table = table_gradient(first, second, table, targets, steps, *walk, items, kind, weight, ctx.sparse)
            if ctx.sparse:
                to_table = torch.sparse_coo_tensor(targets[None], to_table, ctx.table_size, check_invariants=False)
        if ctx.needs_input_grad[3] and grad_z is not None:
            to_time = time_gradient(first, steps, weight, signal.numel(), ctx.time_dtype)
    return to_table, None, grad_z, to_time, *[None] * 11


_token_noise.op.register_autograd(_backward, setup_context=_setup_context)


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `token_noise` at a named shape; without values on the meta device."""
    M, D, N, T = (shape[name] for name in ("tokens", "width", "items", "timesteps"))
    generator = torch.Generator(device=device).manual_seed(0) if device.type != "meta" else None

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    targets = torch.randint(1, N + 1, (M,), generator=generator, device=device)
    kept = torch.linspace(0.99, 0.05, T, device=device)
    return {
        "table": normal(N + 1, D),
        "targets": targets,
        "condition": normal(M, D),
        "time_table": normal(T, D),
        "signal": kept.sqrt(),
        "noise_level": (1.0 - kept).sqrt(),
        "weight": 0.001,
        "seed": 1,
        "sequences": targets.new_zeros(M) if shape.get("sequences") else None,
        "geodesic": bool(shape.get("geodesic")),
    }


def _gradient_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    values = _inputs(shape, dtype, device)
    del values["time_table"]
    return {"grad_z": values.pop("condition"), **values, "sparse": bool(shape.get("sparse"))}


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """Rows of E and c in, z out, ids, the time table once; Philox's integers are not counted as arithmetic."""
    M, D, T = shape["tokens"], shape["width"], shape["timesteps"]
    flops = M * D * (26 if shape.get("geodesic") else 16)
    return Cost(bytes=dtype.itemsize * D * (3 * M + T) + 8 * (M + T), flops=flops)


def _gradient_cost(shape: Shape, dtype: torch.dtype) -> Cost:
    """The gradient of z in, once summed by item and once by step, and both gradients out; sorting is not counted."""
    M, D, T = shape["tokens"], shape["width"], shape["timesteps"]
    rows = 2 * M + T + (M if shape.get("sparse") else shape["items"] + 1) + (M if shape.get("geodesic") else 0)
    return Cost(bytes=dtype.itemsize * D * rows + 48 * M, flops=M * D * (50 if shape.get("geodesic") else 4))


_SHAPES: dict[str, Shape] = {
    "paper": {"tokens": 4352, "width": 128, "items": 12_101, "timesteps": 32},
    "geodesic": {"tokens": 4352, "width": 128, "items": 12_101, "timesteps": 32, "geodesic": 1},
    "long histories, one step a sequence": {
        "tokens": 25_600,
        "width": 256,
        "items": 12_101,
        "timesteps": 1000,
        "sequences": 1,
    },
    "narrow": {"tokens": 4352, "width": 32, "items": 12_101, "timesteps": 32},
    "width 64": {"tokens": 4352, "width": 64, "items": 12_101, "timesteps": 32},
    "width 96": {"tokens": 4352, "width": 96, "items": 12_101, "timesteps": 32, "geodesic": 1},
    "width 192": {"tokens": 4352, "width": 192, "items": 12_101, "timesteps": 32},
    "a million items": {"tokens": 4352, "width": 128, "items": 1_000_000, "timesteps": 32, "sparse": 1},
    "widest": {"tokens": 512, "width": 4096, "items": 1000, "timesteps": 4095, "geodesic": 1},
}

ENTRIES = [
    Entry(
        name="token_noise",
        summary="gather of E, draw of t and eps, x_t, time embedding and mix",
        use_when="training on a GPU: one launch instead of about ten, and no noise in memory",
        avoid_when="training must repeat a CPU run draw by draw: torch's generator draws other numbers",
        dtypes=DTYPES,
        shapes=_SHAPES,
        inputs=_inputs,
        run=token_noise,
        twin=token_noise_twin,
        cost=_cost,
    ),
    Entry(
        name="token_noise.backward",
        summary="gradients to E (dense, or one row a token) and to the time table, noise drawn again",
        use_when="wherever token_noise trains; sparse from about a million items on, with torch.optim.SparseAdam",
        avoid_when="one item is most of a batch: its tokens are added up one after the other",
        dtypes=DTYPES,
        shapes=_SHAPES,
        inputs=_gradient_inputs,
        run=token_noise_gradients,
        twin=token_noise_gradients_twin,
        cost=_gradient_cost,
    ),
]
