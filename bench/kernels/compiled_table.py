"""The committed table of compiled kernels: one JSON object, a row on each line, and what counts as a regression."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from adrec.data.json_text import parse_json
from adrec.environment import Environment, Frozen
from adrec.errors import DataError
from adrec.files import write_text
from bench.kernels.selection import dtype_name
from kernels.compilation import CompiledKernel
from kernels.inventory import entries

Key = tuple[str, str, str, str, int, str]


class CompiledRow(Frozen):
    """What one launch of one kernel uses when compiled for one target; memory in bytes, registers a thread.

    ``constants`` are the block sizes and other constants; ``spills`` are bytes a thread; ``warps_bound`` is the most
    warps that can be resident on a multiprocessor, of ``warps_limit``.
    """

    entry: str
    shape: str
    dtype: str
    kernel: str
    launch: int = Field(ge=0)
    target: str
    constants: dict[str, bool | int | float | str]
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    shared_limit: int
    tensor_columns: int
    warps_bound: int
    warps_limit: int
    limited_by: str

    @property
    def key(self) -> Key:
        """What identifies a row in a table."""
        return (self.entry, self.shape, self.dtype, self.kernel, self.launch, self.target)

    @property
    def name(self) -> str:
        """The row in words."""
        launch = f" #{self.launch}" if self.launch else ""
        return f"{self.entry} ({self.kernel}{launch}), {self.shape}, {self.dtype}, {self.target}"


class CompiledTable(Frozen):
    """Rows, the compiler that they are of, and the command that made them.

    ``ptxas`` is the version of NVIDIA's assembler for each target. An ``--update`` is one more command, after ``&&``;
    ``compiled_at_utc`` and ``environment`` are those of the last one. Tables of earlier versions have none of these.
    """

    schema_version: Literal[1] = 1
    kind: Literal["kernels-compiled"] = "kernels-compiled"
    command: str | None = None
    compiled_at_utc: str | None = None
    environment: Environment | None = None
    triton: str
    ptxas: dict[str, str] | None = None
    rows: list[CompiledRow]


def row_key(kernel: CompiledKernel) -> Key:
    """`CompiledRow.key` of a kernel, compiled or not."""
    return (kernel.entry, kernel.shape, dtype_name(kernel.dtype), kernel.kernel, kernel.launch, kernel.target.name)


def compiled_row(kernel: CompiledKernel) -> CompiledRow | None:
    """The row of a compiled kernel; None for one that did not compile."""
    if (used := kernel.resources) is None or (bound := kernel.occupancy) is None:
        return None
    return CompiledRow(
        entry=kernel.entry,
        shape=kernel.shape,
        dtype=dtype_name(kernel.dtype),
        kernel=kernel.kernel,
        launch=kernel.launch,
        target=kernel.target.name,
        constants=dict(kernel.constants),
        warps=used.warps,
        stages=used.stages,
        registers=used.registers,
        spills=used.spills,
        shared=used.shared,
        shared_limit=kernel.target.shared_per_block,
        tensor_columns=used.tensor_columns,
        warps_bound=bound.warps,
        warps_limit=bound.limit,
        limited_by=bound.limited_by,
    )


def made_by(command: str, kept: CompiledTable | None) -> str | None:
    """What makes a table, ``command`` last; after an ``--update`` None where the rest of it is of unknown commands."""
    if kept is None or kept.command is None:
        return command if kept is None else None
    return " && ".join([*(each for each in kept.command.split(" && ") if each != command), command])


def write_table(path: Path, table: CompiledTable, kernels: Iterable[CompiledKernel]) -> int:
    """Write ``table`` with the rows of everything that compiled, in the place of their kernel.

    One row a line, so that a difference shows the kernels that changed. Returns the number of rows.
    """
    rows = [*table.rows, *(row for kernel in kernels if (row := compiled_row(kernel)) is not None)]
    places = {entry.name: place for place, entry in enumerate(entries())}
    rows.sort(key=lambda row: places.get(row.entry, len(places)))
    head = table.model_dump(mode="json", exclude={"rows"})
    lines = ",\n".join(json.dumps(row.model_dump(mode="json"), allow_nan=False) for row in rows)
    write_text(path, f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n')
    return len(rows)


def read_table(path: Path) -> CompiledTable:
    """Read a table; DataError says what is wrong with it and how to make a new one."""
    way_out = "`adrec kernels compile --out FILE` writes one"
    try:
        return CompiledTable.model_validate(parse_json(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(f"{path}: no such table of compiled kernels; {way_out}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "table"
        raise DataError(f"{path}: field {field!r}: {first['msg']}; {way_out}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a table of compiled kernels ({error}); {way_out}") from None


def regressions(
    kernels: Sequence[CompiledKernel], recorded: Iterable[CompiledRow], *, same_compiler: bool
) -> list[str]:
    """What got worse against the rows of a table that should be among ``kernels``, one sentence a row.

    same_compiler: the table is of this version of Triton; then code that differs at all counts, since only a change of
    the kernel explains it. Of another: spills, too much shared memory and fewer resident warps. A row that is missing
    here or there counts: only a complete table holds anything.
    """
    known = {row.key: row for row in recorded}
    now = {row.key: row for kernel in kernels if (row := compiled_row(kernel)) is not None}
    found = []
    for key, row in now.items():
        if key not in known:
            found.append(f"{row.name}: not in the record; write the record again with --out")
        elif (worse := _worse(row, known[key], same_compiler)) is not None:
            found.append(f"{row.name}: {worse}")
    gone = "in the record, but not compiled: kernel, shape, dtype or target is gone, or compiling failed"
    found.extend(f"{row.name}: {gone}" for key, row in known.items() if key not in now)
    return found


def _worse(row: CompiledRow, before: CompiledRow, same_compiler: bool) -> str | None:
    if row.spills > 0:
        return f"spills {row.spills} bytes a thread (record: {before.spills})"
    if row.shared > row.shared_limit:
        return f"{row.shared} bytes of shared memory, limit {row.shared_limit} (record: {before.shared})"
    if row.warps_bound < before.warps_bound:
        return (
            f"at most {row.warps_bound} resident warps, record {before.warps_bound}: {row.registers} registers"
            f" (record: {before.registers}), {row.shared} bytes of shared memory (record: {before.shared})"
        )
    if same_compiler and row != before:
        now, old = row.model_dump(), before.model_dump()
        changes = ", ".join(f"{name} {now[name]} (record: {old[name]})" for name in now if now[name] != old[name])
        return f"not as recorded: {changes}; `adrec kernels compile --update --out FILE` records it"
    return None
