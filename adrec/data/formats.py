"""Recognising what kind of interaction file a path holds."""

from __future__ import annotations

import gzip
import re
import zlib
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from adrec.errors import DataError, nearest

HEAD_BYTES = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
FOUR_NUMBERS = re.compile(r"\d+\t\d+\t(\d+(?:\.\d+)?)\t(\d+)")
JSON_ARRAY = re.compile(r"\s*\[\s*([\[{]|$)")
TYPED_COLUMN = re.compile(r"[^:\t]+:(token|token_seq|float|float_seq)")


class Format(str, Enum):
    """Formats that `adrec prepare` reads; the value is what ``--format`` takes."""

    CSV = "csv"
    MOVIELENS = "movielens"
    AMAZON = "amazon"
    RECBOLE = "recbole"
    PARQUET = "parquet"
    AUTHORS = "authors"


DESCRIPTIONS = {
    Format.CSV: "a header line, then rows separated by comma, tab, semicolon or bar",
    Format.MOVIELENS: "u.data (tabs), ratings.dat ('::') or ratings.csv",
    Format.AMAZON: "Amazon reviews, one JSON object a line (2014, 2018 and 2023 field names)",
    Format.RECBOLE: "RecBole atomic .inter with typed column names",
    Format.PARQUET: "Parquet with named columns",
    Format.AUTHORS: "the ADRec authors' dataset.pkl, already prepared",
}


@dataclass(frozen=True)
class Source:
    """An input file, its format, and its first decompressed bytes."""

    path: Path
    format: Format
    compressed: bool
    head: bytes

    @property
    def first_line(self) -> str:
        """The first line that is not blank, without byte order mark and line end."""
        return _first_line(self.head)


def open_source(path: Path, asked: str | None = None) -> Source:
    """Recognise ``path`` by content and name, or take the format ``asked`` for.

    A directory is accepted when exactly one file in it has a known name (``u.data``, ``ratings.dat``,
    ``ratings.csv``, ``dataset.pkl``, ``*.inter``). Raises: `DataError` for a missing or empty file, an
    unknown ``--format``, content that fits no format, and text that no format reads: UTF-16, lines that end in a
    carriage return alone, a JSON array.
    """
    path = _file_in(path)
    head, compressed = _read_head(path)
    if not head.removeprefix(BYTE_ORDER_MARK).strip():
        raise DataError(f"{path}: line 1: the file is empty; it must hold interactions")
    if asked is None:
        return Source(path, _recognise(path, head), compressed, head)
    names = [known.value for known in Format]
    if asked not in names:
        raise DataError(f"--format {asked!r}{nearest(asked, names)}: must be one of {', '.join(names)}")
    given = Format(asked)
    if given not in (Format.PARQUET, Format.AUTHORS):
        _refuse_text(path, _first_line(head))
    return Source(path, given, compressed, head)


def _file_in(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if not path.is_dir():
        return path
    names = ("u.data", "ratings.dat", "ratings.csv", "dataset.pkl")
    found = [path / name for name in names if (path / name).is_file()] + sorted(path.glob("*.inter"))
    if len(found) != 1:
        listing = ", ".join(file.name for file in found) or "none"
        raise DataError(f"{path}: is a directory with {listing} of the known file names; name one file in it")
    return found[0]


def _read_head(path: Path) -> tuple[bytes, bool]:
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if not head.startswith(GZIP_MAGIC):
            return head, False
        head = b""
        with gzip.open(path) as file:
            while len(head) < HEAD_BYTES and (chunk := file.read1(HEAD_BYTES)):
                head += chunk
        return head, True
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        if b"\n" in head:
            # The damage lies further on, and is reported with its line when the file is read in full.
            return head, True
        raise DataError(f"{path}: line 1: the gzip stream is damaged ({error}); download it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _recognise(path: Path, head: bytes) -> Format:
    name = path.name.casefold().removesuffix(".gz")
    if head.startswith(b"PAR1") or name.endswith((".parquet", ".pq")):
        return Format.PARQUET
    # Pickle protocols 2 and above begin with the opcode PROTO and their number.
    if (head[:1] == b"\x80" and head[1:2] <= b"\x05") or name.endswith((".pkl", ".pickle")):
        return Format.AUTHORS
    line = _first_line(head)
    _refuse_text(path, line)
    if name.endswith(".inter") or TYPED_COLUMN.fullmatch(line.split("\t")[0]):
        return Format.RECBOLE
    if line.startswith("{"):
        return Format.AMAZON
    if name == "ratings.dat" or is_ratings_dat(line):
        return Format.MOVIELENS
    if is_four_numbers(line):
        if name == "u.data" or _may_be_u_data(line):
            return Format.MOVIELENS
        raise DataError(
            f"{path}: line 1: {line!r} is no header, and not 'user, item, rating up to 10, time from 100000000' as in "
            "u.data; put a line of column names first, or give --format movielens if the columns have this order"
        )
    if any(separator in line for separator in ",\t;|"):
        return Format.CSV
    listing = "; ".join(f"{known.value}: {DESCRIPTIONS[known]}" for known in Format)
    raise DataError(f"{path}: line 1: {line[:60]!r} fits no known format; give --format ({listing})")


def is_ratings_dat(line: str) -> bool:
    """Whether a line looks like ``user::item::rating::time``."""
    return line.count("::") == 3


def is_four_numbers(line: str) -> bool:
    """Whether a line is four numbers separated by tabs, so not a header."""
    return FOUR_NUMBERS.fullmatch(line) is not None


def _may_be_u_data(line: str) -> bool:
    """Whether the third of four numbers may be a rating and the last one a time, in seconds from 1973 on."""
    found = FOUR_NUMBERS.fullmatch(line)
    return found is not None and float(found[1]) <= 10 and int(found[2]) >= 10**8


def _refuse_text(path: Path, line: str) -> None:
    """Refuse text that no reader takes, by its first line."""
    if "\0" in line:
        raise DataError(f"{path}: line 1: not UTF-8, it looks like UTF-16; convert the file to UTF-8")
    if "\r" in line:
        raise DataError(f"{path}: line 1: a carriage return without a line feed; end lines in LF or CRLF")
    if JSON_ARRAY.match(line):
        raise DataError(
            f"{path}: line 1: a JSON array; write one object a line (pandas: to_json(orient='records', lines=True))"
        )


def _first_line(head: bytes) -> str:
    lines = head.removeprefix(BYTE_ORDER_MARK).decode("utf-8", errors="replace").split("\n")
    return next((line.removesuffix("\r") for line in lines if line.strip()), "")
