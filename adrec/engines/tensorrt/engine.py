"""TensorRT as an engine: whole requests of the plans in an export folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from adrec.engines.exported import ExportError, GraphFile, GraphFormat, Manifest
from adrec.engines.exported_engine import ExportedEngine
from adrec.engines.tensorrt import library
from adrec.engines.tensorrt.library import Platform, TensorRTError
from adrec.engines.tensorrt.plan import check_platform, digest, read_record
from adrec.engines.tensorrt.runner import PlanRunner
from adrec.models.base import SequenceModel


class TensorRTEngine(ExportedEngine):
    """Runs the plans that `adrec export RUN --to tensorrt` made in ``folder`` on this machine; see `ExportedEngine`.

    Users are cut into batches of the plan's largest. A request whose batch or length no profile covers is refused
    before it runs. Raises NotSupportedError without TensorRT or a GPU.
    """

    name = "tensorrt"
    format: ClassVar[GraphFormat] = "onnx"
    # As few runs as the plan allows: a GPU is kept waiting by starts, not by padding.
    run_tokens: ClassVar[float] = 1e9

    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        """A CUDA device, with TensorRT installed."""
        return device.type == "cuda" and library.available()

    def __init__(self, model: SequenceModel, *, folder: Path, only: str | None = None) -> None:
        super().__init__(model, folder=Path(folder), only=only)
        self.platform = library.this_platform(library.load())

    def open(self, path: Path) -> PlanRunner:
        return PlanRunner(find_plan(path, self.platform))

    def most_users(self, session: PlanRunner) -> int | None:
        profiles = session.record.key.profiles
        return max((each.ranges["batch"].max for each in profiles if "batch" in each.ranges), default=None)

    def run(
        self, graph: GraphFile, session: Any, inputs: dict[str, np.ndarray], outputs: tuple[str, ...]
    ) -> dict[str, Tensor]:
        found = session({name: torch.from_numpy(value).to(session.device) for name, value in inputs.items()})
        return {name: found[name].cpu() for name in outputs}


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
    raise ExportError(f"{graph.parent}: holds no plan of {graph.name} for this machine{why}. Build it: sh build.sh")
