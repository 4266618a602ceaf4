"""What `kernels.token_noise` and its gradients refuse, before a kernel or its twin is chosen: both refuse the same."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._reverse_steps import DTYPES, check_tensors
from kernels._runtime import check_seed, require
from kernels._scalars import require_numbers

WIDEST = 4096


def check_arguments(
    table: Tensor,
    targets: Tensor,
    signal: Tensor,
    noise_level: Tensor,
    *,
    weight: float,
    seed: int | Tensor | None,
    steps: Tensor | None,
    gaussian: Tensor | None,
    sequences: Tensor | None,
    needs_noise: bool = True,
    time_table: Tensor | None = None,
    **rows: Tensor | None,
) -> None:
    """Raise UnsupportedError for what `kernels.token_noise` does not take; see there.

    time_table: None where only ``signal`` says what T is. rows: by name, what else is `[M, D]` in storage dtype.
    needs_noise: whether noise is read besides steps.
    """
    require_numbers(weight=weight)
    check_seed(seed, table.device, needed=False)
    require(table.dim() == 2, f"table has shape {list(table.shape)}; expected [N + 1, D]")
    M, D = targets.numel(), table.shape[1]
    require(1 <= D <= WIDEST, f"table has width {D}; allowed: 1 to {WIDEST}")
    require(table.is_contiguous(), "table is not contiguous; pass table.contiguous() kept from step to step")
    if time_table is None:
        require(signal.dim() == 1 and len(signal) > 0, f"signal has shape {list(signal.shape)}; expected [T]")
    else:
        fits = time_table.dim() == 2 and len(time_table) > 0
        require(fits, f"time_table is {list(time_table.shape)}; expected [T, {D}]")
    T = len(signal if time_table is None else time_table)
    check_tensors(
        (
            ("table", table, list(table.shape), DTYPES),
            ("targets", targets, [M], (torch.int64,)),
            *((name, tensor, [M, D], DTYPES) for name, tensor in rows.items()),
            ("time_table", time_table, [T, D], DTYPES),
            ("signal", signal, [T], DTYPES[:1]),
            ("noise_level", noise_level, [T], DTYPES[:1]),
            ("steps", steps, [M], (torch.int64,)),
            ("gaussian", gaussian, [M, D], DTYPES),
            ("sequences", sequences, [M], (torch.int64,)),
        )
    )
    given = steps is not None and (gaussian is not None or not needs_noise)
    require(seed is not None or given, f"seed is None; give steps{' and gaussian' if needs_noise else ''}")
    require(steps is None or sequences is None, "steps and sequences are both given; sequences only share drawn steps")
