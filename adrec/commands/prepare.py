"""`adrec prepare` and `adrec synthesize`: make a prepared data set from a raw file or from a known law."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from adrec.data.dataset import Dataset

PREPARE_HELP = """
Prepare raw interactions: filter, order by time, split, and write Parquet files and dataset.json.

\b
INPUT, recognised by name and content; text may be gzipped
- CSV or TSV with named columns; Parquet with named columns
- MovieLens: u.data, ratings.dat, ratings.csv. Four numbers between tabs are
  u.data by name, by --format movielens, or if the first line's third is at
  most 10 (a rating) and its fourth at least 100000000 (a time)
- Amazon reviews: JSON lines of 2014, 2018 or 2023 (not a JSON array)
- RecBole: .inter with typed columns
- the ADRec authors' dataset.pkl

\b
Rules, in the order they apply
- Blank lines are skipped; a byte order mark and CRLF line ends are fine.
- An error that names the line: a row without user, item or time; a time
  that is no number; an id with a tab or a line break.
- Ids of CSV-like text are integers when the whole column is (007 is not),
  else strings, kept as they are.
- Ids of JSON lines are what the first line's is: all integers, or all text;
  then another value counts as the text that spells it (5 is "5").
- Times count s, ms, us or ns since 1970, by the size of the largest.
- --min-rating drops rows rated lower.
- A user's interactions are ordered by time; ties keep the input's order.
- --deduplicate keeps the earliest of each user-item pair.
- --core k: users and items with fewer than k interactions are dropped until
  none is left; taken over the whole file, before the split.
- leave-one-out: the last item is the test target, the one before it the
  validation target. A user with fewer than 3 interactions is kept for
  training only.
- temporal: training before --validation-from; a user's first interaction in
  [--validation-from, --test-from) is the validation target, the first from
  --test-from on the test target; one without any history is no example.
- dataset.pkl is prepared already: its lists are taken as they are.
- --out appears complete or not at all.
"""

SYNTHESIZE_HELP = """
Draw synthetic interactions from a known law, and state what popularity and a perfect recommender reach on it.

\b
The next item is one of the few that follow the last one on a hidden ring,
or, with probability --noise, a draw by popularity. --out writes a prepared
data set, --raw a file of interactions for `adrec prepare`; give either or
both.
"""


def register(app: typer.Typer) -> None:
    """Add the commands ``prepare`` and ``synthesize`` to ``app``."""
    app.command("prepare", help=PREPARE_HELP)(prepare_command)
    app.command("synthesize", help=SYNTHESIZE_HELP)(synthesize_command)


def prepare_command(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Interaction file.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Directory to write.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Name of the data set (default: that of --out).")] = None,
    format: Annotated[
        str | None,
        typer.Option(help="csv, movielens, amazon, recbole, parquet or authors (default: recognised)."),
    ] = None,
    user_column: Annotated[str | None, typer.Option(help="Column of user ids (default: by name).")] = None,
    item_column: Annotated[str | None, typer.Option(help="Column of item ids (default: by name).")] = None,
    time_column: Annotated[str | None, typer.Option(help="Column of times (default: by name).")] = None,
    rating_column: Annotated[str | None, typer.Option(help="Column of ratings (default: by name).")] = None,
    core: Annotated[
        int | None,
        typer.Option(min=0, help="Keep users and items with this many interactions; 0 or 1 keeps all (default: 5)."),
    ] = None,
    min_rating: Annotated[float | None, typer.Option(help="Drop interactions rated lower.")] = None,
    deduplicate: Annotated[bool, typer.Option("--deduplicate", help="Keep the first of a user-item pair.")] = False,
    split: Annotated[str | None, typer.Option(help="leave-one-out or temporal (default: leave-one-out).")] = None,
    validation_from: Annotated[
        str | None, typer.Option(help="Temporal split: quantile in (0, 1) or ISO date (default: 0.8).")
    ] = None,
    test_from: Annotated[
        str | None, typer.Option(help="Temporal split: quantile in (0, 1) or ISO date (default: 0.9).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set at --out.")] = False,
) -> None:
    """Run `adrec.data.prepare.prepare` and print a summary."""
    from rich.console import Console

    from adrec.data.prepare import PrepareOptions, prepare

    options = PrepareOptions(
        name=name,
        format=format,
        user_column=user_column,
        item_column=item_column,
        time_column=time_column,
        rating_column=rating_column,
        core=core,
        min_rating=min_rating,
        deduplicate=deduplicate,
        split=split,
        validation_from=validation_from,
        test_from=test_from,
    )
    with Console(stderr=True).status(f"{source.name}") as status:
        dataset = prepare(
            source,
            out,
            options,
            overwrite,
            lambda stage: status.update(f"{stage} {source.name}".replace("[", r"\[")),
        )
    _summarise(dataset, out)


def synthesize_command(
    out: Annotated[Path | None, typer.Option(help="Directory for a prepared data set.", show_default=False)] = None,
    raw: Annotated[
        Path | None, typer.Option(help="File for raw interactions, .csv or .parquet.", show_default=False)
    ] = None,
    users: Annotated[int, typer.Option(min=1, help="Number of users.")] = 4000,
    items: Annotated[int, typer.Option(min=1, help="Number of items, up to 10 million.")] = 1000,
    mean_length: Annotated[float, typer.Option(min=3, help="Mean interactions a user; each has 3 or more.")] = 12.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same data.")] = 0,
    noise: Annotated[float, typer.Option(min=0, max=1, help="Share of draws that ignore the last item.")] = 0.3,
    cluster_size: Annotated[int, typer.Option(min=5, help="Items on a ring.")] = 50,
    exponent: Annotated[float, typer.Option(min=0, max=10, help="Zipf exponent of popularity.")] = 0.8,
    name: Annotated[str | None, typer.Option(help="Name of the data set (default: that of --out).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set at --out.")] = False,
) -> None:
    """Run `adrec.data.synthesize` and print a summary."""
    from adrec.data.staging import check_destination
    from adrec.data.synthesize import synthetic_dataset, write_raw
    from adrec.data.synthetic import RingLaw
    from adrec.errors import DataError

    if out is None and raw is None:
        raise DataError(
            "nothing to write: give --out for a prepared data set, --raw for a file of interactions, or both"
        )
    law = RingLaw(items, cluster_size=cluster_size, exponent=exponent, noise=noise)
    if out is not None:
        check_destination(out.resolve(), overwrite)
    if raw is not None:
        rows = write_raw(raw, users, items, mean_length, seed, law)
        typer.echo(f"{rows:,} interactions written to {raw}")
    if out is not None:
        dataset = synthetic_dataset(users, items, mean_length, seed, name or out.resolve().name, law)
        dataset.save(out, overwrite)
        _summarise(dataset, out)


def _summarise(dataset: Dataset, out: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    lengths = dataset.sequences.lengths
    cells = dataset.user_count * dataset.item_count
    table = Table(title=f"{escape(dataset.name)} ({dataset.info.format}, {dataset.info.protocol['split']})")
    table.add_column("measure")
    table.add_column("value", justify="right")
    rows = [
        ("users", f"{dataset.user_count:,}"),
        ("items", f"{dataset.item_count:,}"),
        ("interactions", f"{dataset.info.interactions:,}"),
        ("mean length", f"{lengths.double().mean().item():.1f}"),
        ("median length", f"{lengths.median().item():,}"),
        ("density", f"{dataset.info.interactions / cells:.4%}"),
        ("training interactions", f"{int(dataset.train_lengths.sum()):,}"),
        ("validation examples", f"{int((dataset.validation_positions >= 0).sum()):,}"),
        ("test examples", f"{int((dataset.test_positions >= 0).sum()):,}"),
    ]
    if dataset.info.synthetic is not None:
        rows.append(("popularity HR@20 (exact)", f"{dataset.info.synthetic['popularity_hr20']:.2f} %"))
        rows.append(("Bayes-optimal HR@20 (exact)", f"{dataset.info.synthetic['bayes_hr20']:.2f} %"))
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"written to {escape(str(out))}, fingerprint {dataset.fingerprint[:12]}", soft_wrap=True)
