"""Checking raw interactions value by value, and giving them their types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from adrec.data.readers import RawTable
from adrec.errors import DataError

Fault = tuple[pl.Expr, str, Callable[[object], str]]


@dataclass(frozen=True)
class CheckedTable:
    """Interactions with types: ``user`` and ``item`` integer or string, ``time`` Int64 or Float64.

    frame: those columns and ``row``, with rows below the smallest rating left out. rows_read: rows before
    that. unit: what ``time`` counts since 1970, one of ``s``, ``ms``, ``us``, ``ns``.
    """

    frame: pl.LazyFrame
    rows_read: int
    unit: str


def check_table(table: RawTable, min_rating: float | None) -> CheckedTable:
    """Check every row, then cast.

    Rules: an id is never empty and never holds a tab or a line break (lists of recommendations are printed as
    tab-separated lines); a time is a finite number; a rating is a finite number where ``min_rating`` asks for
    one. Ids of a text format become integers when every one of the column is a 64-bit integer in its usual
    form (``7``, ``-7``; not ``007`` or ``+7``), otherwise all stay strings; in JSON lines all must be integers when
    the first is one, and an id holds no ``\\u0000``. The unit of numeric times follows
    from the largest: below 1e11 seconds, below 1e14 milliseconds, below 1e17 microseconds, else nanoseconds.
    Raises: `DataError` naming file and line of the first bad row.
    """
    schema = table.frame.collect_schema()
    for role in ("user", "item", "time"):
        _refuse_type(table, role, schema[role])
    time, exact_time = _number(schema["time"], "time")
    faults = [*_id_faults("user", schema["user"]), *_id_faults("item", schema["item"])]
    if table.json:
        faults += [fault for role in ("user", "item") for fault in _json_id_faults(role, role in table.untyped)]
    faults.append(_number_fault("time", time, "a number (seconds since 1970-01-01)"))
    if min_rating is not None:
        rating, _ = _number(schema["rating"], "rating")
        faults.append(_number_fault("rating", rating, "a number"))
    measures = [
        pl.len().alias("rows"),
        exact_time.all().alias("exact_time"),
        time.abs().max().alias("largest"),
    ]
    measures += [pl.col("row").filter(fault).min().alias(f"fault{k}") for k, (fault, _, _) in enumerate(faults)]
    measures += [_is_integer(role).all().alias(f"{role}_integer") for role in sorted(table.untyped)]
    found = table.frame.select(measures).collect(engine="streaming").row(0, named=True)
    _raise_first(table, faults, [found[f"fault{k}"] for k in range(len(faults))])
    if found["rows"] == 0:
        raise DataError(f"{table.place(0)}: no interactions in the file; it must hold at least one row")

    columns = [pl.col("row"), *(_typed_id(role, schema[role], found) for role in ("user", "item"))]
    columns.append(_typed_time(schema["time"], found["exact_time"]).alias("time"))
    frame = table.frame
    if min_rating is not None:
        frame = frame.filter(rating >= min_rating)
    unit = "us" if schema["time"].is_temporal() else _unit(found["largest"])
    return CheckedTable(frame.select(columns), found["rows"], unit)


def _refuse_type(table: RawTable, role: str, kind: pl.DataType) -> None:
    allowed = kind.is_integer() or kind == pl.String or kind == pl.Categorical or isinstance(kind, pl.Enum)
    wanted = "integer or string"
    if role == "time":
        allowed = kind.is_numeric() or kind == pl.String or kind == pl.Date or isinstance(kind, pl.Datetime)
        wanted = "a number, a date or a datetime"
    if not allowed or str(kind) in ("Int128", "UInt128"):
        raise DataError(f"{table.place(0)}: the {role} column has type {kind}; it must be {wanted}")


def _id_faults(role: str, kind: pl.DataType) -> list[Fault]:
    column = pl.col(role) if kind.is_integer() else pl.col(role).cast(pl.String)
    missing = column.is_null() if kind.is_integer() else column.is_null() | (column == "")
    faults: list[Fault] = [(missing, role, lambda _: f"no value in the {role} column; fill it or drop the row")]
    if not kind.is_integer():
        broken = column.str.contains(r"[\t\n\r]")
        faults.append((broken, role, lambda value: f"the {role} id {value!r} holds a tab or a line break; remove it"))
    return faults


def _json_id_faults(role: str, integers: bool) -> list[Fault]:
    # Polars reads half of a surrogate pair, which is no text, as a NUL.
    nul = pl.col(role).str.contains("\0", literal=True)
    faults: list[Fault] = [
        (nul, role, lambda value: f"the {role} id {value!r} holds \\u0000 or half of a surrogate pair; remove it")
    ]
    if integers:
        faults.append(
            (
                ~_is_integer(role),
                role,
                lambda value: f"the {role} id {value!r} is no 64-bit integer, the first is a number; write all as text",
            )
        )
    return faults


def _number_fault(role: str, value: pl.Expr, wanted: str) -> Fault:
    def say(raw: object) -> str:
        if raw is None or raw == "":
            return f"no value in the {role} column; fill it or drop the row"
        return f"the {role} {raw!r} is not {wanted}; convert it"

    return value.is_null() | ~value.is_finite(), role, say


def _number(kind: pl.DataType, role: str) -> tuple[pl.Expr, pl.Expr]:
    """Return the column as Float64 (null where it is no number), and whether each value is a whole Int64."""
    column = pl.col(role)
    if kind == pl.String:
        column = column.str.strip_chars()
        return column.cast(pl.Float64, strict=False), column.cast(pl.Int64, strict=False).is_not_null()
    if kind.is_temporal():
        return _microseconds(role).cast(pl.Float64), pl.lit(True)
    if kind == pl.UInt64:
        return column.cast(pl.Float64), column < 2**63
    return column.cast(pl.Float64, strict=False), pl.lit(kind.is_integer())


def _microseconds(role: str) -> pl.Expr:
    return pl.col(role).cast(pl.Datetime("us")).to_physical()


def _typed_time(kind: pl.DataType, exact: bool) -> pl.Expr:
    if kind.is_temporal():
        return _microseconds("time")
    column = pl.col("time").str.strip_chars() if kind == pl.String else pl.col("time")
    return column.cast(pl.Int64 if exact else pl.Float64)


def _is_integer(role: str) -> pl.Expr:
    # The round trip accepts exactly the usual spelling: not "007", "+7", " 7" or numbers beyond 64 bits.
    return (pl.col(role).cast(pl.Int64, strict=False).cast(pl.String) == pl.col(role)).fill_null(False)


def _typed_id(role: str, kind: pl.DataType, found: dict[str, object]) -> pl.Expr:
    if kind == pl.UInt64:
        return pl.col(role)
    whole = kind.is_integer() or bool(found.get(f"{role}_integer", False))
    return pl.col(role).cast(pl.Int64 if whole else pl.String)


def _raise_first(table: RawTable, faults: list[Fault], rows: list[int | None]) -> None:
    bad = [(row, k) for k, row in enumerate(rows) if row is not None]
    if not bad:
        return
    row, k = min(bad)
    _, role, say = faults[k]
    value = table.frame.filter(pl.col("row") == row).select(role).collect().item()
    raise DataError(f"{table.place(row)}: {say(value)}")


def _unit(largest: float | None) -> str:
    bounds = ((1e11, "s"), (1e14, "ms"), (1e17, "us"))
    return next((unit for bound, unit in bounds if (largest or 0) < bound), "ns")
