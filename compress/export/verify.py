"""Hold a folder of exported graphs to the run they came from, in every runtime that is here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from adrec.checkpoint import Run
from adrec.data.dataset import Examples
from adrec.data.jagged import Jagged
from adrec.engines import CachedEngine, tensorrt
from adrec.engines.aotinductor import AotInductorEngine
from adrec.engines.base import history_keys
from adrec.engines.exported import ExportError, GraphFile, Manifest, load_manifest
from adrec.engines.exported_engine import request_inputs
from adrec.engines.onnxruntime import PROVIDERS, OnnxRuntimeEngine, load_onnxruntime
from adrec.engines.tensorrt.engine import tensorrt_engines
from adrec.errors import DataError, NotSupportedError
from adrec.noise import PhiloxNoise
from adrec.respacing import Steps
from compress.export.comparison import Candidate, Pair, compare

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
    """Compare every request graph of a folder with `cached`, in each provider (None: those installed).

    report: called with each pair. Raises ExportError where the folder is of another model than the run or its baseline.
    """
    if len(examples) == 0:
        raise DataError("no example to compare on; choose the other --split")
    manifest = load_manifest(folder)
    source = run_of(manifest, run, folder)
    exact = CachedEngine(source.model)
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
    """An engine for each request graph and provider. A loop is asked for the fewest, some and the most steps."""
    packages = [graph for graph in manifest.graphs if graph.format == "aotinductor"]
    if packages:
        return [
            Candidate(
                "aotinductor cpu", graph.file, graph.precision, graph.plan,
                AotInductorEngine.from_export(folder, run.model, precision=graph.precision, only=graph.file),
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


def save_for_replay(
    folder: Path, run: Run, histories: Jagged, out: Path, *, seed: int = 0
) -> list[tuple[str, Path, Path]]:
    """Inputs and outputs of each request graph in Polygraphy's format; ``(graph, inputs, outputs)`` for each.

    On a machine with a GPU ``polygraphy run GRAPH --trt --strongly-typed --load-inputs INPUTS --load-outputs OUTPUTS``
    repeats them.
    """
    try:
        from polygraphy.comparator import IterationResult, RunResults
        from polygraphy.json import save_json
    except ImportError:
        raise NotSupportedError("Polygraphy is not installed: pip install 'adrec[polygraphy]'") from None
    manifest = load_manifest(folder)
    source = run_of(manifest, run, folder)
    histories = histories.tail(source.config.max_length)
    noise = PhiloxNoise(seed, history_keys(histories), source.config.width)
    out.mkdir(parents=True, exist_ok=True)
    saved = []
    for graph in manifest.graphs:
        if graph.kind != "request" or graph.format != "onnx" or graph.precision == "int8-dynamic":
            continue
        engine = OnnxRuntimeEngine.from_export(
            folder, source.model, precision=graph.precision, provider="cpu", only=graph.file
        )
        table = engine.table(plans_of(graph, source)[-1])
        _, session = engine.session(table)
        everyone = torch.arange(len(histories))
        inputs = request_inputs(graph, histories, table, noise, everyone, source.model)
        names = [spec.name for spec in graph.outputs]
        values = session.run(names, inputs)
        stem = out / Path(graph.file).stem
        given, got = Path(f"{stem}-inputs.json"), Path(f"{stem}-outputs.json")
        save_json([inputs], str(given))
        results = RunResults()
        results.append(
            ("onnxruntime-cpu", [IterationResult(dict(zip(names, values, strict=True)), runner_name="onnxruntime-cpu")])
        )
        results.save(str(got))
        saved.append((graph.file, given, got))
    return saved
