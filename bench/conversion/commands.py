"""`adrec bench convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        Path, typer.Argument(help="Records (.jsonl), or a file of pytest-benchmark (.json).", show_default=False)
    ],
    target: Annotated[
        Path, typer.Argument(help="The other of the two; the endings say which is which.", show_default=False)
    ],
) -> None:
    """Convert records to pytest-benchmark's JSON, or its JSON to records; nothing is lost either way."""
    from adrec.errors import ConfigError
    from adrec.files import check_output, write_text
    from bench.archive import read_any
    from bench.conversion.pytest_json import pytest_text, read_pytest_json
    from bench.json_lines import json_line

    endings = (source.suffix.lower(), target.suffix.lower())
    if endings not in ((".jsonl", ".json"), (".json", ".jsonl")):
        raise ConfigError(
            f"{source} to {target}: expected records.jsonl benchmark.json, or benchmark.json records.jsonl"
        )
    check_output(target, "TARGET", make_folder=True, inputs=[source])
    if endings[0] == ".jsonl":
        records = read_any(source)
        text = pytest_text(records)
    else:
        records = read_pytest_json(source)
        text = "".join(json_line(record) for record in records)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)
    typer.echo(f"{len(records)} records in {target}")
