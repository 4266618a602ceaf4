"""The console that tables are printed on."""

from __future__ import annotations

from rich.console import Console


def wide_console(stderr: bool = False) -> Console:
    """A console wide enough for a table where it is a file or a pipe, which have no width."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=200)
