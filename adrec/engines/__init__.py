"""Engines: one interface, several ways to compute the same recommendations."""

from __future__ import annotations

from pathlib import Path

import torch

from adrec.engines.aotinductor import AotInductorEngine
from adrec.engines.base import Engine, TopK
from adrec.engines.cached import CachedEngine
from adrec.engines.exported_engine import ExportedEngine
from adrec.engines.onnxruntime import OnnxRuntimeEngine, OnnxRuntimeInt8Engine, check_provider, load_onnxruntime
from adrec.engines.reference import ReferenceEngine
from adrec.engines.tensorrt.engine import TensorRTEngine, TensorRTFloat16Engine
from adrec.engines.triton import TritonBFloat16Engine, TritonEngine, TritonFloat16Engine
from adrec.errors import ConfigError, nearest
from adrec.models.base import SequenceModel

_KINDS: tuple[type[Engine], ...] = (
    ReferenceEngine,
    CachedEngine,
    TritonEngine,
    TritonBFloat16Engine,
    TritonFloat16Engine,
    OnnxRuntimeEngine,
    OnnxRuntimeInt8Engine,
    AotInductorEngine,
    TensorRTEngine,
    TensorRTFloat16Engine,
)
ENGINES: dict[str, type[Engine]] = {kind.name: kind for kind in _KINDS}


def exact_engines(device: torch.device) -> list[str]:
    """Names of the engines that compute in float32, run on a device, and need no file made first."""
    return [
        name
        for name, kind in ENGINES.items()
        if kind.dtype == torch.float32 and not kind.exports and kind.runs_on(device)
    ]


def check_engine(name: str, provider: str | None = None) -> type[Engine]:
    """The engine of a name. Raises ConfigError for an unknown one, with the nearest name.

    provider: ONNX Runtime's, for its engines alone (ConfigError); NotSupportedError where it is not installed.
    """
    if name not in ENGINES:
        raise ConfigError(f"unknown engine '{name}'{nearest(name, ENGINES)}; allowed: {', '.join(ENGINES)}")
    kind = ENGINES[name]
    if provider is not None:
        if not issubclass(kind, OnnxRuntimeEngine):
            raise ConfigError(
                f"provider is '{provider}', but engine '{name}' has none; leave it out, or use engine"
                f" '{OnnxRuntimeEngine.name}'"
            )
        check_provider(load_onnxruntime(), provider)
    return kind


def make_engine(name: str, model: SequenceModel, folder: Path | None = None, provider: str | None = None) -> Engine:
    """Create an engine by name; raises what `check_engine` does.

    folder: of `adrec export`, whose files an engine that reads some runs, in its own precision or, for those in
    float32, in the folder's first; without it such an engine makes its own. provider: see `OnnxRuntimeEngine`.
    """
    kind = check_engine(name, provider)
    options = {} if provider is None else {"provider": provider}
    if folder is None:
        return kind(model, **options)
    if not issubclass(kind, ExportedEngine):
        raise ConfigError(f"engine '{name}' reads no exported folder, so {folder} is of no use to it; leave it out")
    return kind.from_export(folder, model, precision=None if kind.precision == "fp32" else kind.precision, **options)


__all__ = [
    "ENGINES",
    "AotInductorEngine",
    "CachedEngine",
    "Engine",
    "OnnxRuntimeEngine",
    "ReferenceEngine",
    "TensorRTEngine",
    "TopK",
    "TritonEngine",
    "check_engine",
    "exact_engines",
    "make_engine",
]
