"""`adrec env`: versions, devices, and whether another distribution owns one of our package names."""

from __future__ import annotations

import os
from importlib.metadata import packages_distributions

import typer
from rich.console import Console
from rich.table import Table

from adrec.versions import installed_versions

ROOMS = ("adrec", "kernels", "compress", "bench")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("env")(env)


def env() -> None:
    """Show what adrec runs on; warns when another package shadows `kernels`, `compress` or `bench`."""
    import torch

    table = Table("what", "is", show_header=False)
    for name, version in installed_versions().items():
        table.add_row(name, version or "not installed")
    table.add_row("processors", str(os.cpu_count()))
    table.add_row("torch threads", str(torch.get_num_threads()))
    table.add_row("gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use")
    console = Console()
    console.print(table)
    for room, owner in name_clashes():
        console.print(
            f"[bold yellow]warning:[/] the name '{room}' also belongs to the installed distribution '{owner}';"
            " install adrec into an environment of its own"
        )


def name_clashes() -> list[tuple[str, str]]:
    """Our top-level names that another installed distribution also provides, with that distribution's name."""
    owners = packages_distributions()
    return [(room, owner) for room in ROOMS for owner in sorted(set(owners.get(room, []))) if owner != "adrec"]
