"""`adrec bench recbole`: a run beside RecBole's SASRec."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from bench.rivals import PYTHON_VARIABLE

TITLES = (
    *("model", "engine", "steps", "batch (users)", "p50 (ms)", "time ratio to baseline", "NDCG@20 (%)", "HR@20 (%)"),
    *("users evaluated", "accuracy measured with"),
)


def bench_recbole(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.", show_default=False)],
    python: Annotated[
        str | None,
        typer.Option(
            envvar=PYTHON_VARIABLE,
            help="Interpreter of an environment with RecBole; default: this one.",
        ),
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Users in a batch, comma-separated.")] = "1,32,512",
    epochs: Annotated[int | None, typer.Option(min=1, help="RecBole trains so many at most; default: its 300.")] = None,
    data: Annotated[Path | None, typer.Option(help="Data set of the run; default: where it was trained from.")] = None,
    seconds_per_cell: Annotated[float, typer.Option(min=0.001, max=1e6, help="Time budget of a cell.")] = 2.0,
    users: Annotated[int | None, typer.Option(min=1, help="Evaluate a random sample of so many users.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of both; default: torch's setting.")] = None,
    out: Annotated[Path | None, typer.Option(help="Records file; default: RUN/bench/recbole.jsonl.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train RecBole's SASRec on the run's data in another process; measure both in turn, each row with its accuracy.

    RecBole's model has the run's width, encoder blocks, heads and longest history, and RecBole's defaults else. Ratios
    are to the run at one step in `cached`. Exit status 1 when a row or RecBole failed, 2 for bad input.
    """
    from adrec.commands.options import integers
    from adrec.environment import printable_command
    from adrec.errors import ConfigError
    from adrec.files import check_output
    from bench.console import wide_console
    from bench.progress import SweepProgress
    from bench.rivals.sweep import recbole_sweep
    from bench.running.session import write_whole
    from bench.subject import load_subject
    from bench.tables import main_columns
    from bench.timing import TimingProtocol
    from bench.tradeoff import pinned_threads

    if python == "":
        raise ConfigError("--python is empty: name an interpreter that has RecBole, or leave it out for this one")
    target = out or run / "bench" / "recbole.jsonl"
    check_output(target, "--out", make_folder=True)
    sizes = sorted(set(integers(batch_sizes, "--batch-sizes", 1, 2**20)))
    subject = load_subject(run, data, "test", users)
    console, command = wide_console(stderr=True), printable_command(sys.argv)
    protocol = TimingProtocol(seconds=seconds_per_cell)
    with (
        pinned_threads(threads),
        SweepProgress(console, quiet=quiet) as progress,
        recbole_sweep(subject, python or sys.executable, sizes, protocol, command, progress, epochs) as sweep,
    ):
        for notice in subject.notices:
            progress.say(f"note: {notice}")
        records = list(sweep.rows())
    write_whole(target, records)
    shown = [column for column in main_columns() if column.title in TITLES]
    table = Table(*(column.title for column in shown))
    for record in records:
        table.add_row(*(column.text(record) for column in shown))
    wide_console().print(table, markup=False)
    for record in (failed := [record for record in records if record.error]):
        console.print(f"failed: {record.model}, batch {record.batch_size_users}: {record.error}", markup=False)
    console.print(f"{len(records)} rows in {target}; `adrec bench report {target}` draws them", markup=False)
    if failed:
        raise typer.Exit(1)
