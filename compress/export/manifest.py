"""What an exported graph says of itself: entries of the manifest, and the same facts inside the ONNX file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import adrec
import kernels
from adrec.checkpoint import Run, model_fingerprint
from adrec.config import ModelConfig, ServingConfig
from adrec.engines.exported import GraphFile, Manifest, Precision, StepTable, graph_sha256
from adrec.files import write_text
from adrec.models import quantization_of
from adrec.models.base import SequenceModel
from adrec.respacing import Steps
from adrec.schedule import DiffusionTable
from adrec.versions import installed_versions
from compress.export.graphs import Graph
from compress.export.lint_rules import MOST_RESULTS

PREFIX = "adrec."
_TOOLS = ("adrec", "torch", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Origin:
    """Where a graph's numbers come from; everything that a reader of the file alone should know.

    formats: those of fewer bits that the model stores, see `stored_formats`.
    """

    config: ModelConfig
    model_fingerprint: str
    dataset_name: str | None = None
    dataset_fingerprint: str | None = None
    formats: tuple[str, ...] = ()

    @classmethod
    def of_run(cls, run: Run) -> Origin:
        formats = stored_formats(run.model)
        return cls(run.config, run.fingerprint, run.info.dataset_name, run.dataset_fingerprint, formats)

    @classmethod
    def of_model(cls, model: SequenceModel) -> Origin:
        return cls(model.config, model_fingerprint(model.state_dict()), formats=stored_formats(model))


def stored_formats(model: SequenceModel) -> tuple[str, ...]:
    """Names of the formats of fewer bits that a model's layers and table are stored in; empty in float32."""
    found = quantization_of(model)
    if found is None:
        return ()
    formats: set[str] = {each.format for each in found.layers.values()}
    return tuple(sorted(formats if found.table is None else formats | {found.table.format}))


def tool_versions() -> dict[str, str]:
    """Versions of what makes graphs, those that are installed."""
    found = installed_versions()
    return {name: version for name in _TOOLS if (version := found.get(name)) is not None}


@cache
def _code() -> str:
    """Digest of the code that makes graphs: versions of a checkout do not tell what was edited."""
    folders = (Path(__file__).parent, Path(adrec.__file__).parent, Path(kernels.__file__).parent)
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def cache_name(format: str, model: SequenceModel, steps: Steps, loop: bool, precision: Precision, k: int) -> str:
    """Name of the folder of one engine's graph; it holds all that decides the file but the weights."""
    plan = steps.model_dump_json() if isinstance(steps, ServingConfig) else str(steps)
    facts = json.dumps([format, plan, loop, k, model.config.model_dump(mode="json"), tool_versions(), _code()])
    return f"{format}-{precision}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


def metadata(graph: Graph, origin: Origin, precision: Precision, serving: ServingConfig | None) -> dict[str, str]:
    """``metadata_props`` of an ONNX file, all text."""
    plan, config = graph.plan, origin.config
    facts: dict[str, object] = {
        "kind": plan.kind,
        "model": config.model,
        "model_fingerprint": origin.model_fingerprint,
        "dataset": origin.dataset_name,
        "dataset_fingerprint": origin.dataset_fingerprint,
        "source_formats": ", ".join(origin.formats) or None,
        "precision": precision,
        "floats": str(graph.core.dtype).removeprefix("torch."),
        "runtime": _runtime(graph, precision),
        "catalogue": plan.catalogue,
        "items": config.items,
        "max_length": config.max_length,
        "padding": config.padding,
        "positions": config.positions,
        "k": plan.k if plan.kind in ("request", "score") else None,
    }
    if any(spec.name == "histories" for spec in graph.inputs):
        # A graph looks ids up without a check: runtimes read another row for an id below 0, or memory beyond the table.
        facts["ids"] = f"1 to {config.items}, 0 for padding; unchecked"
    if graph.diffusion:
        facts |= {
            "schedule": config.schedule,
            "trained_steps": config.timesteps,
            "steps": "loop" if plan.loop else None if plan.table is None else plan.table.steps,
            "serving": None if serving is None else json.dumps(serving.model_dump(mode="json")),
        }
    versions = {f"version.{name}": version for name, version in tool_versions().items()}
    return {PREFIX + name: str(value) for name, value in (facts | versions).items() if value is not None}


def _runtime(graph: Graph, precision: Precision) -> str:
    """What a graph is for: ``any``, or what is left where TensorRT or GPUs have no operator for it."""
    if precision == "int8-dynamic":
        return "onnxruntime-cpu"
    ranks = graph.plan.kind in ("request", "score")
    return "onnxruntime" if ranks and graph.plan.k > MOST_RESULTS else "any"


def graph_file(
    folder: Path,
    file: str,
    graph: Graph,
    precision: Precision,
    serving: ServingConfig | None,
    data: str | None,
) -> GraphFile:
    """The manifest's entry of a graph just written to ``folder``."""
    plan = graph.plan
    return GraphFile(
        file=file,
        kind=plan.kind,
        precision=precision,
        steps=None if plan.table is None else plan.table.steps,
        serving=serving,
        loop=plan.loop,
        k=plan.k if plan.kind in ("request", "score") else None,
        catalogue=plan.catalogue,
        data=data,
        sha256=graph_sha256(folder, file, data),
        inputs=tuple(graph.inputs),
        outputs=tuple(graph.outputs),
    )


def write_manifest(
    folder: Path, origin: Origin, graphs: list[GraphFile], tables: Mapping[int, DiffusionTable] | None = None
) -> Manifest:
    """Write ``export.json`` for the graphs of a folder. tables: by step count, what a loop is given for it."""
    manifest = Manifest(
        model=origin.config,
        model_fingerprint=origin.model_fingerprint,
        dataset_name=origin.dataset_name,
        dataset_fingerprint=origin.dataset_fingerprint,
        tool_versions=tool_versions(),
        step_tables={steps: step_table(table) for steps, table in (tables or {}).items()},
        graphs=tuple(graphs),
    )
    write_text(folder / "export.json", manifest.model_dump_json(indent=1) + "\n")
    return manifest


def step_table(table: DiffusionTable) -> StepTable:
    """A table as the loop's inputs ``times`` and ``coefficients``."""
    columns = zip(table.from_x0.tolist(), table.from_xt.tolist(), table.sigma.tolist(), strict=True)
    return StepTable(times=tuple(table.time.tolist()), coefficients=tuple(columns))
