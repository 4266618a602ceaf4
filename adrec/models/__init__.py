"""The networks: shared layers over jagged batches, ADRec and SASRec+."""

from __future__ import annotations

from adrec.config import ModelConfig, QuantizationConfig
from adrec.models.adrec import ADRec
from adrec.models.base import SequenceModel
from adrec.models.item_tables import QuantizedTable
from adrec.models.quantized import QuantizedLinear, give_layer_formats
from adrec.models.sasrec import SASRec

MODELS: dict[str, type[SequenceModel]] = {"adrec": ADRec, "sasrec": SASRec}


def build_model(config: ModelConfig, quantization: QuantizationConfig | None = None) -> SequenceModel:
    """Create the network of a configuration, with fresh weights from torch's global generator.

    quantization: formats of its layers and table, which then hold zeros, to load a state into. Raises ConfigError for
    formats that do not fit the network.
    """
    model = MODELS[config.model](config)
    if quantization is not None:
        give_layer_formats(model, quantization)
        if quantization.table is not None:
            model.item_embedding = QuantizedTable.empty(config.items, config.width, quantization.table)
    return model


def quantization_of(model: SequenceModel) -> QuantizationConfig | None:
    """The formats that a model's layers and table have; None for a model in float32."""
    layers = {name: part.format for name, part in model.named_modules() if isinstance(part, QuantizedLinear)}
    table = model.item_embedding.format if isinstance(model.item_embedding, QuantizedTable) else None
    return QuantizationConfig(layers=layers, table=table) if layers or table is not None else None


__all__ = ["MODELS", "ADRec", "SASRec", "SequenceModel", "build_model", "quantization_of"]
