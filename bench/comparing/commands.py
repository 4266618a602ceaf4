"""`adrec bench compare` and `adrec bench calibrate`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from adrec.errors import ConfigError
from bench.console import wide_console


def compare(
    old: Annotated[Path, typer.Argument(help="Records of the build to compare with.", show_default=False)],
    new: Annotated[Path, typer.Argument(help="Records of the build in question.", show_default=False)],
    bound: Annotated[str, typer.Option(help="Slow-down that counts as a regression.")] = "5%",
    accuracy_bound: Annotated[str, typer.Option(help="Loss of NDCG@20 that counts, of the old value.")] = "1%",
    calibration: Annotated[
        Path | None, typer.Option(help="Record of `adrec bench calibrate`: intervals then hold the noise between runs.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table for a pull request to this file.")] = None,
    allow_other_machine: Annotated[
        bool, typer.Option("--allow-other-machine", help="Compare records of different machines or thread counts.")
    ] = False,
    allow_busy_machine: Annotated[
        bool, typer.Option("--allow-busy-machine", help="Judge rows measured while others overloaded the machine.")
    ] = False,
) -> None:
    """Compare two files of records row by row.

    Medians of all rows are judged; p99 of serving and p95 of tradeoff rows too, where enough calls lie beyond it.

    Exit status: 0 no regression, 1 a row is surely slower or less accurate beyond the bound, or fails now; 2 bad input.
    """
    from adrec.files import check_output, write_text
    from bench.archive import read_any
    from bench.calibration import read_calibration
    from bench.comparing.comparison import compare as compare_rows
    from bench.comparing.rows import rows_of
    from bench.comparing.tables import console_table, markdown_of

    limit, accuracy_limit = share(bound, "--bound", 1000), share(accuracy_bound, "--accuracy-bound", 100)
    if markdown is not None:
        check_output(markdown, "--markdown", make_folder=True, inputs=[old, new, *filter(None, [calibration])])
    found = compare_rows(
        rows_of(read_any(old)),
        rows_of(read_any(new)),
        bound=limit,
        accuracy_bound=accuracy_limit,
        calibration=None if calibration is None else read_calibration(calibration),
        allow_other_machine=allow_other_machine,
        allow_busy_machine=allow_busy_machine,
    )
    console, notes = wide_console(), Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(console_table(found), markup=False)
    for name, keys in (("old", found.only_old), ("new", found.only_new)):
        for key in keys:
            notes.print(f"only in the {name} file: {found.name(key)}", markup=False)
    for note in found.notes:
        notes.print(f"note: {note}", markup=False)
    console.print(f"{found.summary}; {len(found.regressions)} regressions beyond {bound}", markup=False)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        write_text(markdown, markdown_of(found, old.name, new.name))
    if found.regressions:
        raise typer.Exit(1)


def calibrate(
    engine: Annotated[str, typer.Option(help="Engine of the workload.")] = "cached",
    steps: Annotated[int, typer.Option(min=1, max=4095, help="Reverse steps.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Users in a batch.")] = 32,
    items: Annotated[int, typer.Option(min=1, help="Size of the catalogue.")] = 4000,
    runs: Annotated[int, typer.Option(min=4, max=1000, help="Processes to measure in, one after the other.")] = 8,
    seconds_per_cell: Annotated[float, typer.Option(help="Time budget of a cell, as the sweep's.")] = 2.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's setting.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Records file (JSON lines), to which the record is added.")] = Path(
        "calibration.jsonl"
    ),
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Measure a workload against itself and say the smallest difference that this machine can tell."""
    from adrec.devices import check_device
    from adrec.engines import ENGINES
    from adrec.environment import printable_command
    from adrec.files import check_output
    from bench import calibration as noise
    from bench.kernels.selection import pick
    from bench.progress import SweepProgress
    from bench.timing import TimingProtocol

    if not 0 < seconds_per_cell < math.inf:
        raise ConfigError(f"--seconds-per-cell {seconds_per_cell}: must be above 0 and finite, such as 2")
    check_output(out, "--out", make_folder=True)
    check_device(device)
    workload = noise.Workload(pick(engine, ENGINES, "--engine"), steps, batch_size, items, threads, device)
    if out.exists():
        noise.read_calibration(out)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with SweepProgress(console, quiet=quiet) as progress:
        expected = runs * (2 * seconds_per_cell + noise.START_SECONDS)
        progress.update("calibrating", 1e-9, expected)
        record = noise.calibrate(
            workload,
            TimingProtocol(seconds=seconds_per_cell),
            runs,
            printable_command(sys.argv),
            lambda done: progress.update("calibrating", expected * done / runs, expected),
        )
    noise.append_calibration(out, record)
    for sentence in noise.describe(record.noise):
        console.print(sentence, markup=False)
    if (load := noise.busy(record)) is not None:
        console.print(f"note: the machine was busy (load {load:g}): on an idle one the noise is less", markup=False)
    console.print(f"record in {out}; use it with `adrec bench compare OLD NEW --calibration {out}`", markup=False)


def share(text: str, option: str, most_percent: float) -> float:
    """Parse ``5%`` to 0.05; raises ConfigError for anything else, and for more than ``most_percent``."""
    number = text.strip().removesuffix("%")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not text.strip().endswith("%") or not 0.0 <= value <= most_percent:
        raise ConfigError(f"{option} {text}: expected a percentage from 0% to {most_percent:g}%, such as 5%")
    return value / 100.0
