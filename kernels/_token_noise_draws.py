"""Steps and Gaussian noise of training tokens: their counters, and what they are in torch.

Counters of token i (its place among the packed tokens): ``(i << 24) + dimension`` for its noise and
``(i << 24) + (1 << 12)`` for its step; ``(s << 24) + (2 << 12)`` for the step of all tokens of sequence s. A step is
``(w T) >> 32`` of the first Philox word w: exact integers, the same on every device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import philox

TOKEN_NOISE, TOKEN_STEP, SEQUENCE_STEP = range(3)


def drawn(
    seed: int | Tensor, targets: Tensor, width: int, timesteps: int, sequences: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the steps `[M]` int64 and the noise `[M, width]` float32 that `kernels.token_noise` draws.

    targets: `[M]` int64; padding (0) has step 0 unless it takes its sequence's. sequences: `[M]` int64, the sequence of
    each token, for one step a sequence. Exact for the steps; the noise is Triton's to 5e-7 (`kernels.philox`).
    """
    seed = int(seed)
    tokens = torch.arange(targets.numel(), device=targets.device)
    key, draw = (tokens, TOKEN_STEP) if sequences is None else (sequences, SEQUENCE_STEP)
    word, _ = philox.philox(seed, philox.offsets(key, draw, 1)[:, 0])
    steps = (word * timesteps) >> 32
    if sequences is None:
        steps = steps.masked_fill(targets == 0, 0)
    return steps, philox.row_noise(seed, tokens, TOKEN_NOISE, width)


def noised_rows(
    rows: Tensor,
    targets: Tensor,
    steps: Tensor,
    gaussian: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    geodesic: bool,
) -> Tensor:
    """``x_t`` of item rows `[M, D]`, in their dtype; see `kernels.token_noise` for the formula and the arguments."""
    clean = F.normalize(rows, dim=-1) if geodesic else rows
    scale, level, noise = (values.detach().to(rows.dtype) for values in (signal[steps], noise_level[steps], gaussian))
    x_t = scale[:, None] * clean + level[:, None] * noise
    if geodesic:
        length = x_t.norm(dim=-1, keepdim=True)
        sine = torch.where(length > 0.0, length.sin() / torch.where(length > 0.0, length, 1.0), 1.0)
        x_t = length.cos() * clean + sine * x_t
    return torch.where((targets == 0)[:, None], clean, x_t)
