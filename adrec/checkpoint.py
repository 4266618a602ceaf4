"""Run folders: ``config.yaml``, ``model.safetensors``, ``items.parquet``, ``run.json``, ``metrics.json`` and logs.

Loading a run reads YAML (safe loader), JSON, Parquet and safetensors only: no code in it is ever executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adrec.config import ModelConfig, RunConfig, StrictModel, load_yaml, parse
from adrec.data.dataset import Dataset, tool_version
from adrec.errors import ConfigError, RunError
from adrec.files import replacing, write_text
from adrec.models import build_model, quantization_of
from adrec.models.base import SequenceModel

CONFIG, WEIGHTS, ITEMS, RUN_FILE, METRICS_FILE = (
    "config.yaml",
    "model.safetensors",
    "items.parquet",
    "run.json",
    "metrics.json",
)
BASELINE = "baseline"


class RunInfo(StrictModel):
    """Contents of ``run.json``: where the run comes from.

    data_path: absolute, so that it is found from any directory; as given where nothing is there, and in runs of earlier
    versions.
    """

    schema_version: Literal[1] = 1
    tool_version: str
    dataset_name: str
    dataset_fingerprint: str
    data_path: str
    model_fingerprint: str
    config_sha256: str


@dataclass(frozen=True)
class Run:
    """A loaded run. item_ids: raw id of item i is ``item_ids[i - 1]``; item_counts: `[N + 1]` training counts."""

    path: Path
    settings: RunConfig
    info: RunInfo
    model: SequenceModel
    item_ids: pa.Array
    item_counts: Tensor
    metrics: dict[str, Any]

    @property
    def config(self) -> ModelConfig:
        return self.settings.model

    @property
    def fingerprint(self) -> str:
        return self.info.model_fingerprint

    @property
    def dataset_fingerprint(self) -> str:
        return self.info.dataset_fingerprint

    @property
    def data_path(self) -> str:
        return self.info.data_path

    def baseline(self) -> Run | None:
        """The SASRec+ run of stage 1 kept inside this run, if there is one."""
        return load_run(self.path / BASELINE) if (self.path / BASELINE / RUN_FILE).is_file() else None


def model_fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values of a state dict, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def save_run(
    path: Path, settings: RunConfig, model: SequenceModel, dataset: Dataset, data_path: str, metrics: Mapping[str, Any]
) -> None:
    """Write a run's files into ``path`` (made when missing), each whole or not at all; ``run.json`` comes last."""
    formats = quantization_of(model)
    if formats != settings.quantization:
        raise RunError(
            f"{path}: the settings say quantization {settings.quantization}, but the model has {formats}; pass settings"
            " with quantization_of(model)"
        )
    path.mkdir(parents=True, exist_ok=True)
    (path / RUN_FILE).unlink(missing_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with replacing(path / WEIGHTS) as temporary:
        save_file(state, temporary)
    write_text(path / CONFIG, yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    table = pa.table({"raw": dataset.item_ids, "count": pa.array(dataset.item_counts()[1:].numpy())})
    with replacing(path / ITEMS) as temporary:
        pq.write_table(table, temporary)
    write_metrics(path, metrics)
    where = Path(data_path)
    info = RunInfo(
        tool_version=tool_version(),
        dataset_name=dataset.name,
        dataset_fingerprint=dataset.fingerprint,
        data_path=str(where.resolve()) if data_path and where.exists() else data_path,
        model_fingerprint=model_fingerprint(state),
        config_sha256=_sha256(path / CONFIG),
    )
    write_text(path / RUN_FILE, info.model_dump_json(indent=2) + "\n")


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write ``metrics.json`` of a run."""
    write_text(path / METRICS_FILE, json.dumps(metrics, indent=2, sort_keys=True) + "\n")


def load_run(path: str | Path, device: str = "cpu") -> Run:
    """Read a run folder; raises RunError naming what is missing, damaged or of another version."""
    path = Path(path)
    if not (path / RUN_FILE).is_file():
        raise RunError(
            f"{path}: not a finished run ({RUN_FILE} is missing); train one with `adrec train DATA --out {path}`,"
            " or continue an interrupted one with --resume"
        )
    content = _read(path / RUN_FILE, _json)
    writer = content.get("tool_version") if isinstance(content, dict) else None
    info = _parse(RunInfo, content, path / RUN_FILE, writer)
    settings = _parse(RunConfig, _read(path / CONFIG, load_yaml), path / CONFIG, writer)
    state = _read(path / WEIGHTS, lambda file: load_file(file, device=device))
    items = _read(path / ITEMS, pq.read_table)
    if not {"raw", "count"} <= set(items.column_names):
        raise RunError(f"{path / ITEMS}: columns are {', '.join(items.column_names)}; expected raw and count")
    metrics = _read(path / METRICS_FILE, _json)
    if model_fingerprint(state) != info.model_fingerprint:
        raise RunError(f"{path / WEIGHTS}: the weights do not match the fingerprint in {RUN_FILE}; restore the file")
    try:
        model = build_model(settings.model, settings.quantization)
        _check_dtypes(model.state_dict(), state)
        model.load_state_dict(state)
    except (ConfigError, RuntimeError) as error:
        raise RunError(
            f"{path}: {CONFIG} does not describe the weights: {error}. Restore both files from one copy of the run"
        ) from None
    if items.num_rows != settings.model.items:
        raise RunError(f"{path / ITEMS}: {items.num_rows} items, but the model has {settings.model.items}")
    if _read(path / CONFIG, _sha256) != info.config_sha256:
        raise RunError(f"{path / CONFIG}: was changed or cut after the run was written; restore the file")
    counts = torch.zeros(items.num_rows + 1, dtype=torch.int64)
    counts[1:] = torch.from_numpy(items["count"].to_numpy().copy())
    raw = items["raw"].combine_chunks()
    return Run(path, settings, info, model.to(device).eval(), raw, counts, metrics)


def _check_dtypes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    # Loading would convert them, and make other numbers of what was stored.
    for name in expected.keys() & found.keys():
        if expected[name].dtype != found[name].dtype:
            raise ConfigError(f"{name} is {found[name].dtype}; expected {expected[name].dtype}")


Content = TypeVar("Content")
Settings = TypeVar("Settings", bound=StrictModel)


def _read(file: Path, reader: Callable[[Path], Content]) -> Content:
    try:
        return reader(file)
    except (ConfigError, OSError, ValueError, SafetensorError, pa.ArrowException) as error:
        raise RunError(
            f"{file}: the run cannot be read: {error}. Restore {file.name} from a copy, or train the run again"
        ) from None


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _parse(kind: type[Settings], values: Any, file: Path, writer: Any) -> Settings:
    """Validate the contents of a run's file; raises RunError naming the file and what to do. writer: its adrec."""
    try:
        return parse(kind, values, str(file))
    except ConfigError as error:
        other = f"adrec {writer}, which wrote the run" if isinstance(writer, str) else "the adrec that wrote the run"
        raise RunError(
            f"{error}. This is adrec {tool_version()}: read the run with {other}, restore {file.name} from a copy, or"
            " train the run again"
        ) from None
