"""`adrec evaluate`: accuracy against reverse steps, beside SASRec+ and popularity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adrec.commands.options import integers

if TYPE_CHECKING:
    from adrec.checkpoint import Run
    from adrec.data.dataset import Dataset
    from adrec.evaluation import Interval

COLUMNS = ("HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR@20")
EXCLUSIONS = {"keep": (False,), "exclude": (True,), "both": (False, True)}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(evaluate)


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    data: Annotated[Path | None, typer.Option(help="Prepared data (default: where the run was trained from).")] = None,
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    steps: Annotated[str, typer.Option(help="Reverse steps to compare, such as 1,2,4,8,16,32.")] = "1",
    engine: Annotated[str, typer.Option(help="Engine that computes.")] = "cached",
    seeds: Annotated[str, typer.Option(help="Seeds of the sampling noise, one row each.")] = "0",
    history: Annotated[
        str, typer.Option(help="Rank the user's own items too (keep), leave them out (exclude), or both.")
    ] = "both",
    strata: Annotated[bool, typer.Option("--strata", help="Add rows by item popularity and history length.")] = False,
    device: Annotated[str, typer.Option(help="torch device, such as cpu or cuda.")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="Users at a time.")] = 512,
    output: Annotated[Path | None, typer.Option("--json", help="Also write every row to this file.")] = None,
) -> None:
    """Rank the whole catalogue for every user of a split; percent, averaged over users, 95 % bootstrap intervals."""
    from adrec.checkpoint import load_run
    from adrec.config import write_text
    from adrec.errors import ConfigError, nearest

    if history not in EXCLUSIONS:
        raise ConfigError(f"--history is '{history}'{nearest(history, EXCLUSIONS)}; allowed: {', '.join(EXCLUSIONS)}")
    if split not in ("test", "validation"):
        raise ConfigError(f"--split is '{split}'{nearest(split, ['test', 'validation'])}; allowed: test, validation")
    loaded = load_run(run, device)
    longest = loaded.settings.model.timesteps if loaded.settings.model.model == "adrec" else 1
    wanted = integers(steps, "--steps", 1, longest)
    draws = integers(seeds, "--seeds", 0, 2**31 - 1)
    dataset = open_data(loaded, data)
    rows = evaluation_rows(
        loaded, dataset, split, wanted, draws, engine, EXCLUSIONS[history], strata, batch_size, device
    )
    table = Table(title=f"{dataset.name}, {split}, full ranking of {dataset.item_count} items, %")
    for column in ("system", "steps", "seed", "own items", "group", "users", *COLUMNS):
        table.add_column(column, justify="left" if column in ("system", "group") else "right")
    for row in rows:
        cells = [str(row[name]) for name in ("system", "steps", "seed", "own items", "group", "users")]
        table.add_row(*cells, *(f"{row[name]['value']:.2f} ±{_half(row[name]):.2f}" for name in COLUMNS))
    # A table wider than the screen would fold its numbers; better to let the terminal scroll.
    console = Console()
    Console(width=max(console.width, 200)).print(table)
    if output is not None:
        write_text(output, json.dumps({"run": str(run), "dataset": dataset.name, "rows": rows}, indent=2) + "\n")
        console.print(f"written to {output}")


def open_data(run: Run, data: Path | None) -> Dataset:
    """Load the data set of a run, given or remembered; raises RunError when it is not the one trained on."""
    from adrec.data.dataset import Dataset
    from adrec.errors import RunError

    path = Path(run.data_path) if data is None else data
    if data is None and not path.exists():
        raise RunError(f"the run was trained from {path}, which is not there; say where the data is with --data")
    dataset = Dataset.load(path)
    if dataset.fingerprint != run.dataset_fingerprint:
        raise RunError(
            f"{path}: fingerprint {dataset.fingerprint[:12]} is not that of the run's data set"
            f" '{run.info.dataset_name}' ({run.dataset_fingerprint[:12]}); item ids would not match"
        )
    return dataset


def evaluation_rows(
    run: Run,
    dataset: Dataset,
    split: Any,
    steps: list[int],
    seeds: list[int],
    engine_name: str,
    exclusions: tuple[bool, ...],
    strata: bool,
    batch_size: int,
    device: str,
) -> list[dict[str, Any]]:
    """One row for each system, step count, seed, exclusion and group; metrics as value, low and high in percent."""
    import torch

    from adrec.engines import make_engine
    from adrec.evaluation import evaluate as evaluate_engine
    from adrec.evaluation import length_groups, popularity_evaluation, popularity_groups, stratify

    examples = dataset.examples(split)
    known = (examples.histories.lengths > 0).nonzero().squeeze(1)
    if known.numel() < len(examples):
        examples = type(examples)(examples.histories.select(known), examples.targets[known], examples.users[known])
    groups = {"all": torch.ones(len(examples), dtype=torch.bool)}
    if strata:
        groups |= popularity_groups(examples.targets, dataset.item_counts()) | length_groups(examples.histories.lengths)
    baseline = run.baseline()
    systems: list[tuple[str, Any, int | None, int]] = [("popularity", None, None, 0)]
    if baseline is not None:
        systems.append(("sasrec+", make_engine(engine_name, baseline.model.to(device)), None, 0))
    engine = make_engine(engine_name, run.model)
    if run.settings.model.model == "adrec":
        systems += [("adrec", engine, count, seed) for seed in seeds for count in steps]
    else:
        systems.append(("sasrec+", engine, None, 0))
    rows = []
    with Progress(transient=True) as progress:
        task = progress.add_task("evaluating", total=len(systems) * len(exclusions) * len(examples))
        for name, system, count, seed in systems:
            for exclude in exclusions:
                if system is None:
                    result = popularity_evaluation(dataset.item_counts(), examples, exclude_history=exclude)
                    progress.advance(task, len(examples))
                else:
                    result = evaluate_engine(
                        system,
                        examples,
                        steps=count,
                        seed=seed,
                        batch_size=batch_size,
                        exclude_history=exclude,
                        progress=lambda done: progress.advance(task, done),
                    )
                for group, (users, metrics) in stratify(result.ranks, groups).items():
                    head = {"system": name, "steps": count or "-", "seed": seed, "group": group, "users": users}
                    head["own items"] = "left out" if exclude else "ranked"
                    rows.append(head | {metric: _interval(value) for metric, value in metrics.items()})
    return rows


def _interval(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _half(interval: dict[str, float]) -> float:
    return (interval["high"] - interval["low"]) / 2.0
