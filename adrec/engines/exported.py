"""What stands in a folder of exported graphs: the manifest, its checks, and nothing that needs another runtime."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from adrec.config import ModelConfig, ServingConfig, StrictModel, parse
from adrec.errors import AdrecError, ConfigError
from adrec.respacing import Steps

MANIFEST = "export.json"
SCHEMA_VERSION = 1
GraphKind = Literal["request", "represent", "encode", "denoise", "score"]
Catalogue = Literal["inside", "input", "outside"]
"""Where the item table is: an initialiser of the graph, an input of it, or looked up and scored by the caller."""
GraphFormat = Literal["onnx", "aotinductor"]
Quantisation = Literal["int8-dynamic", "int8-qdq", "fp8-qdq"]
Precision = Literal["fp32", "fp16"] | Quantisation


class ExportError(AdrecError):
    """A folder of exported graphs, or a file in it, is missing, damaged, foreign or of another model."""


class TensorSpec(StrictModel):
    """An input or output of a graph. dtype: as torch names it. shape: sizes, or names of the sizes of a request."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class GraphFile(StrictModel):
    """One graph of a folder.

    steps: reverse steps that are unrolled; None for a loop, whose ``coefficients`` say how many, and for graphs without
    any. serving: the settings those steps come from, where they are not evenly spaced DDPM steps. k: length of the
    lists; None where nothing is ranked. data: file of the weights where they are not in ``file``. sha256: over both.
    """

    file: str
    format: GraphFormat = "onnx"
    kind: GraphKind
    precision: Precision
    steps: int | None = None
    serving: ServingConfig | None = None
    loop: bool = False
    k: int | None = None
    catalogue: Catalogue = "inside"
    data: str | None = None
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def plan(self) -> Steps:
        """What `Engine.table` is given for these steps."""
        return self.steps if self.serving is None else self.serving


class StepTable(StrictModel):
    """Coefficients of a plan of steps, which the loop takes as inputs: row `i` is the i-th least noisy step."""

    times: tuple[int, ...]
    coefficients: tuple[tuple[float, float, float], ...]


class Manifest(StrictModel):
    """Contents of ``export.json``: the model that the graphs come from, and the graphs.

    step_tables: by step count, for callers of the loop. tool_versions: of what wrote the graphs.
    """

    schema_version: Literal[1] = 1
    model: ModelConfig
    model_fingerprint: str
    dataset_name: str | None
    dataset_fingerprint: str | None
    tool_versions: dict[str, str]
    step_tables: dict[int, StepTable] = Field(default_factory=dict)
    graphs: tuple[GraphFile, ...]

    def choose(
        self,
        kind: GraphKind,
        precision: Precision,
        steps: Steps,
        *,
        only: str | None = None,
        format: GraphFormat = "onnx",
    ) -> GraphFile | None:
        """The graph of a kind for a plan of steps, unrolled before looped; None where there is none.

        only: the one file to consider.
        """
        fitting = [
            each
            for each in self.graphs
            if (each.kind, each.format, each.precision) == (kind, format, precision) and only in (None, each.file)
        ]
        for graph in fitting:
            if not graph.loop and graph.plan == steps:
                return graph
        return next((graph for graph in fitting if graph.loop), None) if steps is not None else None

    def precisions(self, format: GraphFormat = "onnx") -> tuple[Precision, ...]:
        """Those of the graphs of a format that compute a whole request, in the order they were written."""
        fitting = (graph for graph in self.graphs if (graph.kind, graph.format) == ("request", format))
        return tuple(dict.fromkeys(graph.precision for graph in fitting))


def load_manifest(folder: Path) -> Manifest:
    """Read ``export.json``; raises ExportError when the folder is none of ours, or from another schema."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ExportError(f"{folder}: holds no {MANIFEST}; write one with `adrec export RUN --to onnx --out {folder}`")
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        return parse(Manifest, values, str(path))
    except (OSError, ValueError, ConfigError) as error:
        raise ExportError(f"{path}: the manifest cannot be read: {error}") from None


def check_graph(folder: Path, graph: GraphFile) -> Path:
    """Path of a graph whose content is what was exported; raises ExportError where it is missing or changed."""
    for name in (graph.file, graph.data):
        if name is not None and (Path(name).name != name or not (folder / name).is_file()):
            what = "weights" if name == graph.data else "graph"
            raise ExportError(f"{folder / name}: the file of the {what} is missing; export again")
    if graph_sha256(folder, graph.file, graph.data) != graph.sha256:
        raise ExportError(f"{folder / graph.file}: was changed or cut after it was exported; export again")
    return folder / graph.file


def graph_sha256(folder: Path, file: str, data: str | None) -> str:
    """SHA-256 over a graph's file and that of its weights, in hexadecimal."""
    digest = hashlib.sha256()
    for name in (file, data):
        if name is not None:
            with (folder / name).open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
