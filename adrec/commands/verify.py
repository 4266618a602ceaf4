"""`adrec verify`: our models and engines against reference files of the authors' code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(verify)


def verify(files: Annotated[list[Path], typer.Argument(help="Reference files (.npz).")]) -> None:
    """Compare outputs, losses, gradients, samples, scores and top lists with what the released code computed.

    Exit status: 0 all within tolerance, 1 something beyond it, 2 an unusable file or a model not supported yet.
    """
    from adrec.errors import AdrecError
    from adrec.verify import verify_file

    console, unusable, failed = Console(), False, False
    for file in files:
        try:
            checks = verify_file(file)
        except AdrecError as error:
            unusable = True
            Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)
            continue
        table = Table("quantity", "largest difference", "tolerance", "", title=file.name, title_justify="left")
        for check in checks:
            failed |= not check.passed
            verdict = "[green]ok[/]" if check.passed else "[bold red]BEYOND[/]"
            table.add_row(check.quantity, f"{check.difference:.2e}", f"{check.tolerance:.0e} {check.unit}", verdict)
        console.print(table)
    if failed or unusable:
        raise typer.Exit(1 if failed else 2)
