"""Command-line commands of the `adrec` package, one module each; `bench` registers its own."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add every command of this package to the root application."""
    from adrec.commands import environment, evaluate, import_checkpoint, prepare, recommend, train, verify

    for module in (prepare, train, evaluate, recommend, import_checkpoint, verify, environment):
        module.register(app)
