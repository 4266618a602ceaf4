"""`adrec env`: versions, devices, and whether another distribution owns one of our package names."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, packages_distributions, version

import typer
from rich.console import Console
from rich.table import Table

ROOMS = ("adrec", "kernels", "compress", "bench")
DISTRIBUTIONS = (
    "adrec",
    "torch",
    "triton",
    "lightning",
    "numpy",
    "polars",
    "pyarrow",
    "onnx",
    "onnxruntime",
    "tensorrt",
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("env")(env)


def env() -> None:
    """Show what adrec runs on; warns when another package shadows `kernels`, `compress` or `bench`."""
    import torch

    table = Table("what", "is", show_header=False)
    table.add_row("python", platform.python_version())
    for name in DISTRIBUTIONS:
        table.add_row(name, _version(name))
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


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
