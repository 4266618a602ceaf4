"""From a raw interaction file to a prepared `Dataset`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import torch
from pydantic import BaseModel, ConfigDict, Field

from adrec.data.checks import check_table
from adrec.data.checksum import file_sha256
from adrec.data.columns import ColumnNames
from adrec.data.dataset import Dataset, build_dataset
from adrec.data.formats import Format, Source, open_source
from adrec.data.interactions import Interactions, deduplicate, encode, k_core
from adrec.data.jagged import Jagged
from adrec.data.readers import read_table
from adrec.data.split import Split, leave_one_out, temporal
from adrec.data.staging import check_destination, work_directory
from adrec.errors import DataError

DEFAULT_CORE = 5
DEFAULT_VALIDATION_FROM = "0.8"
DEFAULT_TEST_FROM = "0.9"


class PrepareOptions(BaseModel):
    """Everything `adrec prepare` can be told; ``None`` means the default, which depends on the format.

    core: k of the iterative k-core, default 5, 0 or 1 turns it off. validation_from, test_from: bounds of the
    temporal split, quantiles or ISO dates, defaults 0.8 and 0.9.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = None
    format: str | None = None
    user_column: str | None = None
    item_column: str | None = None
    time_column: str | None = None
    rating_column: str | None = None
    core: int | None = Field(default=None, ge=0)
    min_rating: float | None = None
    deduplicate: bool = False
    split: str | None = None
    validation_from: str | None = None
    test_from: str | None = None


def prepare(
    source: Path,
    out: Path,
    options: PrepareOptions | None = None,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda stage: None,
) -> Dataset:
    """Read ``source``, filter, order, split, and write the data set to ``out`` (everything or nothing).

    Steps in order: rows below ``min_rating`` are dropped; each user's interactions are ordered by time, ties
    keep the order of the input; with ``deduplicate`` the first of repeated user-item pairs is kept; the
    k-core is taken over what remains; then the split is made. ``dataset.pkl`` is prepared already and its
    lists are taken as they are. ``report`` is told the name of each stage. Raises: `DataError`.
    """
    options = options or PrepareOptions()
    source, out = Path(source), Path(out)
    check_destination(out.resolve(), overwrite)
    split = _split(options)
    report("reading")
    found = open_source(source, options.format)
    name = options.name or out.resolve().name
    if found.format is Format.AUTHORS:
        _refuse_for_authors(found, options)
        dataset = Dataset.from_authors(found.path, name)
    else:
        dataset = _prepare_raw(found, out, name, split, options, report)
    report("writing")
    dataset.save(out, overwrite)
    return dataset


def _prepare_raw(
    source: Source,
    out: Path,
    name: str,
    split: Split,
    options: PrepareOptions,
    report: Callable[[str], None],
) -> Dataset:
    core = DEFAULT_CORE if options.core is None else options.core
    asked = ColumnNames(options.user_column, options.item_column, options.time_column, options.rating_column)
    with work_directory(out) as work:
        try:
            raw = read_table(source, asked, options.min_rating is not None, work)
            report("checking")
            table = check_table(raw, options.min_rating)
            report("ordering")
            interactions = encode(table)
        except (pl.exceptions.PolarsError, OSError) as error:
            # What the readers cannot foresee: a Parquet page that does not decode, a full disk.
            detail = str(error).splitlines()[0]
            raise DataError(
                f"{source.path}: cannot be read ({detail}); check the file and the free disk space"
            ) from None
    if len(interactions) == 0:
        raise DataError(
            f"{source.path}: none of {table.rows_read} interactions has a rating of at least "
            f"{options.min_rating}; give a smaller --min-rating"
        )
    report("filtering")
    if options.deduplicate:
        interactions = deduplicate(interactions)
    interactions = k_core(interactions, core)
    report("splitting")
    offsets = interactions.offsets()
    if split is Split.TEMPORAL:
        bounds = (options.validation_from or DEFAULT_VALIDATION_FROM, options.test_from or DEFAULT_TEST_FROM)
        positions = temporal(interactions, table.unit, *bounds)
    else:
        positions = leave_one_out(np.diff(offsets))
    protocol = {
        "core": core,
        "min_rating": options.min_rating,
        "deduplicate": "first of each user-item pair" if options.deduplicate else None,
        "order": "time ascending within a user; ties keep the order of the input",
        "ids": "items 1 to N and users 0 to U - 1 in ascending order of raw id",
        "time_unit": table.unit,
        "rows_read": table.rows_read,
        **positions.protocol,
    }
    return build_dataset(
        sequences=_sequences(interactions, offsets),
        train_lengths=torch.from_numpy(positions.train_lengths),
        validation_positions=torch.from_numpy(positions.validation_positions),
        test_positions=torch.from_numpy(positions.test_positions),
        item_ids=interactions.item_ids,
        user_ids=interactions.user_ids,
        name=name,
        source=source.path.name,
        source_sha256=file_sha256(source.path),
        format=source.format.value,
        protocol=protocol,
    )


def _sequences(interactions: Interactions, offsets: np.ndarray) -> Jagged:
    return Jagged(torch.from_numpy(interactions.items.astype(np.int64) + 1), torch.from_numpy(offsets))


def _split(options: PrepareOptions) -> Split:
    allowed = [split.value for split in Split]
    if options.split is not None and options.split not in allowed:
        raise DataError(f"--split {options.split!r}: must be one of {', '.join(allowed)}")
    split = Split(options.split or Split.LEAVE_ONE_OUT)
    if split is Split.LEAVE_ONE_OUT and (options.validation_from or options.test_from):
        raise DataError("--validation-from and --test-from are bounds of the temporal split; add --split temporal")
    return split


def _refuse_for_authors(source: Source, options: PrepareOptions) -> None:
    """An option that would change prepared lists is refused rather than ignored."""
    if source.compressed:
        raise DataError(f"{source.path}: a dataset.pkl is read uncompressed; run gunzip first")
    set_here = {
        "--core": (options.core or 0) > 1,
        "--min-rating": options.min_rating is not None,
        "--deduplicate": options.deduplicate,
        "--split": options.split == Split.TEMPORAL.value,
        "--user-column": options.user_column is not None,
        "--item-column": options.item_column is not None,
        "--time-column": options.time_column is not None,
        "--rating-column": options.rating_column is not None,
    }
    for option, present in set_here.items():
        if present:
            raise DataError(
                f"{source.path}: {option} does not apply, a dataset.pkl is prepared already and its lists "
                "are taken as they are; drop the option, or prepare the raw interactions"
            )
