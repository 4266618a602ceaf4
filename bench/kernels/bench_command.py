"""`adrec bench kernels`: time the kernels on a GPU against what they replace, or whole engines against each other.

On a CPU the twins that take the kernels' place.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.console import wide_console
from bench.kernels.commands import DTYPE, KERNEL, SHAPE, print_advice

if TYPE_CHECKING:
    import torch

    from bench.kernels.records import KernelsRecord
    from bench.kernels.selection import Case

HEADS = 4
KERNEL_OPTIONS = ("kernel", "shape", "dtype", "cuda_graph")
ENGINE_OPTIONS = ("paths", "batch_sizes", "steps", "items", "width")
MOST_ITEMS, MOST_USERS, MOST_STEPS = 2**31, 2**20, 4095


def bench_kernels(
    context: typer.Context,
    kernel: KERNEL = "*",
    shape: SHAPE = None,
    dtype: DTYPE = None,
    list_: Annotated[bool, typer.Option("--list", help="Say which kernel helps when, and stop.")] = False,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Time each kernel in a CUDA graph too.")] = False,
    engines: Annotated[bool, typer.Option("--engines", help="Measure engines instead of single kernels.")] = False,
    paths: Annotated[
        str | None,
        typer.Option(help="With --engines: engines, also compiled or in a CUDA graph; default: all of the device."),
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="With --engines: users in a batch.")] = "1,32,512,4096",
    steps: Annotated[str, typer.Option(help="With --engines: reverse steps.")] = "1,4,32",
    items: Annotated[str, typer.Option(help="With --engines: sizes of the catalogue.")] = "12000,1000000,10000000",
    width: Annotated[int, typer.Option(min=8, max=4096, help="With --engines: model width.")] = 128,
    seconds_per_path: Annotated[float, typer.Option(help="Time budget of each path in a row's comparison.")] = 1.0,
    device: Annotated[str, typer.Option(help="cuda, cuda:N; cpu: the kernels' twins, or engines.")] = "cuda",
    out: Annotated[Path, typer.Option(help="Records file (JSON lines).")] = Path("kernels-bench.jsonl"),
    append: Annotated[bool, typer.Option("--append", help="Add to the records file instead of replacing it.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no table.")] = False,
) -> None:
    """Time each kernel against its eager twin, the compiled twin and a copy of the same bytes, on a CUDA device.

    With --device cpu no kernel runs: its twins are timed, by default in float32 at the paper's shape. With --engines:
    whole engines on a random model. Exit status 1 when a row failed, 2 for bad input.
    """
    from adrec.environment import printable_command
    from adrec.errors import ConfigError
    from adrec.files import check_output
    from bench.kernels.measure import KernelBench, Timer
    from bench.kernels.records import CPU_NOTE
    from bench.kernels.selection import choose_cases, choose_entries, choose_twins
    from bench.progress import SweepProgress
    from bench.timing import TimingProtocol, clock_for

    if list_:
        print_advice(choose_entries(kernel), wide_console())
        return
    if not 0 < seconds_per_path < math.inf:
        raise ConfigError(f"--seconds-per-path {seconds_per_path}: must be above 0 and finite, such as 1")
    check_mode(context, engines=engines)
    check_output(out, "--out", make_folder=True)
    if not append:
        check_partial(out)
    # Names before the device: a slip of the pen should not wait for a GPU.
    cases: list[Case] = []
    if not engines:
        cases = choose_twins(kernel, shape, dtype) if device == "cpu" else choose_cases(kernel, shape, dtype)
    if cuda_graph and device == "cpu":
        raise ConfigError("--cuda-graph: there are none with --device cpu; leave it out")
    where = check_bench_device(device, engines=engines)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    sweep = _engine_sweep(where, paths, batch_sizes, steps, items, width) if engines else None
    with SweepProgress(console, quiet=quiet) as progress:
        if where.type == "cpu":
            what = "on a CPU this is a smoke run" if engines else CPU_NOTE
            progress.say(f"note: {what}; its times say nothing about a GPU")
        timer = Timer(where, TimingProtocol(seconds=seconds_per_path), clock_for(where), printable_command(sys.argv))
        if sweep is None:
            bench = KernelBench.on_a_cpu(timer) if where.type == "cpu" else KernelBench(timer, graph=cuda_graph)
            rows: Iterator[KernelsRecord] = bench.rows(cases, progress.update)
        else:
            rows = sweep(timer, progress.update)
        found = write_rows(rows, out, append=append)
    if not quiet:
        wide_console().print(rows_table(found), markup=False)
    failed = [row for row in found if row.error is not None]
    for row in failed:
        console.print(f"failed: {row_name(row)}, {row.path}: {row.error}", markup=False)
    kept = out if append or len(failed) < len(found) or not found else partial_path(out)
    console.print(f"{len(found)} rows in {kept if kept.exists() else out}", markup=False)
    if failed:
        raise typer.Exit(1)


def check_mode(context: typer.Context, *, engines: bool) -> None:
    """Raise ConfigError for an option that was given and that the other mode reads."""
    from adrec.commands.options import given
    from adrec.errors import ConfigError

    others = KERNEL_OPTIONS if engines else ENGINE_OPTIONS
    wrong = given(context, others)
    if wrong:
        reads = "kernels are measured, not with --engines" if engines else "--engines is given"
        named = ", ".join(wrong)
        raise ConfigError(f"{named}: read only where {reads}; leave it out, or run the two one after the other")


def check_partial(out: Path) -> None:
    """Raise ConfigError where rows of a run that did not end well would be replaced."""
    from adrec.errors import ConfigError

    partial = partial_path(out)
    if partial.exists():
        raise ConfigError(
            f"{partial} holds what an interrupted or failed run measured; rename it to keep it, or delete it"
        )


def partial_path(out: Path) -> Path:
    """Where rows lie until all of a run are measured."""
    return out.with_name(f"{out.name}.partial")


def check_bench_device(name: str, *, engines: bool) -> torch.device:
    """Return the device; raises NotSupportedError for a CUDA device that is not there or would run no kernel."""
    import torch

    from adrec.devices import check_device
    from adrec.errors import NotSupportedError
    from kernels import _runtime

    elsewhere = "`adrec bench kernels --list`, `adrec kernels compile` and `adrec kernels roofline` need no GPU"
    if name.startswith("cuda") and not torch.cuda.is_available():
        cpu = "a smoke run of engines: --engines --device cpu --paths reference,cached"
        cpu = cpu if engines else "the kernels' twins: --device cpu"
        raise NotSupportedError(f"kernels are timed on a CUDA device, and torch finds none here. {elsewhere}; {cpu}")
    device = check_device(name)
    if device.type == "cuda" and not _runtime.AVAILABLE:
        raise NotSupportedError("Triton is not installed: pip install 'adrec[triton]' (Linux)")
    if device.type == "cuda" and _runtime.INTERPRETED:
        raise NotSupportedError("TRITON_INTERPRET=1 is set: kernels would be interpreted, not timed; unset it")
    return device


def write_rows(rows: Iterator[KernelsRecord], out: Path, *, append: bool) -> list[KernelsRecord]:
    """Write each row when it is measured: to ``<out>.partial`` renamed at the end, or with ``append`` to ``out``."""
    from bench.kernels.records import append_record, read_kernel_records

    out.parent.mkdir(parents=True, exist_ok=True)
    target = out if append else partial_path(out)
    if out.exists():
        # What is no file of such records is neither added to nor replaced.
        read_kernel_records([out])
    if not append:
        check_partial(out)
    found = []
    for row in rows:
        append_record(target, row)
        found.append(row)
    # Failures alone do not replace what an earlier run measured.
    if not append and (not out.exists() or any(row.error is None for row in found)):
        target.touch()
        target.replace(out)
    return found


def rows_table(found: list[KernelsRecord]) -> Table:
    """A table of rows: time, what it is of the floor, ratio to the baseline, and how near the results are."""
    from bench.kernels.records import KernelRecord

    notes = {row.note for row in found if isinstance(row, KernelRecord) and row.note}
    table = Table(
        *("what", "path", "median, us", "p95, us", "GB/s", "floor", "time to baseline", "memory, MiB", "results"),
        title="; ".join(sorted(notes)) or None,
    )
    for row in found:
        if row.timing is None:
            table.add_row(row_name(row), row.path, f"{row.error}", style="red")
            continue
        ratio = row.timing.time_ratio_to_baseline
        table.add_row(
            row_name(row),
            row.path,
            f"{row.timing.latency_us_p50:.4g}",
            f"{row.timing.latency_us_p95:.4g}",
            "-" if row.roof.gigabytes_per_second is None else f"{row.roof.gigabytes_per_second:.4g}",
            "-" if row.roof.floor_fraction is None else f"{row.roof.floor_fraction:.1%} of it",
            "-" if ratio is None else f"{ratio.value:.3g} ({ratio.low:.3g} to {ratio.high:.3g})",
            "-" if row.timing.peak_memory_mib is None else f"{row.timing.peak_memory_mib:.0f}",
            row.error or _results(row),
        )
    return table


def row_name(row: KernelsRecord) -> str:
    """What a row measured, without its path."""
    from bench.kernels.records import KernelRecord

    if isinstance(row, KernelRecord):
        return f"{row.kernel}, {row.shape_name}, {row.dtype}"
    return f"{row.items} items, batch {row.batch_size_users}, {row.steps} steps"


def _results(row: KernelsRecord) -> str:
    from bench.kernels.records import KernelRecord

    if not isinstance(row, KernelRecord):
        return "-" if row.top20_overlap_fraction is None else f"{row.top20_overlap_fraction:.2%} same items"
    parts = [] if row.rms_ratio is None else [f"rms {row.rms_ratio:.1e}"]
    return ", ".join(parts if row.different_integers is None else [*parts, f"{row.different_integers:.2%} other ids"])


def _engine_sweep(
    device: torch.device, paths: str | None, batch_sizes: str, steps: str, items: str, width: int
) -> Callable[..., Iterator[KernelsRecord]]:
    from adrec.commands.options import integers
    from adrec.errors import ConfigError
    from bench.kernels.catalogues import RandomCatalogue
    from bench.kernels.engine_paths import check_paths, default_paths
    from bench.kernels.engine_sweep import Axes, EngineSweep

    if width % HEADS:
        raise ConfigError(f"--width {width}: allowed are multiples of {HEADS}, the heads of the random model")
    counts, sizes = integers(steps, "--steps", 1, MOST_STEPS), integers(items, "--items", 1, MOST_ITEMS)
    axes = Axes(
        paths=default_paths(device) if paths is None else tuple(check_paths(paths)),
        batch_sizes=tuple(integers(batch_sizes, "--batch-sizes", 1, MOST_USERS)),
        steps=tuple(counts),
        catalogues=tuple(RandomCatalogue(size, width, max(counts)) for size in sizes),
    )
    return lambda timer, report: EngineSweep(timer, axes).rows(report)
