"""The networks that are held against each other: their names, what they store, and the files that it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from adrec.checkpoint import Run, load_run
from adrec.config import LayerFormat
from adrec.errors import RunError
from adrec.models.base import SequenceModel
from compress.item_table import ItemTableConfig
from compress.quantize import QuantizeConfig
from compress.workshop import PRECISIONS

FLOAT = "float32"


def network_name(run: Run) -> str:
    """Blocks of encoder and denoiser, and the width, such as ``2+2 x 128``."""
    config = run.config
    denoiser = config.denoiser_blocks if config.model == "adrec" else 0
    kind = " mlp" if denoiser and config.denoiser == "mlp" else ""
    return f"{config.encoder_blocks}+{denoiser}{kind} x {config.width}"


def stored_precision(run: Run) -> str:
    """The precision that a run stores, by the name of `compress.workshop.PRECISIONS` where it has one."""
    stored = run.settings.quantization
    if stored is None:
        return FLOAT
    layers = _in_words(stored.layers.values())
    table = None if stored.table is None else stored.table.format
    return NAMES.get((layers, table)) or f"layers {layers or FLOAT}, table {table or FLOAT}"


def _in_words(formats: Iterable[LayerFormat]) -> str:
    computed = {(each.format, each.compute) for each in formats}
    return ", ".join(sorted(name if compute == FLOAT else f"{name} in {compute}" for name, compute in computed))


def _names() -> Iterator[tuple[tuple[str, str | None], str]]:
    for name, stages in PRECISIONS.items():
        layers: list[LayerFormat] = []
        table = None
        for stage in stages:
            if stage["technique"] == "quantize":
                layers = QuantizeConfig.model_validate(stage).formats("")
            else:
                table = ItemTableConfig.model_validate(stage).format
        # Only layers that cannot bear the first format get the next one.
        for used in range(1, len(layers) + 1) or [0]:
            yield (_in_words(layers[:used]), table), name


NAMES = dict(_names())
"""Of the formats of layers and item table: the name of that precision in `compress.workshop.PRECISIONS`."""


def load_networks(teacher: Run, paths: Sequence[Path], option: str) -> list[Run]:
    """Load compressed runs; raises RunError for one of other data than the teacher's, for a rounded teacher, and for
    two of the same name, by which records tell them apart.
    """
    if (stored := stored_precision(teacher)) != FLOAT:
        raise RunError(
            f"{teacher.path}: stores {stored}, so that it is no teacher to be held against; give the run that it was"
            f" made from, and this one with {option}"
        )
    loaded = [load_run(path) for path in dict.fromkeys(paths)]
    folders: dict[str, Path] = {}
    for run in (teacher, *loaded):
        if run is not teacher and run.path.resolve() == teacher.path.resolve():
            raise RunError(f"{option} {run.path}: is RUN itself, which has its rows already; leave it out")
        if (same := folders.setdefault(run.path.resolve().name, run.path)) != run.path:
            raise RunError(
                f"{option} {run.path}: has the name of {same}, and records know a run by the name of its folder; rename"
                " one of the two"
            )
    for other in loaded:
        if other.dataset_fingerprint != teacher.dataset_fingerprint:
            raise RunError(
                f"{option} {other.path}: was trained on '{other.info.dataset_name}', RUN on"
                f" '{teacher.info.dataset_name}'; give runs of the same data set"
            )
    return loaded


def file_bytes(model: SequenceModel) -> int:
    """Bytes of the file that a run stores a model's weights in."""
    return len(save(state_of(model)))


def state_of(model: SequenceModel) -> dict[str, Tensor]:
    """The weights of a model as a run stores them."""
    return {name: value.detach().contiguous() for name, value in model.state_dict().items()}
