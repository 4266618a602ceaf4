"""`adrec kernels`: which kernels there are, what compiling them for GPUs gives, and what they could reach at best."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.console import wide_console

if TYPE_CHECKING:
    from bench.kernels.compiled_table import CompiledRow
    from bench.kernels.gpus import Gpu
    from bench.kernels.records import KernelRecord
    from kernels.compilation import CompiledKernel
    from kernels.inventory import Entry

KERNEL = Annotated[str, typer.Option(help="Names of kernels, with * for anything.")]
DTYPE = Annotated[str | None, typer.Option(help="Storage dtypes, comma-separated, such as float32,bf16; default: all.")]
SHAPE = Annotated[str | None, typer.Option(help="Names of shapes, comma-separated; or sizes, such as users=512.")]


def register(app: typer.Typer) -> None:
    """Add the `kernels` group to the root application."""
    group = typer.Typer(help="List, compile and judge the Triton kernels; needs no GPU.", no_args_is_help=True)
    group.command("list")(list_kernels)
    group.command("compile")(compile_kernels)
    group.command("roofline")(roofline)
    app.add_typer(group, name="kernels")


def list_kernels(kernel: KERNEL = "*") -> None:
    """Say what each kernel does, when it helps and when not."""
    from bench.kernels.selection import choose_entries

    print_advice(choose_entries(kernel), wide_console())


def print_advice(entries: Sequence[Entry], console: Console) -> None:
    """One row a kernel: name, what it fuses, advice and dtypes."""
    from bench.kernels.selection import dtype_name

    table = Table("kernel", "what it does", "use it when", "avoid it when", "dtypes", show_lines=True)
    for entry in entries:
        dtypes = "\n".join(dtype_name(dtype) for dtype in entry.dtypes)
        summary = f"{entry.summary}\n{entry.notes}".strip()
        table.add_row(entry.name, summary, entry.use_when, entry.avoid_when, dtypes)
    console.print(table, markup=False)


def compile_kernels(
    kernel: KERNEL = "*",
    target: Annotated[str | None, typer.Option(help="Targets, comma-separated, such as sm_90; default: all.")] = None,
    dtype: DTYPE = None,
    shape: SHAPE = None,
    each_block_size: Annotated[
        bool,
        typer.Option("--each-block-size", help="Only the first launch of a kernel and dtype with its block sizes."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the table to this JSON file.")] = None,
    update: Annotated[
        bool, typer.Option("--update", help="With --out: keep the table's rows of what was not chosen.")
    ] = False,
    check: Annotated[Path | None, typer.Option(help="Compare with the table in this JSON file.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, and only rows with a problem.")] = False,
) -> None:
    """Compile every kernel for every target and show registers, spills, shared memory and the occupancy bound.

    Exit status: 0 all well; 1 a kernel spills, exceeds the shared memory, does not compile, or is worse than the table
    of --check, or not the same although Triton is; 2 bad input, or nothing can be compiled here.
    """
    from rich.progress import Progress

    from adrec.environment import printable_command, read_environment, utc_now
    from adrec.errors import ConfigError, NotSupportedError
    from adrec.files import check_output
    from adrec.versions import installed_versions
    from bench.kernels.compiled_table import CompiledTable, made_by, read_table, regressions, row_key, write_table
    from bench.kernels.selection import choose_cases, dtype_name, pick_all
    from kernels.compilation import CompilationError, compile_cases
    from kernels.ptx import assembler_version
    from kernels.targets import TARGETS

    targets = [TARGETS[name] for name in ([*TARGETS] if target is None else pick_all(target, TARGETS, "--target"))]
    cases = choose_cases(kernel, shape, dtype)
    if check is not None and shape is not None and "=" in shape:
        raise ConfigError(f"--check knows named shapes only, and --shape is {shape}; leave one of them out")
    if each_block_size and out is not None:
        raise ConfigError(
            "--each-block-size leaves out most rows of a table, and --out writes one; leave one of them out"
        )
    if update and out is None:
        raise ConfigError("--update changes the table of --out FILE, which is not given")
    version = installed_versions()["triton"] or "unknown"
    if out is not None:
        check_output(out, "--out")
    kept = read_table(out) if update and out is not None else None
    if kept is not None and kept.triton != version:
        raise ConfigError(f"--update: {out} is of Triton {kept.triton}, this is {version}; compile all without it")
    recorded = None if check is None else read_table(check)
    console, notes = wide_console(), Console(stderr=True, soft_wrap=True, highlight=False)
    with Progress(console=notes, disable=quiet, transient=True) as progress:
        task = progress.add_task("compiling", total=None)
        try:
            found = compile_cases(
                cases,
                targets,
                once_per_blocks=each_block_size,
                jobs=jobs,
                report=lambda done, total, name: progress.update(task, completed=done, total=total, description=name),
            )
        except CompilationError as error:
            raise NotSupportedError(str(error)) from None
    bad = [each for each in found if each.problems]
    if bad or not quiet:
        console.print(compiled_table(bad if quiet else found), markup=False)
    for each in bad:
        where = f"{each.entry} {each.kernel}, {each.shape}, {dtype_name(each.dtype)}, {each.target.name}"
        notes.print(f"bad: {where}: {'; '.join(each.problems)}", markup=False)
    names, dtypes = {each.entry.name for each in cases}, {dtype_name(each.dtype) for each in cases}
    shapes, targeted = {each.shape_name for each in cases}, {each.name for each in targets}

    def chosen(row: CompiledRow) -> bool:
        return (
            (kernel == "*" or row.entry in names)
            and (dtype is None or row.dtype in dtypes)
            and (shape is None or row.shape in shapes)
            and row.target in targeted
        )

    worse: list[str] = []
    if recorded is not None:
        if recorded.triton != version:
            notes.print(f"note: the record is of Triton {recorded.triton}, this is {version}", markup=False)
        known = [row for row in recorded.rows if chosen(row)]
        if each_block_size:
            compiled = {row_key(each) for each in found}
            known = [row for row in known if row.key in compiled]
        worse = regressions(found, known, same_compiler=recorded.triton == version)
        for sentence in worse:
            notes.print(f"worse: {sentence}", markup=False)
        notes.print(f"{len(worse)} rows worse than {check}, or not as there", markup=False)
    if out is not None:
        others = [] if kept is None else [row for row in kept.rows if not chosen(row)]
        assemblers = {each.name: assembler_version(each) for each in targets}
        table = CompiledTable(
            command=made_by(printable_command(sys.argv), kept),
            compiled_at_utc=utc_now(),
            environment=read_environment(),
            triton=version,
            ptxas=assemblers if kept is None else {**(kept.ptxas or {}), **assemblers},
            rows=others,
        )
        rows = write_table(out, table, found)
        notes.print(f"{rows} rows in {out}" + (f", {len(others)} of them kept" if update else ""), markup=False)
    if bad or worse:
        raise typer.Exit(1)


def compiled_table(found: Sequence[CompiledKernel]) -> Table:
    """A table of compiled kernels, a row each; problems are marked."""
    from bench.kernels.selection import dtype_name

    table = Table("kernel", "shape", "dtype", "target", "blocks", "warps", "stages", "registers", "spills")
    for name in ("shared", "occupancy", "limited by", "seconds"):
        table.add_column(name)
    for each in found:
        launch = f" #{each.launch}" if each.launch else ""
        name = f"{each.entry}\n{each.kernel}{launch}".strip()
        sizes = {name: value for name, value in each.constants.items() if not isinstance(value, bool)}
        blocks = " ".join(f"{name}={value}" for name, value in sizes.items())
        where = [name, each.shape, dtype_name(each.dtype), each.target.name, blocks]
        if (used := each.resources) is None or (bound := each.occupancy) is None:
            table.add_row(*where, *["-"] * 6, f"{each.error}", "", style="bold red")
            continue
        limit = each.target.shared_per_block
        table.add_row(
            *where,
            str(used.warps),
            str(used.stages),
            str(used.registers),
            f"{used.spills} B",
            f"{used.shared / 1024:.1f} of {limit / 1024:.0f} KiB",
            f"{bound.warps} of {bound.limit} warps",
            bound.limited_by,
            f"{used.seconds:.1f}",
            style="bold red" if each.problems else None,
        )
    return table


def roofline(
    kernel: KERNEL = "*",
    shape: SHAPE = None,
    dtype: DTYPE = None,
    gpu: Annotated[str | None, typer.Option(help="GPUs, comma-separated, such as H100,L4; default: all.")] = None,
    records: Annotated[
        list[Path] | None,
        typer.Option(
            help="Records of `adrec bench kernels`: show what they reach of the floor, in a graph where timed."
        ),
    ] = None,
) -> None:
    """Show the least bytes and operations of each kernel, and the least time that they take on named GPUs.

    Floors are from data sheets: full bandwidth and full arithmetic peak, no launch overhead.
    """
    from bench.kernels.gpus import GPUS
    from bench.kernels.measure import GRAPH, KERNEL
    from bench.kernels.records import KernelRecord, read_kernel_records
    from bench.kernels.selection import choose_cases, dtype_name, pick_all, sizes_text

    gpus = [GPUS[name] for name in ([*GPUS] if gpu is None else pick_all(gpu, GPUS, "--gpu"))]
    cases = choose_cases(kernel, shape, dtype)
    read = read_kernel_records(records or [])
    known = [each for each in read if isinstance(each, KernelRecord) and each.timing is not None]
    # Last, so that it counts where there are both: without the host's time for a launch.
    measured = [each for path in (KERNEL, GRAPH) for each in known if each.path == path]
    table = Table("kernel", "shape", "dtype", "MB", "MFLOP", "FLOP/byte", show_lines=True)
    for each in gpus:
        table.add_column(f"{each.name}\nfloor, us", justify="right")
    if measured:
        table.add_column("measured\n(floor / time)", justify="right")
    for case in cases:
        cost = case.entry.cost(case.shape, case.dtype)
        floors = [each.floor(cost, case.dtype) for each in gpus]
        row = [
            case.entry.name,
            f"{case.shape_name}\n{sizes_text(case.shape)}",
            dtype_name(case.dtype),
            f"{cost.bytes / 1e6:.3g}",
            f"{cost.flops / 1e6:.3g}",
            f"{cost.flops / max(cost.bytes, 1):.3g}",
            *(f"{floor.microseconds:.3g}\n{floor.bound}" for floor in floors),
        ]
        if measured:
            row.append("\n".join(_reached(measured, case.entry.name, dict(case.shape), dtype_name(case.dtype), gpus)))
        table.add_row(*row)
    console = wide_console()
    console.print(table, markup=False)
    for each in gpus:
        console.print(f"{each.name}: {each.source}; {each.bandwidth:.0f} GB/s", markup=False, highlight=False)


def _reached(
    measured: Sequence[KernelRecord], kernel: str, shape: dict[str, int], dtype: str, gpus: Sequence[Gpu]
) -> list[str]:
    """What records of a kernel reach of its floor, one line each; the last record of a device counts."""
    from bench.kernels.measure import GRAPH

    found: dict[str, str] = {}
    for each in measured:
        if (each.kernel, each.shape, each.dtype) != (kernel, shape, dtype) or each.timing is None:
            continue
        if each.roof.gpu is not None and each.roof.gpu not in {gpu.name for gpu in gpus}:
            continue
        share = "no floor known" if each.roof.floor_fraction is None else f"{each.roof.floor_fraction:.0%}"
        name = each.roof.gpu or each.protocol.device_name
        where = " in a graph" if each.path == GRAPH else ""
        found[name] = f"{name}: {each.timing.latency_us_p50:.3g} us, {share}{where}"
    return list(found.values()) or ["-"]
