"""Toy kernels and their entries: one that is fine, one that spills, one with too much shared memory, broken ones."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels import _runtime
from kernels._runtime import LIFT_DOTS, Launch, jit, kernel_op, launch, record_launches, runs_triton, tl
from kernels._specialisation import specialise
from kernels.compilation import _compile_all, compile_cases
from kernels.inventory import Case, Cost, Entry, Shape
from kernels.targets import TARGETS


@jit
def scale_kernel(x_ptr, out_ptr, bias_ptr, count, factor, negate, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.load(x_ptr + place, mask=inside).to(tl.float32) * factor
    if bias_ptr is not None:
        value += tl.load(bias_ptr + place, mask=inside).to(tl.float32)
    if negate:
        value = -value
    tl.store(out_ptr + place, value, mask=inside)


@jit
def spilling_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    # A thread of the one warp holds SIZE^2 / 32 values of the tile from the sums on, more than it has registers.
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tile = tl.load(x_ptr + place).to(tl.float32)
    tl.store(out_ptr + place, tile - tl.max(tile, 1)[:, None] + tl.sum(tile, 0)[None, :])


@jit
def product_kernel(a_ptr, b_ptr, out_ptr, depth, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    row, column, inner = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :], tl.arange(0, DEPTH)
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for first in range(0, depth, DEPTH):
        a = tl.load(a_ptr + row * depth + first + inner[None, :])
        b = tl.load(b_ptr + (first + inner)[:, None] * SIZE + column)
        if LIFT_DOTS:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(out_ptr + row * SIZE + column, total)


@jit
def broken_kernel(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE), tl.arange(0, 2 * SIZE))


def scale_twin(x: Tensor, factor: float) -> Tensor:
    return (x.float() * factor).to(x.dtype)


def _empty(x: Tensor, factor: float) -> Tensor:
    return torch.empty_like(x)


@kernel_op("toy_scale", _empty)
def _scale(x: Tensor, factor: float) -> Tensor:
    out = torch.empty_like(x)
    launch(scale_kernel, (-(-x.numel() // 256),), x, out, None, x.numel(), factor, 0, BLOCK=256, num_warps=4)
    return out


def scale(x: Tensor, factor: float) -> Tensor:
    return _scale(x, factor) if runs_triton(x) else scale_twin(x, factor)


def spill(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    launch(spilling_kernel, (1,), x, out, SIZE=x.shape[0], num_warps=1)
    return out


def product(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(a.shape[0], a.shape[0], dtype=torch.float32)
    options = {"SIZE": a.shape[0], "DEPTH": 64, "num_warps": 8, "num_stages": 4}
    launch(product_kernel, (1,), a, b, out, a.shape[1], **options)
    return out


def broken(x: Tensor) -> Tensor:
    launch(broken_kernel, (1,), x, SIZE=16)
    return x


def refused(x: Tensor) -> Tensor:
    raise ValueError("this shape is not for me")


def _rows(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {"x": torch.ones(shape["rows"], shape["width"], dtype=dtype, device=device)}


def _scale_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return _rows(shape, dtype, device) | {"factor": 3.0}


def _product_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    rows, depth = shape["rows"], shape["width"]
    make = torch.ones(rows, depth, dtype=dtype, device=device)
    return {"a": make, "b": torch.ones(depth, rows, dtype=dtype, device=device)}


def _cost(shape: Shape, dtype: torch.dtype) -> Cost:
    count = shape["rows"] * shape["width"]
    return Cost(bytes=2 * count * dtype.itemsize, flops=count)


def make_entry(name: str, run: Any, inputs: Any = _rows, **options: Any) -> Entry:
    settings: dict[str, Any] = {
        "dtypes": (torch.float32, torch.bfloat16),
        "shapes": {"paper": {"rows": 128, "width": 128}},
        "twin": run,
        **options,
    }
    return Entry(
        name=name, summary=f"{name} a matrix", use_when="never: it is a toy", avoid_when="always", inputs=inputs,
        run=run, cost=_cost, **settings,
    )  # fmt: skip


SHAPES = {"paper": {"rows": 128, "width": 128}, "odd, small": {"rows": 3, "width": 5}}
SCALE = make_entry("scale", scale, _scale_inputs, twin=scale_twin, shapes=SHAPES, dtypes=(torch.float32, torch.float16))
SCALE_FP8 = make_entry("scale_fp8", scale, _scale_inputs, twin=scale_twin, dtypes=(torch.float8_e4m3fn, torch.int8))
SPILL = make_entry("spill", spill, dtypes=(torch.float32,))
PRODUCT = make_entry("product", product, _product_inputs, dtypes=(torch.float32,))
BROKEN = make_entry("broken", broken, dtypes=(torch.int32,))
REFUSED = make_entry("refused", refused, dtypes=(torch.float32,))
IDLE = make_entry("idle", lambda x: x, dtypes=(torch.float32,))
ENTRIES = [SCALE, SCALE_FP8, SPILL, PRODUCT, BROKEN, REFUSED, IDLE]


def __getattr__(name: str) -> Any:
    if name == "crashing_kernel":
        # What a compiler that crashes does to its process.
        os._exit(3)
    raise AttributeError(name)


def report(jobs: int) -> dict[str, Any]:
    """What a test process, in which kernels are interpreted, wants to know of the compiler; as JSON values."""
    return {
        "compiled": compile_everything(jobs),
        "with a crash": compile_with_a_crash(),
        "specialised": compare_with_launcher(),
    }


def compile_everything(jobs: int) -> dict[str, Any]:
    """Every kernel compiled for sm_86 and sm_90, and the calls that told of progress."""
    cases = [
        Case(entry, name, shape, dtype)
        for entry in ENTRIES
        for name, shape in entry.shapes.items()
        for dtype in entry.dtypes
    ]
    progress: list[tuple[int, int, str]] = []
    found = compile_cases(
        cases, [TARGETS["sm_86"], TARGETS["sm_90"]], jobs=jobs, report=lambda *seen: progress.append(seen)
    )
    rows = []
    for each in found:
        used = each.resources
        rows.append(
            {
                "entry": each.entry,
                "cell": [each.entry, each.shape, str(each.dtype), each.target.name],
                "kernel": each.kernel,
                "launch": each.launch,
                "constants": dict(each.constants),
                "problems": each.problems,
                "usage": None if used is None else [used.registers, used.spills, used.shared, used.warps, used.stages],
                "occupancy": None if each.occupancy is None else each.occupancy.warps,
            }
        )
    return {"rows": rows, "progress": progress}


def compile_with_a_crash() -> list[str]:
    """Outcomes of two kernels of which the first takes the compiler's process down."""
    with record_launches() as launches:
        scale(torch.empty(512, device="meta"), 2.0)
    good = specialise(launches[0])
    units = [(replace(good, kernel="toy_kernels:crashing_kernel"), "sm_90"), (good, "sm_90")]
    found = _compile_all(units, 2, lambda *seen: None)
    return [outcome if isinstance(outcome, str) else "compiled" for outcome in (found[unit] for unit in units)]


def compare_with_launcher() -> list[list[Any]]:
    """Specialisations by us and by Triton's own launcher, for arguments of every kind."""
    triton = _runtime.triton
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    bind = triton.runtime.jit.create_function_from_signature(
        scale_kernel.signature, scale_kernel.params, triton.compiler.make_backend(target)
    )
    store = torch.empty(64, device="meta")
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool)
    tensors: list[Any] = [store.to(dtype)[first:] for dtype in dtypes for first in (0, 1, 4, 16)]
    numbers = [0, 1, 2, 16, -16, True, False, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63, 0.5, 1.0, None]
    found = []
    for value in [*tensors, *numbers]:
        _, theirs, _ = bind(store, value, None, value, 1.5, False, BLOCK=64, num_warps=4)
        ours = specialise(Launch(scale_kernel, (1,), (store, value, None, value, 1.5, False), {"BLOCK": 64}))
        marked = list(zip(scale_kernel.arg_names, theirs, strict=True))
        found.append(
            [
                str(value.dtype) if isinstance(value, Tensor) else str(value),
                [[kind for _, kind in ours.signature], list(ours.aligned), [name for name, _ in ours.constants]],
                [
                    [kind for kind, _ in theirs],
                    [name for name, (_, mark) in marked if mark == "D"],
                    [name for name, (kind, _) in marked if kind == "constexpr"],
                ],
            ]
        )
    return found
