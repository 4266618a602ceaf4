"""Names and shapes of the authors' released state dicts, mapped to ours and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adrec.errors import RunError

_RENAMES = [
    (r"^LayerNorm\.", "history_norm."),
    (r"^hist_norm\.", "history_norm."),
    (r"^trm_encoder\.transformer_blocks\.", "encoder.blocks."),
    (r"^diffu\.ag_encoder\.transformer_blocks\.", "encoder.blocks."),
    (r"^diffu\.net\.decoder\.transformer_blocks\.", "denoiser.blocks."),
    (r"^diffu\.net\.decoder\.0\.", "denoiser.up."),
    (r"^diffu\.net\.decoder\.2\.", "denoiser.down."),
    (r"^diffu\.net\.decoder\.3\.", "denoiser.norm."),
    (r"^diffu\.net\.time_embed\.0\.", "time_embedding.up."),
    (r"^diffu\.net\.time_embed\.2\.", "time_embedding.down."),
    (r"\.attention\.w_layer\.", ".attention.output."),
    (r"\.feed_forward\.w_1\.", ".feed_forward.up."),
    (r"\.feed_forward\.w_2\.", ".feed_forward.down."),
    (r"\.input_sublayer\.norm\.", ".attention_norm."),
    (r"\.output_sublayer\.norm\.", ".feed_forward_norm."),
]
_PROJECTION = re.compile(r"\.attention\.linear_layers\.([012])\.")


def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a released state dict (or gradients under its names) and join the three projections into ``qkv``."""
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        ours = name
        for pattern, replacement in _RENAMES:
            ours = re.sub(pattern, replacement, ours)
        found = _PROJECTION.search(ours)
        if found is None:
            renamed[ours] = value
        else:
            joined = _PROJECTION.sub(".attention.qkv.", ours)
            parts.setdefault(joined, {})[int(found.group(1))] = value
    for name, three in parts.items():
        if sorted(three) != [0, 1, 2]:
            raise RunError(
                f"'{name}' needs the projections 0, 1 and 2 of the released state dict; found {sorted(three)}"
            )
        renamed[name] = torch.cat([three[0], three[1], three[2]])
    return renamed


def read_released(path: Any) -> dict[str, Tensor]:
    """Read a released ``.pth`` file with ``weights_only``, so nothing in it is executed.

    Accepts a plain state dict or a dict that holds one under ``state_dict`` or ``model``; a ``module.`` prefix is
    dropped. Raises RunError when the file is not that, or holds a number that is not finite.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here; all mean the same to the user
        reason = type(error).__name__
        raise RunError(
            f"{path}: not a plain state dict of tensors ({reason}). Files that need code to load are refused; save"
            " `model.state_dict()` with torch.save and import that"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise RunError(f"{path}: holds {type(loaded).__name__}; expected a state dict of tensors")
    for name, value in loaded.items():
        if not bool(torch.isfinite(value).all()):
            raise RunError(f"{path}: '{name}' holds NaN or infinite values; save the weights before training diverged")
    return {str(name).removeprefix("module."): value for name, value in loaded.items()}
