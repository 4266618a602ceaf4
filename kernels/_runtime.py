"""The only importer of Triton: where kernels run, how they are launched, registered with torch and recorded.

Three ways to run a kernel: natively on a CUDA device; in Triton's interpreter on CPU tensors, where the environment
variable TRITON_INTERPRET=1 was set before Triton was imported (slow, for tests); or not at all, in which case public
functions run their pure-torch twins. `runs_triton` says which.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    # Enough of the language for kernels to be defined; launching one raises `MissingTritonError`.
    tl = SimpleNamespace(constexpr=object)

AVAILABLE = triton is not None
# Read once, as Triton does: it decides between compiler and interpreter when a kernel is defined.
INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET", "0") == "1"
LIBRARY = "adrec"


class MissingTritonError(RuntimeError):
    """A Triton kernel was asked for where Triton is not installed."""

    def __init__(self) -> None:
        super().__init__("Triton is not installed: pip install 'adrec[triton]' (Linux), or use the pure-torch twin")


class UnsupportedError(ValueError):
    """A kernel was given a dtype, shape, device or layout that it does not support."""


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the plain function where Triton is missing."""
    return triton.jit(function) if AVAILABLE else function


def constant(value: Any) -> Any:
    """A global constant that kernels may read (`tl.constexpr`)."""
    return tl.constexpr(value) if AVAILABLE else value


# The interpreter computes bf16 products as garbage and truncates on the way there: kernels lift operands of `tl.dot`
# to float32 where this is set, so that the interpreter tests their addressing with any storage dtype.
LIFT_DOTS = constant(INTERPRETED)


def cdiv(count: int, size: int) -> int:
    """Number of blocks of ``size`` that cover ``count``."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """Smallest power of two that is at least ``count`` (and at least 1)."""
    return 1 << max(0, count - 1).bit_length()


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch: what would have been compiled and run."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]


_recordings: list[list[Launch]] = []


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect launches instead of running them, so that they can be compiled or counted without a device.

    Inside, kernels run on tensors of the ``meta`` device too, and operators run their bodies directly.
    """
    found: list[Launch] = []
    _recordings.append(found)
    try:
        yield found
    finally:
        _recordings.pop()


def recording() -> bool:
    """Whether launches are being recorded."""
    return bool(_recordings)


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Run ``kernel[grid](*arguments, **options)``, visible to `torch.compile`. An empty grid launches nothing.

    options: constexpr parameters by name, num_warps, num_stages and maxnreg (most registers of a thread).
    """
    if _recordings:
        _recordings[-1].append(Launch(kernel, tuple(grid), arguments, options))
        return
    if not AVAILABLE:
        raise MissingTritonError
    if 0 in grid:
        return
    if INTERPRETED:
        kernel[tuple(grid)](*arguments, **options)
    else:
        wrapped = torch.library.wrap_triton(kernel)
        if wrapped is not kernel:
            # Traced: torch's compiler launches kernels without a limit on registers, and takes none.
            options.pop("maxnreg", None)
            wrapped[tuple(grid)](*arguments, **options)
            return
        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device(next(value.device for value in arguments if isinstance(value, Tensor))):
            kernel[tuple(grid)](*arguments, **options)


def runs_triton(*tensors: Tensor) -> bool:
    """Whether a public function given these tensors launches its kernel; otherwise it runs its pure-torch twin.

    Raises UnsupportedError when the tensors are not all on one device.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise UnsupportedError(f"tensors are on {', '.join(sorted(map(str, devices)))}; expected one device")
    if recording():
        return True
    kind = next(iter(devices)).type
    return AVAILABLE and (kind == "cuda" or (INTERPRETED and kind == "cpu"))


def kernel_op(name: str, fake: Callable[..., Any], *, mutates_args: Sequence[str] = ()) -> Callable[..., Any]:
    """Register a function that launches kernels as the operator ``adrec::name``.

    Natively a `torch.library.triton_op`, which the compiler can open; in the interpreter an opaque custom operator,
    since there is nothing to compile. fake: same signature, returns empty outputs of the right shapes and dtypes.
    The function returned has the operator as ``.op`` (for `register_autograd` and opcheck) and the body as ``.body``.
    """
    register = torch.library.custom_op if INTERPRETED or not AVAILABLE else torch.library.triton_op

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        operator: Any = register(f"{LIBRARY}::{name}", body, mutates_args=tuple(mutates_args))
        operator.register_fake(fake)

        @functools.wraps(body)
        def call(*arguments: Any, **options: Any) -> Any:
            return body(*arguments, **options) if _recordings else operator(*arguments, **options)

        call.op, call.body = operator, body  # type: ignore[attr-defined]
        return call

    return decorate


def check_seed(seed: Any, device: torch.device, *, needed: bool = True) -> None:
    """Raise UnsupportedError unless a seed is an int of 64 bits or 1 int64 on the device; None unless it is needed."""
    if seed is None and not needed:
        return
    if isinstance(seed, Tensor):
        fits = seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == device
        found = f"seed is {seed.dtype} of {seed.numel()} elements on {seed.device}"
        require(fits, f"{found}; expected 1 int64 on {device}")
        return
    require(
        isinstance(seed, int) and not isinstance(seed, bool),
        f"seed is {seed!r}, a {type(seed).__name__}; expected an int or 1 int64 on {device}",
    )
    require(-(1 << 63) <= seed < 1 << 63, f"seed is {seed}; allowed: -2^63 to 2^63 - 1")


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """A seed as `[1]` int64 on the device, which kernels read: a captured graph then draws by its current value."""
    check_seed(seed, device)
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    return torch.tensor([seed], dtype=torch.int64, device=device)


_kept_zeros: dict[tuple[torch.device, int], Tensor] = {}


def zeros_kept(like: Tensor, count: int) -> Tensor:
    """``count`` int32 zeros or more on the device of a tensor, for a kernel that leaves them as zeros.

    Launches of one CUDA stream run one after another, so each stream has one such buffer, filled once. A captured graph
    may be replayed on any stream, also beside others: it fills a buffer of its own, and so does traced code.
    """
    if like.device.type != "cuda" or type(like) is not Tensor or recording():
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    with torch.cuda.device(like.device):
        key = like.device, torch.cuda.current_stream().cuda_stream
        kept = None if torch.cuda.is_current_stream_capturing() else _kept_zeros.get(key)
        if kept is None or kept.numel() < count:
            kept = torch.zeros(count, dtype=torch.int32, device=like.device)
            if not torch.cuda.is_current_stream_capturing():
                _kept_zeros[key] = kept
    return kept


def require(condition: bool, message: str) -> None:
    """Raise UnsupportedError with the message unless the condition holds."""
    if not condition:
        raise UnsupportedError(message)


def require_offsets(name: str, offsets: Tensor, count: int, *, shortest: int = 0, spare: bool = False) -> None:
    """Raise UnsupportedError unless offsets rise from 0 to ``count``; on a CPU only: reading others would stall.

    shortest: the least by which each rises. spare: they may end before ``count``.
    """
    if offsets.device.type != "cpu" or recording() or not offsets.numel() or torch.compiler.is_compiling():
        return
    steps = offsets[1:] - offsets[:-1]
    end = int(offsets[-1])
    fits = int(offsets[0]) == 0 and (end <= count if spare else end == count)
    fits = fits and (not steps.numel() or int(steps.min()) >= shortest)
    found = f"{name} is {offsets[:8].tolist()}{'...' if offsets.numel() > 8 else ''}"
    wanted = f"rise from 0 to {count}{' or less' if spare else ''}{f', each by {shortest} or more' if shortest else ''}"
    require(fits, f"{found}; expected to {wanted}, the values that they divide")
