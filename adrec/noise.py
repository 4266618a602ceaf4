"""The forward process of training, and where the noise of sampling comes from (an argument, never hidden state)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from adrec.schedule import DiffusionTable
from kernels import philox

if TYPE_CHECKING:
    # `adrec.models` imports this module.
    from adrec.models.layout import Layout


@dataclass(frozen=True)
class TokenNoise:
    """What training draws for a batch.

    steps: `[M]` int64 in 0..T-1. gaussian: `[M, D]`. padding_steps: `[1]` or `[B]` int64, the step of the padding.
    keep_condition: `[B]` bool, False where a sequence is trained without its condition; None keeps all.
    """

    steps: Tensor
    gaussian: Tensor
    padding_steps: Tensor
    keep_condition: Tensor | None = None


@dataclass(frozen=True)
class SeededTokenNoise:
    """What training hands to `kernels.token_noise`, which draws steps and noise itself, from a seed.

    seed: int, or `[1]` int64 on the model's device, where it makes nothing wait for the host. independent: a step for
    each token; else one for each sequence, also for its padding. keep_condition: as in `TokenNoise`.
    """

    seed: int | Tensor
    independent: bool = True
    keep_condition: Tensor | None = None


def draw_token_noise(
    layout: Layout,
    width: int,
    timesteps: int,
    *,
    independent: bool = True,
    condition_dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> TokenNoise:
    """Draw ``t ~ U{0..T-1}`` and noise for each token, or one t for each sequence (paper section 4.2).

    Padding has step 0 with independent steps and its sequence's step otherwise, as in the released code.
    """
    device = layout.lengths.device
    batch, tokens = layout.lengths.numel(), layout.tokens
    if independent:
        steps = torch.randint(timesteps, (tokens,), generator=generator, device=device)
        padding_steps = steps.new_zeros(1)
    else:
        padding_steps = torch.randint(timesteps, (batch,), generator=generator, device=device)
        steps = padding_steps[layout.users]
    gaussian = torch.randn(tokens, width, generator=generator, device=device)
    return TokenNoise(steps, gaussian, padding_steps, _draw_kept(layout, condition_dropout, generator))


def seed_token_noise(
    layout: Layout,
    *,
    independent: bool = True,
    condition_dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> SeededTokenNoise:
    """Draw the seed of a batch on its device, and which sequences keep their condition."""
    seed = torch.randint(1 << 62, (1,), generator=generator, device=layout.lengths.device)
    return SeededTokenNoise(seed, independent, _draw_kept(layout, condition_dropout, generator))


def _draw_kept(layout: Layout, condition_dropout: float, generator: torch.Generator | None) -> Tensor | None:
    if condition_dropout == 0.0:
        return None
    lengths = layout.lengths
    return torch.rand(lengths.numel(), generator=generator, device=lengths.device) >= condition_dropout


def noised(clean: Tensor, steps: Tensor, gaussian: Tensor, table: DiffusionTable, geodesic: bool) -> Tensor:
    """``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps``; on the unit sphere a geodesic walk along it.

    clean, gaussian: `[M, D]`. steps: `[M]` int64. Returns `[M, D]`.
    """
    signal, noise = (column.to(clean.device)[steps, None] for column in (table.signal, table.noise))
    x_t = signal * clean + noise * gaussian
    if not geodesic:
        return x_t
    length = x_t.norm(dim=-1, keepdim=True)
    return length.cos() * clean + length.sin() * x_t / length


class NoiseSource(Protocol):
    """Gaussian noise of sampling: draw 0 is x_T, draw i the noise of the i-th reverse step."""

    def __call__(self, draw: int) -> Tensor:
        """Return `[B, D]` float32."""

    def zeros(self) -> Tensor:
        """Return zeros where a draw would be, `[B, D]` float32."""

    def select(self, rows: Tensor) -> NoiseSource:
        """The noise of some rows `[R]`, in that order."""


@dataclass(frozen=True)
class PhiloxNoise:
    """Noise that is a function of (seed, the row's key, draw, dimension) only; see `kernels.philox`.

    planned: draws that will be asked for, in that order. Those of few rows are computed several at a time: for one user
    a draw costs half as much as 32. What is returned is kept, and not to be written to.
    """

    seed: int
    row_keys: Tensor
    width: int
    planned: tuple[int, ...] = ()
    _ahead: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, draw: int) -> Tensor:
        ahead = self._ahead
        if draw not in ahead:
            first = self.planned.index(draw) if draw in self.planned else len(self.planned)
            most = max(1, philox.CHUNK // max(1, self.row_keys.numel() * self.width))
            part = self.planned[first : first + most] or (draw,)
            ahead = dict(zip(part, philox.row_noise(self.seed, self.row_keys, part, self.width), strict=True))
            # Exchanged as a whole: another thread sees all of it or nothing.
            object.__setattr__(self, "_ahead", ahead)
        return ahead[draw]

    def zeros(self) -> Tensor:
        return torch.zeros(self.row_keys.numel(), self.width, device=self.row_keys.device)

    def select(self, rows: Tensor) -> PhiloxNoise:
        """The noise of some rows `[R]`, in that order."""
        return PhiloxNoise(self.seed, self.row_keys[rows], self.width, self.planned)


@dataclass(frozen=True)
class ExplicitNoise:
    """Noise given as a tensor `[S + 1, B, D]`: row 0 is x_T, the last row belongs to t = 0 and has no effect."""

    values: Tensor

    def __call__(self, draw: int) -> Tensor:
        return self.values[draw]

    def zeros(self) -> Tensor:
        return torch.zeros_like(self.values[0])

    def select(self, rows: Tensor) -> ExplicitNoise:
        """The noise of some rows `[R]`, in that order."""
        return ExplicitNoise(self.values[:, rows])


def unit(rows: Tensor) -> Tensor:
    """Project rows to the unit sphere."""
    return F.normalize(rows, dim=-1)
