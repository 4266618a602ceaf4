"""From an interaction file of any supported format to one lazy Polars frame with standard column names."""

from __future__ import annotations

import glob
import gzip
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import polars as pl

from adrec.data.columns import ColumnNames, choose_columns
from adrec.data.csv_text import csv_rows
from adrec.data.formats import BYTE_ORDER_MARK, TYPED_COLUMN, Format, Source, is_four_numbers
from adrec.data.json_text import parse_json
from adrec.data.line_numbers import line_of_row, malformed_line, row_note
from adrec.errors import DataError

MOVIELENS_COLUMNS = ("user_id", "item_id", "rating", "timestamp")
SEPARATORS = "\t,;|"
CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class RawTable:
    """Interactions as the file states them, in file order.

    frame: columns ``row`` (0-based row of the file), ``user``, ``item``, ``time`` and, when asked for,
    ``rating``; from text they are strings, from Parquet they have the file's types. place: turns a ``row``
    into the start of a message, the file and the line (row for Parquet). untyped: the roles whose strings may
    stand for integers, because the format cannot tell the two apart. json: the text was JSON; strings of ``untyped``
    roles must then be integers.
    """

    frame: pl.LazyFrame
    place: Callable[[int], str]
    untyped: frozenset[str]
    json: bool = False


@dataclass(frozen=True)
class _TextLayout:
    """How rows are cut into fields; ``kind`` is a layout of `line_of_row`."""

    kind: str
    separator: str
    names: tuple[str, ...]


def read_table(source: Source, asked: ColumnNames, needs_rating: bool, work: Path) -> RawTable:
    """Open ``source``; text is parsed once into a Parquet file in the scratch directory ``work``.

    Raises: `DataError`, with file and line, for a missing column, a line that cannot be cut into fields,
    bytes that are not UTF-8, or a truncated gzip stream.
    """
    if source.format is Format.PARQUET:
        return _read_parquet(source, asked, needs_rating)
    text = _plain_text(source, work)
    layout = _layout(source)
    columns = choose_columns(f"{source.path}: line 1", layout.names, asked, needs_rating)
    renames = columns.renames()
    parsed = work / "interactions.parquet"
    try:
        _scan(text, layout, renames).sink_parquet(parsed, compression="lz4", statistics=False)
    except pl.exceptions.PolarsError as error:
        where = malformed_line(text, layout.kind, layout.separator, len(layout.names))
        detail = f"line {where[0]}: {where[1]}" if where else f"cannot be parsed ({str(error).splitlines()[0]})"
        raise DataError(f"{source.path}: {detail}") from None

    def place(row: int) -> str:
        line = line_of_row(text, row, layout.kind, layout.separator)
        return f"{source.path}: line {line}{row_note(text, line, layout.kind, layout.separator, len(layout.names))}"

    untyped = {"user", "item"}
    if layout.kind == "json":
        # JSON says whether an id is a number or a string; only numbers may become integers.
        first = _first_object(source)
        for role in ("user", "item"):
            value = first[getattr(columns, role)]
            if isinstance(value, str):
                untyped.remove(role)
            elif value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise DataError(f"{place(0)}: the {role} is {str(value)[:80]}; write text or an integer")
    return RawTable(pl.scan_parquet(parsed, glob=False), place, frozenset(untyped), layout.kind == "json")


def _read_parquet(source: Source, asked: ColumnNames, needs_rating: bool) -> RawTable:
    try:
        frame = pl.scan_parquet(source.path, glob=False)
        names = frame.collect_schema().names()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{source.path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
    columns = choose_columns(f"{source.path}", names, asked, needs_rating)
    chosen = [pl.col(name).alias(role) for name, role in columns.renames().items()]
    frame = frame.select(chosen).with_row_index("row")
    return RawTable(frame, lambda row: f"{source.path}: row {row + 1}", frozenset())


def _layout(source: Source) -> _TextLayout:
    line = source.first_line
    if source.format is Format.AMAZON:
        return _TextLayout("json", "", tuple(_first_object(source)))
    if source.format is Format.RECBOLE:
        return _TextLayout("header", "\t", _untyped_names(source.path, line))
    if source.format is Format.MOVIELENS and "::" in line:
        return _TextLayout("bare", "::", MOVIELENS_COLUMNS)
    if source.format is Format.MOVIELENS and is_four_numbers(line):
        return _TextLayout("bare", "\t", MOVIELENS_COLUMNS)
    headers = {separator: next(csv_rows([line], separator)) for separator in SEPARATORS}
    separator = max(SEPARATORS, key=lambda candidate: len(headers[candidate]))
    return _TextLayout("quoted", separator, tuple(headers[separator]))


def _untyped_names(path: Path, header: str) -> tuple[str, ...]:
    names = header.split("\t")
    for name in names:
        if not TYPED_COLUMN.fullmatch(name):
            raise DataError(
                f"{path}: line 1: column {name!r} has no type; a RecBole column is 'name:type' with type "
                "token, token_seq, float or float_seq. For a plain tab-separated file give --format csv"
            )
    return tuple(name.rsplit(":", 1)[0] for name in names)


def _first_object(source: Source) -> dict[str, object]:
    try:
        first = parse_json(source.first_line, constants=False)
    except ValueError as error:
        raise DataError(f"{source.path}: line 1: not a JSON object ({error})") from None
    if not isinstance(first, dict):
        raise DataError(f"{source.path}: line 1: expected a JSON object, found {source.first_line[:40]!r}")
    return first


def _scan(text: Path, layout: _TextLayout, renames: dict[str, str]) -> pl.LazyFrame:
    roles = [pl.col(name).alias(role) for name, role in renames.items()]
    if layout.kind == "json":
        # scan_ndjson has no switch for glob patterns, so a bracket in the path is escaped.
        pattern = glob.escape(str(text))
        return pl.scan_ndjson(pattern, schema=dict.fromkeys(renames, pl.String()), row_index_name="row").select(
            "row", *roles
        )
    if layout.separator == "::":
        # The CSV reader takes one separator byte: lines come in whole and are cut here.
        lines = _scan_csv(text, ["line"], "\x01", quoted=False, header=False)
        cut = pl.col("line").str.splitn("::", len(layout.names)).struct.rename_fields(list(layout.names))
        return lines.filter(pl.col("line").is_not_null()).with_columns(cut.struct.unnest()).select("row", *roles)
    # Names by position: the reader would rename a name that the header repeats.
    positions = [str(position) for position in range(len(layout.names))]
    frame = _scan_csv(text, positions, layout.separator, layout.kind == "quoted", layout.kind != "bare")
    chosen = [pl.col(str(layout.names.index(name))).alias(role) for name, role in renames.items()]
    # A blank line is a row of nulls, and is skipped.
    return frame.filter(~pl.all_horizontal(pl.col(positions).is_null())).select("row", *chosen)


def _scan_csv(text: Path, names: list[str], separator: str, quoted: bool, header: bool) -> pl.LazyFrame:
    quote = '"' if quoted else None
    if header:
        return pl.scan_csv(
            text,
            separator=separator,
            quote_char=quote,
            infer_schema=False,
            with_column_names=lambda _: names,
            row_index_name="row",
            glob=False,
        )
    return pl.scan_csv(
        text,
        has_header=False,
        separator=separator,
        quote_char=quote,
        schema=dict.fromkeys(names, pl.String()),
        row_index_name="row",
        glob=False,
    )


def _opened(source: Source) -> BufferedReader | gzip.GzipFile:
    return gzip.open(source.path) if source.compressed else source.path.open("rb")


def _plain_text(source: Source, work: Path) -> Path:
    """Return a path to uncompressed text; Polars' JSON reader needs the byte order mark gone too."""
    marked = source.format is Format.AMAZON and source.head.startswith(BYTE_ORDER_MARK)
    if not source.compressed and not marked:
        return source.path
    plain = work / "input"
    lines = 0
    try:
        with _opened(source) as file, plain.open("wb") as target:
            if marked:
                file.seek(len(BYTE_ORDER_MARK))
            # read1 hands out what is there, so that the line count is right when the stream breaks off.
            while chunk := file.read1(CHUNK_BYTES):
                target.write(chunk)
                lines += chunk.count(b"\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        detail = re.sub(r"\s+", " ", str(error))
        raise DataError(
            f"{source.path}: line {lines + 1}: the gzip stream is truncated or damaged here ({detail}); "
            "download the file again"
        ) from None
    except OSError as error:
        raise DataError(f"{source.path}: cannot be decompressed ({error.strerror or error})") from None
    return plain
