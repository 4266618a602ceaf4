"""The `adrec` console command: finds sub-commands through the entry-point group ``adrec.commands``.

Every entry resolves to ``register(app: typer.Typer) -> None``. Only this module turns an `AdrecError` into an
exit status, so a command never needs a try block of its own.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import NoReturn

import typer
from rich.console import Console

from adrec.errors import AdrecError

COMMAND_GROUP = "adrec.commands"


def build_app() -> typer.Typer:
    """Assemble the root application from every installed package that registers commands."""
    app = typer.Typer(
        name="adrec",
        help="Diffusion-based sequential recommendation: prepare, train, evaluate, recommend, measure.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for entry in sorted(entry_points(group=COMMAND_GROUP), key=lambda item: item.name):
        entry.load()(app)
    return app


def main() -> None:
    """Run the command line; bad input ends with its message on standard error and the error's exit code."""
    try:
        build_app()()
    except AdrecError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        raise
    except OSError as error:
        # What no command foresaw: a full disk, a file that vanished meanwhile.
        reason = error.strerror or str(error)
        _fail(reason if error.filename is None else f"{error.filename}: {reason}", AdrecError.exit_code)


def _fail(message: str, exit_code: int) -> NoReturn:
    # Square brackets in a value must not be read as Rich markup, nor a:b: as an emoji.
    plain = message.replace("[", r"\[")
    Console(stderr=True, soft_wrap=True, emoji=False).print(f"[bold red]error:[/] {plain}")
    sys.exit(exit_code)
