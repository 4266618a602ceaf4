"""Dropout whose mask costs little on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LANES = 4
_LEVELS = 1 << 16


def dropout(rows: Tensor, probability: float, active: bool) -> Tensor:
    """Zero each element with the given probability and scale the rest by ``1 / (1 - p)``; the identity when inactive.

    On a CPU torch draws each element of a mask by itself, an eighth of a training step. One 64-bit draw holds
    four 16-bit uniforms, so p is rounded to a multiple of 2^-16 there. On other devices this is torch's own dropout.
    """
    if not active or probability == 0.0:
        return rows
    if rows.device.type != "cpu":
        return F.dropout(rows, probability)
    dropped = round(probability * _LEVELS)
    words = torch.empty((rows.numel() + _LANES - 1) // _LANES, dtype=torch.int64)
    lanes = words.random_(-(2**63), None).view(torch.int16)[: rows.numel()].view(rows.shape)
    keep = (lanes >= dropped - _LEVELS // 2).to(rows.dtype)
    return rows * keep.mul_(_LEVELS / (_LEVELS - dropped))
