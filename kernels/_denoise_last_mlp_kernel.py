# mypy: allow-untyped-defs
"""The Triton kernel of `kernels.denoise_last_mlp`: all reverse steps of a tile of users in one program."""

from __future__ import annotations

from kernels._denoise_last_steps import feed_forward, gaussian, publish, reverse_step
from kernels._runtime import jit, tl
from kernels._tile_ops import layer_norm, to_storage


@jit
def denoise_last_mlp_kernel(
    out_ptr,
    condition_ptr,
    up_ptr,
    up_bias_ptr,
    down_ptr,
    down_bias_ptr,
    norm_ptr,
    times_ptr,
    coefficients_ptr,
    seed_ptr,
    row_keys_ptr,
    noise_ptr,
    scratch_ptr,
    users,
    steps,
    norm_epsilon,
    mix_weight,
    guidance_scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    SLICE: tl.constexpr,
    KEYED: tl.constexpr,
    NOISE: tl.constexpr,
    GUIDED: tl.constexpr,
    GEODESIC: tl.constexpr,
):
    """See `kernels.denoise_last_mlp` for the arguments.

    scratch: `[programs, ROWS, WIDTH]` in storage dtype, used where SLICE, the columns of an operand read at a time, is
    not WIDTH, the power of two covering D. HIDDEN: hidden units done at a time.
    """
    program = tl.program_id(0).to(tl.int64)
    user = program * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = columns < D
    cell = (user < users)[:, None] & inside[None, :]
    condition_cells = condition_ptr + user[:, None] * D + columns[None, :]
    operand_rows = scratch_ptr + program * (ROWS * WIDTH)

    x_t = gaussian(seed_ptr, row_keys_ptr, noise_ptr, 0, users, user, columns, D, KEYED, NOISE)
    for draw in range(steps):
        row = steps - 1 - draw
        time = tl.load(times_ptr + row * D + columns, mask=inside, other=0.0)
        step_input = mix_weight * (x_t + time[None, :])
        h = step_input + tl.load(condition_cells, mask=cell, other=0.0).to(tl.float32)
        conditional = h
        for branch in range(2 if GUIDED else 1):
            if GUIDED:
                # The second pass has no condition.
                conditional = tl.where(branch == 1, h, conditional)
                h = tl.where(branch == 1, step_input, h)
            operand = to_storage(h, up_ptr.dtype.element_ty)
            publish(operand, operand_rows, SLICE)
            h = feed_forward(
                operand,
                operand_rows,
                tl.zeros([ROWS, WIDTH], tl.float32),
                up_ptr,
                up_bias_ptr,
                down_ptr,
                down_bias_ptr,
                columns,
                D,
                HIDDEN,
                SLICE,
                False,
            )
            h = layer_norm(h, norm_ptr, norm_ptr + D, columns, D, norm_epsilon)
        if GUIDED:
            h += guidance_scale * (conditional - h)
        x_t = reverse_step(
            x_t,
            h,
            coefficients_ptr,
            row,
            steps,
            seed_ptr,
            row_keys_ptr,
            noise_ptr,
            users,
            user,
            columns,
            D,
            KEYED,
            NOISE,
            GEODESIC,
        )
    tl.store(out_ptr + user[:, None] * D + columns[None, :], x_t, mask=cell)
