"""Requests that are cut into several graphs (`adrec export --split`), run one after another as one engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adrec.engines.exported import GraphFile, Manifest, TensorSpec, check_graph
from adrec.engines.onnxruntime import OnnxRuntimeEngine
from adrec.models.base import SequenceModel
from adrec.schedule import DiffusionTable


class PartsEngine(OnnxRuntimeEngine):
    """ONNX Runtime on the parts of a request in turn; what one gives is what a later one takes, by name.

    parts: of one precision, the first takes histories (or their rows of the table), the last gives representations or
    lists. Lists that no part ranks are ranked in float32 by this engine.
    """

    name = "onnxruntime parts"

    def __init__(self, folder: Path, model: SequenceModel, parts: tuple[GraphFile, ...], provider: str) -> None:
        super().__init__(model, folder=folder, provider=provider)
        self.parts = parts
        self.whole = as_one(parts)
        self._opened = [self.open(check_graph(folder, part)) for part in parts]

    def session(self, table: DiffusionTable | None) -> tuple[GraphFile, Any]:
        return self.whole, self._opened

    def run(
        self, graph: GraphFile, session: Any, inputs: dict[str, np.ndarray], outputs: tuple[str, ...]
    ) -> dict[str, Tensor]:
        values = dict(inputs)
        for part, opened in zip(self.parts, session, strict=True):
            # Representations of a float16 graph are float32, and the next part may take float16.
            given = {spec.name: values[spec.name].astype(spec.dtype, copy=False) for spec in part.inputs}
            names = [spec.name for spec in part.outputs]
            values.update(zip(names, opened.run(names, given), strict=True))
        return {name: torch.from_numpy(values[name]).to(_KINDS[name]) for name in outputs}


_KINDS = {"items": torch.int64, "scores": torch.float32, "rows": torch.float32}


def as_one(parts: tuple[GraphFile, ...]) -> GraphFile:
    """An entry for all parts together, with what they take from outside."""
    made: set[str] = set()
    taken: dict[str, TensorSpec] = {}
    for part in parts:
        taken |= {spec.name: spec for spec in part.inputs if spec.name not in made and spec.name not in taken}
        made |= {spec.name for spec in part.outputs}
    steps = next((part for part in parts if part.kind == "denoise"), parts[0])
    return steps.model_copy(
        update={
            "file": " + ".join(part.file for part in parts),
            "k": parts[-1].k,
            "inputs": tuple(taken.values()),
            "outputs": parts[-1].outputs,
        }
    )


def chains(manifest: Manifest) -> list[tuple[GraphFile, ...]]:
    """The parts of each way to compute a request in a folder without its whole graphs.

    Representations as a whole, or encoded and then denoised; scored by a graph where there is one.
    """
    graphs = [graph for graph in manifest.graphs if graph.format == "onnx"]
    found: list[tuple[GraphFile, ...]] = []
    for graph in graphs:
        encode, score = (
            next((each for each in graphs if (each.kind, each.precision) == (kind, graph.precision)), None)
            for kind in ("encode", "score")
        )
        after = () if score is None else (score,)
        if graph.kind == "represent":
            found.append((graph, *after))
        elif graph.kind == "denoise" and encode is not None:
            found.append((encode, graph, *after))
    return found
