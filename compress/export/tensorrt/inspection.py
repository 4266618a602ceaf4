"""Read an engine back and compare the dtypes of its layers with those of the graph it was built from.

A build that falls back to float32 gives right numbers, a plan and no error; only the inspector tells.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from adrec.engines.tensorrt.library import TensorRTError, last_messages, start
from adrec.engines.tensorrt.profiles import Profile
from adrec.engines.tensorrt.runner import refit
from compress.export.tensorrt.graph import Graph
from compress.export.tensorrt.options import BuildOptions

# Words for dtypes in the inspector's "Format/Datatype", old ("Row major linear FP16 format") and new ("Half").
_WORDS = {
    "float32": ("float", "fp32", "float32"),
    "float16": ("half", "fp16", "float16"),
    "bfloat16": ("bf16", "bfloat16"),
    "float8_e4m3fn": ("fp8", "float8"),
    "int8": ("int8",),
    "int32": ("int32",),
    "int64": ("int64",),
    "bool": ("bool",),
    "uint8": ("uint8",),
}
_BY_WORD = {word: dtype for dtype, words in _WORDS.items() for word in words}
# float32 may always be seen: sums and statistics are kept in it.
_NARROW = ("float16", "bfloat16", "float8_e4m3fn")


@dataclass(frozen=True)
class LayerTypes:
    """Tensors that layers read and write, counted by dtype; ``unknown`` where the inspector names none."""

    counts: dict[str, int]
    layers: int


def read_layers(
    trt: ModuleType,
    content: bytes,
    graph: Graph,
    profiles: Sequence[Profile],
    options: BuildOptions,
    logger: Any,
) -> LayerTypes:
    """What the engine inspector says of a plan just built; of one without weights, once those of its graph are in."""
    runtime = start(trt.Runtime, logger)
    if options.version_compatible:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise TensorRTError(f"TensorRT cannot read back the plan that it built: {last_messages(logger)}")
    if options.weights == "stripped":
        # Without weights an engine has no execution context.
        refit(trt, engine, logger, graph.path)
    inspector = engine.create_engine_inspector()
    if profiles:
        # Formats of a dynamic engine are known for given shapes only.
        context = engine.create_execution_context()
        if context is None:
            raise TensorRTError(f"TensorRT made no execution context: {last_messages(logger)}")
        for info in graph.inputs:
            context.set_input_shape(info.name, profiles[0].shape(info.shape, "opt"))
        inspector.execution_context = context
    return parse_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def parse_layers(text: str) -> LayerTypes:
    """Count dtypes in the inspector's JSON. Raises TensorRTError for text that holds no layers."""
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError):
        raise TensorRTError(f"the engine inspector returned no layers: {text[:120]!r}") from None
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        raise TensorRTError("the engine inspector returned names only: the plan was not built with DETAILED verbosity")
    counts = Counter(dtype for layer in layers for dtype in _dtypes(layer))
    return LayerTypes(dict(sorted(counts.items())), len(layers))


def check_precision(layers: LayerTypes, graph: Graph) -> bool:
    """Whether the engine shows every dtype that the graph's matrix products read, and none narrower than the graph.

    `False` where the inspector hides the dtypes of some layers, so that nothing is proven. Raises TensorRTError for a
    narrow float that the graph does not have, or for a dtype that is missing although every layer shows its own.
    """
    seen = set(layers.counts)
    strange = sorted(dtype for dtype in seen & set(_NARROW) if dtype not in graph.all_floats)
    found = ", ".join(f"{count} {dtype}" for dtype, count in layers.counts.items())
    wanted = ", ".join(sorted(graph.floats))
    if strange:
        raise TensorRTError(
            f"the engine computes in {', '.join(strange)}, which {graph.path.name} does not: its matrix products read"
            f" {wanted}; tensors of layers: {found}. The plan was not kept"
        )
    missing = sorted(graph.floats - seen)
    if missing and "unknown" not in seen:
        raise TensorRTError(
            f"the engine has no layer in {', '.join(missing)}, which the matrix products of {graph.path.name} read;"
            f" tensors of layers: {found}. The plan was not kept"
        )
    return not missing


def _dtypes(layer: dict[str, Any]) -> Iterator[str]:
    for tensor in (*layer.get("Inputs", ()), *layer.get("Outputs", ())):
        text = str(tensor.get("Format/Datatype") or tensor.get("Datatype") or tensor.get("Format") or "").lower()
        words = [_BY_WORD[word] for word in re.findall(r"[a-z]+\d*", text) if word in _BY_WORD]
        yield words[0] if words else "unknown"
