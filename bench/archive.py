"""All kinds of records in one place: reading a file without knowing which command wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

from pydantic import Field, TypeAdapter

from adrec.errors import DataError
from bench.calibration import CalibrationRecord
from bench.compression.record import CompressRecord
from bench.json_lines import read_json_lines
from bench.kernels.records import EngineRecord, KernelRecord
from bench.profiling.record import ProfileRecord
from bench.record import TradeoffRecord
from bench.scaling.record import ScalingRecord
from bench.serving.records import ServingRecord
from bench.training_speed.record import TrainingRecord

AnyRecord = (
    TradeoffRecord
    | KernelRecord
    | EngineRecord
    | ServingRecord
    | CalibrationRecord
    | ProfileRecord
    | ScalingRecord
    | TrainingRecord
    | CompressRecord
)
ADAPTER: TypeAdapter[AnyRecord] = TypeAdapter(Annotated[AnyRecord, Field(discriminator="kind")])
KINDS: tuple[str, ...] = tuple(str(kind.model_fields["kind"].default) for kind in get_args(AnyRecord))


def read_any(path: Path) -> list[AnyRecord]:
    """Read and validate the records of a file, of whatever kind; DataError names the line and the way out.

    An empty file is refused too: there is nothing to compare or to convert in it.
    """
    records = read_json_lines(path, ADAPTER.validate_python, "adrec bench run", KINDS)
    if not records:
        raise DataError(f"{path}: is empty, as after a run that measured nothing; `adrec bench run` writes records")
    return records
