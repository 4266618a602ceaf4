"""Engines: one interface, several ways to compute the same recommendations."""

from __future__ import annotations

from adrec.engines.base import Engine, TopK
from adrec.engines.cached import CachedEngine
from adrec.engines.reference import ReferenceEngine
from adrec.errors import ConfigError, nearest
from adrec.models.base import SequenceModel

ENGINES: dict[str, type[Engine]] = {"reference": ReferenceEngine, "cached": CachedEngine}


def make_engine(name: str, model: SequenceModel) -> Engine:
    """Create an engine by name; raises ConfigError with the nearest name for an unknown one."""
    if name not in ENGINES:
        raise ConfigError(f"unknown engine '{name}'{nearest(name, ENGINES)}; allowed: {', '.join(ENGINES)}")
    return ENGINES[name](model)


__all__ = ["ENGINES", "CachedEngine", "Engine", "ReferenceEngine", "TopK", "make_engine"]
