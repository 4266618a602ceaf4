"""`adrec recommend`: recommendations for a file of users."""

from __future__ import annotations

import warnings
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(recommend)


def recommend(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    source: Annotated[Path, typer.Option("--input", help="Users: .csv, .jsonl or .parquet (see below).")],
    out: Annotated[Path, typer.Option(help="Result: .parquet, .jsonl or .csv.")],
    k: Annotated[int, typer.Option(min=1, help="Items for each user.")] = 20,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Reverse steps (default: as the run's settings say, or 1).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling noise.")] = 0,
    unknown: Annotated[str, typer.Option(help="Items the model does not know: drop or raise.")] = "drop",
    exclude_history: Annotated[bool, typer.Option("--exclude-history", help="Leave out the user's own items.")] = False,
    separator: Annotated[str, typer.Option(help="Between the ids of a CSV history.")] = " ",
    engine: Annotated[str, typer.Option(help="Engine that computes.")] = "cached",
    exported: Annotated[
        Path | None, typer.Option(help="Folder of `adrec export`, for onnxruntime, tensorrt and aotinductor.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    provider: Annotated[
        str | None, typer.Option(help="ONNX Runtime's: cpu, cuda or tensorrt (default: that of --device).")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Users at a time.")] = 512,
) -> None:
    """Recommend for every user of a file, streaming; the output appears only when it is complete.

    Input: columns `user` (text or integers) and `history` (a list; in CSV a JSON list or ids joined by --separator,
    quoted if it holds a comma), or in CSV one interaction a row (`user`, `item`), a user's rows together, oldest
    first. Without a `user`, users are numbered by row. Users without a known item get the most popular ones and say
    so in the column `source`.
    """
    from adrec.errors import ConfigError
    from adrec.files import check_output
    from adrec.recommender import Recommender
    from adrec.streaming import file_format, open_output, read_histories

    if not separator:
        raise ConfigError("--separator is empty; give one character or more")
    file_format(out, "--out")
    check_output(out, "--out", inputs=[source])
    file_format(source, "--input")
    recommender = Recommender.load(run, engine, device, exported, provider)
    options: dict[str, Any] = {
        "steps": steps or "run",
        "seed": seed,
        "unknown": unknown,
        "exclude_history": exclude_history,
        "batch_size": batch_size,
    }
    # A wrong option is refused also when there is no user.
    recommender.recommend([], k, **options)
    users = read_histories(source, separator)
    done = dropped = fallback = 0
    columns = (
        SpinnerColumn(),
        TextColumn("recommending"),
        MofNCompleteColumn(),
        TextColumn("users"),
        TimeElapsedColumn(),
    )
    with open_output(out, recommender.run.item_ids.type) as writer, Progress(*columns, transient=True) as progress:
        task = progress.add_task("recommending", total=None)
        while batch := list(islice(users, batch_size)):
            with warnings.catch_warnings():
                # The summary below says it once for the whole file.
                warnings.simplefilter("ignore", UserWarning)
                results = recommender.recommend([user.history for user in batch], k, **options)
            writer.write([user.user for user in batch], results)
            done += len(batch)
            dropped += sum(result.unknown for result in results)
            fallback += sum(result.source == "popularity" for result in results)
            progress.advance(task, len(batch))
    console = Console(soft_wrap=True)
    console.print(f"{done} users written to {out}", highlight=False)
    if dropped:
        console.print(f"{dropped} unknown items were dropped from histories", highlight=False)
    if fallback:
        console.print(f"{fallback} users had no known item and got the most popular ones", highlight=False)
