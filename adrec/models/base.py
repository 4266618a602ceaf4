"""What every model shares: the item table, the history embedding and the causal encoder over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adrec.config import ModelConfig
from adrec.data.jagged import Jagged
from adrec.models.dropout import dropout
from adrec.models.layers import NORM_EPSILON, CausalTransformer, LayerNorm, Pads
from adrec.models.layout import Layout

WEIGHT_STD = 0.1


@dataclass(frozen=True)
class TokenBatch:
    """A training batch: packed inputs and one-shifted targets `[M]` int64, users sorted by length."""

    inputs: Tensor
    targets: Tensor
    layout: Layout

    @classmethod
    def from_sequences(cls, sequences: Jagged, max_length: int) -> TokenBatch:
        """Cut each sequence (2 items or more) to its last ``max_length + 1`` and shift it by one."""
        sequences = sequences.tail(max_length + 1)
        sequences = sequences.select(torch.argsort(sequences.lengths, stable=True))
        ends = sequences.offsets[1:] - 1
        keep = torch.ones(sequences.values.numel(), dtype=torch.bool, device=ends.device)
        keep[ends] = False
        return cls(
            inputs=sequences.values[keep],
            targets=sequences.values[1:][keep[:-1]],
            layout=Layout.from_sorted_lengths(sequences.lengths - 1),
        )

    def to(self, device: torch.device) -> TokenBatch:
        """Move to a device."""
        if self.inputs.device == device:
            return self
        lengths = self.layout.lengths.to(device)
        return TokenBatch(self.inputs.to(device), self.targets.to(device), Layout.from_sorted_lengths(lengths))


class SequenceModel(nn.Module):
    """Item table `[N + 1, D]` (row 0 is padding and stays zero), optional positions, norm and causal encoder."""

    history_norm_epsilon = NORM_EPSILON

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.item_embedding = nn.Embedding(config.items + 1, config.width, padding_idx=0)
        self.position_embedding = (
            nn.Embedding(config.max_length, config.width) if config.positions == "learned" else None
        )
        self.history_norm = LayerNorm(config.width, self.history_norm_epsilon)
        self.encoder = CausalTransformer(config.width, config.heads, config.encoder_blocks, config.dropout)

    def initialise(self) -> None:
        """Xavier-normal linear layers with zero bias; item table and positions N(0, .1), padding row zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                self._initialise_linear(module.weight)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.item_embedding.weight.normal_(0.0, WEIGHT_STD)
            self.item_embedding.weight[0] = 0.0
            if self.position_embedding is not None:
                self.position_embedding.weight.normal_(0.0, WEIGHT_STD)

    def _initialise_linear(self, weight: Tensor) -> None:
        nn.init.xavier_normal_(weight)

    @property
    def table(self) -> Tensor:
        """The item table `[N + 1, D]`."""
        return self.item_embedding.weight

    def embed(self, inputs: Tensor, layout: Layout) -> tuple[Tensor, Pads | None]:
        """``LN(dropout(E[s] + position))`` of packed ids `[M]`, and the padding rows in ``released`` mode."""
        rows = self.item_embedding(inputs)
        if self.position_embedding is not None:
            place = layout.positions + (self.config.max_length - layout.lengths).repeat_interleave(layout.lengths)
            rows = rows + self.position_embedding(place)
        tokens = self.history_norm(dropout(rows, self.config.embedding_dropout, self.training))
        return tokens, self.pads(layout.lengths)

    def pads(self, lengths: Tensor) -> Pads | None:
        """Padding rows at the encoder's input for histories of the given lengths `[B]`; None in ``masked`` mode."""
        if self.config.padding == "masked":
            return None
        counts = self.config.max_length - lengths
        # Through the table's lookup, not a slice of it: the padding row must receive no gradient.
        padding = self.item_embedding(counts.new_zeros(1))
        if self.position_embedding is None:
            raw, bias = padding, counts.to(self.table.dtype).log()[:, None]
        else:
            raw = padding + self.position_embedding.weight
            place = torch.arange(self.config.max_length, device=lengths.device)
            bias = torch.zeros(1, dtype=raw.dtype, device=raw.device).masked_fill(place >= counts[:, None], -torch.inf)
        return Pads(self.history_norm(raw)[None], bias)

    def encode(self, inputs: Tensor, layout: Layout) -> tuple[Tensor, Pads | None]:
        """Condition c of every packed token `[M, D]`, and of the padding."""
        tokens, pads = self.embed(inputs, layout)
        return self.encoder(tokens, layout, pads)
