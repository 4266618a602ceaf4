"""Packages of a request compiled by AOTInductor: native code of the whole graph, for the CPU or GPU it is compiled on.

On a GPU Inductor writes the kernels. Those of `kernels` are not in a package: their launches are sized in Python by the
batch of a request, which a package leaves open.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from adrec.config import ServingConfig
from adrec.engines.aotinductor import compute_capability
from adrec.engines.exported import MANIFEST, ExportError, GraphFile, Manifest, Precision
from adrec.errors import NotSupportedError
from adrec.models import in_float32
from adrec.models.adrec import ADRec
from adrec.models.base import SequenceModel
from adrec.respacing import Steps, sampling_table
from compress.export.folder import export_folder
from compress.export.graphs import Graph, GraphPlan
from compress.export.manifest import Origin, cache_name, graph_file, write_manifest
from compress.export.onnx_export import ExportOptions, check_plans, graph_name
from compress.export.request import RequestGraph


@torch.inference_mode(False)
def export_aotinductor(
    model: SequenceModel,
    out: Path,
    options: ExportOptions,
    *,
    origin: Origin | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    report: Callable[[str], None] = lambda name: None,
) -> Manifest:
    """Compile a request package for each plan of steps, batch and length dynamic; all of the folder or nothing.

    device: that the packages are for, the CPU or a CUDA device here. Raises NotSupportedError for what only ONNX graphs
    have, ExportError where the compiler fails (it needs a C++ compiler, and Triton for a GPU).
    """
    if options.loop or options.split or options.quantised or options.precision != "fp32":
        raise NotSupportedError("--to aotinductor makes float32 requests with unrolled steps only; use --to onnx")
    if options.catalogue != "inside":
        raise NotSupportedError("--to aotinductor keeps the item table inside; use --to onnx --table")
    if options.plugins:
        raise NotSupportedError("--to aotinductor has no nodes that TensorRT runs; drop --plugins")
    check_plans(model, options)
    origin, model = origin or Origin.of_model(model), in_float32(model)
    plans: list[Steps] = list(options.steps) if isinstance(model, ADRec) else [None]
    with export_folder(out, overwrite) as folder:
        core = RequestGraph(model)
        written: list[GraphFile] = []
        for steps in plans:
            table = sampling_table(model.betas, steps) if isinstance(model, ADRec) else None
            serving = steps if isinstance(steps, ServingConfig) else None
            graph = Graph(core, GraphPlan("request", table, k=options.k), model)
            name = graph_name(graph.plan, "fp32", serving, {each.file for each in written})
            path = folder / Path(name).with_suffix(".pt2")
            compile_package(graph, path, torch.device(device))
            entry = graph_file(folder, path.name, graph, "fp32", serving, None)
            written.append(entry.model_copy(update={"format": "aotinductor"}))
            report(path.name)
        return write_manifest(folder, origin, written)


def compile_package(graph: Graph, path: Path, device: torch.device) -> None:
    """Compile a graph to a package at ``path``. Raises ExportError where torch or the C++ compiler fails."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with torch.no_grad(), warnings.catch_warnings(), on_device:
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(trace(graph, device.type), package_path=str(path))
    except Exception as error:
        raise ExportError(f"the package cannot be compiled: {str(error).strip().splitlines()[0]}") from error


def trace(graph: Graph, device: str) -> ExportedProgram:
    """A graph's program with weights, constants and everything it makes on one kind of device."""
    program = torch.export.export(graph.eval(), graph.example(), dynamic_shapes=graph.dynamic_shapes(batch=1))
    # Graphs are made on the CPU, and name it where they make tensors.
    return program if device == "cpu" else move_to_device_pass(program, device)


def export_for_engine(
    model: SequenceModel, root: Path, *, steps: Steps, loop: bool, precision: Precision, k: int
) -> Path:
    """Compile the one package that an engine needs to a folder under ``root``, once; see the ONNX export's."""
    if loop or precision != "fp32":
        raise NotSupportedError("AOTInductor packages are float32 with unrolled steps")
    # One cache may serve several machines.
    cuda = model.device.type == "cuda"
    target = f"cuda{compute_capability(model.device)}" if cuda else torch.backends.cpu.get_cpu_capability().lower()
    folder = root / cache_name(f"aotinductor-{target}", model, steps, loop, precision, k)
    if not (folder / MANIFEST).is_file():
        options = ExportOptions(steps=(1 if steps is None else steps,), k=min(k, model.config.items))
        export_aotinductor(model, folder, options, device=model.device)
    return folder
