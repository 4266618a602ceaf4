"""The networks: shared layers over jagged batches, ADRec and SASRec+."""

from __future__ import annotations

from adrec.config import ModelConfig
from adrec.models.adrec import ADRec
from adrec.models.base import SequenceModel
from adrec.models.sasrec import SASRec

MODELS: dict[str, type[SequenceModel]] = {"adrec": ADRec, "sasrec": SASRec}


def build_model(config: ModelConfig) -> SequenceModel:
    """Create the network of a configuration, with fresh weights from torch's global generator."""
    return MODELS[config.model](config)


__all__ = ["MODELS", "ADRec", "SASRec", "SequenceModel", "build_model"]
