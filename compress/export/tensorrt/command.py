"""What ``adrec export RUN --to tensorrt`` does beyond the ONNX export: checks before it, plans after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from adrec.engines.exported import Manifest
from adrec.engines.tensorrt.profiles import Profile, check_profiles, parse_profile
from adrec.errors import ConfigError
from compress.export.lint_rules import MOST_RESULTS
from compress.export.tensorrt.build import export_tensorrt
from compress.export.tensorrt.options import BuildOptions


def check_tensorrt(
    profile: Sequence[str], *, k: int, loop: bool = False, table: str = "inside", quantised: Sequence[str] = ()
) -> tuple[Profile, ...]:
    """The profiles of a command, before anything is exported. Raises ConfigError for what no plan can be built of."""
    profiles = tuple(parse_profile(text) for text in profile)
    if loop:
        raise ConfigError("--to tensorrt builds unrolled steps, which CUDA graphs need too; leave out --loop")
    if table == "outside":
        raise ConfigError("--to tensorrt builds whole requests, so the item table cannot be outside")
    if "int8-dynamic" in quantised:
        raise ConfigError("TensorRT reads no dynamic int8, which is for ONNX Runtime on CPUs; use --int8 qdq")
    if k > MOST_RESULTS:
        raise ConfigError(f"--k is {k}; TensorRT's TopK allows {MOST_RESULTS}: choose a smaller k")
    check_profiles(profiles, ("batch", "length", "items") if table == "input" else ("batch", "length"))
    return profiles


def check_lengths(profiles: Sequence[Profile], max_length: int) -> None:
    """Raise ConfigError for a profile of longer histories than the model reads: its graph does not cut them."""
    longest = max(each.ranges["length"].max for each in profiles)
    if longest > max_length:
        raise ConfigError(f"--profile covers length {longest}; allowed: up to {max_length}, which the run reads")


def build_plans(
    out: Path,
    manifest: Manifest,
    profiles: Sequence[Profile],
    options: BuildOptions,
    report: Callable[[str], None],
) -> None:
    """Build the request graphs of an export folder, or all but their plans.

    Raises PlanNotBuiltError, after everything else was written, where TensorRT or a GPU is missing.
    """
    graphs = [out / graph.file for graph in manifest.graphs if graph.kind == "request"]
    rows = manifest.model.items + 1
    limits = {"batch": (1, 1), "length": (1, manifest.model.max_length), "items": (rows, rows)}
    exported = export_tensorrt(graphs, profiles, options, limits=limits, report=report)
    for note in exported.notes:
        report(f"note: {note}")
    for command in exported.trtexec.values():
        report(f"the same with trtexec (of TensorRT 11: without --stronglyTyped, which all is there): {command}")
    for plan in exported.require_plans().values():
        report(f"wrote {plan}")
