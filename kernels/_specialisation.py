"""What a kernel is compiled for: types, constants and alignments of a launch, as Triton's launcher would have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import _runtime
from kernels._runtime import Launch
from kernels.targets import Target

# Triton converts the 8-bit float of this type name in hardware, from compute capability 8.9 on, or not at all.
FLOAT8, FLOAT8_CAPABILITY = "fp8e4nv", 89
ALIGNMENT = 16
# Constants that say which model or request a kernel is compiled for; other whole numbers are sizes of its blocks.
_MODEL_SIZES = frozenset({"B", "D", "HEADS", "HEAD", "HEAD_COUNT", "HEAD_WIDTH", "PADS", "PAD_MODE", "OWN"})
_TYPE_NAMES = {
    torch.bool: "u1",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: FLOAT8,
    torch.float8_e5m2: "fp8e5",
}


@dataclass(frozen=True)
class Variant:
    """A kernel specialised for one launch: all that the compiler is told, in a form that another process can read.

    kernel: ``module:name``. signature: type of each parameter. constants: (parameter, value) pairs. aligned: parameters
    that are multiples of 16. options: num_warps, num_stages and other compiler options.
    """

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.kernel.split(":")[1]

    @property
    def blocks(self) -> tuple[object, ...]:
        """The kernel, its block sizes, warps, stages and register limit: what a plan chose, whatever it was for."""
        sizes = [
            (name, value)
            for name, value in self.constants
            if name.isupper() and name not in _MODEL_SIZES and isinstance(value, int) and not isinstance(value, bool)
        ]
        return (self.kernel, *sizes, *self.options)

    def compiles_for(self, target: Target) -> bool:
        """Whether the target has the types of the signature."""
        return target.capability >= FLOAT8_CAPABILITY or f"*{FLOAT8}" not in dict(self.signature).values()


def specialise(launch: Launch) -> Variant:
    """Types, constants and alignments of a launch, as Triton's launcher derives them from the arguments.

    Tensors are pointers of their dtype, aligned where their first element is at a multiple of 16 bytes of their
    storage, as every allocator aligns storages. Integers are 32 bits where they fit, 1 is a constant, multiples of 16
    are marked; None is a constant; floats are 32 bits. Raises TypeError for another kind of argument.
    """
    kernel = launch.kernel
    named = {name: value for name, value in launch.options.items() if name in kernel.arg_names}
    options = {name: value for name, value in launch.options.items() if name not in named}
    bound = kernel.signature.bind(*launch.arguments, **named)
    bound.apply_defaults()
    signature, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        value = bound.arguments[parameter.name]
        value = getattr(value, "value", value) if isinstance(value, _runtime.tl.constexpr) else value
        type_name, is_aligned = ("constexpr", False) if parameter.is_constexpr else _argument(parameter, value)
        signature[parameter.name] = type_name
        if type_name == "constexpr":
            constants[parameter.name] = value
        if is_aligned:
            aligned.append(parameter.name)
    return Variant(
        kernel=f"{kernel.fn.__module__}:{kernel.fn.__qualname__}",
        signature=tuple(signature.items()),
        constants=tuple(constants.items()),
        aligned=tuple(aligned),
        options=tuple(sorted(options.items())),
    )


def _argument(parameter: Any, value: Any) -> tuple[str, bool]:
    """Type name of a run-time argument, and whether it is marked as a multiple of 16."""
    if value is None:
        return "constexpr", False
    specialised = not parameter.do_not_specialize
    alignable = specialised and not parameter.do_not_specialize_on_alignment
    declared = parameter.annotation_type
    if isinstance(value, Tensor):
        if value.dtype not in _TYPE_NAMES:
            raise TypeError(f"parameter {parameter.name} is a tensor of {value.dtype}, which no kernel takes")
        first_byte = value.storage_offset() * value.element_size()
        pointer = "*k" if parameter.is_const else "*"
        return declared or pointer + _TYPE_NAMES[value.dtype], alignable and first_byte % ALIGNMENT == 0
    if isinstance(value, bool):
        return declared or "u1", False
    if isinstance(value, float):
        return declared or "fp32", False
    if not isinstance(value, int):
        raise TypeError(f"parameter {parameter.name} is a {type(value).__name__}: not a tensor, number or None")
    if declared.startswith(("fp", "bf")) or declared == "u1":
        return declared, False
    if value == 1 and specialised and not declared:
        return "constexpr", False
    return declared or _integer_type(value), alignable and value % ALIGNMENT == 0


def _integer_type(value: int) -> str:
    if -(2**31) <= value < 2**31:
        return "i32"
    return "i64" if value < 2**63 else "u64"
