"""Inputs and outputs of exported graphs in Polygraphy's format, with the comparison that repeats them elsewhere.

A folder of ``<graph>-inputs.json``, ``<graph>-outputs.json``, ``replay.sh`` and ``compare.py``. On a machine with
TensorRT and Polygraphy, and without this project, ``sh replay.sh EXPORT`` builds each graph with TensorRT, runs it on
the same inputs, and compares by `compress.export.replay_compare`, of which ``compare.py`` is a copy: lists up to ties,
scores to a tolerance. Polygraphy's report of each comparison is ``<graph>-accuracy.json``.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from adrec.checkpoint import Run
from adrec.data.jagged import Jagged
from adrec.engines.base import history_keys
from adrec.engines.exported import GraphFile, load_manifest
from adrec.engines.exported_engine import draws_of, request_inputs
from adrec.engines.onnxruntime import OnnxRuntimeEngine
from adrec.errors import ConfigError, NotSupportedError
from adrec.files import write_text
from adrec.noise import PhiloxNoise
from compress.export import replay_compare
from compress.export.lint_rules import MOST_RESULTS
from compress.export.verify import plans_of, run_of

MOST_USERS = 512

_SCRIPT = """\
#!/bin/sh
# Repeats what ONNX Runtime computed on a CPU with TensorRT: sh replay.sh [FOLDER OF THE EXPORT]
# Needs Polygraphy 0.53 or newer. Other options of polygraphy run, such as --onnxrt, go into POLYGRAPHY_RUNNER.
# Ends with 1 if a graph differs: see <graph>-accuracy.json, and --verbose in POLYGRAPHY_RUNNER.
folder=${{1:-{folder}}}
here=$(cd "$(dirname "$0")" && pwd)
runner=${{POLYGRAPHY_RUNNER:---trt --strongly-typed}}
failed=0
{commands}
exit $failed
"""


@dataclass(frozen=True)
class Replay:
    """What was saved of one graph: the file, its inputs, its outputs, and Polygraphy's command for it."""

    graph: str
    inputs: Path
    outputs: Path
    command: str


def save_for_replay(folder: Path, run: Run, histories: Jagged, out: Path, *, seed: int = 0) -> list[Replay]:
    """Run each request graph that TensorRT may read on the CPU, for up to 512 users, and save what it took and gave.

    Nothing is written where there is no such graph. Raises what `check_replay` does, and ExportError where the folder
    is of another model.
    """
    check_replay(folder, out)
    from polygraphy.comparator import IterationResult, RunResults
    from polygraphy.json import save_json

    manifest = load_manifest(folder)
    source = run_of(manifest, run, folder)
    graphs = [graph for graph in manifest.graphs if _replayed(graph)]
    if not graphs:
        return []
    histories = histories.select(torch.arange(min(MOST_USERS, len(histories)))).tail(source.config.max_length)
    noise = PhiloxNoise(seed, history_keys(histories), source.config.width)
    out.mkdir(parents=True, exist_ok=True)
    saved = []
    for graph in graphs:
        engine = OnnxRuntimeEngine.from_export(
            folder, source.model, precision=graph.precision, provider="cpu", only=graph.file
        )
        table = engine.table(plans_of(graph, source)[-1])
        _, session = engine.session(table)
        items, lengths = histories.padded(histories.longest).numpy(), histories.lengths.numpy()
        inputs = request_inputs(graph, items, lengths, table, draws_of(noise, table), source.model)
        given = {spec.name: inputs[spec.name] for spec in graph.inputs}
        names = [spec.name for spec in graph.outputs]
        values = dict(zip(names, session.run(names, given), strict=True))
        stem = Path(graph.file).stem
        paths = out / f"{stem}-inputs.json", out / f"{stem}-outputs.json"
        save_json([given], str(paths[0]))
        results = RunResults()
        results.append(("onnxruntime-cpu", [IterationResult(values, runner_name="onnxruntime-cpu")]))
        results.save(str(paths[1]))
        saved.append(Replay(graph.file, *paths, _command(graph, given)))
    write_text(out / "compare.py", Path(replay_compare.__file__).read_text(encoding="utf-8"))
    write_text(out / "replay.sh", _script(folder.resolve(), [each.command for each in saved]))
    return saved


def check_replay(folder: Path, out: Path) -> None:
    """Raise, before any work, NotSupportedError without Polygraphy, ConfigError where ``out`` is the export itself."""
    if out.resolve() == folder.resolve():
        raise ConfigError(f"--save is {out}, the export itself; choose another folder")
    try:
        import polygraphy.comparator
        import polygraphy.json  # noqa: F401
    except ImportError:
        raise NotSupportedError("Polygraphy is not installed: pip install 'adrec[polygraphy]'") from None


def _replayed(graph: GraphFile) -> bool:
    readable = graph.format == "onnx" and graph.kind == "request" and graph.precision != "int8-dynamic"
    return readable and not graph.loop and (graph.k or 0) <= MOST_RESULTS


def _command(graph: GraphFile, inputs: dict[str, np.ndarray]) -> str:
    """Polygraphy's command in ``replay.sh``, whose variables it reads."""
    stem = Path(graph.file).stem
    shapes = " ".join(f"{name}:[{','.join(map(str, value.shape))}]" for name, value in inputs.items())
    bound = "compare_float32" if graph.precision == "fp32" else "compare_lists"
    return (
        f'polygraphy run "$folder"/{shlex.quote(graph.file)} $runner --input-shapes {shapes}'
        f' --load-inputs "$here"/{stem}-inputs.json --load-outputs "$here"/{stem}-outputs.json'
        f' --compare-func-script "$here"/compare.py:{bound} --save-accuracy-results "$here"/{stem}-accuracy.json'
    )


def _script(folder: Path, commands: Sequence[str]) -> str:
    lines = "\n".join(f"{command} || failed=1" for command in commands)
    return _SCRIPT.format(folder=shlex.quote(str(folder)), commands=lines)
