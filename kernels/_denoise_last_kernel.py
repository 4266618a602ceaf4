# mypy: allow-untyped-defs
"""The Triton kernel of `kernels.denoise_last`: all reverse steps of a tile of users in one program.

The new token's residual stream stays in registers through all blocks; weights stream from the second-level cache.
A row attends to its own keys, so attention multiplies and adds elementwise: every one of KEYS lanes runs its own online
softmax over every KEYS-th key, and the lanes are merged at the end, so that no barrier is met per key.
"""

from __future__ import annotations

from kernels._denoise_last_steps import feed_forward, gaussian, project, publish, reverse_step
from kernels._runtime import constant, jit, tl
from kernels._tile_ops import dot, layer_norm, to_storage

NORM_EPSILON = constant(1e-12)
NO_PADS, ONE_PAD_ROW, PAD_ROWS = constant(0), constant(1), constant(2)


@jit
def attend(
    qkv_ptr,
    keys_values_ptr,
    pads_ptr,
    start,
    prefix,
    absent,
    token_cells,
    pads,
    scale,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_COUNT: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    PADS: tl.constexpr,
):
    """Attention of each row's new token over its padding, its prefix and itself: `[ROWS, HEAD_COUNT, HEAD_WIDTH]`.

    qkv: scratch `[ROWS, 3, HEAD_COUNT, HEAD_WIDTH]`. keys_values, pads: `[2, M, D]` and `[2, P, D]` of this block.
    start, prefix, absent: `[ROWS]`, a row's first token, how many tokens precede its last, how many pads it has.
    token_cells: M D, int64.
    """
    ROWS: tl.constexpr = start.shape[0]
    PART: tl.constexpr = HEAD_COUNT * HEAD_WIDTH
    d: tl.constexpr = D // HEADS
    row, key_lane = tl.arange(0, ROWS), tl.arange(0, KEYS)
    head, lane = tl.arange(0, HEAD_COUNT), tl.arange(0, HEAD_WIDTH)
    own = qkv_ptr + row[:, None, None] * (3 * PART) + head[None, :, None] * HEAD_WIDTH + lane[None, None, :]
    query = tl.load(own) * scale
    top = tl.sum(query * tl.load(own + PART), 2)
    mixed = tl.load(own + 2 * PART)
    total = tl.full([ROWS, HEAD_COUNT], 1.0, tl.float32)

    # A row's keys: its padding as ``seen`` rows, then its prefix.
    seen = tl.minimum(absent, pads if PADS != NO_PADS else 0)
    if PADS == ONE_PAD_ROW:
        pad_weight = tl.log(tl.maximum(absent, 1).to(tl.float32))
    count = seen + prefix
    known = (head[:, None] < HEADS) & (lane[None, :] < d)
    columns = head[:, None] * d + lane[None, :]
    for first in range(0, tl.max(count, 0), KEYS):
        # Keys are the first axis: a thread then holds all keys of its row, and reducing over them meets no barrier.
        place = first + key_lane[:, None]
        is_pad = place < seen[None, :]
        visible = place < count[None, :]
        source = keys_values_ptr + (start[None, :] + (place - seen[None, :])) * D
        step = token_cells
        if PADS != NO_PADS:
            source = tl.where(is_pad, pads_ptr + place.to(tl.int64) * D, source)
            step = tl.where(is_pad, pads * D, step)[:, :, None, None]
        key_ptr = source[:, :, None, None] + columns[None, None, :, :]
        mask = visible[:, :, None, None] & known[None, None, :, :]
        key = tl.load(key_ptr, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(key_ptr + step, mask=mask, other=0.0).to(tl.float32)
        score = tl.sum(query[None, :, :, :] * key, 3)
        if PADS == ONE_PAD_ROW:
            score += tl.where(is_pad, pad_weight[None, :], 0.0)[:, :, None]
        score = tl.where(visible[:, :, None], score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        keep, weight = tl.exp(top - new_top), tl.exp(score - new_top[None, :, :])
        top, total = new_top, total * keep + tl.sum(weight, 0)
        mixed = mixed * keep[:, :, None] + tl.sum(weight[:, :, :, None] * value, 0)
    return mixed / total[:, :, None]


@jit
def denoise_last_kernel(
    out_ptr,
    condition_ptr,
    qkv_ptr,
    qkv_bias_ptr,
    out_weight_ptr,
    out_bias_ptr,
    attention_norm_ptr,
    up_ptr,
    up_bias_ptr,
    down_ptr,
    down_bias_ptr,
    feed_forward_norm_ptr,
    keys_values_ptr,
    pads_ptr,
    offsets_ptr,
    times_ptr,
    coefficients_ptr,
    seed_ptr,
    row_keys_ptr,
    noise_ptr,
    scratch_ptr,
    operand_scratch_ptr,
    users,
    tokens,
    steps,
    blocks,
    pads,
    max_length,
    mix_weight,
    scale,
    guidance_scale,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_COUNT: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    SLICE: tl.constexpr,
    MIX_SLICE: tl.constexpr,
    PADS: tl.constexpr,
    KEYED: tl.constexpr,
    NOISE: tl.constexpr,
    GUIDED: tl.constexpr,
    GEODESIC: tl.constexpr,
):
    """See `kernels.denoise_last` for the arguments.

    scratch: `[programs, ROWS, 3 HEAD_COUNT HEAD_WIDTH + WIDTH]` float32, queries, keys and values, and what the pass
    with condition returned. operand_scratch: `[programs, 2, ROWS, WIDTH]` in storage dtype, the mixed values and (where
    SLICE is not WIDTH) the operand of a product. WIDTH, HEAD_COUNT and HEAD_WIDTH: powers of two covering D, HEADS and
    D / HEADS. OUTPUTS, HIDDEN: columns of queries, keys and values, and hidden units, done at a time. SLICE, MIX_SLICE:
    columns of an operand read at a time.
    """
    PART: tl.constexpr = HEAD_COUNT * HEAD_WIDTH
    d: tl.constexpr = D // HEADS
    dtype = qkv_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, ROWS)
    user = program * ROWS + tile
    valid = user < users
    columns = tl.arange(0, WIDTH)
    inside = columns < D
    cell = valid[:, None] & inside[None, :]
    condition_cells = condition_ptr + user[:, None] * D + columns[None, :]

    start = tl.load(offsets_ptr + user, mask=valid, other=0)
    length = (tl.load(offsets_ptr + user + 1, mask=valid, other=1) - start).to(tl.int32)
    # Rows without a user see only themselves, so that they stay finite; nothing of them is stored.
    prefix = tl.where(valid, length - 1, 0)
    absent = tl.where(valid, tl.maximum(max_length - length, 0), 0)

    qkv_rows = scratch_ptr + program * (ROWS * (3 * PART + WIDTH))
    conditional_cells = qkv_rows + ROWS * 3 * PART + tile[:, None] * WIDTH + columns[None, :]
    mixed_rows = operand_scratch_ptr + program * (2 * ROWS * WIDTH)
    operand_rows = mixed_rows + ROWS * WIDTH
    head, lane = tl.arange(0, HEAD_COUNT), tl.arange(0, HEAD_WIDTH)
    head_cells = mixed_rows + tile[:, None, None] * WIDTH + head[None, :, None] * d + lane[None, None, :]
    head_inside = (head[None, :, None] < HEADS) & (lane[None, None, :] < d)
    layers = blocks * 2 if GUIDED else blocks
    token_cells = tl.full([], D, tl.int64) * tokens

    # x_t rests in the output between its uses: next to attention, registers are short.
    x_t_cells = out_ptr + user[:, None] * D + columns[None, :]
    x_t = gaussian(seed_ptr, row_keys_ptr, noise_ptr, 0, users, user, columns, D, KEYED, NOISE)
    tl.store(x_t_cells, x_t, mask=cell)
    tl.debug_barrier()
    h = tl.zeros([ROWS, WIDTH], tl.float32)
    # Addresses hoisted out of these loops would fill the registers for the whole of a step.
    for draw in tl.range(0, steps, disable_licm=True):
        row = steps - 1 - draw
        for layer in tl.range(0, layers, disable_licm=True):
            block = layer
            if GUIDED:
                block = layer % blocks
            if block == 0:
                if GUIDED:
                    tl.store(conditional_cells, h)
                # The second pass through the blocks, with guidance, has no condition.
                h = tl.load(condition_cells, mask=cell & (layer == 0), other=0.0).to(tl.float32)
                time = tl.load(times_ptr + row * D + columns, mask=inside, other=0.0)
                h += mix_weight * (tl.load(x_t_cells, mask=cell, other=0.0) + time[None, :])
            operand = to_storage(h, dtype)
            publish(operand, operand_rows, SLICE)
            for first in range(0, 3 * PART, OUTPUTS):
                output = first + tl.arange(0, OUTPUTS)
                output_head, output_lane = (output % PART) // HEAD_WIDTH, output % HEAD_WIDTH
                known = (output < 3 * PART) & (output_head < HEADS) & (output_lane < d)
                output_row = output // PART * D + output_head * d + output_lane
                projected = project(
                    operand,
                    operand_rows,
                    qkv_ptr + block * (3 * D * D),
                    qkv_bias_ptr + block * (3 * D),
                    output_row,
                    known,
                    D,
                    SLICE,
                )
                projected_cells = qkv_rows + tile[:, None] * (3 * PART) + output[None, :]
                tl.store(projected_cells, projected, mask=(output < 3 * PART)[None, :])
            tl.debug_barrier()
            cache = keys_values_ptr + layer * (2 * token_cells)
            mixed = attend(
                qkv_rows,
                cache,
                pads_ptr + layer * (2 * pads * D),
                start,
                prefix,
                absent,
                token_cells,
                pads,
                scale,
                D,
                HEADS,
                HEAD_COUNT,
                HEAD_WIDTH,
                KEYS,
                PADS,
            )
            tl.store(head_cells, to_storage(mixed, dtype), mask=head_inside)
            tl.debug_barrier()
            h += tl.load(out_bias_ptr + block * D + columns, mask=inside, other=0.0)[None, :]
            for first in range(0, D, MIX_SLICE):
                part = first + tl.arange(0, MIX_SLICE)
                mixed_part = tl.load(
                    mixed_rows + tile[:, None] * WIDTH + part[None, :], mask=(part < D)[None, :], other=0.0
                )
                weight = tl.load(
                    out_weight_ptr + block * (D * D) + columns[None, :] * D + part[:, None],
                    mask=(part < D)[:, None] & inside[None, :],
                    other=0.0,
                )
                h = dot(mixed_part, weight, h)
            norm = attention_norm_ptr + block * (2 * D)
            h = layer_norm(h, norm, norm + D, columns, D, NORM_EPSILON)
            operand = to_storage(h, dtype)
            publish(operand, operand_rows, SLICE)
            h = feed_forward(
                operand,
                operand_rows,
                h,
                up_ptr + block * (4 * D * D),
                up_bias_ptr + block * (4 * D),
                down_ptr + block * (4 * D * D),
                down_bias_ptr + block * D,
                columns,
                D,
                HIDDEN,
                SLICE,
                True,
            )
            norm = feed_forward_norm_ptr + block * (2 * D)
            h = layer_norm(h, norm, norm + D, columns, D, NORM_EPSILON)
        x0_hat = h
        if GUIDED:
            x0_hat += guidance_scale * (tl.load(conditional_cells) - x0_hat)
        x_t = reverse_step(
            tl.load(x_t_cells, mask=cell, other=0.0),
            x0_hat,
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
        # No thread may still read the old x_t, or already read the new one.
        tl.debug_barrier()
        tl.store(x_t_cells, x_t, mask=cell)
        tl.debug_barrier()
