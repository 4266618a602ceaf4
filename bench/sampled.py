"""Accuracy of a run by step count, sampler, start and early stop: ``python -m bench.sampled RUN --out FILE``.

Both splits, beside SASRec+ and popularity, every row paired with the run's own T DDPM steps: what a user reads before
choosing how a run is served. The rows are those of `adrec evaluate`; the record adds what is needed to make it again.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from adrec.checkpoint import Run, load_run
from adrec.commands.evaluate import plans
from adrec.commands.options import integers
from adrec.comparison import KEPT, Comparison, Split
from adrec.config import ServingConfig
from adrec.data.dataset import Dataset
from adrec.data.of_run import open_data
from adrec.environment import Environment, Frozen, printable_command, read_environment
from adrec.errors import ConfigError
from adrec.files import check_output, write_text
from compress.technique import METRIC

SPLITS: tuple[Split, ...] = ("test", "validation")


class SampledSplit(Frozen):
    """One split. rows: as `adrec evaluate --json` writes them, the user's own items ranked too."""

    split: Split
    rows: list[dict[str, Any]]


class SampledRecord(Frozen):
    """Contents of a record file."""

    schema_version: Literal[1] = 1
    command: str
    run: str
    dataset: str
    lambda_uncertainty: float
    environment: Environment
    evaluations: list[SampledSplit]


def sample(
    run: Run, dataset: Dataset, wanted: list[int | ServingConfig], seeds: list[int], command: str
) -> SampledRecord:
    """Evaluate a run by every plan on both splits."""
    found = []
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        for split in SPLITS:
            task = progress.add_task(split, total=None)
            comparison = Comparison(
                run, run.baseline(), dataset, split, wanted, seeds, "cached", (False,), strata=False, batch_size=512
            )
            rows = comparison.rows(partial(_advance, progress, task))
            found.append(SampledSplit(split=split, rows=rows))
    return SampledRecord(
        command=command,
        run=run.path.name,
        dataset=dataset.name,
        lambda_uncertainty=run.config.lambda_uncertainty,
        environment=read_environment(),
        evaluations=found,
    )


def main(
    run: Annotated[Path, typer.Argument(help="Run folder of an adrec model.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    steps: Annotated[str | None, typer.Option(help="Reverse steps; default: 1, 2, 4, ... and all trained.")] = None,
    sampler: Annotated[str, typer.Option(help="ddpm, ddim, dpm++2m, or several with commas.")] = "ddpm,ddim,dpm++2m",
    eta: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of ddim.")] = 0.0,
    start: Annotated[str, typer.Option(help="noise, zero, or noise,zero.")] = "noise,zero",
    until_stable: Annotated[int | None, typer.Option(min=1, help="Add rows that stop early: K, see evaluate.")] = None,
    data: Annotated[Path | None, typer.Option(help="Prepared data (default: where the run was trained from).")] = None,
    seeds: Annotated[str, typer.Option(help="Of the noise of sampling.")] = "0",
) -> None:
    """Write the accuracy of a run by how it is sampled."""
    check_output(out, "--out", make_folder=True)
    command = printable_command(["python", "-m", "bench.sampled", *sys.argv[1:]])
    loaded = load_run(run)
    if loaded.config.model != "adrec":
        raise ConfigError(f"{run} is a '{loaded.config.model}' run and has no reverse steps; give a run of adrec")
    counts = steps or ",".join(map(str, _doubled(loaded.config.timesteps)))
    wanted = plans(loaded.settings, counts, sampler, eta, start, until_stable)
    record = sample(loaded, open_data(loaded, data), wanted, integers(seeds, "--seeds", 0, 2**31 - 1), command)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, record.model_dump_json(indent=1) + "\n")
    for each in record.evaluations:
        for row in each.rows:
            if row.get(KEPT):
                kept, found, mean = row[KEPT], row[METRIC]["value"], row["mean steps"]
                typer.echo(
                    f"{each.split:10} {row['steps']:4} steps (mean {mean:5.2f})  {row['sampler']:44} seed {row['seed']}"
                    f"  {METRIC} {found:.2f}  kept {kept['value']:.2f} [{kept['low']:.2f}, {kept['high']:.2f}] %"
                )


def _advance(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def _doubled(trained: int) -> list[int]:
    return [*(2**place for place in range(trained.bit_length()) if 2**place < trained), trained]


if __name__ == "__main__":
    typer.run(main)
