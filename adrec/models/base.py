"""What every model shares: the item table, the history embedding and the causal encoder over it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adrec.config import ModelConfig
from adrec.data.jagged import Jagged
from adrec.models.dropout import dropout
from adrec.models.item_tables import QuantizedTable
from adrec.models.layers import NORM_EPSILON, CausalTransformer, LayerNorm
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
        self.item_embedding: nn.Embedding | QuantizedTable = nn.Embedding(config.items + 1, config.width, padding_idx=0)
        self.position_embedding = nn.Embedding(config.max_length, config.width) if config.positions != "none" else None
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
        """The item table `[N + 1, D]` in float32; a large one that is quantised is unpacked, which takes time."""
        return self.item_embedding.weight

    @property
    def device(self) -> torch.device:
        return self.history_norm.weight.device

    def embed(self, inputs: Tensor, layout: Layout) -> Tensor:
        """``LN(dropout(E[s] + position))`` of packed ids `[M]` -> `[M, D]`."""
        rows = self.item_embedding(inputs)
        if self.position_embedding is not None:
            place = layout.positions + (self.config.max_length - layout.lengths).repeat_interleave(layout.lengths)
            rows = rows + self.position_embedding(place)
        return self._normalise(rows)

    def pad_rows(self) -> Tensor | None:
        """Padding at the encoder's input `[1, P, D]`; None in ``masked`` mode."""
        if self.config.padding == "masked":
            return None
        # Through the table's lookup, not a slice of it: the padding row must receive no gradient.
        rows = self.item_embedding(torch.zeros(1, dtype=torch.int64, device=self.device))
        if self.position_embedding is not None and self.config.positions == "released":
            rows = rows + self.position_embedding.weight
        return self._normalise(rows)[None]

    def pad_bias(self, lengths: Tensor) -> Tensor | None:
        """Bias `[B, P]` on the attention scores of padding for histories of the given lengths `[B]`."""
        if self.config.padding == "masked":
            return None
        counts = (self.config.max_length - lengths)[:, None]
        if self.config.positions != "released":
            return counts.to(self.history_norm.weight.dtype).log()
        place = torch.arange(self.config.max_length, device=lengths.device)
        zero = self.history_norm.weight.new_zeros(1)
        return zero.masked_fill(place >= counts, -torch.inf)

    def encode(self, inputs: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """Condition c of every packed token `[M, D]`, and of the padding `[1, P, D]`."""
        rows = self.pad_rows()
        pads = None if rows is None else self.encoder.pad_states(rows)
        tokens = self.encoder(self.embed(inputs, layout), layout, pads, self.pad_bias(layout.lengths))
        return tokens, None if pads is None else pads.output

    def _normalise(self, rows: Tensor) -> Tensor:
        return self.history_norm(dropout(rows, self.config.embedding_dropout, self.training))
