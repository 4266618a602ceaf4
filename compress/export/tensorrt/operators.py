"""The operators of this project's own domain: inputs, attributes, outputs, and the kernel that computes each.

A node ``adrec::NAME`` is a plugin for TensorRT, and for every other runtime the model-local function of the same name
that stands in the file (`compress.export.tensorrt.functions`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels.plugin_kernels import Arithmetic, DenoisePlugin, PluginKernel, ScorePlugin

DOMAIN = "adrec"
TRITON_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}
# In order; `WEIGHTS` are those of `kernels.block_weights.BlockWeights`.
WEIGHTS = (
    "qkv", "qkv_bias", "out_weight", "out_bias", "attention_norm", "up", "up_bias", "down", "down_bias",
    "feed_forward_norm",
)  # fmt: skip
Attributes = Mapping[str, Any]
Shapes = Sequence[Sequence[Any]]
Dtypes = Sequence[torch.dtype]


@dataclass(frozen=True)
class Output:
    """One output: dtype and sizes, which may be symbolic."""

    dtype: torch.dtype
    shape: tuple[Any, ...]


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid and its run-time integers, both of which may be symbolic."""

    kernel: PluginKernel
    grid: tuple[Any, ...]
    integers: tuple[Any, ...]


@dataclass(frozen=True)
class Operator:
    """One operator. describe and launch: from attributes, and shapes and dtypes of the inputs."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, type]
    describe: Callable[[Attributes, Shapes, Dtypes, Arithmetic], list[Output]]
    launch: Callable[[Attributes, Shapes, Dtypes, Arithmetic], Launch]

    def pointer_types(self, kernel: PluginKernel, inputs: Dtypes, outputs: Dtypes) -> dict[str, str]:
        """Triton's type of each pointer of the kernel."""
        named = zip((*kernel.inputs, *kernel.outputs), (*inputs, *outputs), strict=True)
        return {name: TRITON_TYPES[dtype] for name, dtype in named}


def score_plugin(attributes: Attributes, dtypes: Dtypes) -> ScorePlugin:
    """Sizes of the two scoring kernels. dtypes: of rows and table."""
    return ScorePlugin(
        count=int(attributes["count"]), width=int(attributes["width"]), k=int(attributes["k"]),
        first=int(attributes["first"]), rows=dtypes[0], table=dtypes[1],
    )  # fmt: skip


def denoise_plugin(attributes: Attributes, dtypes: Dtypes) -> DenoisePlugin:
    """Sizes of the denoising kernel. dtypes: of the operator's inputs."""
    names = ("width", "heads", "blocks", "steps", "pad_rows", "max_length")
    return DenoisePlugin(
        **{name: int(attributes[name]) for name in names},
        mix_weight=float(attributes["mix_weight"]),
        guidance_scale=float(attributes["guidance_scale"]),
        geodesic=bool(attributes["geodesic"]),
        stored=dtypes[1],
    )


def _score_outputs(attributes: Attributes, shapes: Shapes, dtypes: Dtypes, sizes: Arithmetic) -> list[Output]:
    plugin, batch = score_plugin(attributes, dtypes), shapes[0][0]
    splits, _ = plugin.splits(batch, sizes)
    return [Output(torch.int64, (batch, splits, plugin.capacity)), Output(torch.float32, (batch, splits))]


def _score_launch(attributes: Attributes, shapes: Shapes, dtypes: Dtypes, sizes: Arithmetic) -> Launch:
    plugin, batch = score_plugin(attributes, dtypes), shapes[0][0]
    return Launch(plugin.score(), plugin.score_grid(batch, sizes), (batch, *plugin.splits(batch, sizes)))


def _merge_sizes(attributes: Attributes) -> ScorePlugin:
    # What is merged is keys, whatever was multiplied.
    return score_plugin(attributes, (torch.float32, torch.float32))


def _merge_outputs(attributes: Attributes, shapes: Shapes, dtypes: Dtypes, sizes: Arithmetic) -> list[Output]:
    plugin, batch = _merge_sizes(attributes), shapes[0][0]
    return [
        Output(torch.int64, (batch, plugin.best)),
        Output(torch.int64, (batch, plugin.k)),
        Output(torch.float32, (batch, plugin.k)),
    ]


def _merge_launch(attributes: Attributes, shapes: Shapes, dtypes: Dtypes, sizes: Arithmetic) -> Launch:
    return Launch(_merge_sizes(attributes).merge(), (shapes[0][0],), (shapes[0][1],))


def _denoise_outputs(attributes: Attributes, shapes: Shapes, dtypes: Dtypes, sizes: Arithmetic) -> list[Output]:
    plugin, users = denoise_plugin(attributes, dtypes), shapes[0][0]
    programs = plugin.programs(users, sizes)
    return [
        Output(torch.float32, (users, plugin.width)),
        Output(torch.float32, (programs, plugin.rows, plugin.scratch_width)),
        Output(plugin.stored, (programs, 2, plugin.rows, plugin.padded_width)),
    ]


def _denoise_launch(attributes: Attributes, shapes: Shapes, dtypes: Dtypes, sizes: Arithmetic) -> Launch:
    plugin, users = denoise_plugin(attributes, dtypes), shapes[0][0]
    # Keys and values are `[branches, blocks, 2, B, L, D]`: B L places for packed tokens.
    keys_values = shapes[DENOISE_INPUTS.index("keys_values")]
    return Launch(plugin.denoise(), (plugin.programs(users, sizes),), (users, keys_values[3] * keys_values[4]))


DENOISE_INPUTS = (
    "condition", *WEIGHTS, "keys_values", "pads", "offsets", "times", "coefficients", "noise",
)  # fmt: skip
_SCORE_ATTRIBUTES = {"count": int, "width": int, "k": int, "first": int}
_DENOISE_ATTRIBUTES = {
    "width": int, "heads": int, "blocks": int, "steps": int, "pad_rows": int, "max_length": int, "mix_weight": float,
    "guidance_scale": float, "geodesic": int,
}  # fmt: skip

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator(
            "score_splits", ("rows", "table"), ("candidates", "bounds"),
            _SCORE_ATTRIBUTES, _score_outputs, _score_launch,
        ),
        Operator(
            "merge_splits", ("candidates", "bounds"), ("merged", "items", "scores"),
            _SCORE_ATTRIBUTES, _merge_outputs, _merge_launch,
        ),
        Operator(
            "denoise_last", DENOISE_INPUTS, ("x0", "scratch", "operand_scratch"),
            _DENOISE_ATTRIBUTES, _denoise_outputs, _denoise_launch,
        ),
    )
}  # fmt: skip
