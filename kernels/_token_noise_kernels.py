# mypy: allow-untyped-defs
"""The kernels of `kernels.token_noise`: forward, steps drawn again, gradient to the item table and to the time table.

Tiles are `[ROWS, COLUMNS]`, COLUMNS the next power of two above D. M tokens, T steps. Token places and ids are int64.
"""

from __future__ import annotations

from kernels import philox
from kernels._gaussian import normal, sine_cosine
from kernels._runtime import constant, jit, next_power_of_2, tl
from kernels._token_noise_draws import SEQUENCE_STEP, TOKEN_STEP

_KEY_SHIFT = constant(philox.DIMENSION_BITS + philox.DRAW_BITS)
_TOKEN_STEP_OFFSET = constant(TOKEN_STEP << philox.DIMENSION_BITS)
_SEQUENCE_STEP_OFFSET = constant(SEQUENCE_STEP << philox.DIMENSION_BITS)
# Elements of a tile: 8 per thread keep Philox and the geodesic formula in registers.
_TILE = 1024


def blocks(width: int) -> tuple[int, int, int]:
    """Rows of a tile, its columns (the next power of two above the width) and warps."""
    columns = next_power_of_2(width)
    return max(1, _TILE // columns), columns, 4 if columns <= _TILE else 8


@jit
def draw_steps(seed, tokens, targets, sequences_ptr, inside, T, SEQUENCES: tl.constexpr):
    """Step of each token, int64. tokens, targets: int64; inside: which of them exist."""
    if SEQUENCES:
        sequence = tl.load(sequences_ptr + tokens, mask=inside, other=0)
        offset = (sequence << _KEY_SHIFT) + _SEQUENCE_STEP_OFFSET
    else:
        offset = (tokens << _KEY_SHIFT) + _TOKEN_STEP_OFFSET
    word = tl.randint(seed, offset).to(tl.int64) & 0xFFFFFFFF
    steps = (word * T) >> 32
    if not SEQUENCES:
        steps = tl.where(targets == 0, 0, steps)
    return steps


@jit
def token_gaussian(seed_ptr, gaussian_ptr, tokens, columns, inside, D, GAUSSIAN: tl.constexpr):
    """Noise of tokens `[R]` at columns `[C]`, `[R, C]` float32: given (GAUSSIAN) or drawn. inside: `[R, C]`."""
    if GAUSSIAN:
        noise = tl.load((gaussian_ptr + tokens[:, None] * D) + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        noise = normal(tl.load(seed_ptr), (tokens[:, None] << _KEY_SHIFT) + columns[None, :])
    return noise


@jit
def unit_rows(rows):
    """Rows `[R, C]` over their length (epsilon of `torch.nn.functional.normalize`), and that length `[R, 1]`."""
    length = tl.maximum(tl.sqrt_rn(tl.sum(rows * rows, 1)), 1e-12)[:, None]
    return rows / length, length


@jit
def polar(rows):
    """Length r `[R, 1]` of rows `[R, C]`, ``cos r`` and ``sin r / r`` (1 at zero)."""
    length = tl.sqrt_rn(tl.sum(rows * rows, 1))[:, None]
    sine, cosine = sine_cosine(length)
    return length, cosine, tl.where(length > 0.0, sine / tl.where(length > 0.0, length, 1.0), 1.0)


@jit
def forward_kernel(
    z_ptr,
    steps_out_ptr,
    x_t_ptr,
    table_ptr,
    targets_ptr,
    condition_ptr,
    time_ptr,
    signal_ptr,
    level_ptr,
    seed_ptr,
    steps_ptr,
    gaussian_ptr,
    sequences_ptr,
    M,
    D,
    T,
    weight,
    STEPS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    SEQUENCES: tl.constexpr,
    GEODESIC: tl.constexpr,
    WRITE_STEPS: tl.constexpr,
    WRITE_X_T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = tokens < M
    mask = inside[:, None] & (columns < D)[None, :]
    targets = tl.load(targets_ptr + tokens, mask=inside, other=0)
    if STEPS:
        steps = tl.load(steps_ptr + tokens, mask=inside, other=0)
    else:
        steps = draw_steps(tl.load(seed_ptr), tokens, targets, sequences_ptr, inside, T, SEQUENCES)
    if WRITE_STEPS:
        tl.store(steps_out_ptr + tokens, steps, mask=inside)
    clean = tl.load((table_ptr + targets[:, None] * D) + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if GEODESIC:
        clean, _ = unit_rows(clean)
    noise = token_gaussian(seed_ptr, gaussian_ptr, tokens, columns, mask, D, GAUSSIAN)
    signal = tl.load(signal_ptr + steps, mask=inside, other=0.0)[:, None]
    level = tl.load(level_ptr + steps, mask=inside, other=0.0)[:, None]
    x_t = signal * clean + level * noise
    if GEODESIC:
        x_t = tl.where(mask, x_t, 0.0)
        _, cosine, sine = polar(x_t)
        x_t = cosine * clean + sine * x_t
    x_t = tl.where((targets == 0)[:, None], clean, x_t)
    place = tokens[:, None] * D
    if WRITE_X_T:
        tl.store((x_t_ptr + place) + columns[None, :], x_t, mask=mask)
    time = tl.load((time_ptr + steps[:, None] * D) + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    condition = tl.load((condition_ptr + place) + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store((z_ptr + place) + columns[None, :], condition + weight * (x_t + time), mask=mask)


@jit
def steps_kernel(out_ptr, targets_ptr, seed_ptr, sequences_ptr, M, T, SEQUENCES: tl.constexpr, BLOCK: tl.constexpr):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < M
    targets = tl.load(targets_ptr + tokens, mask=inside, other=0)
    steps = draw_steps(tl.load(seed_ptr), tokens, targets, sequences_ptr, inside, T, SEQUENCES)
    tl.store(out_ptr + tokens, steps, mask=inside)


@jit
def _geodesic_gradient(gradient, stored, noise, signal, level, mask):
    """Take a gradient of ``x_t = cos(r) x_0 + s(r) v`` `[R, C]`, r = |v|, s(r) = sin(r) / r, back to the stored row."""
    clean, norm = unit_rows(stored)
    mixed = tl.where(mask, signal * clean + level * noise, 0.0)
    length, cosine, sine = polar(mixed)
    safe = tl.where(length > 0.0, length, 1.0)
    # s'(r) is (cos r - s) / r.
    to_length = (cosine - sine) / safe * tl.sum(gradient * mixed, 1)[:, None]
    to_length -= sine * length * tl.sum(gradient * clean, 1)[:, None]
    to_clean = cosine * gradient + signal * (sine * gradient + to_length / safe * mixed)
    # A row shorter than the epsilon of the norm is divided by the epsilon alone.
    along = tl.where(norm > 1e-12, tl.sum(to_clean * clean, 1)[:, None], 0.0)
    return (to_clean - along * clean) / norm


@jit
def table_gradient_kernel(
    out_ptr,
    targets_ptr,
    order_ptr,
    ends_ptr,
    grad_z_ptr,
    grad_x_ptr,
    table_ptr,
    steps_ptr,
    signal_ptr,
    level_ptr,
    seed_ptr,
    gaussian_ptr,
    M,
    D,
    weight,
    SPARSE: tl.constexpr,
    GRAD_X: tl.constexpr,
    GEODESIC: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """SPARSE: one row a token. Otherwise targets are sorted, and the first token of each item's run adds up the run."""
    first = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    if SPARSE:
        item = first
        first *= ROWS
        end = first + ROWS
    else:
        item = tl.load(targets_ptr + first)
        before = tl.load(targets_ptr + first - 1, mask=first > 0, other=-1)
        head = (item != before) & (item != 0)
        end = tl.load(ends_ptr + first, mask=head, other=0)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in range(first, end, ROWS):
        places = start + tl.arange(0, ROWS)
        targets = tl.load(targets_ptr + places, mask=places < M, other=0)
        # Padding has no gradient. A sparse one keeps its rows, as zeros: leaving them out needs the data's size.
        inside = targets != 0
        tokens = places
        if not SPARSE:
            inside = targets == item
            tokens = tl.load(order_ptr + places, mask=inside, other=0)
        mask = inside[:, None] & (columns < D)[None, :]
        rows = tokens[:, None] * D
        gradient = tl.load((grad_z_ptr + rows) + columns[None, :], mask=mask, other=0.0).to(tl.float32) * weight
        if GRAD_X:
            gradient += tl.load((grad_x_ptr + rows) + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        steps = tl.load(steps_ptr + tokens, mask=inside, other=0)
        signal = tl.load(signal_ptr + steps, mask=inside, other=0.0)[:, None]
        if GEODESIC:
            stored = tl.load((table_ptr + targets[:, None] * D) + columns[None, :], mask=mask, other=0.0)
            noise = token_gaussian(seed_ptr, gaussian_ptr, tokens, columns, mask, D, GAUSSIAN)
            level = tl.load(level_ptr + steps, mask=inside, other=0.0)[:, None]
            gradient = _geodesic_gradient(gradient, stored.to(tl.float32), noise, signal, level, mask)
        else:
            gradient *= signal
        if SPARSE:
            tl.store((out_ptr + rows) + columns[None, :], gradient, mask=(places < M)[:, None] & (columns < D)[None, :])
        else:
            total += tl.sum(gradient, 0)
    if not SPARSE:
        tl.store(out_ptr + item * D + columns, total, mask=(columns < D) & head)


@jit
def time_gradient_kernel(
    out_ptr, bounds_ptr, order_ptr, grad_z_ptr, D, weight, TOKENS: tl.constexpr, COLUMNS: tl.constexpr
):
    step = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, end = tl.load(bounds_ptr + step), tl.load(bounds_ptr + step + 1)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for first in range(start, end, TOKENS):
        places = first + tl.arange(0, TOKENS)
        tokens = tl.load(order_ptr + places, mask=places < end, other=0)
        mask = (places < end)[:, None] & (columns < D)[None, :]
        gradient = tl.load((grad_z_ptr + tokens[:, None] * D) + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(gradient.to(tl.float32), 0)
    tl.store(out_ptr + step * D + columns, total * weight, mask=columns < D)
