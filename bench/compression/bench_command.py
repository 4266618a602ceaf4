"""`adrec bench compress`: compressed runs held against their teacher, `reference` and SASRec+."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def bench_compress(
    run: Annotated[Path, typer.Argument(help="Run that the others were made from.", show_default=False)],
    networks: Annotated[
        list[Path] | None,
        typer.Option("--with", help="A compressed run of the same data. Repeatable."),
    ] = None,
    steps: Annotated[str, typer.Option(help="Reverse steps of RUN, comma-separated; all of them are added.")] = "1",
    precisions: Annotated[
        str, typer.Option(help="Of every network, comma-separated.")
    ] = "float32,int8 table,int8,int8 dynamic",
    engines: Annotated[str, typer.Option(help="Comma-separated; reference is added as the denominator.")] = "cached",
    batch_sizes: Annotated[str, typer.Option(help="Users in a batch, comma-separated.")] = "1,512",
    data: Annotated[Path | None, typer.Option(help="Prepared data (default: where RUN was trained from).")] = None,
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    seed: Annotated[int, typer.Option(min=0, help="Of sampling noise and calibration.")] = 0,
    seconds_per_row: Annotated[float, typer.Option(min=0.001, help="Time of a row at a batch size.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=1, help="Least rounds, which reference's slow calls decide.")] = 4,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: torch's setting.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Records file; .md and .csv go beside it. Default: RUN/bench/compress.jsonl.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Measure accuracy, top-20 overlap, file size and interleaved speed of compressed models; write records and tables.

    Exit status 1 when a row failed, 2 for bad input.
    """
    from adrec.checkpoint import load_run
    from adrec.commands.options import integers
    from adrec.data.of_run import open_data
    from adrec.environment import printable_command
    from adrec.errors import ConfigError, nearest
    from adrec.files import check_output, write_text
    from bench.compression.held_against import REFERENCE, HeldAgainst
    from bench.compression.networks import load_networks
    from bench.compression.session import check_engines
    from bench.compression.tables import csv_table, markdown_table
    from bench.console import wide_console
    from bench.json_lines import json_line
    from bench.timing import TimingProtocol
    from bench.tradeoff import pinned_threads
    from compress.workshop import PRECISIONS

    target = out or run / "bench" / "compress.jsonl"
    beside = [target.with_suffix(end) for end in (".md", ".csv")]
    for file in (target, *beside):
        check_output(file, "--out", make_folder=True)
    if target in beside:
        raise ConfigError(f"--out is {target}: the tables would replace it; give a name that ends in .jsonl")
    if split not in ("test", "validation"):
        raise ConfigError(f"--split is '{split}'{nearest(split, ['test', 'validation'])}; allowed: test, validation")
    wanted, chosen = ([part.strip() for part in text.split(",")] for text in (precisions, engines))
    for name in wanted:
        if name not in PRECISIONS:
            allowed = ", ".join(PRECISIONS)
            raise ConfigError(f"--precisions holds '{name}'{nearest(name, PRECISIONS)}; allowed: {allowed}")
    check_engines(chosen)
    teacher = load_run(run)
    loaded = load_networks(teacher, networks or [], "--with")
    longest = teacher.config.timesteps if teacher.config.model == "adrec" else 1
    console = wide_console()
    errors = wide_console(stderr=True)
    with pinned_threads(threads):
        held = HeldAgainst(
            teacher, loaded, open_data(teacher, data),
            "test" if split == "test" else "validation",
            integers(steps, "--steps", 1, longest), list(dict.fromkeys(wanted)),
            [name for name in dict.fromkeys(chosen) if name != REFERENCE],
            integers(batch_sizes, "--batch-sizes", 1, 2**20),
            TimingProtocol(seconds=seconds_per_row, rounds=rounds, rounds_slow=rounds),
            printable_command(sys.argv), seed,
            progress=(lambda line: None) if quiet else lambda line: errors.print(line, markup=False),
        )  # fmt: skip
        records = held.records()
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, "".join(map(json_line, records)))
    write_text(beside[0], markdown_table(records))
    write_text(beside[1], csv_table(records))
    console.print(markdown_table(records), markup=False, soft_wrap=True)
    console.print(f"{len(records)} rows in {target}, tables in {beside[0].name} and {beside[1].name}", markup=False)
    failed = [record for record in records if record.error is not None]
    for record in failed:
        errors.print(f"failed: {record.network}, {record.precision}, {record.engine}: {record.error}", markup=False)
    if failed:
        raise typer.Exit(1)
