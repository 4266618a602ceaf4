# mypy: allow-untyped-defs
"""The Triton kernel of `kernels.encode_prefix`: from item ids to the denoiser's prefix keys and values in one launch.

A program owns the users whose first token lies in its span of the packed tokens, finds them by searching the offsets,
and walks through their tokens in chunks of TILE rows. Between stages the rows of a chunk rest in a small scratch that
only its program reads (held in registers across stages, they spill); weights stream from L2. A chunk attends to its
own keys in registers; keys and values go to memory for the denoiser's last token and for later chunks of a history
longer than a chunk. No program reads what another one wrote.
"""

from __future__ import annotations

from kernels._encode_prefix_stages import (
    add_attention,
    add_feed_forward,
    attend,
    attend_pad_row,
    cells_of,
    clean_targets,
    embed_rows,
    first_at_least,
    keep,
    matrix,
    project,
    users_of_rows,
)
from kernels._runtime import constant, jit, tl
from kernels._tile_ops import to_storage

NO_PADS, ONE_PAD_ROW, PAD_ROWS = constant(0), constant(1), constant(2)


@jit
def encode_prefix_kernel(
    items_ptr,
    offsets_ptr,
    table_ptr,
    positions_ptr,
    history_norm_ptr,
    encoder_qkv,
    encoder_qkv_bias,
    encoder_out,
    encoder_out_bias,
    encoder_attention_norm,
    encoder_up,
    encoder_up_bias,
    encoder_down,
    encoder_down_bias,
    encoder_feed_forward_norm,
    denoiser_qkv,
    denoiser_qkv_bias,
    denoiser_out,
    denoiser_out_bias,
    denoiser_attention_norm,
    denoiser_up,
    denoiser_up_bias,
    denoiser_down,
    denoiser_down_bias,
    denoiser_feed_forward_norm,
    encoder_pads,
    denoiser_pads,
    start_time_ptr,
    encoder_cache,
    denoiser_cache,
    last_ptr,
    scratch_ptr,
    residual_ptr,
    users: tl.int32,
    plane: tl.int64,
    span,
    encoder_blocks,
    denoiser_blocks,
    branches,
    pads,
    max_length,
    heads,
    width,
    history_norm_epsilon,
    scale,
    mix_weight,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    SLICE: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT_SLICE: tl.constexpr,
    POSITIONS: tl.constexpr,
    PADS: tl.constexpr,
    DENOISER: tl.constexpr,
    GEODESIC: tl.constexpr,
):
    """See `kernels.encode_prefix` for the arguments; span: how many tokens a program's users may start in.

    encoder_cache: as ``denoiser_cache``, with one branch. plane: M D, elements of one block's keys. residual:
    `[programs, 2, TILE, WIDTH]` float32. scratch: `[programs, 3, TILE, WIDTH]` in storage dtype. heads, width: H and D,
    as loop bounds that are not known to the compiler, which would unroll. WIDTH, HEAD_WIDTH: powers of two that cover D
    and HEAD = D / H. SLICE, OUT_SLICE: columns of a product's operand at a time. HIDDEN: hidden units at a time.
    """
    dtype = table_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    # The search may run past the last offset, which is where the last user ends.
    first_user = tl.minimum(first_at_least(offsets_ptr, users + 1, program * span), users)
    end_user = tl.minimum(first_at_least(offsets_ptr, users + 1, (program + 1) * span), users)
    origin = tl.load(offsets_ptr + first_user)
    count = (tl.load(offsets_ptr + end_user) - origin).to(tl.int32)

    columns = tl.arange(0, WIDTH)
    lanes = tl.arange(0, HEAD_WIDTH)
    head_inside = lanes < HEAD
    tile = tl.arange(0, TILE)
    # The rows of a chunk as they enter a block, between its attention and its feed-forward, and what heads have mixed.
    entry_residual = residual_ptr + program * 2 * TILE * WIDTH
    middle_residual = entry_residual + TILE * WIDTH
    entry_rows = scratch_ptr + program * 3 * TILE * WIDTH
    middle_rows = entry_rows + TILE * WIDTH
    mixed_rows = middle_rows + TILE * WIDTH

    for chunk in tl.range(0, count, TILE, disable_licm=True):
        rows = chunk + tile
        valid = rows < count
        user, start, end = users_of_rows(offsets_ptr, first_user, end_user, origin, rows)
        # Rows beyond the last token see themselves, so that they stay finite; nothing of them is stored.
        start = tl.where(valid, start, rows)
        end = tl.where(valid, end, rows + 1)
        is_last = rows + 1 == end
        absent = tl.maximum(max_length - (end - start), 0)
        earliest = tl.min(start, 0)
        own = (tile[None, :] <= tile[:, None]) & (chunk + tile[None, :] >= start[:, None])

        row_items = items_ptr + origin + rows
        place = tl.maximum(max_length - end + rows, 0)
        embedded = embed_rows(
            row_items, table_ptr, positions_ptr, history_norm_ptr, valid, place, columns,
            history_norm_epsilon, D, POSITIONS,
        )  # fmt: skip
        keep(embedded, entry_residual, entry_rows, TILE, WIDTH)

        for layer in tl.range(encoder_blocks + branches * denoiser_blocks, disable_licm=True):
            step = layer - encoder_blocks
            if step < 0:
                block = layer
                finish = True
                qkv, qkv_bias = encoder_qkv, encoder_qkv_bias
                out, out_bias, attention_norm = encoder_out, encoder_out_bias, encoder_attention_norm
                up, up_bias = encoder_up, encoder_up_bias
                down, down_bias, feed_forward_norm = encoder_down, encoder_down_bias, encoder_feed_forward_norm
                padding = encoder_pads + layer * 2 * pads * D
                keys = encoder_cache + layer * 2 * plane
            else:
                block = step % denoiser_blocks
                # Of the last block only the keys and values are read.
                finish = block + 1 < denoiser_blocks
                qkv, qkv_bias = denoiser_qkv, denoiser_qkv_bias
                out, out_bias, attention_norm = denoiser_out, denoiser_out_bias, denoiser_attention_norm
                up, up_bias = denoiser_up, denoiser_up_bias
                down, down_bias, feed_forward_norm = denoiser_down, denoiser_down_bias, denoiser_feed_forward_norm
                padding = denoiser_pads + step * 2 * pads * D
                keys = denoiser_cache + step * 2 * plane
            keys += origin * D
            values = keys + plane
            qkv, qkv_bias = qkv + block * 3 * D * D, qkv_bias + block * 3 * D
            out, out_bias = out + block * D * D, out_bias + block * D
            up, up_bias = up + block * 4 * D * D, up_bias + block * 4 * D
            down, down_bias = down + block * 4 * D * D, down_bias + block * D
            attention_norm += block * 2 * D
            feed_forward_norm += block * 2 * D

            if DENOISER and step >= 0 and block == 0:
                # History positions hold their clean targets, the next items, at step 0; a last row has none.
                clean = clean_targets(row_items, table_ptr, start_time_ptr, rows + 1 < end, columns, D, GEODESIC)
                condition = tl.load(cells_of(entry_residual, TILE, WIDTH))
                tl.debug_barrier()
                # Branch 1 has no condition.
                mixture = tl.where(step == 0, condition, 0.0) + mix_weight * clean
                keep(mixture, entry_residual, entry_rows, TILE, WIDTH)

            operand = tl.load(cells_of(entry_rows, TILE, WIDTH))
            for head in tl.range(heads, disable_licm=True):
                units = head * HEAD + lanes
                key = project(operand, entry_rows, qkv, qkv_bias, D + units, head_inside, width, D, SLICE)
                value = project(operand, entry_rows, qkv, qkv_bias, 2 * D + units, head_inside, width, D, SLICE)
                key, value = to_storage(key, dtype), to_storage(value, dtype)
                # The encoder's are read again only by later chunks of the same history.
                kept = valid & ((step >= 0) | (end > chunk + TILE))
                places = rows[:, None] * D + units[None, :]
                cells = kept[:, None] & head_inside[None, :]
                tl.store(keys + places, tl.where(is_last[:, None], 0.0, key), mask=cells)
                tl.store(values + places, tl.where(is_last[:, None], 0.0, value), mask=cells)
                if finish:
                    query = project(operand, entry_rows, qkv, qkv_bias, units, head_inside, width, D, SLICE)
                    if PADS == ONE_PAD_ROW:
                        top, total, mixed = attend_pad_row(query, padding, absent, units, head_inside, scale, D)
                    else:
                        top = tl.full([TILE], -float("inf"), tl.float32)
                        total = tl.zeros([TILE], tl.float32)
                        mixed = tl.zeros([TILE, HEAD_WIDTH], tl.float32)
                    query = to_storage(query, dtype)
                    if PADS == PAD_ROWS:
                        for first in tl.range(0, pads, TILE, disable_licm=True):
                            old = first + tile
                            old_key = matrix(padding, old, old < pads, D, units, head_inside)
                            old_value = matrix(padding + pads * D, old, old < pads, D, units, head_inside)
                            seen = (old < pads)[None, :] & (old[None, :] < absent[:, None])
                            top, total, mixed = attend(query, old_key, old_value, seen, scale, top, total, mixed)
                    for first in tl.range(earliest, chunk, TILE, disable_licm=True):
                        old = first + tile
                        old_key = matrix(keys, old, old < chunk, D, units, head_inside)
                        old_value = matrix(values, old, old < chunk, D, units, head_inside)
                        seen = (old < chunk)[None, :] & (old[None, :] >= start[:, None])
                        top, total, mixed = attend(query, old_key, old_value, seen, scale, top, total, mixed)
                    top, total, mixed = attend(query, key, value, own, scale, top, total, mixed)
                    head_cells = mixed_rows + tile[:, None] * WIDTH + units[None, :]
                    tl.store(head_cells, to_storage(mixed / total[:, None], dtype), mask=head_inside[None, :])
            if finish:
                # Threads read here what other threads have mixed.
                tl.debug_barrier()
                attended = add_attention(
                    entry_residual, mixed_rows, out, out_bias, attention_norm, tile, columns, width, D, OUT_SLICE
                )
                keep(attended, middle_residual, middle_rows, TILE, WIDTH)
                finished = add_feed_forward(
                    middle_residual, middle_rows, up, up_bias, down, down_bias, feed_forward_norm, tile, columns, width,
                    D, SLICE, HIDDEN,
                )  # fmt: skip
                keep(finished, entry_residual, entry_rows, TILE, WIDTH)
            if step == -1:
                encoded = tl.load(cells_of(entry_residual, TILE, WIDTH))
                last_cells = last_ptr + user.to(tl.int64)[:, None] * D + columns[None, :]
                tl.store(last_cells, encoded, mask=(valid & is_last)[:, None] & (columns < D)[None, :])
        # In the next chunk threads read keys and values that other threads have written, and overwrite rows.
        tl.debug_barrier()
