"""Export an ONNX file to a TensorRT plan: the plan and its record, or all that is needed to build it elsewhere."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from pydantic import ValidationError

from adrec.config import StrictModel
from adrec.engines.exported import Precision, load_manifest
from adrec.engines.tensorrt import library
from adrec.engines.tensorrt.library import TensorRTError
from adrec.engines.tensorrt.plan import PlanKey, PlanRecord, plan_name, read_plan, record_path
from adrec.engines.tensorrt.profiles import Profile, check_profiles, parse_profile, uncovered
from adrec.errors import AdrecError, ConfigError, NotSupportedError
from adrec.files import write_bytes, write_text
from adrec.models.base import SequenceModel
from adrec.respacing import Steps
from compress.export.tensorrt.builder import build
from compress.export.tensorrt.graph import Graph, read_graph
from compress.export.tensorrt.options import BuildOptions
from compress.export.tensorrt.trtexec import build_script, trtexec_command

REQUEST_FILE, SCRIPT_FILE, TIMING_CACHE = "tensorrt.json", "build.sh", "timing.cache"


class PlanNotBuiltError(AdrecError):
    """All files were written but the plan, for TensorRT or the GPU is missing here; the command exits with 3."""

    exit_code = 3


class BuildRequest(StrictModel):
    """What ``tensorrt.json`` holds: builds that any machine can repeat. graphs: file names, in the same folder."""

    schema_version: Literal[1] = 1
    graphs: tuple[str, ...]
    profiles: tuple[Profile, ...]
    options: BuildOptions


@dataclass(frozen=True)
class Exported:
    """Outcome of `export_tensorrt`. plans: by graph; none where they could not be built here, ``missing`` says why.

    notes: lines for the user. trtexec: the equivalent
    command by graph, for graphs without operators that trtexec does not know.
    """

    folder: Path
    plans: dict[str, Path]
    missing: str | None
    notes: tuple[str, ...]
    trtexec: dict[str, str]

    def require_plans(self) -> dict[str, Path]:
        """The plans by graph; raises PlanNotBuiltError, with how to build them, where there are none."""
        if self.missing is not None:
            raise PlanNotBuiltError(
                f"no plan was built: {self.missing}. All else is in {self.folder}; on a machine with TensorRT 10.12 or"
                f" newer and an NVIDIA GPU: sh {self.folder / SCRIPT_FILE}"
            )
        return self.plans


def export_tensorrt(
    graphs: Sequence[Path],
    profiles: Sequence[Profile],
    options: BuildOptions | None = None,
    *,
    limits: Mapping[str, tuple[int, int]] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write the build request, ``build.sh`` and, where TensorRT and a GPU are here, the plans beside ONNX files.

    graphs: in one folder, with the same dynamic dimensions. limits: smallest and largest size of a dimension that
    requests will have; what no profile covers is noted. A plan that is there already, whole and with the same
    fingerprint, is kept. Raises ConfigError for profiles or a graph that TensorRT cannot take, before anything is
    written, and TensorRTError where a build fails.
    """
    options = options or BuildOptions()
    if not graphs:
        raise ConfigError("there is no graph to build a plan from; export at least one request graph")
    folder = graphs[0].parent
    read = [read_graph(graph) for graph in graphs]
    for graph in read:
        check_profiles(profiles, graph.dimensions)
    notes = [f"no profile covers {gap}" for gap in uncovered(profiles, limits)]
    commands = {
        graph.path.name: trtexec_command(graph, profiles, options, f"{graph.path.stem}.plan", TIMING_CACHE)
        for graph in read
        if not graph.plugins
    }
    names = tuple(graph.path.name for graph in read)
    request = BuildRequest(graphs=names, profiles=tuple(profiles), options=options)
    write_text(folder / REQUEST_FILE, json.dumps(request.model_dump(mode="json"), indent=1) + "\n")
    write_text(folder / SCRIPT_FILE, build_script(read, list(commands.values())))
    trtexec = {name: shlex.join(command) for name, command in commands.items()}
    try:
        trt = library.load()
        here = library.this_platform(trt)
    except NotSupportedError as error:
        return Exported(folder, {}, str(error), tuple(notes), trtexec)
    plans = {}
    for graph in read:
        key = PlanKey(graph=graph.fingerprint, profiles=request.profiles, options=options.as_record(), platform=here)
        plan = folder / plan_name(graph.path.stem, key)
        record = _kept(plan, here)
        if record is None:
            report(f"building {plan.name} for {here.gpu.name} with TensorRT {here.tensorrt}")
            record = _build(trt, graph, key, options, plan, trtexec.get(graph.path.name, ""))
        notes += [f"{plan.name}: {note}" for note in record.notes]
        plans[graph.path.name] = plan
    return Exported(folder, plans, None, tuple(notes), trtexec)


def export_for_engine(
    model: SequenceModel, root: Path, *, steps: Steps, loop: bool, precision: Precision, k: int
) -> Path:
    """Export the one graph that an engine needs and build its plan, in a folder under ``root``; returns the folder.

    The graph is that of ONNX Runtime's engine. A plan for this machine that is there already is kept.
    """
    from compress.export.onnx_export import export_for_engine as export_graph

    folder = export_graph(model, root, steps=steps, loop=loop, precision=precision, k=k)
    graphs = [folder / graph.file for graph in load_manifest(folder).graphs if graph.precision == precision]
    export_tensorrt(graphs, default_profiles(model.config.max_length), BuildOptions()).require_plans()
    return folder


def default_profiles(max_length: int) -> list[Profile]:
    """One user, small batches and large ones, of any length: what an engine is built for where nobody says more."""
    lengths = {1: min(16, max_length), 2: max_length, 33: max_length}
    return [
        parse_profile(f"batch={batch},length=1:{lengths[least]}:{max_length}")
        for least, batch in ((1, "1:1:1"), (2, "2:16:32"), (33, "33:256:512"))
    ]


def own_files(folder: Path, graphs: Iterable[str]) -> set[str]:
    """Names of the files in a folder that `export_tensorrt` wrote for some graphs there."""
    plans = (path.name for graph in graphs for path in folder.glob(f"{Path(graph).stem}.*.plan*"))
    return {REQUEST_FILE, SCRIPT_FILE, TIMING_CACHE, *plans}


def read_request(folder: Path) -> BuildRequest:
    """The build request of an export folder. Raises ConfigError where there is none."""
    path = folder / REQUEST_FILE
    try:
        return BuildRequest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no {REQUEST_FILE}; write it with adrec export RUN --to tensorrt") from None
    except ValidationError as error:
        raise ConfigError(f"{path} is not a build request: {error}") from None


def _kept(plan: Path, here: library.Platform) -> PlanRecord | None:
    """The record of a plan that is there already and passes every check; None where it has to be built."""
    try:
        return read_plan(plan, here)[1]
    except TensorRTError:
        return None


def _build(trt: ModuleType, graph: Graph, key: PlanKey, options: BuildOptions, plan: Path, trtexec: str) -> PlanRecord:
    if graph.plugins:
        from compress.export.tensorrt.plugins import register_plugins

        register_plugins(key.platform.gpu.capability)
    built = build(trt, graph, key.profiles, options, timing_cache=plan.with_name(TIMING_CACHE))
    notes = [] if built.confirmed else ["the engine inspector hides some dtypes, so the precision is not confirmed"]
    record = PlanRecord(
        key=key,
        fingerprint=key.fingerprint,
        graph_files=graph.files,
        plan_sha256=hashlib.sha256(built.content).hexdigest(),
        plan_bytes=len(built.content),
        inputs=graph.inputs,
        outputs=graph.outputs,
        layers=built.layers.counts,
        precision_confirmed=built.confirmed,
        trtexec=trtexec,
        notes=(*notes, *built.warnings),
    )
    write_bytes(plan, built.content)
    record.write(record_path(plan))
    return record
