"""`adrec bench profile` and `adrec bench profile-steps`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from adrec.errors import ConfigError
from bench.console import wide_console

MOST_STEPS, MOST_USERS = 4095, 2**20


def profile(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.", show_default=False)],
    engine: Annotated[str, typer.Option(help="Engine.")] = "cached",
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_STEPS, help="Reverse steps; default: the run's serving plan, or all trained."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=MOST_USERS, help="Users in a batch.")] = 512,
    out: Annotated[Path | None, typer.Option(help="Folder for page, record and trace; default: RUN/profile.")] = None,
    data: Annotated[Path | None, typer.Option(help="Data set of the histories; default: the run's.")] = None,
    seconds: Annotated[float, typer.Option(help="Time budget; at least 5 rounds are measured.")] = 10.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's setting.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Break a request down into stages, each against its floor on this machine, and record a trace for Perfetto."""
    from adrec.devices import check_device
    from adrec.engines import ENGINES
    from adrec.environment import printable_command
    from adrec.files import check_output_folder
    from bench.kernels.selection import pick
    from bench.profiling.page import console_table, sentences, subtitle
    from bench.profiling.profile import Profiler, write_profile
    from bench.progress import SweepProgress
    from bench.subject import load_subject
    from bench.tradeoff import pinned_threads

    if not 0 < seconds < math.inf:
        raise ConfigError(f"--seconds {seconds}: must be above 0 and finite, such as 10")
    target = out or run / "profile"
    check_output_folder(target, "--out")
    name, where = pick(engine, ENGINES, "--engine"), check_device(device)
    subject = load_subject(run, data, "test", None)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with pinned_threads(threads), SweepProgress(console, quiet=quiet) as progress:
        profiler = Profiler(subject, name, steps, batch, where, seconds, printable_command(sys.argv))
        record, paths = write_profile(profiler, target, lambda done, all_: progress.update("profiling", done, all_))
    wide_console().print(console_table(record), markup=False)
    console.print(subtitle(record), markup=False)
    for sentence in sentences(record):
        console.print(sentence, markup=False)
    console.print(f"page: {paths[0]}; trace for https://ui.perfetto.dev: {paths[2]}", markup=False)


def profile_steps(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.", show_default=False)],
    engine: Annotated[str, typer.Option(help="Engine.")] = "cached",
    steps: Annotated[str | None, typer.Option(help="Step counts; default: 1,2,4,... up to the trained count.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=MOST_USERS, help="Users in a batch.")] = 32,
    budget_ms: Annotated[float | None, typer.Option(help="Also say the most accurate setting within it.")] = None,
    data: Annotated[Path | None, typer.Option(help="Data set; default: the run's.")] = None,
    users: Annotated[int | None, typer.Option(help="Evaluate a random sample of so many users.")] = None,
    seconds_per_cell: Annotated[float, typer.Option(help="Time budget of a step count.")] = 2.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's setting.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder for records and report; default: RUN/steps.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Measure what each step count costs and keeps, and say which to deploy.

    Exit status 1 when a row failed, 2 for bad input.
    """
    from adrec.commands.options import integers
    from adrec.engines import ENGINES
    from adrec.environment import printable_command
    from bench.kernels.selection import pick
    from bench.profiling.steps import advice, steps_table
    from bench.report import write_report
    from bench.timing import TimingProtocol
    from bench.tradeoff import run_tradeoff

    if budget_ms is not None and not 0 < budget_ms < math.inf:
        raise ConfigError(f"--budget-ms {budget_ms}: must be above 0 and finite, such as 50")
    target = out or run / "steps"
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    result = run_tradeoff(
        run,
        data=data,
        engines=[pick(engine, ENGINES, "--engine")],
        steps=None if steps is None else integers(steps, "--steps", 1, MOST_STEPS),
        batch_sizes=[batch],
        protocol=TimingProtocol(seconds=seconds_per_cell),
        users=users,
        threads=threads,
        device=device,
        out=target / "tradeoff.jsonl",
        command=printable_command(sys.argv),
        console=console,
        quiet=quiet,
    )
    page = write_report(result.records, target / "report.html", command=printable_command(sys.argv))
    wide_console().print(steps_table(result.records), markup=False)
    for sentence in advice(result.records, budget_ms):
        console.print(sentence, markup=False)
    for record in result.failed:
        console.print(f"failed: {record.engine}, {record.steps} steps: {record.error}", markup=False)
    console.print(f"report: {page}", markup=False)
    if result.failed:
        raise typer.Exit(1)
