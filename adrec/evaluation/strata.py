"""Split an evaluation by how popular the target is and by how long the history is."""

from __future__ import annotations

import torch
from torch import Tensor

from adrec.evaluation.metrics import Interval, interval_table

HEAD_SHARE = 0.2
QUINTILES = 5


def head_items(item_counts: Tensor) -> Tensor:
    """True for the 20 % of items with the most training interactions, `[N + 1]` bool (row 0 is False)."""
    items = item_counts.numel() - 1
    head = torch.zeros(items + 1, dtype=torch.bool)
    head[item_counts[1:].argsort(descending=True, stable=True)[: round(HEAD_SHARE * items)] + 1] = True
    return head


def popularity_groups(targets: Tensor, item_counts: Tensor) -> dict[str, Tensor]:
    """Masks `[n]` of the examples whose target is a head or a tail item."""
    head = head_items(item_counts)[targets]
    return {"head items (top 20 %)": head, "tail items": ~head}


def length_groups(lengths: Tensor) -> dict[str, Tensor]:
    """Masks `[n]` of history-length quintiles; equal lengths stay together, so groups may differ in size."""
    edges = torch.quantile(lengths.double(), torch.linspace(0, 1, QUINTILES + 1, dtype=torch.float64)).unique()
    groups: dict[str, Tensor] = {}
    for index, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        mask = (lengths <= high) & ((lengths >= low) if index == 0 else (lengths > low))
        if bool(mask.any()):
            groups[f"history {int(lengths[mask].min())} to {int(lengths[mask].max())}"] = mask
    if len(edges) == 1:
        groups[f"history {int(edges[0])}"] = torch.ones_like(lengths, dtype=torch.bool)
    return groups


def stratify(
    ranks: Tensor, groups: dict[str, Tensor], bootstrap: int = 1000
) -> dict[str, tuple[int, dict[str, Interval]]]:
    """Number of users and metrics of each group."""
    return {name: (int(mask.sum()), interval_table(ranks[mask], bootstrap)) for name, mask in groups.items()}
