"""ONNX files of a model: traced by `torch.export`, opset 20, named sizes, held to the linter before they are kept."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from adrec.config import ServingConfig
from adrec.data.jagged import Jagged
from adrec.engines.exported import (
    MANIFEST,
    Catalogue,
    ExportError,
    GraphFile,
    GraphKind,
    Manifest,
    Precision,
    Quantisation,
)
from adrec.errors import ConfigError, NotSupportedError
from adrec.models import in_float32
from adrec.models.adrec import ADRec
from adrec.models.base import SequenceModel
from adrec.respacing import Steps, sampling_table
from adrec.schedule import DiffusionTable
from compress.export.folder import export_folder
from compress.export.graphs import Graph, GraphPlan
from compress.export.manifest import Origin, cache_name, graph_file, metadata, write_manifest
from compress.export.request import RequestGraph

OPSET = 20
# A protobuf message ends at 2 GiB; the graph itself needs some of it.
INLINE_LIMIT = 2**31 - 2**24
# ONNX Runtime's quantiser copies a transposed weight as one message.
LARGEST_QUANTISED = 2**31 - 2**10


@dataclass(frozen=True)
class ExportOptions:
    """What `export_onnx` writes.

    steps: plans, a graph each (None: as trained). loop: also one graph whose step count is an input. split: also
    encode, denoise and score. precision: of the float graphs, fp32 or fp16. quantised: further variants of every
    request graph, made from it; the body of a loop stays in float. keep_float: whether the request graphs that they are
    made from are kept. catalogue: where the item table is. inline_limit: bytes of weights above which they are a file
    of their own. calibration: histories, needed by the Q/DQ variants. quantiser: of those. plugins: steps and scoring
    are nodes of an own domain, which TensorRT runs with this project's kernels, others as model-local functions. sizes:
    smallest and largest batch and length of requests, where they are known: the linter checks limits against them.
    """

    steps: Sequence[Steps] = (1,)
    precision: Literal["fp32", "fp16"] = "fp32"
    quantised: Sequence[Quantisation] = ()
    loop: bool = False
    split: bool = False
    k: int = 20
    catalogue: Catalogue = "inside"
    inline_limit: int = INLINE_LIMIT
    calibration: Jagged | None = None
    quantiser: Literal["onnxruntime", "modelopt"] = "onnxruntime"
    plugins: bool = False
    keep_float: bool = True
    sizes: Mapping[str, tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        if "int8-dynamic" in self.quantised and self.precision != "fp32":
            raise ConfigError(
                f"--precision is {self.precision}, but dynamic int8 is for CPUs, which compute the rest in float32;"
                " drop one"
            )
        if self.catalogue == "outside" and not self.split:
            raise ConfigError("--table is outside, so nothing can rank the catalogue in one graph; add --split")
        if self.loop and any(isinstance(plan, ServingConfig) for plan in self.steps):
            raise ConfigError("a loop takes its coefficients at run time: export settings of their own without --loop")
        if self.plugins and (self.loop or self.split or self.quantised or self.catalogue != "inside"):
            raise ConfigError("--plugins has whole requests of float graphs with their table inside; drop the others")
        needs = [name for name in self.quantised if name != "int8-dynamic"]
        if needs and self.loop and self.quantiser == "modelopt":
            raise ConfigError("--quantiser is modelopt, which is for unrolled steps here; drop it, or --loop")
        if needs and self.calibration is None:
            raise ConfigError(f"{needs[0]} needs histories to calibrate with; name the data with --data")


@dataclass
class _Writer:
    """Exports graphs into a folder, one after another."""

    folder: Path
    model: SequenceModel
    origin: Origin
    options: ExportOptions
    core: RequestGraph
    report: Callable[[str], None]
    written: list[GraphFile] = field(default_factory=list)

    def write(self, plan: GraphPlan, serving: ServingConfig | None = None, quantised: bool = False) -> None:
        graph = Graph(self.core, plan, self.model)
        precision = self.options.precision
        self._keep(graph, precision, serving, lambda path: save_graph(graph, path, self.options.inline_limit,
                   metadata(graph, self.origin, precision, serving)))  # fmt: skip
        if not (quantised and self.options.quantised):
            return
        from compress.export.quantise import quantise_graph

        entry = self.written[-1]
        source = self.folder / entry.file
        for kind in self.options.quantised:
            facts = metadata(graph, self.origin, kind, serving)

            def write(path: Path, kind: Quantisation = kind, facts: dict[str, str] = facts) -> str | None:
                return quantise_graph(
                    source, path, kind, graph, facts, self.options.calibration, self.options.inline_limit,
                    self.options.quantiser,
                )  # fmt: skip

            self._keep(graph, kind, serving, write)
        if not self.options.keep_float:
            self.written.remove(entry)
            for name in (entry.file, entry.data):
                if name is not None:
                    (self.folder / name).unlink()

    def _keep(
        self, graph: Graph, precision: Precision, serving: ServingConfig | None, write: Callable[[Path], str | None]
    ) -> None:
        from compress.export.lint import require_clean

        taken = {each.file for each in self.written}
        name = graph_name(graph.plan, precision, serving, taken, floats=self.options.precision)
        data = write(self.folder / name)
        require_clean(self.folder / name, self.options.sizes if graph.plan.kind == "request" else None)
        self.written.append(graph_file(self.folder, name, graph, precision, serving, data))
        if self.options.keep_float or precision != self.options.precision or graph.plan.kind != "request":
            self.report(name)


# An engine exports in the middle of a request, and tensors made in inference mode cannot be traced.
@torch.inference_mode(False)
def export_onnx(
    model: SequenceModel,
    out: Path,
    options: ExportOptions,
    *,
    origin: Origin | None = None,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda name: None,
) -> Manifest:
    """Write the graphs of a model and their manifest to the folder ``out``, all of it or nothing.

    A model that stores fewer bits is exported as its numbers stand, see `in_float32`. report: called with each file's
    name. Raises ConfigError for steps or k that the model has not, NotSupportedError without the packages, ExportError
    where the linter finds a fault.
    """
    require_onnx()
    origin, model = origin or Origin.of_model(model), in_float32(model)
    if options.quantiser == "modelopt" and any(kind.endswith("qdq") for kind in options.quantised):
        from compress.export.quantise import require_modelopt

        require_modelopt()
    diffusion = isinstance(model, ADRec)
    check_plans(model, options)
    tables = {plan: sampling_table(model.betas, plan) for plan in options.steps} if isinstance(model, ADRec) else {}
    dtype = torch.float16 if options.precision == "fp16" else torch.float32
    with export_folder(out, overwrite) as folder:
        writer = _Writer(folder, model, origin, options, _core(model, options.plugins, dtype), report)
        whole: GraphKind = "represent" if options.catalogue == "outside" else "request"

        def plan(kind: GraphKind, table: DiffusionTable | None = None, *, loop: bool = False) -> GraphPlan:
            return GraphPlan(kind, table, loop, options.k, options.catalogue)

        for steps, table in tables.items() if diffusion else [(None, None)]:
            serving = steps if isinstance(steps, ServingConfig) else None
            writer.write(plan(whole, table), serving, quantised=True)
            if options.split and diffusion:
                writer.write(plan("denoise", table), serving)
        if options.loop:
            writer.write(plan(whole, loop=True), quantised=True)
            if options.split:
                writer.write(plan("denoise", loop=True))
        if options.split:
            writer.write(plan("encode" if diffusion else "represent"))
            if options.catalogue != "outside":
                writer.write(plan("score"))
        counted = {table.steps: table for plan, table in tables.items() if not isinstance(plan, ServingConfig)}
        return write_manifest(folder, writer.origin, writer.written, counted)


def check_plans(model: SequenceModel, options: ExportOptions) -> None:
    """Raise ConfigError for steps or k that the model has not, NotSupportedError for what no graph can hold.

    That are steps that stop early, and tables that are too large for dynamic int8.
    """
    if not isinstance(model, ADRec) and any(plan not in (None, 1) for plan in options.steps):
        raise ConfigError(f"steps are {list(options.steps)}, but a '{model.config.model}' model has no reverse steps")
    for steps in options.steps:
        if isinstance(steps, ServingConfig):
            steps.check(model.config)
            if steps.early_stop is not None:
                raise NotSupportedError(
                    "a graph runs the same steps for every user: export settings without early_stop"
                )
    table_bytes = 4 * (model.config.items + 1) * model.config.width
    if "int8-dynamic" in options.quantised and options.catalogue == "inside" and table_bytes > LARGEST_QUANTISED:
        raise NotSupportedError(
            f"the item table has {table_bytes / 2**30:.2f} GiB in float32, and ONNX Runtime's quantiser takes less than"
            " 2 GiB; leave --int8 dynamic out, or hold the table outside of the graph with --table input"
        )
    if not 1 <= options.k <= model.config.items:
        raise ConfigError(f"k is {options.k}; allowed: 1 to {model.config.items}, the size of the catalogue")


def _core(model: SequenceModel, plugins: bool, dtype: torch.dtype) -> RequestGraph:
    if not plugins:
        return RequestGraph(model, dtype=dtype)
    from compress.export.tensorrt.plugin_request import PluginRequest

    return PluginRequest(model, dtype=dtype)


def save_graph(graph: Graph, path: Path, inline_limit: int, facts: dict[str, str]) -> str | None:
    """Trace a graph and write it; returns the name of the file of its weights where they are too large to be inside."""
    import onnx_ir

    graph.eval()
    with quiet_exporter():
        program = torch.onnx.export(
            graph,
            graph.example(),
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in graph.inputs],
            output_names=[spec.name for spec in graph.outputs],
            dynamic_shapes=graph.dynamic_shapes(),
            verbose=False,
        )
    assert program is not None
    model = program.model
    with quiet_exporter():
        graph.core.finish(model)
    strip_traces(model)
    model.producer_name, model.producer_version = "adrec", facts.get("adrec.version.adrec", "")
    model.metadata_props.clear()
    model.metadata_props.update(facts)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    data = f"{path.stem}.data" if size > inline_limit else None
    onnx_ir.save(model, path, external_data=data)
    return data


def strip_traces(model: Any) -> None:
    """Remove what the tracer notes of source files and classes: it names paths of the machine that exported."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def graph_name(
    plan: GraphPlan, precision: Precision, serving: ServingConfig | None, taken: set[str], *, floats: str = "fp32"
) -> str:
    """``request-fp32-s4.onnx``: kind, precision, and steps where the graph has any.

    floats: of what a quantised graph leaves in float, named where it is no fp32: ``request-int8-qdq-fp16-s4.onnx``.
    """
    rest = f"-{floats}" if floats not in ("fp32", precision) else ""
    steps = "-loop" if plan.loop else "" if plan.table is None else f"-s{plan.table.steps}"
    if serving is not None:
        steps += f"-{serving.sampler.replace('+', 'p')}"
    stem, suffix = f"{plan.kind}-{precision}{rest}{steps}", ""
    while f"{stem}{suffix}.onnx" in taken:
        suffix = f"-{int(suffix[1:] or 1) + 1}"
    return f"{stem}{suffix}.onnx"


def require_onnx() -> None:
    """Raise NotSupportedError unless the packages that write ONNX files are installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise NotSupportedError(f"writing ONNX files needs {error.name}: pip install 'adrec[onnx]'") from None


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter prints its progress, and warns of operators of packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        cause = error.__cause__ or error
        raise ExportError(f"the graph cannot be exported: {str(cause).strip().splitlines()[0]}") from error
    finally:
        logger.setLevel(level)


def export_for_engine(
    model: SequenceModel, root: Path, *, steps: Steps, loop: bool, precision: Precision, k: int
) -> Path:
    """Export the one graph that an engine needs to a folder under ``root``, once; returns the folder.

    steps: the plan, None for a loop and for models without steps. The folder's name holds all that decides the file.
    """
    if precision in ("int8-qdq", "fp8-qdq"):
        raise NotSupportedError(f"{precision} needs histories to calibrate with; use `adrec export` and from_export")
    folder = root / cache_name("onnx", model, steps, loop, precision, k)
    if (folder / MANIFEST).is_file():
        return folder
    quantised: Sequence[Quantisation] = ("int8-dynamic",) if precision == "int8-dynamic" else ()
    options = ExportOptions(
        steps=() if loop else (1 if steps is None else steps,),
        precision="fp16" if precision == "fp16" else "fp32",
        quantised=quantised,
        loop=loop,
        k=min(k, model.config.items),
    )
    try:
        export_onnx(model, folder, options)
    except (ConfigError, OSError):
        # Another process may have been faster; then its folder serves.
        if not (folder / MANIFEST).is_file():
            raise
    return folder
