"""A request whose reverse steps and scoring are nodes of this project's own domain (`operators`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adrec.engines.packing import block_weights, pad_rows
from adrec.errors import ConfigError, NotSupportedError
from adrec.models.adrec import ADRec, MLPDenoiser
from adrec.models.base import SequenceModel
from adrec.models.layers import CausalTransformer
from adrec.schedule import DiffusionTable
from compress.export.request import Encoded, Prefix, RequestGraph
from compress.export.tensorrt.operators import DENOISE_INPUTS, DOMAIN, WEIGHTS
from kernels._reverse_steps import NARROWEST, NARROWEST_HEAD, WIDEST, WIDEST_HEAD
from kernels.score_topk import MOST_RESULTS
from kernels.score_topk import WIDEST as WIDEST_SCORED

if TYPE_CHECKING:
    import onnx_ir


class CountedEncoding(Encoded):
    """`Encoded` that remembers the lengths it was made from, `[B]` int64."""

    lengths: Tensor


class PluginRequest(RequestGraph):
    """`RequestGraph` with the kernels `score_topk` and, for denoisers of transformer blocks, `denoise_last` as nodes.

    Every node has a model-local function of the same name, which runtimes without the plugin run. Raises
    NotSupportedError for widths that the kernels do not have.
    """

    def __init__(self, model: SequenceModel, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(model, dtype=dtype)
        config = model.config
        if config.width > WIDEST_SCORED:
            raise NotSupportedError(f"--plugins: width is {config.width}; the kernels have up to {WIDEST_SCORED}")
        self.denoises = isinstance(model, ADRec) and not isinstance(model.denoiser, MLPDenoiser)
        if self.denoises:
            self._register_denoiser(model)

    def _register_denoiser(self, model: SequenceModel) -> None:
        assert isinstance(model, ADRec)
        assert isinstance(model.denoiser, CausalTransformer)
        config, denoiser, head = model.config, model.denoiser, model.config.width // model.config.heads
        if not NARROWEST <= config.width <= WIDEST or not NARROWEST_HEAD <= head <= WIDEST_HEAD:
            raise NotSupportedError(
                f"--plugins: width is {config.width} and heads are {head} wide; the kernel has widths {NARROWEST} to"
                f" {WIDEST} and heads {NARROWEST_HEAD} to {WIDEST_HEAD}"
            )
        for name, weight in zip(WEIGHTS, block_weights(denoiser, self.dtype), strict=True):
            self.register_buffer(f"plugin_{name}", weight.cpu())
        # Where padding is not seen, one row stands in for the pointer, and none is read.
        branches = 2 if self.guided else 1
        pads = torch.zeros(branches, config.denoiser_blocks, 2, 1, config.width, dtype=self.dtype)
        rows = model.pad_rows()
        self.pad_rows = 0
        if rows is not None:
            with torch.no_grad():
                output = model.encoder.pad_states(rows).output
                start = torch.zeros(1, dtype=torch.int64, device=output.device)
                inputs = [output, torch.zeros_like(output)] if self.guided else [output]
                states = [denoiser.pad_states(model.mix_pads(each, start)) for each in inputs]
            pads = torch.stack([pad_rows(state, self.dtype).cpu() for state in states])
            self.pad_rows = pads.shape[3]
        self.register_buffer("plugin_pads", pads)

    def encode(self, items: Tensor, lengths: Tensor) -> Encoded:
        encoded = CountedEncoding(*super().encode(items, lengths))
        encoded.lengths = lengths
        return encoded

    def reverse(self, encoded: Encoded, noise: Tensor, times: Tensor, table: DiffusionTable) -> Tensor:
        if not self.denoises:
            return super().reverse(encoded, noise, times, table)
        if table.from_previous is not None:
            raise NotSupportedError("--plugins: the kernel denoise_last has no multistep sampler; use ddpm or ddim")
        if not isinstance(encoded, CountedEncoding):
            raise NotSupportedError("--plugins: a denoise graph of its own has no lengths; export without --split")
        offsets = torch.cat([torch.zeros_like(encoded.lengths[:1]), encoded.lengths.cumsum(0)])
        if not table.starts_noisy:
            noise = torch.cat([torch.zeros_like(noise[:1]), noise[1:]])
        attributes = {
            "width": self.config.width,
            "heads": self.config.heads,
            "blocks": self.config.denoiser_blocks,
            "steps": table.steps,
            "pad_rows": self.pad_rows,
            "max_length": self.config.max_length,
            "mix_weight": self.config.lambda_uncertainty,
            "guidance_scale": self.config.guidance_scale,
            "geodesic": int(self.config.geodesic),
        }
        given = {
            **{name: self.get_buffer(f"plugin_{name}") for name in (*WEIGHTS, "pads")},
            "condition": encoded.last,
            "keys_values": self._packed(encoded, offsets),
            "offsets": offsets,
            "times": times.float(),
            "coefficients": torch.stack([table.from_x0, table.from_xt, table.sigma], 1).float(),
            "noise": noise,
        }
        outputs = [(torch.float32, encoded.last.shape), (torch.float32, (1,)), (self.dtype, (1,))]
        rows = self._node("denoise_last", [given[name] for name in DENOISE_INPUTS], attributes, outputs)[0]
        return rows.to(self.dtype)

    def score(self, rows: Tensor, k: int, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if table is not None:
            raise NotSupportedError("--plugins needs the item table inside of the graph; export without --table input")
        if k > MOST_RESULTS:
            raise ConfigError(f"k is {k}; allowed with --plugins: 1 to {MOST_RESULTS}")
        attributes = {"count": self.config.items + 1, "width": self.config.width, "k": k, "first": 1}
        batch = rows.shape[0]
        lists, best = (torch.int64, (batch, 1, k)), (torch.float32, (batch, k))
        found = self._node("score_splits", [rows, self.model.table], attributes, [lists, best])
        _, items, scores = self._node("merge_splits", found, attributes, [lists, (torch.int64, (batch, k)), best])
        return items, scores

    def finish(self, model: onnx_ir.Model) -> None:
        """Add the model-local functions to a graph that `torch.onnx.export` made of this module."""
        from compress.export.tensorrt.functions import add_functions

        add_functions(model)

    def _packed(self, encoded: CountedEncoding, offsets: Tensor) -> Tensor:
        """Keys and values of the prefixes without padding, `[branches, blocks, 2, B, L, D]`, tokens one behind another.

        Token j of user b is place ``offsets[b] + j`` of the B L places; what is behind the last is zero.
        """
        batch, width, lengths = encoded.last.shape[0], self.config.width, encoded.lengths
        rows = torch.stack([part for prefix in encoded.prefixes for part in self._rows(prefix)])
        before = rows.shape[2]
        # Place 0 of the source holds zeros; a prefix is aligned to the right of ``before`` columns.
        rows = torch.cat([rows.new_zeros(rows.shape[0], 1, width), rows.flatten(1, 2)], 1)
        column = torch.arange(before)
        first = before - (lengths[:, None] - 1)
        place = torch.where(column >= first, offsets[:-1, None] + column - first, batch * (before + 1))
        source = 1 + torch.arange(batch)[:, None] * before + column
        index = torch.zeros(batch * (before + 1) + 1, dtype=torch.int64)
        index = index.scatter(0, place.reshape(-1), source.reshape(-1))[:-1]
        branches = 2 if self.guided else 1
        return rows[:, index].reshape(branches, self.config.denoiser_blocks, 2, batch, before + 1, width)

    def _rows(self, prefix: Prefix) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, L - 1, D]`, head by head, padding cut off."""
        batch, width, pads = prefix.values.shape[0], self.config.width, self.pad_rows
        keys = prefix.keys[..., pads:].permute(0, 3, 1, 2)
        values = prefix.values[..., pads:, :].permute(0, 2, 1, 3)
        return keys.reshape(batch, -1, width), values.reshape(batch, -1, width)

    def _node(
        self,
        name: str,
        inputs: Sequence[Tensor],
        attributes: dict[str, Any],
        outputs: Sequence[tuple[torch.dtype, Sequence[Any]]],
    ) -> Sequence[Tensor]:
        """One node. outputs: dtypes and shapes that its model-local function has; scratch is larger in the plugin."""
        # The parser hands a node with these to a plugin that is compiled ahead of time.
        tensorrt: dict[str, Any] = {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}
        return torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{name}",
            inputs,
            {**attributes, **tensorrt},
            dtypes=[dtype for dtype, _ in outputs],
            shapes=[shape for _, shape in outputs],
            version=1,
        )
