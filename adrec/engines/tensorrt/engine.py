"""TensorRT as an engine: whole requests of the plans in an export folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from adrec.checkpoint import model_fingerprint
from adrec.data.jagged import Jagged
from adrec.engines.base import Engine, PlanFeature, TopK, history_keys
from adrec.engines.exported import ExportError, GraphFile, Manifest, Precision, check_graph, load_manifest
from adrec.engines.exported_engine import PaddedGroups, request_inputs
from adrec.engines.tensorrt import library
from adrec.engines.tensorrt.library import Platform, TensorRTError
from adrec.engines.tensorrt.plan import check_platform, digest, read_record
from adrec.engines.tensorrt.runner import PlanRunner
from adrec.errors import ConfigError
from adrec.models.base import SequenceModel
from adrec.noise import ExplicitNoise, PhiloxNoise
from adrec.respacing import Steps
from adrec.schedule import DiffusionTable


class TensorRTEngine(Engine):
    """Runs the plans that `adrec export RUN --to tensorrt` made in ``folder`` on this machine.

    Users are sorted by length and cut into batches of the plan's largest. A request whose batch or length no profile
    covers is refused before it runs. Results come back to the model's device, which may be the CPU.

    precision: which of the folder's graphs (None: its first). Raises ExportError for a folder of another model,
    NotSupportedError without TensorRT or a GPU.
    """

    name = "tensorrt"
    features = frozenset[PlanFeature]({"sampler dpm++2m", "start zero"})
    exports: ClassVar[bool] = True

    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        """A CUDA device, with TensorRT installed."""
        return device.type == "cuda" and library.available()

    def __init__(self, model: SequenceModel, *, folder: Path, precision: Precision | None = None) -> None:
        super().__init__(model)
        self.folder, self.manifest = Path(folder), load_manifest(Path(folder))
        fingerprint = model_fingerprint(model.state_dict())
        if self.manifest.model_fingerprint != fingerprint:
            raise ExportError(
                f"{folder}: was exported from another model ({self.manifest.model_fingerprint[:12]}) than this one"
                f" ({fingerprint[:12]}); export this run, or load the one it came from"
            )
        held = self.manifest.precisions()
        if not held or (precision is not None and precision not in held):
            raise ConfigError(f"{folder}: holds no request graph in {precision or 'any precision'}: {', '.join(held)}")
        self.precision: Precision = precision or held[0]
        self.platform = library.this_platform(library.load())
        self._runners: dict[str, PlanRunner] = {}

    def encode(self, histories: Jagged) -> PaddedGroups:
        histories = histories.to("cpu")
        order = torch.argsort(histories.lengths, stable=True)
        return PaddedGroups((order,), (histories.select(order),), len(histories))

    def sample(self, state: PaddedGroups, table: DiffusionTable | None, noise: PhiloxNoise | ExplicitNoise) -> Tensor:
        return self._run(state, table, noise)["rows"]

    @torch.inference_mode()
    def recommend(
        self,
        histories: Jagged,
        k: int,
        steps: Steps = None,
        seed: int = 0,
        row_keys: Tensor | None = None,
        exclude: Jagged | None = None,
    ) -> TopK:
        """Lists as the plan ranks them; with ``exclude`` or a k above the plan's, representations are scored here."""
        table = self.table(steps)
        self._check_top_k(torch.empty(len(histories), 0), k, exclude)
        graph, _ = self.runner(table)
        if exclude is not None or graph.k is None or k > graph.k or len(histories) == 0:
            return super().recommend(histories, k, steps, seed, row_keys, exclude)
        self.check_histories(histories)
        histories = histories.tail(self.model.config.max_length)
        keys = history_keys(histories) if row_keys is None else row_keys
        found = self._run(self.encode(histories), table, PhiloxNoise(seed, keys.to("cpu"), self.model.config.width))
        return TopK(found["items"][:, :k], found["scores"][:, :k])

    def runner(self, table: DiffusionTable | None) -> tuple[GraphFile, PlanRunner]:
        """The graph of a table's steps and the runner of its plan. Raises ConfigError, ExportError for missing ones."""
        steps: Steps = None if table is None else self._steps_of(table)
        graph = self.manifest.choose("request", self.precision, steps)
        if graph is None:
            wanted = "no steps" if table is None else f"{table.steps} steps"
            raise ConfigError(f"{self.folder}: holds no {self.precision} graph for {wanted}; export it with --steps")
        if graph.file not in self._runners:
            self._runners[graph.file] = PlanRunner(find_plan(check_graph(self.folder, graph), self.platform))
        return graph, self._runners[graph.file]

    def _steps_of(self, table: DiffusionTable) -> Steps:
        # Tables are kept by plan, and come back as they were given out.
        plan = next((plan for plan, kept in self._tables.items() if kept is table), table.steps)
        return table.steps if plan is None else plan

    def _run(
        self, state: PaddedGroups, table: DiffusionTable | None, noise: PhiloxNoise | ExplicitNoise
    ) -> dict[str, Tensor]:
        graph, runner = self.runner(table)
        profiles = runner.record.key.profiles
        most = max((each.ranges["batch"].max for each in profiles if "batch" in each.ranges), default=state.size)
        order, histories = state.rows[0], state.histories[0]
        parts: list[Mapping[str, Tensor]] = []
        for rows in torch.arange(state.size).split(most):
            given = request_inputs(graph, histories.select(rows), table, noise, order[rows], self.model)
            parts.append(runner({name: torch.from_numpy(value).to(runner.device) for name, value in given.items()}))
        back = torch.argsort(order).to(self.device)
        return {name: torch.cat([part[name] for part in parts]).to(self.device)[back] for name in parts[0]}


def tensorrt_engines(folder: Path, manifest: Manifest, model: SequenceModel) -> list[tuple[GraphFile, TensorRTEngine]]:
    """The request graphs of a folder that have a plan, each with an engine."""
    planned = [graph for graph in manifest.graphs if any(folder.glob(f"{Path(graph.file).stem}.*.plan"))]
    return [(graph, TensorRTEngine(model, folder=folder, precision=graph.precision)) for graph in planned]


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
