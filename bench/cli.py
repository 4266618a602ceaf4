"""`adrec bench`: measure the trade-off of a run, write its report, time kernels, describe the machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from adrec.commands.options import integers
from adrec.errors import ConfigError, nearest
from bench.comparing.commands import calibrate, compare
from bench.compression.bench_command import bench_compress
from bench.conversion.commands import convert
from bench.kernels.bench_command import bench_kernels
from bench.profiling.commands import profile, profile_steps
from bench.rivals.commands import bench_recbole
from bench.running.commands import list_suites, run_suites, serving

SPLITS = ("test", "validation")
MOST_STEPS, MOST_USERS = 4095, 2**20


def register(app: typer.Typer) -> None:
    """Add the `bench` group to the root application."""
    group = typer.Typer(help="Measure speed together with accuracy.", no_args_is_help=True)
    group.command("list")(list_suites)
    group.command("run")(run_suites)
    group.command("tradeoff")(tradeoff)
    group.command("serving")(serving)
    group.command("report")(report)
    group.command("compare")(compare)
    group.command("calibrate")(calibrate)
    group.command("convert")(convert)
    group.command("profile")(profile)
    group.command("profile-steps")(profile_steps)
    group.command("compress")(bench_compress)
    group.command("recbole")(bench_recbole)
    group.command("kernels")(bench_kernels)
    group.command("env")(env)
    app.add_typer(group, name="bench")


def tradeoff(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(help="Data set of the histories; default: the one that the run was trained on."),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(help="Step counts, comma-separated; default: 1,2,4,... up to the trained count."),
    ] = None,
    engines: Annotated[str, typer.Option(help="Engines, comma-separated.")] = "reference,cached",
    batch_sizes: Annotated[str, typer.Option(help="Users in a batch, comma-separated.")] = "1,32,512",
    seeds: Annotated[str, typer.Option(help="Noise seeds, comma-separated; latency is measured at the first.")] = "0",
    seconds_per_cell: Annotated[
        float, typer.Option(help="Time budget of a cell; slow cells exceed it to reach 3 rounds.")
    ] = 2.0,
    users: Annotated[int | None, typer.Option(help="Evaluate a random sample of so many users.")] = None,
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's setting.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Records file; default: RUN/bench/tradeoff.jsonl.")] = None,
    append: Annotated[bool, typer.Option("--append", help="Add to the records file instead of replacing it.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Measure engine x steps x batch size and write one record a row, each with its accuracy.

    Exit status 1 when a row failed, 2 for bad input.
    """
    from adrec.environment import printable_command
    from bench.subject import Split
    from bench.timing import TimingProtocol
    from bench.tradeoff import run_tradeoff

    if split not in SPLITS:
        raise ConfigError(f"--split {split!r}: allowed are {' and '.join(SPLITS)}{nearest(split, SPLITS)}")
    chosen: Split = "test" if split == "test" else "validation"
    console = Console(stderr=True, soft_wrap=True)
    target = out or run / "bench" / "tradeoff.jsonl"
    result = run_tradeoff(
        run,
        data=data,
        engines=[name.strip() for name in engines.split(",")],
        steps=None if steps is None else integers(steps, "--steps", 1, MOST_STEPS),
        batch_sizes=integers(batch_sizes, "--batch-sizes", 1, MOST_USERS),
        seeds=integers(seeds, "--seeds", 0, 2**31 - 1),
        protocol=TimingProtocol(seconds=seconds_per_cell),
        split=chosen,
        users=users,
        threads=threads,
        device=device,
        out=target,
        append=append,
        command=printable_command(sys.argv),
        console=console,
        quiet=quiet,
    )
    for record in result.failed:
        where = ", ".join(str(each) for each in (record.model, record.engine, record.steps) if each is not None)
        console.print(f"failed: {where}, batch {record.batch_size_users}: {record.error}", markup=False)
    console.print(f"{len(result.records)} rows in {target}; `adrec bench report {target}` draws them", markup=False)
    if result.failed:
        raise typer.Exit(1)


def report(
    records: Annotated[list[Path], typer.Argument(help="Records files (JSON lines).", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Folder, or .html file; default: beside the first records file.")
    ] = None,
) -> None:
    """Write a self-contained HTML report, with Markdown and PNG beside it."""
    from adrec.environment import printable_command
    from bench.archive import read_any
    from bench.report import write_report
    from bench.running.journal import NAME

    # `adrec bench run` leaves its journal among the files that a shell's * names.
    kept = [path for path in records if path.name != NAME] or records
    for path in dict.fromkeys(records):
        if path not in kept:
            typer.echo(f"{path}: left out; it is the journal of `adrec bench run` and holds no records", err=True)
    found = [record for path in kept for record in read_any(path)]
    page = write_report(found, out or kept[0].with_suffix(".html"), command=printable_command(sys.argv))
    typer.echo(str(page))


def env(json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Describe the machine, the versions and the revision, as records do."""
    from adrec.environment import read_environment

    environment = read_environment().model_dump(mode="json")
    if json_:
        typer.echo(json.dumps(environment, indent=2))
        return
    table = Table(show_header=False, box=None)
    for part, values in environment.items():
        for name, value in values.items():
            table.add_row(f"{part} {name}".replace("_", " "), "-" if value in (None, []) else str(value))
    Console().print(table, markup=False)
