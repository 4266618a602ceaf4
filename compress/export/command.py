"""`adrec export`: a run as files of another runtime, and their linter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from adrec.commands.options import choice, integers
from adrec.errors import ConfigError
from compress.export.verify_command import verify

if TYPE_CHECKING:
    from adrec.checkpoint import Run

TARGETS = ("onnx", "tensorrt", "aotinductor")
INT8 = ("dynamic", "qdq")
_EIGHT_BITS = {"int8": "int8-qdq", "fp8": "fp8-qdq"}


class _RunFirst(TyperGroup):
    """``adrec export RUN`` is ``adrec export run RUN``: what is no other sub-command names a run."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "-h", "--help"}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    """Add the `export` group to the root application."""
    group = typer.Typer(
        cls=_RunFirst, help="Files for ONNX Runtime and TensorRT: `adrec export RUN --out DIR`.", no_args_is_help=True
    )
    group.command("run", hidden=True)(export)
    group.command("lint")(lint_files)
    group.command("verify")(verify)
    app.add_typer(group, name="export")


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write, new or empty.")],
    to: Annotated[str, typer.Option(help="onnx, tensorrt or aotinductor.")] = "onnx",
    steps: Annotated[
        str | None,
        typer.Option(help="Step counts, a graph each; default: how the run is served, or 1."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32 or fp16; for TensorRT also int8 or fp8: Q/DQ nodes in a float16 graph.")
    ] = "fp32",
    int8: Annotated[
        str | None, typer.Option(help="Also int8: dynamic (ONNX Runtime on CPUs), qdq (GPUs), or both with a comma.")
    ] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="Also float8 with Q/DQ nodes (GPUs from Ada on).")] = False,
    quantiser: Annotated[str, typer.Option(help="Of Q/DQ nodes: onnxruntime or modelopt.")] = "onnxruntime",
    loop: Annotated[
        bool, typer.Option("--loop", help="Also a graph whose step count is an input; its steps in float always.")
    ] = False,
    split: Annotated[bool, typer.Option("--split", help="Also the request in three: encode, denoise, score.")] = False,
    table: Annotated[str, typer.Option(help="Item table: inside, input, or outside (with --split).")] = "inside",
    k: Annotated[int, typer.Option(min=1, help="Items in a list.")] = 20,
    device: Annotated[str, typer.Option(help="AOTInductor: what it compiles for, cpu, cuda or cuda:N.")] = "cpu",
    baseline: Annotated[bool, typer.Option("--baseline", help="Export the SASRec+ of stage 1 instead.")] = False,
    data: Annotated[Path | None, typer.Option(help="Data to calibrate with; default: the run's own.")] = None,
    calibration_users: Annotated[int, typer.Option(min=1, help="Histories to calibrate with.")] = 256,
    inline_mib: Annotated[
        int | None, typer.Option(min=0, help="Weights above so many MiB go to a file of their own; default 2032.")
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(help="TensorRT: DIM=MIN:OPT:MAX,... such as batch=1:1:1,length=1:8:50. Repeatable."),
    ] = None,
    plugins: Annotated[
        bool,
        typer.Option("--plugins", help="Steps and scoring as nodes that TensorRT runs with own kernels."),
    ] = False,
    weights: Annotated[str, typer.Option(help="TensorRT: fixed, refit, or stripped from the plan.")] = "fixed",
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="TensorRT: also for newer ones of its major version; slower.")
    ] = False,
    hardware_compatibility: Annotated[
        str, typer.Option(help="TensorRT: none, same_compute_capability or ampere_plus; slower.")
    ] = "none",
    workspace_mib: Annotated[int, typer.Option(min=1, help="TensorRT: most scratch memory of a kernel.")] = 4096,
    tf32: Annotated[bool, typer.Option("--tf32", help="TensorRT: round float32 products to TF32.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Export a run: histories in, items and scores out, one graph a step count.

    Exit status 2 for bad input, 3 where all but the TensorRT plan could be written.
    """
    from adrec.checkpoint import load_run
    from adrec.devices import check_device
    from compress.export.folder import check_folder
    from compress.export.manifest import Origin
    from compress.export.onnx_export import INLINE_LIMIT, ExportOptions, export_onnx

    choice(to, TARGETS, "--to")
    choice(table, ("inside", "input", "outside"), "--table")
    choice(quantiser, ("onnxruntime", "modelopt"), "--quantiser")
    kinds = [choice(each.strip(), INT8, "--int8") for each in int8.split(",")] if int8 is not None else []
    quantised = [f"int8-{kind}" for kind in kinds] + (["fp8-qdq"] if fp8 else [])
    floats, quantised = _precisions(precision, quantised, to)
    calibrated = [name for name in quantised if name.endswith("qdq")]
    if quantiser == "modelopt":
        if not calibrated:
            raise ConfigError("--quantiser is of Q/DQ nodes, and none are asked for; add --int8 qdq or --fp8")
        from compress.export.quantise import require_modelopt

        require_modelopt()
    asked = {
        "weights": weights,
        "version_compatible": version_compatible,
        "hardware_compatibility": hardware_compatibility,
        "workspace_mib": workspace_mib,
        "tf32": tf32,
    }
    if to != "tensorrt":
        _refuse_builder_options(asked, to)
    if to != "aotinductor" and device != "cpu":
        raise ConfigError(f"--device is for --to aotinductor; --to is '{to}'")
    compiled_for = check_device(device)
    if (to == "tensorrt") != bool(profile):
        raise ConfigError(
            "--to tensorrt needs --profile, at least one, such as batch=1:1:1,length=1:8:50"
            if to == "tensorrt"
            else f"--profile is for --to tensorrt; --to is '{to}'"
        )
    if to == "tensorrt":
        from adrec.config import parse
        from adrec.engines.tensorrt.profiles import size_range
        from compress.export.tensorrt.command import check_lengths, check_tensorrt
        from compress.export.tensorrt.options import BuildOptions

        profiles = check_tensorrt(profile or [], k=k, loop=loop, table=table, quantised=quantised)
        build_options = parse(BuildOptions, asked, "options of --to tensorrt")
    check_folder(out, overwrite)
    source = load_run(run)
    if baseline:
        source = _baseline_of(source)
    if to == "tensorrt":
        check_lengths(profiles, source.settings.model.max_length)
    plans = _plans(source, steps)
    options = ExportOptions(
        steps=plans,
        precision=floats,
        quantised=quantised,  # type: ignore[arg-type]
        loop=loop,
        split=split,
        k=k,
        catalogue=table,  # type: ignore[arg-type]
        inline_limit=INLINE_LIMIT if inline_mib is None else inline_mib * 2**20,
        calibration=_calibration(source, data, calibration_users) if calibrated else None,
        quantiser="modelopt" if quantiser == "modelopt" else "onnxruntime",
        plugins=plugins,
        keep_float=precision not in _EIGHT_BITS,
        sizes=None if to != "tensorrt" else size_range(profiles),
    )
    console = Console(soft_wrap=True)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    origin = Origin.of_run(source)
    if origin.formats:
        width = "float16" if floats == "fp16" else "float32"
        say(f"the run stores {', '.join(origin.formats)}: the graph computes with those numbers in {width}")
    if to == "aotinductor":
        from compress.export.aotinductor import export_aotinductor

        export_aotinductor(
            source.model, out, options, origin=origin, device=compiled_for, overwrite=overwrite, report=say
        )
        return
    manifest = export_onnx(source.model, out, options, origin=origin, overwrite=overwrite, report=say)
    say(f"{len(manifest.graphs)} graphs in {out}; `adrec export verify {out} --against {run}` compares them")
    if to == "tensorrt":
        from compress.export.tensorrt.command import build_plans

        build_plans(out, manifest, profiles, build_options, say)


def lint_files(
    files: Annotated[list[Path], typer.Argument(help="ONNX files, of this project or not.", show_default=False)],
    profile: Annotated[
        list[str] | None, typer.Option(help="Sizes of requests, DIM=MIN:OPT:MAX,...; repeatable.")
    ] = None,
    target: Annotated[str, typer.Option(help="any (also TensorRT) or onnxruntime.")] = "any",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find what ONNX Runtime or TensorRT refuses or gets wrong, with a reason and a fix each.

    Exit status 0 without errors (warnings are allowed), 1 with some, 2 for what is no ONNX file.
    """
    from compress.export.lint import lint, parse_target

    chosen, sizes = parse_target(target), _sizes(profile)
    found = {file: lint(file, target=chosen, profiles=sizes) for file in files}
    if json_:
        lines = {str(file): [each.model_dump(mode="json") for each in findings] for file, findings in found.items()}
        typer.echo(json.dumps(lines, indent=2))
    else:
        console = Console()
        for file, findings in found.items():
            if not findings:
                console.print(f"{escape(str(file))}: clean", highlight=False, soft_wrap=True)
                continue
            table = Table("rule", "where", "reason", "fix", title=str(file), title_justify="left")
            for each in findings:
                colour = "red" if each.severity == "error" else "yellow"
                table.add_row(f"[{colour}]{each.rule}[/]", escape(each.where), escape(each.reason), escape(each.fix))
            console.print(table)
    if any(each.severity == "error" for findings in found.values() for each in findings):
        raise typer.Exit(1)


def _refuse_builder_options(asked: dict[str, Any], to: str) -> None:
    from compress.export.tensorrt.options import BuildOptions

    for name, value in asked.items():
        if value != BuildOptions.model_fields[name].default:
            raise ConfigError(f"--{name.replace('_', '-')} is for --to tensorrt; --to is '{to}'")


def _precisions(precision: str, quantised: list[str], to: str) -> tuple[Literal["fp32", "fp16"], list[str]]:
    """Precision of the float graphs, and the quantised variants that all options together ask for."""
    if precision not in _EIGHT_BITS:
        choice(precision, ("fp32", "fp16", *_EIGHT_BITS), "--precision")
        return ("fp16" if precision == "fp16" else "fp32"), quantised
    if to != "tensorrt":
        raise ConfigError(
            f"--precision is '{precision}', which is for --to tensorrt; here eight bits are written beside the floats:"
            " --int8 dynamic, --int8 qdq or --fp8"
        )
    wanted = _EIGHT_BITS[precision]
    if others := [name for name in quantised if name != wanted]:
        raise ConfigError(
            f"--precision is '{precision}' and {others[0]} is asked for as well; for several plans use --precision fp16"
            " with --int8 qdq and --fp8"
        )
    return "fp16", [wanted]


def _plans(source: Run, steps: str | None) -> list[Any]:
    if source.config.model != "adrec":
        if steps not in (None, "1"):
            raise ConfigError(f"--steps is {steps}, but a '{source.config.model}' run has no reverse steps")
        return [1]
    if steps is not None:
        return list(integers(steps, "--steps", 1, source.config.timesteps))
    return [source.settings.serving or 1]


def _baseline_of(source: Run) -> Run:
    from adrec.errors import RunError

    found = source.baseline()
    if found is None:
        raise RunError(f"{source.path}: holds no SASRec+ baseline; export a run of `adrec train --model sasrec`")
    return found


def _calibration(source: Run, data: Path | None, users: int) -> Any:
    import numpy as np
    import torch

    from adrec.data.of_run import open_data

    sequences = open_data(source, data).training_sequences()
    known = (sequences.lengths > 0).nonzero().squeeze(1).numpy()
    picked = np.random.default_rng(0).permutation(known)[:users]
    return sequences.select(torch.from_numpy(np.sort(picked)))


def _sizes(profile: list[str] | None) -> dict[str, tuple[int, int]] | None:
    from adrec.engines.tensorrt.profiles import parse_profile, size_range

    if not profile:
        return None
    return size_range([parse_profile(text) for text in profile])
