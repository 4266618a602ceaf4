"""Write Triton's own ``tl.randn`` values to an .npz: ``TRITON_INTERPRET=1 python triton_randn.py OUT.npz``.

A process of its own, because the interpreter must be chosen before Triton is imported. `triton_randn.npz` beside this
file was made this way with Triton 3.7.1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch

SEEDS = [0, 1, 42, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**40 + 12_345, 2**63 - 1, -3]
# Offsets on both sides of every 32-bit border, some in the middle of a user's block, and the largest allowed one.
OFFSETS = [
    *range(129),
    2**24 - 1,
    2**24,
    *range(2**31 - 2, 2**31 + 3),
    *range(2**32 - 2, 2**32 + 3),
    *((123_456_789 << 24) + (31 << 12) + dimension for dimension in range(67)),
    2**40 + 17,
    2**62 + 2**33 + 1,
    2**63 - 1,
    # With seed 0 the first uniform of these is below 1e-7, where the logarithm's argument is clamped.
    14_883_995,
    17_758_991,
    34_829_342,
    38_471_471,
]


def draw(seed: int, offsets: np.ndarray) -> np.ndarray:
    """Return ``tl.randn(seed, offset)`` for int64 offsets of any length, float32."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(seed_pointer, offset_pointer, out_pointer, count, block: tl.constexpr):
        place = tl.program_id(0) * block + tl.arange(0, block)
        inside = place < count
        # The seed comes from memory as int64: a scalar argument below 2^31 would be specialised to 32 bits.
        seed = tl.load(seed_pointer)
        offset = tl.load(offset_pointer + place, mask=inside, other=0)
        tl.store(out_pointer + place, tl.randn(seed, offset), mask=inside)

    out = torch.empty(len(offsets), dtype=torch.float32)
    kernel[(triton.cdiv(len(offsets), 64),)](torch.tensor([seed]), torch.from_numpy(offsets), out, len(offsets), 64)
    return out.numpy()


def main() -> None:
    """Draw every seed at every offset."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("set TRITON_INTERPRET=1: without a GPU only the interpreter can run a kernel")
    offsets = np.array(OFFSETS, dtype=np.int64)
    values = np.stack([draw(seed, offsets) for seed in SEEDS])
    np.savez_compressed(Path(sys.argv[1]), seeds=np.array(SEEDS, dtype=np.int64), offsets=offsets, values=values)


if __name__ == "__main__":
    main()
