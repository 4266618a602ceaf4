"""The two losses of ADRec: cross-entropy over the whole catalogue, never all logits at once, and reconstruction."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adrec.errors import ConfigError, nearest
from adrec.models.layout import Layout

CROSS_ENTROPIES = ("auto", "liger", "chunks")
# Liger computes in float32 whatever it is given.
LIGER_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# A tile of 4 MiB stays in a core's cache: 1.5 times the speed of 64 MiB on a CPU.
DEFAULT_LOGITS_BUDGET = 2**20
# Below so many rows a tile, matrix products and passes over the table's gradient cost more than a second pass saves.
_FEWEST_ROWS = 64
_MOST_ROWS = 512


class _CatalogueCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy; the gradients are formed tile by tile in the forward pass, so no logits are kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor, targets: Tensor, budget: int) -> Tensor:
        count = rows.shape[0]
        # Sums run in float32 at least, whatever the inputs.
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=rows.device)
        rows_grad = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        table_grad = torch.zeros_like(table) if ctx.needs_input_grad[1] else None
        height, width = _tile(count, table.shape[0], budget)
        for first in range(0, count, height):
            part, target = rows[first : first + height], targets[first : first + height, None]
            log_sum = _log_sum(part, table, width, wide) if width < table.shape[0] else None
            for start in range(0, table.shape[0], width):
                items = table[start : start + width]
                logits = (part @ items.T).to(wide)
                log_probability = logits.log_softmax(-1) if log_sum is None else logits.sub_(log_sum)
                here = (target >= start) & (target < start + width)
                place = (target - start).clamp(0, items.shape[0] - 1)
                total -= (log_probability.gather(1, place) * here).sum()
                if rows_grad is None and table_grad is None:
                    continue
                error = log_probability.exp_().scatter_add_(1, place, -here.to(wide)).div_(count).to(table.dtype)
                if rows_grad is not None:
                    rows_grad[first : first + height] += error @ items
                if table_grad is not None:
                    table_grad[start : start + width].addmm_(error.T, part.to(table.dtype))
        ctx.save_for_backward(rows_grad, table_grad)
        return total / count

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows_grad, table_grad = ctx.saved_tensors
        (scale,) = upstream
        return (
            None if rows_grad is None else rows_grad * scale,
            None if table_grad is None else table_grad * scale,
            None,
            None,
        )


def _tile(rows: int, items: int, budget: int) -> tuple[int, int]:
    """Rows and items of a tile of at most ``budget`` logits: whole rows of a small catalogue, else a part of each."""
    if budget // items >= min(rows, _FEWEST_ROWS):
        return max(1, min(rows, budget // items)), items
    height = max(1, min(rows, _MOST_ROWS, budget))
    return height, max(1, budget // height)


def _log_sum(part: Tensor, table: Tensor, width: int, wide: torch.dtype) -> Tensor:
    """Log of the summed exponentials of each row's logits, over tiles of items. `[R, D]` -> `[R, 1]`."""
    running = torch.full((part.shape[0], 1), -torch.inf, dtype=wide, device=part.device)
    for start in range(0, table.shape[0], width):
        logits = (part @ table[start : start + width].T).to(wide)
        running = torch.logaddexp(running, logits.logsumexp(-1, keepdim=True))
    return running


@cache
def liger_cross_entropy() -> Callable[..., Tensor] | None:
    """Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989), or None where it is not installed."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return None
    function: Callable[..., Tensor] = liger_fused_linear_cross_entropy
    return function


def cross_entropy_for(rows: Tensor, table: Tensor, choice: str = "auto") -> str:
    """Return which of "liger" and "chunks" computes the loss of these tensors.

    choice: "auto" is Liger-Kernel on a CUDA device where it is installed and has the dtype, else chunks; "liger" is an
    error (ConfigError) where it cannot run; "chunks" needs nothing.
    """
    if choice not in CROSS_ENTROPIES:
        allowed = ", ".join(CROSS_ENTROPIES)
        raise ConfigError(f"choice is '{choice}'; allowed: {allowed}{nearest(choice, CROSS_ENTROPIES)}")
    if choice == "chunks":
        return "chunks"
    problem = ""
    if rows.device.type != "cuda":
        problem = f"it runs on CUDA devices and the rows are on {rows.device}"
    elif rows.dtype not in LIGER_DTYPES or table.dtype not in LIGER_DTYPES:
        problem = f"it takes float32, float16 and bfloat16, not {rows.dtype} rows with a {table.dtype} table"
    elif liger_cross_entropy() is None:
        problem = "Liger-Kernel is not installed: pip install 'adrec[liger]'"
    if problem and choice == "liger":
        raise ConfigError(f"choice is 'liger', but {problem}; 'auto' and 'chunks' work here")
    return "chunks" if problem or not len(rows) else "liger"


def _by_liger(rows: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    fused = liger_cross_entropy()
    assert fused is not None
    if table.requires_grad and not rows.requires_grad:
        # Liger forms no gradient of the table unless it forms one of the rows.
        rows = rows.detach().requires_grad_()
    # Not its mean: that divides the gradient of each logit by M before storing it, where half precision loses it.
    return fused(rows, table, targets, reduction="sum") / len(rows)


def catalogue_cross_entropy(
    rows: Tensor, table: Tensor, targets: Tensor, budget: int = DEFAULT_LOGITS_BUDGET, choice: str = "auto"
) -> Tensor:
    """Mean of ``CE(rows @ table.T, targets)`` over all rows and all N + 1 columns of the table.

    rows: `[M, D]`. table: `[N + 1, D]`; its padding row is a class of logit 0, as in the released code. targets: `[M]`
    int64. Returns a scalar, float32 at least. choice: see `cross_entropy_for`.

    In chunks, budget is the number of logits held at a time, whatever M and N are; besides them only the gradients are
    kept. A catalogue too large for whole rows costs one more matrix product. Liger-Kernel ignores the budget: it holds
    up to ``2 M D`` logits, or one row of them, waits for the device, and its backward pass may run only once.
    """
    if cross_entropy_for(rows, table, choice) == "liger":
        return _by_liger(rows, table, targets)
    return _CatalogueCrossEntropy.apply(rows, table, targets, budget)


def reconstruction_loss(x0_hat: Tensor, target_rows: Tensor, layout: Layout) -> Tensor:
    """Squared error, averaged over each sequence's tokens, then over the batch and D (paper equation of L_mse).

    x0_hat, target_rows: packed `[M, D]`. The target is not detached. Returns a scalar.
    """
    share = 1.0 / (layout.lengths * layout.lengths.numel() * x0_hat.shape[-1]).to(x0_hat.dtype)
    return (F.mse_loss(x0_hat, target_rows, reduction="none").sum(-1) * share.repeat_interleave(layout.lengths)).sum()
