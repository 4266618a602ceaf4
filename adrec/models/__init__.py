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


def in_float32(model: SequenceModel) -> SequenceModel:
    """The model with every layer and the table in float32, as the numbers it stores stand for.

    A float32 model is returned as it is. What a quantised one does beside its weights (rounding the rows that a dynamic
    layer takes, computing in bfloat16) is left out.
    """
    if quantization_of(model) is None:
        return model
    plain, state = build_model(model.config), dict(model.state_dict())
    for name, part in model.named_modules():
        if isinstance(part, QuantizedLinear | QuantizedTable):
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
            state[f"{name}.weight"] = part.weight
            if isinstance(part, QuantizedLinear):
                state[f"{name}.bias"] = part.bias
    plain.load_state_dict(state)
    return plain.to(model.table.device).train(model.training)


__all__ = ["MODELS", "ADRec", "SASRec", "SequenceModel", "build_model", "in_float32", "quantization_of"]
