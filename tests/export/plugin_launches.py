"""Launch the plugins' kernels as TensorRT would, from `operators.OPERATORS` alone, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress.export.tensorrt.operators import OPERATORS
from kernels._runtime import launch
from kernels.plugin_kernels import Integers


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory as an allocator leaves it: nothing a kernel should read."""
    return torch.full(tuple(shape), torch.nan if dtype.is_floating_point else 2**62, dtype=dtype)


def run(name: str, inputs: Sequence[Tensor], attributes: dict[str, Any]) -> list[Tensor]:
    """All outputs of one operator: pointers of inputs, integers, pointers of outputs, in that order."""
    operator = OPERATORS[name]
    assert len(inputs) == len(operator.inputs)
    assert list(attributes) == list(operator.attributes)
    shapes, dtypes = [tuple(each.shape) for each in inputs], [each.dtype for each in inputs]
    outputs = [poisoned(each.shape, each.dtype) for each in operator.describe(attributes, shapes, dtypes, Integers())]
    found = operator.launch(attributes, shapes, dtypes, Integers())
    held = [each.contiguous() for each in inputs]
    before = [each.clone() for each in held]
    launch(
        found.kernel.kernel,
        found.grid,
        *held,
        *found.integers,
        *outputs,
        **found.kernel.constants,
        **found.kernel.options,
    )
    for name_, kept, now in zip(operator.inputs, before, held, strict=True):
        assert torch.equal(kept.nan_to_num(), now.nan_to_num()), f"{name} wrote to its input {name_}"
    return outputs
