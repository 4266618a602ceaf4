"""What each kernel is, at which shapes it is judged, and what it must move and compute: one `Entry` a kernel.

Compilation reports, rooflines, benchmarks and the GPU tests all walk this list, so a kernel that is not in it is not
shipped. Each kernel's module builds its own entries as ``ENTRIES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Shape = Mapping[str, int]


@dataclass(frozen=True)
class Cost:
    """The least a kernel must do: bytes between memory and chip, and floating-point operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Entry:
    """One kernel.

    name: its public function, with a suffix where one function has several kernels ("prefix_attention.backward").
    summary: what it fuses, in one line. use_when, avoid_when: advice for `adrec kernels list` and
    `adrec bench kernels --list`.
    dtypes: storage types it is compiled and tested for. shapes: named shapes it is judged at; the first is the paper's.
    inputs: ``(shape, dtype, device) -> keyword arguments`` of `run` and `twin`; on the meta device without values.
    run: the Triton path. twin: pure torch, same arguments and results. cost: ``(shape, dtype) -> Cost``.
    """

    name: str
    summary: str
    use_when: str
    avoid_when: str
    dtypes: tuple[torch.dtype, ...]
    shapes: Mapping[str, Shape]
    inputs: Callable[[Shape, torch.dtype, torch.device], dict[str, Any]]
    run: Callable[..., Any]
    twin: Callable[..., Any]
    cost: Callable[[Shape, torch.dtype], Cost]
    notes: str = field(default="")


@dataclass(frozen=True)
class Case:
    """A kernel at one of its shapes and storage dtypes."""

    entry: Entry
    shape_name: str
    shape: Shape
    dtype: torch.dtype


def entries() -> list[Entry]:
    """Every kernel of the package, in the order of a request."""
    from kernels import (
        denoise_last,
        denoise_last_mlp,
        denoise_update,
        encode_prefix,
        prefix_attention,
        score_topk,
        token_noise,
    )

    modules = (
        token_noise,
        denoise_update,
        prefix_attention,
        encode_prefix,
        denoise_last,
        denoise_last_mlp,
        score_topk,
    )
    return [entry for module in modules for entry in module.ENTRIES]
