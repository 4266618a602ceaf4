"""The trtexec command that builds the same engine, and the script that builds it where TensorRT is installed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from adrec.engines.tensorrt.profiles import Profile
from compress.export.tensorrt.graph import Graph
from compress.export.tensorrt.options import BuildOptions

_HARDWARE = {"same_compute_capability": "sameComputeCapability", "ampere_plus": "ampere+"}

_SCRIPT = """\
#!/bin/sh
# Builds {graphs} on a machine with an NVIDIA GPU and TensorRT 10.12 or newer.
#
#   sh build.sh            with adrec installed there: plans, records and checks of their layers' dtypes
#   sh build.sh trtexec    with trtexec alone: plans for other programs; adrec reads only plans that have a record
set -eu
cd "$(dirname "$0")"
if [ "${{1:-adrec}}" = adrec ]; then
    "${{PYTHON:-python3}}" -c "import compress.export.tensorrt" 2>/dev/null || {{
        echo "${{PYTHON:-python3}} has no adrec: pip install 'adrec[tensorrt]', or: sh build.sh trtexec" >&2
        exit 3
    }}
    exec "${{PYTHON:-python3}}" -m compress.export.tensorrt .
fi
[ "$1" = trtexec ] || {{ echo "usage: sh build.sh [adrec|trtexec]" >&2; exit 2; }}
{trtexec}
"""


def trtexec_command(
    graph: Graph, profiles: Sequence[Profile], options: BuildOptions, plan: str, timing_cache: str | None = None
) -> list[str]:
    """Arguments of trtexec for the same build, run in the folder of the ONNX file.

    Its profiles are the same; trtexec checks no dtypes, writes no record, and knows none of this project's plugins.
    """
    command = ["trtexec", f"--onnx={graph.path.name}", f"--saveEngine={plan}", "--stronglyTyped", "--skipInference"]
    dynamic = [info for info in graph.inputs if any(isinstance(size, str) for size in info.shape)]
    for index, profile in enumerate(profiles):
        if len(profiles) > 1:
            command.append(f"--profile={index}")
        for which in ("min", "opt", "max"):
            shapes = ",".join(f"{info.name}:{'x'.join(map(str, profile.shape(info.shape, which)))}" for info in dynamic)
            command.append(f"--{which}Shapes={shapes}")
    command += [
        f"--memPoolSize=workspace:{options.workspace_mib}M",
        f"--builderOptimizationLevel={options.optimization_level}",
        "--profilingVerbosity=detailed",
    ]
    if not options.tf32:
        command.append("--noTF32")
    if options.weights != "fixed":
        command.append("--refit")
    if options.weights == "stripped":
        command.append("--stripWeights")
    if options.version_compatible:
        command.append("--versionCompatible")
    if options.hardware_compatibility != "none":
        command.append(f"--hardwareCompatibilityLevel={_HARDWARE[options.hardware_compatibility]}")
    if timing_cache is not None:
        command.append(f"--timingCacheFile={timing_cache}")
    return command


def build_script(graphs: Sequence[Graph], commands: Sequence[Sequence[str]]) -> str:
    """Text of ``build.sh`` for graphs of one folder and their trtexec commands."""
    if plugins := sorted({name for graph in graphs for name in graph.plugins}):
        lines = [
            f'echo "the graphs have operators of adrec ({", ".join(plugins)}) that trtexec does not know:'
            ' build them with adrec" >&2',
            "exit 2",
        ]
    else:
        # Every network of TensorRT 11 is strongly typed, and an option it does not know ends trtexec.
        missing = 'echo "trtexec is not on the PATH; it comes with TensorRT" >&2'
        lines = [
            f"command -v trtexec >/dev/null || {{ {missing}; exit 3; }}",
            "typed=--stronglyTyped",
            'trtexec --help 2>/dev/null | grep -q -e "$typed" || typed=',
        ]
        for command in commands:
            arguments = [shlex.quote(part) for part in command if part != "--stronglyTyped"]
            lines.append(" \\\n    ".join([f"{arguments[0]} $typed", *arguments[1:]]))
    names = ", ".join(graph.path.name for graph in graphs)
    return _SCRIPT.format(graphs=names, trtexec="\n".join(lines))
