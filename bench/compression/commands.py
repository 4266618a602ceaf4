"""`adrec compress`: apply a recipe to a run, or search for the cheapest model within a budget of time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from compress.candidates import CandidateRecord
    from compress.technique import Receipt


def register(app: typer.Typer) -> None:
    """Add the command to the root application."""
    app.command()(compress)


SEARCH_ONLY = ("students", "precisions", "steps", "engines", "seconds", "threads", "exhaustive")


def compress(
    context: typer.Context,
    run: Annotated[Path | None, typer.Argument(help="Run folder to compress.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to write.", show_default=False)] = None,
    recipe: Annotated[
        str | None, typer.Option(help="YAML file, or a recipe that comes with adrec (--list shows them).")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override the recipe: --set quantize.format=int8-dynamic. Repeatable."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Search instead: 'p99<=2ms@batch=1 and >=5000users/s@batch=512'.")
    ] = None,
    max_loss: Annotated[
        str | None, typer.Option(help="Largest loss of validation NDCG@20 against RUN (default: the recipe's, or 1%).")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Prepared data (default: where the run was trained from).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling noise, training and calibration.")] = 0,
    students: Annotated[
        str, typer.Option(help="Search: networks, 'teacher' or blocks of encoder+denoiser.")
    ] = "teacher,1+1,2+0",
    precisions: Annotated[
        str,
        typer.Option(
            help="Search: auto (all), or some of float32, bf16 table, int8 table, int8 weights, bf16, int8, int8 bf16,"
            " int8 dynamic, int4."
        ),
    ] = "auto",
    steps: Annotated[str, typer.Option(help="Search: reverse steps.")] = "1,2,4",
    engines: Annotated[str, typer.Option(help="Search: engines.")] = "cached",
    seconds: Annotated[
        float, typer.Option(min=0.001, help="Search: time to measure a candidate at a batch size.")
    ] = 1.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's setting.")] = None,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Search: look at every combination.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Show techniques, their settings, and recipes.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Make a run cheaper, and say in receipts what was changed, skipped and lost.

    Exit status 2 for bad input; 3 when a stage cannot be applied or loses too much, or nothing meets the budget.
    """
    from adrec.commands.options import given
    from adrec.errors import ConfigError
    from bench.compression.receipts import technique_table
    from bench.console import wide_console
    from compress.recipe import shipped_recipes, techniques

    console = wide_console()
    if list_:
        for table in technique_table(techniques(), shipped_recipes()):
            console.print(table)
        return
    if run is None or out is None:
        raise ConfigError("name the run to compress and where to write: adrec compress RUN --recipe NAME --out RUN2")
    if (recipe is None) == (budget is None):
        raise ConfigError("give --recipe (what to do) or --budget (what to reach), one of them; --list shows recipes")
    if budget is None:
        if wrong := given(context, SEARCH_ONLY):
            raise ConfigError(
                f"{', '.join(wrong)}: of a search, and --recipe makes none; change the recipe with --set, or give"
                " --budget instead of it"
            )
        _follow(run, str(recipe), out, settings or [], max_loss, data, seed, quiet)
        return
    if settings:
        raise ConfigError("--set changes a recipe, and a search makes its own; name options of the search instead")
    lists = [[part.strip() for part in text.split(",")] for text in (students, precisions, engines)]
    _search(run, out, budget, max_loss, data, seed, lists, steps, seconds, threads, not exhaustive, quiet)


def _follow(
    run: Path,
    recipe: str,
    out: Path,
    settings: list[str],
    max_loss: str | None,
    data: Path | None,
    seed: int,
    quiet: bool,
) -> None:
    from bench.compression.receipts import receipt_table
    from bench.console import wide_console
    from compress.api import compress_run
    from compress.recipe import read_recipe
    from compress.technique import CompressionError, percent

    console = wide_console()
    assignments = settings if max_loss is None else [*settings, f"max_loss={percent(max_loss, '--max-loss')}"]
    wanted = read_recipe(recipe, assignments)
    done: list[Receipt] = []

    def say(line: str) -> None:
        if not quiet:
            console.print(line, markup=False)

    try:
        compress_run(
            run, wanted, out, data=data, seed=seed, report=say, on_receipt=lambda number, receipt: done.append(receipt)
        )
    except CompressionError:
        if done:
            console.print(receipt_table(done, "done before the failure; nothing was written"))
        raise
    console.print(receipt_table(done, f"{run} -> {out}, accuracy on validation [95 % interval]"))
    console.print(f"run written to {out}; next: adrec evaluate {out}", markup=False)


def _search(
    run: Path,
    out: Path,
    budget: str,
    max_loss: str | None,
    data: Path | None,
    seed: int,
    lists: list[list[str]],
    steps: str,
    seconds: float,
    threads: int | None,
    prune: bool,
    quiet: bool,
) -> None:
    from adrec.checkpoint import load_run
    from adrec.commands.options import integers
    from adrec.data.of_run import open_data
    from bench.compression.receipts import front_table, receipt_table, slower_notes
    from bench.compression.session import CANDIDATES, SearchSession, check_engines, check_search_folder
    from bench.console import wide_console
    from bench.timing import TimingProtocol
    from bench.tradeoff import pinned_threads
    from compress.budget import Budget
    from compress.candidates import CandidateBook
    from compress.recipe import MAX_LOSS
    from compress.technique import CompressionError, percent
    from compress.workshop import space_of

    console = wide_console()
    students, precisions, engines = lists
    check_engines(engines)
    check_search_folder(out)
    limits, bound = Budget.parse(budget), MAX_LOSS if max_loss is None else percent(max_loss, "--max-loss")
    loaded = load_run(run)
    space = space_of(loaded.config, students, precisions, integers(steps, "--steps", 1, 4095), engines)
    dataset = open_data(loaded, data)
    with pinned_threads(threads):
        session = SearchSession(
            loaded, dataset, out, space, limits, bound, console, seed=seed, prune=prune,
            protocol=TimingProtocol(seconds=seconds, rounds_most=20),
            data_path=None if data is None else str(data),
        )  # fmt: skip
        search, records = session.go(quiet)
    for record in records:
        if record.status == "failed":
            console.print(f"failed: {record.candidate}: {record.detail}", markup=False, soft_wrap=True)
    book = CandidateBook(out / CANDIDATES)

    def show(chosen: CandidateRecord | None) -> list[CandidateRecord]:
        judged = search.judge(records, chosen)
        for record in judged:
            book.write(record)
        chosen = next((record for record in judged if chosen and record.candidate == chosen.candidate), None)
        console.print(front_table(search, judged, chosen))
        return judged

    try:
        chosen = search.choose(records)
    except CompressionError:
        show(None)
        raise
    for record in show(chosen):
        beside = record.candidate.model_copy(update={"precision": chosen.candidate.precision})
        if record.status == "measured" and beside == chosen.candidate != record.candidate:
            console.print(f"not chosen: {record.candidate}: {record.detail}", markup=False)
    for note in slower_notes(search, records):
        console.print(f"note: {note}", markup=False)
    made = session.write(chosen)
    console.print(receipt_table(made.receipts, f"chosen: {chosen.candidate}; accuracy on validation [95 % interval]"))
    counts = [sum(record.status == status for record in records) for status in ("measured", "pruned", "failed")]
    console.print(
        "{} measured, {} pruned, {} failed; records in ".format(*counts) + str(out / CANDIDATES), markup=False
    )
    console.print(f"run written to {out}; serve it with engine '{chosen.candidate.engine}'", markup=False)
