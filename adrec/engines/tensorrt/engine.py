"""TensorRT as an engine: whole requests of the plans in an export folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from adrec.engines.exported import ExportError, GraphFile, GraphFormat, Manifest, Precision
from adrec.engines.exported_engine import ExportedEngine
from adrec.engines.tensorrt import library
from adrec.engines.tensorrt.library import Platform, TensorRTError
from adrec.engines.tensorrt.plan import check_platform, digest, read_record
from adrec.engines.tensorrt.profiles import padded_size
from adrec.engines.tensorrt.runner import PlanRunner
from adrec.errors import NotSupportedError
from adrec.models.base import SequenceModel

# Columns of the narrowest captured request; wider ones are powers of two.
NARROWEST = 8


class TensorRTEngine(ExportedEngine):
    """Runs TensorRT plans of whole requests on this machine's GPU; see `ExportedEngine`.

    folder: of ``adrec export RUN --to tensorrt``; None exports and builds with default profiles on the first request
    for a number of steps, which takes minutes, and keeps the plan for the next process. Users are cut into batches of
    the plan's largest; a request is refused before any of it runs where no profile covers one of its batches, padded
    to a length that it has. cuda_graphs: replay requests whose shapes come again, see `Captures`; for them lengths are
    padded up to a few sizes. Padding changes no result. Raises NotSupportedError without TensorRT or a GPU.
    """

    name = "tensorrt"
    format: ClassVar[GraphFormat] = "onnx"
    exporter: ClassVar[str | None] = "tensorrt"
    # As few runs as the plan allows: a GPU is kept waiting by starts, not by padding.
    run_tokens: ClassVar[float] = 1e9

    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        """A CUDA device, with TensorRT installed."""
        return device.type == "cuda" and library.available()

    def __init__(
        self, model: SequenceModel, *, folder: Path | None = None, only: str | None = None, cuda_graphs: bool = True
    ) -> None:
        try:
            self.platform = library.this_platform(library.load())
        except NotSupportedError as error:
            raise NotSupportedError(
                f"engine '{self.name}' cannot run here: {error}; or use engine 'onnxruntime'"
            ) from None
        super().__init__(model, folder=None if folder is None else Path(folder), only=only)
        self.cuda_graphs = cuda_graphs

    def open(self, path: Path) -> PlanRunner:
        return PlanRunner(find_plan(path, self.platform))

    def most_users(self, session: PlanRunner) -> int | None:
        profiles = session.record.key.profiles
        return max((each.ranges["batch"].max for each in profiles if "batch" in each.ranges), default=None)

    def columns(self, session: PlanRunner, users: int, longest: int) -> int:
        profiles = session.record.key.profiles
        known = {"batch": users, "length": longest, "items": self.model.config.items + 1}
        sizes = {name: known[name] for name in profiles[0].ranges}
        wanted = max(NARROWEST, 1 << (longest - 1).bit_length()) if self.cuda_graphs else longest
        return padded_size(profiles, sizes, "length", wanted)

    def run(
        self, graph: GraphFile, session: Any, inputs: dict[str, np.ndarray], outputs: tuple[str, ...]
    ) -> dict[str, Tensor]:
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        if self.cuda_graphs:
            found = session.replay(given)
        else:
            found = session({name: tensor.to(session.device) for name, tensor in given.items()})
        return {name: found[name].cpu() for name in outputs}


class TensorRTFloat16Engine(TensorRTEngine):
    """`TensorRTEngine` with weights, item table and activations in float16."""

    name = "tensorrt-fp16"
    precision: ClassVar[Precision] = "fp16"
    dtype = torch.float16


def tensorrt_engines(folder: Path, manifest: Manifest, model: SequenceModel) -> list[tuple[GraphFile, TensorRTEngine]]:
    """The request graphs of a folder that have a plan, each with an engine."""
    planned = [graph for graph in manifest.graphs if any(folder.glob(f"{Path(graph.file).stem}.*.plan"))]
    return [
        (graph, TensorRTEngine.from_export(folder, model, precision=graph.precision, only=graph.file))
        for graph in planned
    ]


def find_plan(graph: Path, here: Platform) -> Path:
    """The plan beside a graph that was built from it for this machine. Raises ExportError saying why none fits."""
    found, reasons = digest(graph), []
    for plan in sorted(graph.parent.glob(f"{graph.stem}.*.plan")):
        try:
            record = read_record(plan)
            check_platform(record, here)
        except TensorRTError as error:
            reasons.append(str(error))
            continue
        if record.graph_files.get(graph.name) == found:
            return plan
        reasons.append(f"{plan.name} was built from another {graph.name}")
    why = f": {'; '.join(reasons)}" if reasons else ""
    script = graph.parent / "build.sh"
    build = f"sh {script}" if script.is_file() else "adrec export RUN --to tensorrt --profile ... --out DIR"
    raise ExportError(f"{graph.parent}: holds no plan of {graph.name} for this machine{why}. Build it: {build}")
