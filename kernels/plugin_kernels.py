# mypy: allow-untyped-defs
"""Kernels as another runtime launches them: pointers of inputs, then integers, then pointers of outputs; no floats.

TensorRT's plugins of one ahead-of-time compiled kernel have this order, no scratch memory and no second launch. So
scratch is an output that nobody reads, floats are constants, and `score_topk` is two plugins, one for each launch.
Sizes that depend on a batch are computed from it by `Arithmetic`, on integers here and symbolically in such a runtime.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kernels._denoise_last_kernel import denoise_last_kernel
from kernels._denoise_last_op import block_sizes
from kernels._runtime import cdiv, jit, next_power_of_2, tl
from kernels._score_topk_merge import EMPTY, LAST_ID, keep_best, order_bits
from kernels._score_topk_op import plan
from kernels._score_topk_tiles import score_splits

# What any GPU gives a block without being asked; a runtime may not ask for more.
MOST_SHARED = 48 * 1024
# Programs that fill a large GPU with tiles of 16 rows, and keys that one program merges.
_PROGRAMS, _MERGED_KEYS, _FEWEST_MERGED_KEYS = 1024, 4096, 2048
_FEWEST_SPLIT_ITEMS = 1024
_ITEMS = 32


class Arithmetic(Protocol):
    """Arithmetic on sizes beyond ``+ - * //``, which sizes have themselves."""

    def cdiv(self, count: Any, size: Any) -> Any: ...
    def least(self, first: Any, second: Any) -> Any: ...
    def most(self, first: Any, second: Any) -> Any: ...
    def constant(self, value: int) -> Any: ...


class Integers:
    """`Arithmetic` on Python integers."""

    def cdiv(self, count: int, size: int) -> int:
        return cdiv(count, size)

    def least(self, first: int, second: int) -> int:
        return min(first, second)

    def most(self, first: int, second: int) -> int:
        return max(first, second)

    def constant(self, value: int) -> int:
        return value


@dataclass(frozen=True)
class PluginKernel:
    """One kernel with its constants. pointers: names of inputs, then of outputs, with the outputs' count.

    integers: names of the run-time integers between them. options: num_warps, num_stages, maxnreg.
    """

    kernel: Any
    inputs: tuple[str, ...]
    integers: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Any]
    options: dict[str, int]


@jit
def score_splits_plugin(
    rows_ptr, table_ptr, B, splits, split_items, candidates_ptr, bounds_ptr,
    FIRST: tl.constexpr, LAST: tl.constexpr, K: tl.constexpr, MOST: tl.constexpr, RESERVED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, CHUNK: tl.constexpr, LIFT: tl.constexpr, ROWS: tl.constexpr,
    ITEMS: tl.constexpr, CAPACITY: tl.constexpr, COMPACTED_ROWS: tl.constexpr,
):  # fmt: skip
    """`score_splits` without exclusion, scale or merge; see there. LAST: rows of the table."""
    score_splits(
        rows_ptr, table_ptr, None, None, None, candidates_ptr, bounds_ptr, None, None, None,
        B, FIRST, LAST, K, MOST, RESERVED, splits, split_items, 0,
        WIDTH, BLOCK_WIDTH, CHUNK, LIFT, ROWS, ITEMS, CAPACITY, COMPACTED_ROWS, False, False, False, 0, 0, 0,
    )  # fmt: skip


@jit
def merge_splits_plugin(
    candidates_ptr, bounds_ptr, splits, merged_ptr, items_ptr, scores_ptr,
    K: tl.constexpr, CAPACITY: tl.constexpr, BEST: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """One program: the best K keys of a row's lists, sorted and decoded; candidates are left as they are.

    candidates: `[B, splits, CAPACITY]` int64, of which the first K of each list are read. bounds is not read. merged:
    `[B, BEST]` int64, scratch. items, scores: `[B, K]`. FAN: at least ``splits``, a power of two, as is BEST.
    """
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, FAN * BEST)
    split, slot = index // BEST, index % BEST
    place = (row * splits + split) * CAPACITY + slot
    key = tl.load(candidates_ptr + place, mask=(split < splits) & (slot < K), other=EMPTY)
    best = tl.arange(0, BEST)
    kept_ptr = merged_ptr + row * BEST
    keep_best((kept_ptr + tl.arange(0, 1))[:, None], key[None, :], index, K, K, BEST)
    tl.debug_barrier()
    key = tl.sort(tl.load(kept_ptr + best), descending=True)
    bits = order_bits((key >> 32).to(tl.int32))
    tl.store(items_ptr + row * K + best, (key & LAST_ID) ^ LAST_ID, mask=best < K)
    tl.store(scores_ptr + row * K + best, bits.to(tl.float32, bitcast=True), mask=best < K)


@jit
def denoise_last_plugin(
    condition_ptr, qkv_ptr, qkv_bias_ptr, out_weight_ptr, out_bias_ptr, attention_norm_ptr, up_ptr, up_bias_ptr,
    down_ptr, down_bias_ptr, feed_forward_norm_ptr, keys_values_ptr, pads_ptr, offsets_ptr, times_ptr,
    coefficients_ptr, noise_ptr, users, tokens, x0_ptr, scratch_ptr, operand_scratch_ptr,
    STEPS: tl.constexpr, BLOCKS: tl.constexpr, PAD_ROWS: tl.constexpr, MAX_LENGTH: tl.constexpr,
    MIX_WEIGHT: tl.constexpr, SCALE: tl.constexpr, GUIDANCE: tl.constexpr,
    D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, HEAD_COUNT: tl.constexpr, HEAD_WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, OUTPUTS: tl.constexpr, HIDDEN: tl.constexpr, SLICE: tl.constexpr,
    MIX_SLICE: tl.constexpr, PADS: tl.constexpr, GUIDED: tl.constexpr, GEODESIC: tl.constexpr,
):  # fmt: skip
    """`denoise_last_kernel` with given noise; see there."""
    denoise_last_kernel(
        x0_ptr, condition_ptr, qkv_ptr, qkv_bias_ptr, out_weight_ptr, out_bias_ptr, attention_norm_ptr, up_ptr,
        up_bias_ptr, down_ptr, down_bias_ptr, feed_forward_norm_ptr, keys_values_ptr, pads_ptr, offsets_ptr, times_ptr,
        coefficients_ptr, offsets_ptr, offsets_ptr, noise_ptr, scratch_ptr, operand_scratch_ptr,
        users, tokens, STEPS, BLOCKS, PAD_ROWS, MAX_LENGTH, MIX_WEIGHT, SCALE, GUIDANCE,
        D, HEADS, WIDTH, HEAD_COUNT, HEAD_WIDTH, ROWS, KEYS, OUTPUTS, HIDDEN, SLICE, MIX_SLICE, PADS,
        False, True, GUIDED, GEODESIC,
    )  # fmt: skip


@dataclass(frozen=True)
class ScorePlugin:
    """Exact scores and top k of ``rows`` `[B, width]` over ``table`` `[count, width]` as two kernels.

    first: table rows below it are never returned. Made for k up to 128 or so: with larger k, fewer programs share the
    catalogue, since one of them merges 4096 keys at most.
    """

    count: int
    width: int
    k: int
    first: int
    rows: torch.dtype
    table: torch.dtype

    @property
    def capacity(self) -> int:
        return self._plan.capacity

    @property
    def best(self) -> int:
        """k rounded up to a power of two."""
        return max(16, next_power_of_2(self.k))

    @property
    def most_splits(self) -> int:
        """Most parts that the catalogue is cut into."""
        return min(_MERGED_KEYS // self.best, max(1, self.items // _FEWEST_SPLIT_ITEMS))

    @property
    def items(self) -> int:
        return max(0, self.count - self.first)

    @property
    def _plan(self) -> Any:
        # Small tiles: the grid follows from the batch, which is not known here.
        return plan(1, self.items, self.width, self.k, self.rows, self.table)

    def splits(self, batch: Any, sizes: Arithmetic) -> tuple[Any, Any]:
        """(parts of the catalogue, items of each) for a batch."""
        tiles = sizes.cdiv(batch, self._plan.rows)
        wanted = sizes.least(sizes.most(sizes.constant(_PROGRAMS) // tiles, 1), self.most_splits)
        items = sizes.constant(max(1, self.items))
        split_items = sizes.cdiv(sizes.cdiv(items, wanted), _ITEMS) * _ITEMS
        return sizes.cdiv(items, split_items), split_items

    def score_grid(self, batch: Any, sizes: Arithmetic) -> tuple[Any, Any]:
        return sizes.cdiv(batch, self._plan.rows), self.splits(batch, sizes)[0]

    def score(self) -> PluginKernel:
        """Writes candidates `[B, splits, capacity]` int64 and bounds `[B, splits]` float32, scratch."""
        chosen = self._plan
        return PluginKernel(
            score_splits_plugin,
            ("rows_ptr", "table_ptr"),
            ("B", "splits", "split_items"),
            ("candidates_ptr", "bounds_ptr"),
            {
                "FIRST": self.first, "LAST": self.count, "K": self.k, "MOST": chosen.most, "RESERVED": chosen.reserved,
                "WIDTH": self.width, "BLOCK_WIDTH": chosen.block_width, "CHUNK": chosen.chunk, "LIFT": chosen.lift,
                "ROWS": chosen.rows, "ITEMS": _ITEMS, "CAPACITY": chosen.capacity,
                "COMPACTED_ROWS": chosen.compacted_rows,
            },
            {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages, "maxnreg": chosen.registers},
        )  # fmt: skip

    def merge(self) -> PluginKernel:
        """Writes merged `[B, best]` int64, scratch, and items and scores `[B, k]`; a program a row."""
        # Of fewer keys the compiler makes code that spills.
        fan = max(next_power_of_2(self.most_splits), _FEWEST_MERGED_KEYS // self.best)
        return PluginKernel(
            merge_splits_plugin,
            ("candidates_ptr", "bounds_ptr"),
            ("splits",),
            ("merged_ptr", "items_ptr", "scores_ptr"),
            {"K": self.k, "CAPACITY": self.capacity, "BEST": self.best, "FAN": fan},
            {"num_warps": 4, "num_stages": 1, "maxnreg": 255},
        )


@dataclass(frozen=True)
class DenoisePlugin:
    """All reverse steps of users whose noise is given; see `kernels.denoise_last` for what is computed.

    stored: dtype of weights, keys and values. pad_rows: rows of padding, 0 for none.
    """

    width: int
    heads: int
    blocks: int
    steps: int
    pad_rows: int
    max_length: int
    mix_weight: float
    guidance_scale: float
    geodesic: bool
    stored: torch.dtype

    @property
    def _sizes(self) -> Any:
        chosen = block_sizes(1, self.padded_width, self.stored)
        # Three stages of 16-bit weights fit into the memory that a block has without asking.
        return chosen._replace(stages=min(chosen.stages, 3))

    @property
    def padded_width(self) -> int:
        return max(16, next_power_of_2(self.width))

    def programs(self, users: Any, sizes: Arithmetic) -> Any:
        return sizes.cdiv(users, self._sizes.rows)

    @property
    def scratch_width(self) -> int:
        """Columns of scratch `[programs, rows, columns]` float32."""
        heads, head = next_power_of_2(self.heads), next_power_of_2(self.width // self.heads)
        return 3 * heads * head + self.padded_width

    @property
    def rows(self) -> int:
        """Users of a program."""
        return int(self._sizes.rows)

    def denoise(self) -> PluginKernel:
        """Writes x0_hat `[B, D]` float32, scratch, and scratch `[programs, 2, rows, padded_width]` as stored."""
        chosen = self._sizes
        weights = ("qkv", "qkv_bias", "out_weight", "out_bias", "attention_norm", "up", "up_bias", "down", "down_bias")
        named = ("condition", *weights, "feed_forward_norm", "keys_values", "pads", "offsets", "times", "coefficients")
        return PluginKernel(
            denoise_last_plugin,
            tuple(f"{name}_ptr" for name in (*named, "noise")),
            ("users", "tokens"),
            ("x0_ptr", "scratch_ptr", "operand_scratch_ptr"),
            {
                "STEPS": self.steps, "BLOCKS": self.blocks, "PAD_ROWS": self.pad_rows, "MAX_LENGTH": self.max_length,
                "MIX_WEIGHT": self.mix_weight, "SCALE": 1.0 / math.sqrt(self.width // self.heads),
                "GUIDANCE": self.guidance_scale, "D": self.width, "HEADS": self.heads, "WIDTH": self.padded_width,
                "HEAD_COUNT": next_power_of_2(self.heads), "HEAD_WIDTH": next_power_of_2(self.width // self.heads),
                "ROWS": chosen.rows, "KEYS": chosen.keys, "OUTPUTS": chosen.outputs, "HIDDEN": chosen.hidden,
                "SLICE": chosen.slice, "MIX_SLICE": chosen.mix_slice, "PADS": min(self.pad_rows, 2),
                "GUIDED": self.guidance_scale != 1.0, "GEODESIC": self.geodesic,
            },
            {"num_warps": chosen.warps, "num_stages": chosen.stages, "maxnreg": 255},
        )  # fmt: skip
