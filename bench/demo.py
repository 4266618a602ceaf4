"""`adrec demo`: the whole main job on embedded synthetic data, from raw sequences to a trade-off report."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

USERS, ITEMS, MEAN_LENGTH = 4_000, 1_000, 12.0
MADE = (
    "data",
    "run",
    "tradeoff.jsonl",
    "tradeoff.jsonl.partial",
    "report.html",
    "report.md",
    "report.png",
    "report-charts",
)
# Small enough to train in a minute or two on two cores; everything else is the default.
MODEL = {"items": ITEMS, "width": 64, "embedding_dropout": 0.1}
STAGE = {"epochs": 30, "cosine_epochs": 30, "validate_every": 3, "patience": 3, "learning_rate": 2e-3}
TRAIN = {"batch_size": 256, "warmup_epochs": 2, "pretrain": STAGE, "main": STAGE}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, run, records and report.")] = Path("demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in that folder.")] = False,
    seconds_per_cell: Annotated[float, typer.Option(min=0.05, help="Measuring time for each row.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data and training.")] = 0,
) -> None:
    """Synthesise data, train the three stages, measure accuracy and latency against steps, write the report."""
    from adrec.config import RunConfig, parse
    from adrec.data.synthesize import synthetic_dataset
    from adrec.environment import printable_command
    from adrec.training.stages import train_run
    from bench.report import write_report
    from bench.timing import TimingProtocol
    from bench.tradeoff import run_tradeoff

    console = Console(soft_wrap=True, highlight=False)
    prepare_folder(out, overwrite)
    console.print(f"1/4 data: {USERS} users, {ITEMS} items from a known law")
    dataset = synthetic_dataset(USERS, ITEMS, MEAN_LENGTH, seed, name="demo")
    dataset.save(out / "data")
    known = dataset.info.synthetic or {}
    popular, perfect = known["popularity_hr20"], known["bayes_hr20"]
    console.print(f"    HR@20 of popularity {popular:.1f} %, of a perfect recommender {perfect:.1f} %")
    console.print("2/4 training")
    settings = parse(RunConfig, {"model": MODEL, "train": {**TRAIN, "seed": seed}}, "demo settings")
    train_run(dataset, str(out / "data"), out / "run", settings, accelerator="auto", devices=1, report=console.print)
    console.print("3/4 measuring accuracy and latency against steps")
    result = run_tradeoff(
        out / "run",
        batch_sizes=(1, 64),
        protocol=TimingProtocol(seconds=seconds_per_cell),
        out=out / "tradeoff.jsonl",
        command=printable_command(sys.argv),
        console=console,
    )
    console.print("4/4 report")
    page = write_report(result.records, out / "report.html", command=printable_command(sys.argv))
    if result.failed:
        console.print(f"{len(result.failed)} rows failed; the report says why")
    console.print(f"report: {page.resolve()}")
    if result.failed:
        raise typer.Exit(1)


def prepare_folder(out: Path, overwrite: bool) -> None:
    """Make an empty folder for the demo; only files that a demo makes are ever removed."""
    from adrec.errors import RunError
    from adrec.files import check_output_folder

    check_output_folder(out, "--out")
    present = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    foreign = [name for name in present if name not in MADE]
    if foreign:
        raise RunError(f"{out}: holds {foreign[0]}, which no demo made; choose another --out")
    if present and not overwrite:
        raise RunError(f"{out}: already holds a demo; pass --overwrite or choose another --out")
    for name in present:
        entry = out / name
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    out.mkdir(parents=True, exist_ok=True)
