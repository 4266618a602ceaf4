"""`adrec bench list`, `adrec bench run` and `adrec bench serving`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from adrec.errors import ConfigError
from bench.console import wide_console

if TYPE_CHECKING:
    from adrec.config import ModelConfig
    from adrec.respacing import Steps
    from bench.running.unit import Unit

ENGINES_HELP = "Engines, comma-separated."
SERVER_OPTIONS = ("rate", "load", "bound_ms", "wait_ms")


def list_suites(
    units: Annotated[bool, typer.Option("--units", help="Show the units too, whose names patterns match.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="With --units: those of a smoke run.")] = False,
) -> None:
    """Say which suites there are, and why one cannot run here."""
    import torch

    from bench.running.registry import SUITES
    from bench.running.unit import Context

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table("suite", "what it measures", "units", "seconds", "here", show_lines=False)
    for suite in SUITES:
        context = Context(Path(), device, "", smoke=smoke)
        reason = suite.obstacle(context)
        found = [] if reason else suite.units(context)
        seconds = "-" if reason else f"{sum(unit.seconds for unit in found):.0f}"
        table.add_row(suite.name, suite.summary, str(len(found)) if not reason else "-", seconds, reason or "yes")
        if units:
            for unit in found:
                table.add_row("", unit.name, "", f"{unit.seconds:.1f}", "")
    wide_console().print(table, markup=False)


def run_suites(
    patterns: Annotated[
        list[str], typer.Argument(help="Suites or units, with * for anything: tradeoff, 'engines/*/batch 1/*'.")
    ],
    run: Annotated[
        Path | None, typer.Option("--run", help="Folder of a trained run; default: an untrained model.")
    ] = None,
    compressed: Annotated[
        list[Path] | None, typer.Option("--with", help="Suite compress: a run made from --run. Repeatable.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Data set of the histories; default: the run's.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for records, one file a suite, and the journal.")] = Path(
        "bench-out"
    ),
    smoke: Annotated[bool, typer.Option("--smoke", help="Everything at its smallest: under two minutes.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run into --out stopped.")] = False,
    engines: Annotated[
        str | None,
        typer.Option(
            help="Engines, comma-separated; default: reference,cached, and for suite engines all that run here, which"
            " also takes reference-compiled, reference-onnx, cached-compiled and sasrec- before an engine.",
        ),
    ] = None,
    users: Annotated[int | None, typer.Option(min=1, help="Evaluate a random sample of so many users.")] = None,
    seconds_per_cell: Annotated[
        float | None, typer.Option(help="Time budget of a cell; default: 2, smoke 0.1.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's setting.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Run the units that match, and keep each as soon as it is measured.

    Exit status 1 when a cell failed or its figures do not count, 2 for bad input, 130 when interrupted; --resume then
    goes on, and tries again what failed.
    """
    from adrec.devices import check_device
    from adrec.environment import printable_command
    from adrec.files import check_output_folder
    from bench.kernels.engine_paths import check_paths
    from bench.progress import SweepProgress
    from bench.running.registry import SUITES
    from bench.running.runner import run_units, select
    from bench.running.session import open_journal
    from bench.running.unit import Context
    from bench.tradeoff import pinned_threads

    if seconds_per_cell is not None and not 0 < seconds_per_cell < math.inf:
        raise ConfigError(f"--seconds-per-cell {seconds_per_cell}: must be above 0 and finite, such as 2")
    check_output_folder(out, "--out")
    context = Context(
        folder=out,
        device=check_device(device),
        command=printable_command(sys.argv),
        smoke=smoke,
        run=run,
        data=data,
        users=users,
        seconds=seconds_per_cell,
        engines=tuple(check_paths("reference,cached" if engines is None else engines, "--engines")),
        engines_named=engines is not None,
        compressed=tuple(compressed or ()),
    )
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with pinned_threads(threads):
        units, left_out = select(patterns, context)
        check_engines(context.engines, units)
        for name, reason in left_out.items():
            console.print(f"left out: {name}: {reason}", markup=False)
        journal = open_journal(context, [suite.name for suite in SUITES], resume=resume)
        for notice in context.notices:
            console.print(f"note: {notice}", markup=False)
        try:
            with SweepProgress(console, quiet=quiet) as progress:
                outcome = run_units(units, journal, progress, progress.say, left_out)
        except KeyboardInterrupt:
            kept = sum(unit.name in journal.done for unit in units)
            console.print(f"interrupted: {kept} of {len(units)} units kept in {out}; --resume goes on", markup=False)
            raise typer.Exit(130) from None
    if outcome.done_before:
        console.print(f"{len(outcome.done_before)} units were done before", markup=False)
    for suite in dict.fromkeys(unit.suite for unit in units):
        rows = sum(done.records for done in journal.done.values() if done.suite == suite)
        console.print(f"{rows} rows in {journal.file_of(suite)}", markup=False)
    spent = sum(done.seconds for done in outcome.measured)
    console.print(f"{len(outcome.measured)} units measured in {spent:.0f} s", markup=False)
    if outcome.failed:
        console.print(
            f"{len(outcome.failed)} of {len(units)} units hold an error, or figures that do not count;"
            " --resume tries them again",
            markup=False,
        )
        raise typer.Exit(1)


def check_engines(names: Sequence[str], units: Sequence[Unit]) -> None:
    """Raise ConfigError for a rival's path among units of suites other than engines, which know engines only."""
    from adrec.engines import ENGINES

    wrong = [name for name in names if name not in ENGINES]
    others = [unit.suite for unit in units if unit.suite != "engines"]
    if wrong and others:
        raise ConfigError(
            f"--engines {wrong[0]}: is measured by suite engines only, not by {others[0]}; run the two one after the"
            f" other, the latter with {', '.join(ENGINES)}"
        )


def serving(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.", show_default=False)],
    engines: Annotated[str, typer.Option(help=ENGINES_HELP)] = "cached",
    steps: Annotated[
        str | None, typer.Option(help="Step counts, comma-separated; default: how the run is served, or 1.")
    ] = None,
    scenarios: Annotated[
        str, typer.Option(help="single stream, server, offline; comma-separated.")
    ] = "single stream,server,offline",
    rate: Annotated[
        float | None, typer.Option(help="Server: arrivals a second; default: --load of the throughput.")
    ] = None,
    load: Annotated[float, typer.Option(help="Server: share of the throughput in full batches.")] = 0.5,
    bound_ms: Annotated[
        float | None, typer.Option(help="Server: latency that 99 % must keep for its figures to count; default: none.")
    ] = None,
    batch_most: Annotated[int, typer.Option(min=1, max=2**20, help="Users in a batch at most.")] = 32,
    wait_ms: Annotated[float, typer.Option(help="Server: how long the first of a batch waits for others.")] = 0.0,
    seconds: Annotated[float, typer.Option(help="Least duration of a scenario.")] = 60.0,
    queries: Annotated[int, typer.Option(min=1, help="Least number of queries.")] = 1024,
    seconds_most: Annotated[float, typer.Option(help="Stop a scenario then; its figures do not count.")] = 600.0,
    data: Annotated[Path | None, typer.Option(help="Data set of the histories; default: the run's.")] = None,
    users: Annotated[int | None, typer.Option(min=1, help="Evaluate a random sample of so many users.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of arrivals, of the queries' users and of the noise.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's setting.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Records file; default: RUN/bench/serving.jsonl.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Serve a run's users one at a time, as they arrive, or all at once, and measure latency and throughput.

    Exit status 1 when a scenario failed or its figures do not count, 2 for bad input.
    """
    from adrec.commands.options import given, integers
    from adrec.devices import check_device
    from adrec.engines import ENGINES
    from adrec.environment import printable_command
    from adrec.files import check_output
    from adrec.respacing import step_count
    from bench.kernels.selection import pick_all
    from bench.progress import SweepProgress
    from bench.running.session import write_whole
    from bench.serving.measure import SCENARIOS, Policy, ServingBench
    from bench.serving.scenarios import Extent, arrival_count
    from bench.serving.tables import serving_table
    from bench.subject import load_subject
    from bench.tradeoff import pinned_threads

    for option, value, least in (
        ("--rate", rate, 0.0), ("--load", load, 0.0), ("--bound-ms", bound_ms, 0.0), ("--wait-ms", wait_ms, -1.0),
        ("--seconds", seconds, -1.0), ("--seconds-most", seconds_most, 0.0),
    ):  # fmt: skip
        if value is not None and not (least < value < math.inf and (value >= 0)):
            raise ConfigError(f"{option} {value}: must be {'above 0' if least == 0.0 else '0 or more'} and finite")
    target = out or run / "bench" / "serving.jsonl"
    check_output(target, "--out", make_folder=True)
    chosen = pick_all(scenarios, SCENARIOS, "--scenarios")
    if "server" not in chosen and (unread := given(context, SERVER_OPTIONS)):
        raise ConfigError(
            f"{', '.join(unread)}: read by scenario server only, and --scenarios is {scenarios}; add server, or leave"
            f" {'it' if len(unread) == 1 else 'them'} out"
        )
    if rate is not None and given(context, ["load"]):
        raise ConfigError(f"--load {load}: not read with --rate, which fixes the arrivals; leave one of them out")
    extent = Extent(seconds, queries, seconds_most)
    if "server" in chosen:
        arrival_count(rate or 0.0, extent)
    names, where = pick_all(engines, ENGINES, "--engines"), check_device(device)
    subject = load_subject(run, data, "test", users)
    settings = subject.run.settings
    trained = step_count(None, settings.model) or 1
    plans: list[Steps] = [settings.serving or 1] if steps is None else [*integers(steps, "--steps", 1, trained)]
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    policy = Policy(extent, batch_most, wait_ms, bound_ms, rate, load, seed)
    with pinned_threads(threads), SweepProgress(console, quiet=quiet) as progress:
        bench = ServingBench(subject, policy, where, printable_command(sys.argv))
        cells = [
            (scenario, name, plan) for name in names for plan in plans for scenario in SCENARIOS if scenario in chosen
        ]
        for cell in cells:
            progress.update(_cell_name(*cell, settings.model), 0.0, seconds)
        records = [bench.record(*cell, partial(progress.update, _cell_name(*cell, settings.model))) for cell in cells]
    write_whole(target, records)
    wide_console().print(serving_table(records), markup=False)
    console.print(f"{len(records)} rows in {target}", markup=False)
    if any(record.error or (record.summary and not record.summary.valid) for record in records):
        raise typer.Exit(1)


def _cell_name(scenario: str, engine: str, plan: Steps, model: ModelConfig) -> str:
    from adrec.respacing import step_count

    count = step_count(plan, model)
    return f"{scenario}, {engine}" + ("" if count is None else f", {count} steps")
