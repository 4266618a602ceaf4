"""GPU architectures that kernels are compiled for: what a block may use, and how many warps then fit.

Limits: CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications per Compute Capability".
Allocation rules (registers by the warp in units of 256, four partitions of 16384; 1 KiB of shared memory kept for each
block): NVIDIA Nsight Compute's occupancy calculator. Tensor memory: PTX ISA, "Tensor Memory".
"""

from __future__ import annotations

from dataclasses import dataclass

KIBIBYTE = 1024
WARP_THREADS = 32
_PARTITIONS = 4
_PARTITION_REGISTERS = 16384
_REGISTER_UNIT = 256
_SHARED_UNIT = 128
_SHARED_RESERVED = KIBIBYTE


@dataclass(frozen=True)
class Target:
    """One architecture. Limits are of one multiprocessor, shared memory in bytes; `shared_per_block` of one block.

    tensor_columns: columns of tensor memory, 0 where there is none.
    """

    name: str
    capability: int
    warps: int
    blocks: int
    shared: int
    shared_per_block: int
    tensor_columns: int = 0

    @property
    def shared_in_code(self) -> int:
        """Bytes that a block keeps for the system and that machine code counts as its own (from 9.0 on)."""
        return _SHARED_RESERVED if self.capability >= 90 else 0


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm_80", 80, warps=64, blocks=32, shared=164 * KIBIBYTE, shared_per_block=163 * KIBIBYTE),
        Target("sm_86", 86, warps=48, blocks=16, shared=100 * KIBIBYTE, shared_per_block=99 * KIBIBYTE),
        Target("sm_89", 89, warps=48, blocks=24, shared=100 * KIBIBYTE, shared_per_block=99 * KIBIBYTE),
        Target("sm_90", 90, warps=64, blocks=32, shared=228 * KIBIBYTE, shared_per_block=227 * KIBIBYTE),
        Target(
            "sm_100", 100, warps=64, blocks=32, shared=228 * KIBIBYTE, shared_per_block=227 * KIBIBYTE,
            tensor_columns=512,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Occupancy:
    """Most warps that can be resident on a multiprocessor, of ``limit``, and what keeps it from being more."""

    warps: int
    limit: int
    limited_by: str

    @property
    def fraction(self) -> float:
        return self.warps / self.limit


def occupancy(target: Target, warps: int, registers: int, shared: int, tensor_columns: int = 0) -> Occupancy:
    """Bound on the occupancy of a kernel; 0 warps where not even one block fits.

    warps: of a block. registers: of a thread. shared: bytes of a block. tensor_columns: tensor memory of a block.
    """
    warp_registers = _round_up(max(registers, 1) * WARP_THREADS, _REGISTER_UNIT)
    block_shared = _round_up(shared + _SHARED_RESERVED, _SHARED_UNIT)
    blocks = {
        "warps": target.warps // warps,
        "blocks": target.blocks,
        "registers": _PARTITIONS * (_PARTITION_REGISTERS // warp_registers) // warps,
        "shared memory": target.shared // block_shared if shared <= target.shared_per_block else 0,
    }
    if tensor_columns:
        blocks["tensor memory"] = target.tensor_columns // tensor_columns
    tightest = min(blocks, key=lambda name: blocks[name])
    return Occupancy(blocks[tightest] * warps, target.warps, tightest)


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
