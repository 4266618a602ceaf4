"""torchao behind one door: weights rounded to a format as stored tensors, and layers that train as if rounded."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from adrec.config import LayerFormat
from adrec.errors import NotSupportedError
from adrec.models.base import SequenceModel
from adrec.models.quantized import Packed, QuantizedLinear, pack, pack_int4
from compress.technique import CompressionError

_INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]
TRAINABLE = ("int8", "int8-dynamic", "int4")


def quantized_linear(layer: nn.Linear, layer_format: LayerFormat) -> QuantizedLinear:
    """A linear layer rounded to a format by torchao (bfloat16: by torch), stored without torchao.

    Raises CompressionError for weights that are not finite, and for a group size that does not divide the inputs.
    """
    if not bool(layer.weight.isfinite().all()):
        raise CompressionError("holds weights that are not finite; such a run cannot be quantised")
    group = layer_format.group_size
    if group is not None and (layer.in_features % group or layer.in_features % 2):
        raise CompressionError(f"group_size is {group}; allowed: what divides {layer.in_features}, the layer's inputs")
    return QuantizedLinear(_packed(layer, layer_format), layer.bias, layer_format)


def _packed(layer: nn.Linear, layer_format: LayerFormat) -> Packed:
    if layer_format.format == "bf16":
        return pack(layer.weight, "bf16")
    quantization = torchao_quantization()
    holder = copy.deepcopy(layer)
    quantization.quantize_(holder, _settings(quantization, layer_format))
    stored: Any = holder.weight
    zero_point = getattr(stored, "zero_point", None)
    assert zero_point is None or not bool(zero_point.any()), "a symmetric format has no zero point"
    if layer_format.format == "int4":
        return Packed(pack_int4(stored.qdata), stored.scale.float())
    return Packed(stored.qdata, stored.scale.float().squeeze(1))


def _settings(quantization: Any, layer_format: LayerFormat) -> Any:
    if layer_format.format == "int8":
        return quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    if layer_format.format == "int8-dynamic":
        return quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    if layer_format.format in ("fp8", "fp8-dynamic"):
        # torchao's dynamic configuration refuses machines that cannot multiply fp8; it stores the same numbers.
        return quantization.Float8WeightOnlyConfig(set_inductor_config=False)
    # Int4WeightOnlyConfig packs for one GPU kernel each; this gives the plain numbers.
    group = quantization.PerGroup(layer_format.group_size)
    return quantization.IntxWeightOnlyConfig(weight_dtype=_INT4, granularity=group)


def prepare_training(model: SequenceModel, names: Collection[str], layer_format: LayerFormat) -> None:
    """Let the named layers multiply by rounded weights while the weights they train stay float32 (straight-through).

    Inputs are not rounded. Raises CompressionError for a format without integers.
    """
    if layer_format.format not in TRAINABLE:
        raise CompressionError(
            f"format {layer_format.format!r} cannot be trained for; allowed: {', '.join(TRAINABLE)};"
            " fine_tune_epochs 0 rounds without training"
        )
    quantization = torchao_quantization()
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    if layer_format.format == "int4":
        rounding = IntxFakeQuantizeConfig(_INT4, group_size=layer_format.group_size, is_symmetric=True)
    else:
        rounding = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    settings = QATConfig(weight_config=rounding, step="prepare")
    quantization.quantize_(model, settings, filter_fn=lambda module, name: name in names)


def finish_training(model: SequenceModel, names: Collection[str]) -> None:
    """Undo `prepare_training`: the named layers are linear ones again, with the trained weights."""
    for name in names:
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, layer.to_linear())


def torchao_quantization() -> Any:
    """torchao's `quantization` module; raises NotSupportedError where it is not installed."""
    disabled = logging.root.manager.disable
    # It warns of each of its GPU libraries that a machine without a GPU cannot load.
    logging.disable(logging.WARNING)
    try:
        from torchao import quantization
    except ImportError:
        raise NotSupportedError(
            "quantising needs torchao: pip install 'adrec[quantize]'; format 'bf16' does not"
        ) from None
    finally:
        logging.disable(disabled)
    return quantization
