"""`adrec evaluate`: accuracy against reverse steps, beside SASRec+ and popularity."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adrec.commands.options import chosen, integers

if TYPE_CHECKING:
    from adrec.checkpoint import Run
    from adrec.config import RunConfig, ServingConfig
    from adrec.source import Source

HEAD = ("system", "steps", "sampler", "seed", "own items", "group", "users")
EXCLUSIONS = {"keep": (False,), "exclude": (True,), "both": (False, True)}
UNLIMITED = 10_000


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(evaluate)


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    data: Annotated[Path | None, typer.Option(help="Prepared data (default: where the run was trained from).")] = None,
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    steps: Annotated[
        str | None, typer.Option(help="Reverse steps to compare, such as 1,2,4,8,16,32 (default: the run's own, or 1).")
    ] = None,
    sampler: Annotated[
        str, typer.Option(help="Samplers for each number of steps: ddpm, ddim, dpm++2m, or several with commas.")
    ] = "ddpm",
    eta: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of ddim: 0 is deterministic.")] = 0.0,
    start: Annotated[str, typer.Option(help="x_T of each sampler: noise, zero (its mean), or noise,zero.")] = "noise",
    until_stable: Annotated[
        int | None,
        typer.Option(min=1, help="Add rows that stop a user's steps once the best so many items stay the same."),
    ] = None,
    engine: Annotated[str, typer.Option(help="Engine that computes.")] = "cached",
    seeds: Annotated[str, typer.Option(help="Seeds of the sampling noise, one row each.")] = "0",
    history: Annotated[
        str, typer.Option(help="Rank the user's own items too (keep), leave them out (exclude), or both.")
    ] = "both",
    strata: Annotated[bool, typer.Option("--strata", help="Add rows by item popularity and history length.")] = False,
    baseline: Annotated[
        Path | None, typer.Option(help="SASRec+ run to compare with (default: that of stage 1 in the run).")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(help="Run that a compressed RUN was made of, to say what is kept (default: where it was)."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="Users at a time.")] = 512,
    output: Annotated[Path | None, typer.Option("--json", help="Also write every row to this file.")] = None,
) -> None:
    """Rank the whole catalogue for every user of a split; percent, averaged over users, 95 % bootstrap intervals."""
    from adrec.checkpoint import load_run
    from adrec.comparison import Comparison, Split
    from adrec.data.of_run import open_data
    from adrec.devices import check_device
    from adrec.environment import printable_command, read_environment, utc_now
    from adrec.errors import ConfigError, nearest
    from adrec.files import check_output, write_text
    from adrec.source import named_source, reachable_source, recorded_source

    if history not in EXCLUSIONS:
        raise ConfigError(f"--history is '{history}'{nearest(history, EXCLUSIONS)}; allowed: {', '.join(EXCLUSIONS)}")
    if split not in ("test", "validation"):
        raise ConfigError(f"--split is '{split}'{nearest(split, ['test', 'validation'])}; allowed: test, validation")
    if output is not None:
        check_output(output, "--json")
    check_device(device)
    loaded = load_run(run, device)
    beside = loaded.baseline() if baseline is None else load_baseline(baseline, loaded)
    recorded = recorded_source(loaded)
    if source is not None:
        made_of: Run | None = named_source(loaded, source, device)
    else:
        made_of = None if recorded is None else reachable_source(loaded, recorded, device)
    wanted = plans(loaded.settings, steps, sampler, eta, start, until_stable)
    draws = integers(seeds, "--seeds", 0, 2**31 - 1)
    chosen: Split = "test" if split == "test" else "validation"
    dataset = open_data(loaded, data)
    comparison = Comparison(
        loaded, beside, dataset, chosen, wanted, draws, engine, EXCLUSIONS[history], strata, batch_size, made_of
    )
    with Progress(transient=True) as progress:
        task = progress.add_task("evaluating", total=None)
        rows = comparison.rows(lambda done, total: progress.update(task, completed=done, total=total))
    # A table wider than the screen would fold its numbers; better to let the terminal scroll.
    console = Console()
    title = f"{dataset.name}, {split}, full ranking of {dataset.item_count} items, % [95 % interval]"
    table = _table(title, rows)
    Console(width=max(console.width, Console(width=UNLIMITED).measure(table).maximum)).print(table)
    if beside is None and loaded.settings.model.model == "adrec":
        note = "no sasrec+ row: the run holds no baseline; name a SASRec+ run with --baseline RUN"
        console.print(note, soft_wrap=True)
    if made_of is not None:
        console.print(f"source: {made_of.path}, the run that this one was made of", markup=False, soft_wrap=True)
    elif recorded is not None:
        console.print(_stored(recorded), markup=False, soft_wrap=True)
    if output is not None:
        content: dict[str, Any] = {
            "command": printable_command(sys.argv),
            "measured_at_utc": utc_now(),
            "environment": read_environment().model_dump(mode="json"),
            "run": str(run),
            "dataset": dataset.name,
            "split": split,
            "rows": rows,
        }
        if recorded is not None:
            content["source"] = recorded.model_dump(mode="json") | {"evaluated": made_of is not None}
        write_text(output, json.dumps(content, indent=2) + "\n")
        console.print(f"written to {output}")


def plans(
    settings: RunConfig, steps: str | None, samplers: str, eta: float, starts: str, until_stable: int | None = None
) -> list[int | ServingConfig]:
    """What is compared: every sampler and start at every step count, evenly spaced; without steps as it is served.

    until_stable: K of plans that stop early, which are added to those of 3 steps or more: fewer can save nothing.
    """
    from typing import get_args

    from adrec.config import EarlyStop, Sampler, ServingConfig
    from adrec.errors import ConfigError
    from adrec.schedule import spaced_times

    trained = settings.model.timesteps if settings.model.model == "adrec" else 1
    names = chosen(samplers, "--sampler", get_args(Sampler))
    origins = chosen(starts, "--start", ("noise", "zero"))
    if eta and "ddim" not in names:
        raise ConfigError(f"--eta is {eta}, but only --sampler ddim has one")
    if until_stable is not None and until_stable > settings.model.items:
        raise ConfigError(
            f"--until-stable is {until_stable}; allowed: 1 to {settings.model.items}, the size of the catalogue"
        )
    if (names, origins) != (["ddpm"], ["noise"]) or until_stable is not None:
        given = f"--sampler {samplers} --start {starts}"
        given += "" if until_stable is None else f" --until-stable {until_stable}"
        if settings.model.model != "adrec":
            raise ConfigError(f"{given}: a '{settings.model.model}' run has no reverse steps; leave them out")
        if steps is None:
            raise ConfigError(f"{given} need --steps: say how many, such as --steps 1,2,4")
    if steps is None:
        return [settings.serving or 1]
    found: list[int | ServingConfig] = []
    for count in integers(steps, "--steps", 1, trained):
        for name, start in product(names, origins):
            plan = {"sampler": name, "eta": eta * (name == "ddim"), "start": start}
            plan["times"] = spaced_times(trained, count).tolist()
            plain = (name, start) == ("ddpm", "noise")
            found.append(count if plain else ServingConfig.model_validate(plan))
            if until_stable is not None and count > 2:
                found.append(ServingConfig.model_validate(plan | {"early_stop": EarlyStop(top=until_stable)}))
    return found


def load_baseline(path: Path, run: Run) -> Run:
    """Load the SASRec+ run that ``run`` is compared with; raises RunError when the two do not fit together."""
    from adrec.checkpoint import load_run
    from adrec.errors import RunError

    found = load_run(path)
    if found.settings.model.model != "sasrec" or run.settings.model.model != "adrec":
        raise RunError(
            f"--baseline {path}: a '{found.settings.model.model}' run beside a '{run.settings.model.model}' run;"
            " allowed: a sasrec run beside an adrec run"
        )
    if found.dataset_fingerprint != run.dataset_fingerprint:
        raise RunError(
            f"--baseline {path}: was trained on '{found.info.dataset_name}' ({found.dataset_fingerprint[:12]}), the run"
            f" on '{run.info.dataset_name}' ({run.dataset_fingerprint[:12]}); give a run of the same data set"
        )
    return found


def _stored(source: Source) -> str:
    kept = source.validation_kept
    known = (
        "what it kept was not measured then"
        if kept is None
        else f"as its receipt stored it then, not measured now, it kept {kept.value:.2f} % [{kept.low:.2f},"
        f" {kept.high:.2f}] of that run's validation NDCG@20"
    )
    return (
        f"source: {source.run}, the run that this one was made of, is not there or has changed; {known}. Name it with"
        " --source RUN to compare"
    )


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    from adrec.comparison import KEPT, OF_SOURCE
    from adrec.evaluation import METRICS

    kept = tuple(name for name in (KEPT, OF_SOURCE) if any(row.get(name) for row in rows))
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for column in (*HEAD, *METRICS, *kept):
        left = column in ("system", "sampler", "group")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        head = {name: str(row[name]) for name in HEAD}
        if row.get("mean steps") not in (None, row["steps"]):
            head["steps"] = f"{row['mean steps']:.2f} of {row['steps']}"
        metrics = [_cell(row[name]) if row.get(name) else "-" for name in (*METRICS, *kept)]
        table.add_row(*head.values(), *metrics)
    return table


def _cell(interval: dict[str, float]) -> str:
    # The interval goes below its value, so that nine metrics fit side by side; the bracket is no markup.
    return f"{interval['value']:.2f}\n\\[{interval['low']:.2f}, {interval['high']:.2f}]"
