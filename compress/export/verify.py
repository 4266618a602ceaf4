"""Hold a folder of exported graphs to the run they came from, in every runtime that is here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

from adrec.checkpoint import Run
from adrec.data.dataset import Examples
from adrec.devices import check_device
from adrec.engines import CachedEngine, tensorrt
from adrec.engines.aotinductor import AotInductorEngine, package_target
from adrec.engines.exported import ExportError, GraphFile, Manifest, load_manifest
from adrec.engines.onnxruntime import PROVIDERS, OnnxRuntimeEngine, load_onnxruntime
from adrec.engines.tensorrt.engine import tensorrt_engines
from adrec.errors import ConfigError, DataError, nearest
from adrec.models import in_float32
from adrec.respacing import Steps
from compress.export.comparison import Candidate, Pair, compare
from compress.export.parts import PartsEngine, chains

BATCH_SIZES = (1, 2, 33, 512)


def verify_export(
    folder: Path,
    run: Run,
    examples: Examples,
    *,
    providers: Sequence[str] | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seed: int = 0,
    report: Callable[[Pair], None] = lambda pair: None,
) -> list[Pair]:
    """Compare every request of a folder with `cached`, whole or in parts, in each provider (None: those installed).

    report: called with each pair. Raises ExportError where the folder is of another model than the run or its baseline.
    """
    if len(examples) == 0:
        raise DataError("no example to compare on; choose the other --split")
    manifest = load_manifest(folder)
    source = run_of(manifest, run, folder)
    # A graph of a model that stores fewer bits computes with its numbers, in float32.
    exact = CachedEngine(in_float32(source.model))
    pairs = []
    for candidate in candidates(folder, manifest, source, providers):
        pairs.append(compare(candidate, exact, examples, batch_sizes=batch_sizes, seed=seed))
        report(pairs[-1])
    if not pairs:
        raise ExportError(f"{folder}: holds no request graph that a runtime here can run")
    return pairs


def run_of(manifest: Manifest, run: Run, folder: Path) -> Run:
    """The run, or the baseline in it, that a folder was exported from; raises ExportError where it is neither."""
    baseline = run.baseline()
    for source in (run, baseline):
        if source is not None and source.fingerprint == manifest.model_fingerprint:
            return source
    raise ExportError(
        f"{folder}: was exported from the model {manifest.model_fingerprint[:12]}, but {run.path} holds"
        f" {run.fingerprint[:12]}; name the run that it came from with --against"
    )


def candidates(folder: Path, manifest: Manifest, run: Run, providers: Sequence[str] | None) -> list[Candidate]:
    """An engine for each request graph, each chain of parts, and each provider.

    A loop is asked for the fewest, some and the most steps.
    """
    packages = [graph for graph in manifest.graphs if graph.format == "aotinductor"]
    if packages:
        device, _ = package_target(folder / packages[0].file)
        for name in providers or ():
            if name != device:
                raise ConfigError(
                    f"provider is '{name}'{nearest(name, PROVIDERS)}; allowed: {device}, which AOTInductor compiled"
                    f" {packages[0].file} for"
                )
        model = copy.deepcopy(run.model).to(check_device(device))
        return [
            Candidate(
                f"aotinductor {device}", graph.file, graph.precision, graph.plan,
                AotInductorEngine.from_export(folder, model, precision=graph.precision, only=graph.file),
            )
            for graph in packages
        ]  # fmt: skip
    runtime = load_onnxruntime()
    available = runtime.get_available_providers()
    chosen = [name for name, full in PROVIDERS.items() if full in available] if providers is None else providers
    found = []
    for provider in chosen:
        for graph in manifest.graphs:
            # int8 at run time is made for CPUs, and Q/DQ as fp16 run there too, in float32 between the roundings.
            if graph.kind != "request" or (graph.precision == "int8-dynamic" and provider != "cpu"):
                continue
            engine = OnnxRuntimeEngine.from_export(
                folder, run.model, precision=graph.precision, provider=provider, only=graph.file
            )
            for steps in plans_of(graph, run):
                found.append(Candidate(f"onnxruntime {provider}", graph.file, graph.precision, steps, engine))
        for parts in chains(manifest):
            if parts[0].precision == "int8-dynamic" and provider != "cpu":
                continue
            whole = PartsEngine(folder, run.model, parts, provider)
            for steps in plans_of(whole.whole, run):
                found.append(
                    Candidate(f"onnxruntime {provider}", whole.whole.file, whole.whole.precision, steps, whole)
                )
    if providers is None and tensorrt.available():
        found += [
            Candidate("tensorrt", graph.file, graph.precision, steps, engine)
            for graph, engine in tensorrt_engines(folder, manifest, run.model)
            for steps in plans_of(graph, run)
        ]
    return found


def plans_of(graph: GraphFile, run: Run) -> list[Steps]:
    """The plans that a graph is compared on."""
    if not graph.loop:
        return [graph.plan]
    longest = run.config.timesteps
    return list(dict.fromkeys([1, min(4, longest), longest]))
