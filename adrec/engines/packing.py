"""Trained modules as the stacked tensors that kernels read."""

from __future__ import annotations

import torch
from torch import Tensor

from adrec.models.adrec import MLPDenoiser
from adrec.models.layers import CausalTransformer, LayerNorm, PadStates
from kernels.block_weights import BlockWeights


def norm_rows(norm: LayerNorm) -> Tensor:
    """Gain and shift `[2, D]` float32."""
    return torch.stack([norm.weight, norm.bias]).detach().float()


def block_weights(transformer: CausalTransformer, dtype: torch.dtype) -> BlockWeights:
    """Stack the blocks of a transformer, matrices in ``dtype``, biases and norms in float32."""
    blocks = list(transformer)

    def matrices(weights: list[Tensor]) -> Tensor:
        return torch.stack(weights).detach().to(dtype).contiguous()

    def biases(weights: list[Tensor]) -> Tensor:
        return torch.stack(weights).detach().float().contiguous()

    return BlockWeights(
        qkv=matrices([block.attention.qkv.weight for block in blocks]),
        qkv_bias=biases([block.attention.qkv.bias for block in blocks]),
        out=matrices([block.attention.output.weight for block in blocks]),
        out_bias=biases([block.attention.output.bias for block in blocks]),
        attention_norm=torch.stack([norm_rows(block.attention_norm) for block in blocks]),
        up=matrices([block.feed_forward.up.weight for block in blocks]),
        up_bias=biases([block.feed_forward.up.bias for block in blocks]),
        down=matrices([block.feed_forward.down.weight for block in blocks]),
        down_bias=biases([block.feed_forward.down.bias for block in blocks]),
        feed_forward_norm=torch.stack([norm_rows(block.feed_forward_norm) for block in blocks]),
    )


def pad_rows(states: PadStates, dtype: torch.dtype) -> Tensor:
    """Keys and values of the padding, `[blocks, 2, P, D]`, of a batch in which all users share it."""
    stacked = torch.stack([keys_values[:, 0] for keys_values in states.keys_values])
    return stacked.transpose(2, 3).flatten(3).detach().to(dtype).contiguous()


def mlp_weights(mlp: MLPDenoiser, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Up and down matrices, each with its bias, and the norm; see `kernels.denoise_last_mlp`."""
    return (
        mlp.up.weight.detach().to(dtype),
        mlp.up.bias.detach().float(),
        mlp.down.weight.detach().to(dtype),
        mlp.down.bias.detach().float(),
        norm_rows(mlp.norm),
    )
