"""How kernels are held to their twins: where they run, how close they must be, memory that tells of stray access."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import _runtime
from kernels.inventory import Entry

MARGIN = 64
# Inductor opens an operator up and compiles its kernels, which takes a GPU.
COMPILE_BACKEND = "inductor" if torch.cuda.is_available() else "aot_eager"
# Root mean square of the difference over that of the twin. bf16 has 8 bits: half an ulp is 2^-9, one ulp of slack 2^-8.
RMS_RATIO = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2**-8}


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where kernels run: the GPU, or CPU tensors in Triton's interpreter; skips where Triton is not installed."""
    if not _runtime.AVAILABLE:
        pytest.skip("Triton is not installed")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Otherwise public functions would run their twins, and every comparison hold a twin to itself.
    assert _runtime.runs_triton(torch.empty(0, device=device)), "without a GPU set TRITON_INTERPRET=1"
    return device


def small_inputs(entry: Entry, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of a kernel and its twin on a CPU, of the sizes of the entry's first shape made small."""
    small = {"users": 2, "length": 3, "longest": 3, "tokens": 4, "items": 9, "steps": 2, "results": 3, "excluded": 3}
    shape = {size: min(value, small.get(size, value)) for size, value in next(iter(entry.shapes.values())).items()}
    return entry.inputs(shape, dtype, torch.device("cpu"))


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of ``expected`` (over 1 where that is all zero)."""
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    size = expected.double().square().mean().sqrt()
    return float(difference / size) if float(size) > 0.0 else float(difference)


def assert_matches(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Same shape, finite where the twin is finite, and within the RMS ratio of ``dtype`` (default: the actual one)."""
    assert actual.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), "not finite in other places than the twin"
    limit = RMS_RATIO[actual.dtype if dtype is None else dtype]
    found = rms_ratio(actual[finite], expected[finite])
    assert found <= limit, f"RMS ratio is {found:.3g}, allowed {limit:.3g}"


def embedded(values: Tensor) -> Tensor:
    """The same values as a contiguous view with NaN (or -1) on both sides: a read outside them shows."""
    bad: Any = math.nan if values.is_floating_point() else -1
    store = torch.empty(values.numel() + 2 * MARGIN, dtype=values.dtype, device=values.device).fill_(bad)
    inside = store[MARGIN : MARGIN + values.numel()].view(values.shape)
    return inside.copy_(values)


@contextmanager
def guarded() -> Iterator[None]:
    """Fill new tensors with NaN (or a large number) between margins; on leaving, nothing may have written to those."""
    made: list[tuple[Tensor, Tensor]] = []
    plain = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        wanted = plain(*size, **options)
        if options.get("out") is not None or wanted.device.type == "meta" or not wanted.numel():
            return wanted
        bad: Any = math.nan if wanted.is_floating_point() else (1 if wanted.dtype == torch.bool else 99)
        store = plain(wanted.numel() + 2 * MARGIN, dtype=wanted.dtype, device=wanted.device).fill_(bad)
        made.append((store, store.clone()))
        return store[MARGIN : MARGIN + wanted.numel()].view(wanted.shape)

    def like(values: Tensor, **options: Any) -> Tensor:
        return poisoned(values.shape, **{"dtype": values.dtype, "device": values.device, **options})

    def zeros(*size: Any, **options: Any) -> Tensor:
        return poisoned(*size, **options).zero_()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        patch.setattr(torch, "zeros", zeros)
        patch.setattr(torch, "empty_like", like)
        patch.setattr(Tensor, "new_empty", lambda self, *size, **options: like_sized(self, size, options, poisoned))
        yield
    for store, before in made:
        for side in (slice(0, MARGIN), slice(-MARGIN, None)):
            same = torch.equal(store[side].view(torch.uint8), before[side].view(torch.uint8))
            assert same, f"a kernel wrote outside a tensor of {store.numel() - 2 * MARGIN} elements"


def like_sized(values: Tensor, size: Any, options: dict[str, Any], make: Any) -> Tensor:
    """`Tensor.new_empty` by `torch.empty`."""
    return make(*size, **{"dtype": values.dtype, "device": values.device, **options})  # type: ignore[no-any-return]
