"""The fused engine: a request is three kernel launches (encode, all reverse steps, score with the top k).

Same results as `cached` up to rounding in float32; with bfloat16 or float16 weights and keys up to the rounding of
those. It needs a CUDA device; on CPU tensors it runs only in Triton's interpreter, for tests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adrec.data.jagged import Jagged
from adrec.engines.base import Engine, PlanFeature, TopK
from adrec.engines.packing import block_weights, mlp_weights, norm_rows, pad_rows
from adrec.errors import ConfigError
from adrec.models.adrec import ADRec, MLPDenoiser
from adrec.models.base import SequenceModel
from adrec.models.item_tables import QuantizedTable
from adrec.models.quantized import Packed
from adrec.noise import ExplicitNoise, PhiloxNoise
from adrec.schedule import DiffusionTable
from kernels import _runtime, philox
from kernels._reverse_steps import NARROWEST, NARROWEST_HEAD, WIDEST, WIDEST_HEAD
from kernels.denoise_last import denoise_last
from kernels.denoise_last_mlp import denoise_last_mlp
from kernels.encode_prefix import encode_prefix
from kernels.score_topk import MOST_RESULTS, score_topk


@dataclass(frozen=True)
class PackedState:
    """Histories after encoding, users sorted by length.

    offsets: `[B + 1]` int64 into the packed tokens. last: `[B, D]` float32, condition of each user's last token.
    keys_values: `[branches, blocks, 2, M, D]`, the denoiser's prefix; None where it has none. order: `[B]` int64, input
    row of each sorted row; None: as given.
    """

    offsets: Tensor
    last: Tensor
    keys_values: Tensor | None
    order: Tensor | None = None


@dataclass(frozen=True)
class StepTables:
    """What the reverse steps of one table read: times `[S, D]` and (from_x0, from_xt, sigma) `[S, 3]`, float32."""

    times: Tensor
    coefficients: Tensor


class TritonEngine(Engine):
    """Three kernel launches a request of up to 128 results, and small ones that torch makes.

    Those are four copies to the device (items, offsets, order by length, row keys) and four operators: row keys in that
    order, the seed, rows back in the order of the request, the steps taken. With 16-bit weights rows are rounded by one
    more. A captured request (`adrec.engines.graphs`) has one copy, and two operators beside the three kernels.

    Quantised layers are read as the numbers they stand for, and multiply as this engine's weights do, whatever their
    own ``compute``. A quantised table is scored as it is stored (int4: unpacked).

    Weights are packed once, so make a new engine after changing them. An item whose score is NaN is never returned.
    Raises ConfigError where no kernel runs, and for widths that the kernels do not have.
    """

    name = "triton"
    features = frozenset[PlanFeature]({"start zero"})

    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        """A CUDA device with Triton installed; a CPU in Triton's interpreter only."""
        return _runtime.runs_triton(torch.empty(0, device=device))

    @torch.inference_mode()
    def __init__(self, model: SequenceModel) -> None:
        super().__init__(model)
        if not self.runs_on(self.device):
            missing = "" if _runtime.AVAILABLE else "; Triton is not installed (pip install 'adrec[triton]')"
            raise ConfigError(
                f"engine '{self.name}' runs on CUDA devices and the model is on {model.table.device}{missing};"
                " use engine 'cached' here"
            )
        self._check_widths()
        self.packed_table = model.table.detach().to(self.dtype).contiguous()
        # A quantised table is scored as it is stored; histories are looked up in what it stands for.
        self.scored_table = Packed(self.packed_table, None)
        if isinstance(model.item_embedding, QuantizedTable):
            self.scored_table = model.item_embedding.kernel_operands or self.scored_table
        positions = model.position_embedding
        self.positions = None if positions is None else positions.weight.detach().to(self.dtype).contiguous()
        self.history_norm = norm_rows(model.history_norm)
        self.encoder = block_weights(model.encoder, self.dtype)
        self.encoder_pads: Tensor | None = None
        self.denoiser, self.denoiser_pads, self.start_time = None, None, None
        self.mlp: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None
        self._steps: dict[int, tuple[DiffusionTable, StepTables]] = {}
        self._seed = torch.zeros(1, dtype=torch.int64, device=self.device)
        rows = model.pad_rows()
        pads = None if rows is None else model.encoder.pad_states(rows)
        if pads is not None:
            self.encoder_pads = pad_rows(pads, self.dtype)
        if not isinstance(model, ADRec):
            return
        if isinstance(model.denoiser, MLPDenoiser):
            self.mlp = mlp_weights(model.denoiser, self.dtype)
            return
        self.denoiser = block_weights(model.denoiser, self.dtype)
        start = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.start_time = model.time_embedding(start)[0].float().contiguous()
        if pads is not None:
            inputs = [pads.output] if self.branches == 1 else [pads.output, torch.zeros_like(pads.output)]
            states = [model.denoiser.pad_states(model.mix_pads(row, start)) for row in inputs]
            self.denoiser_pads = torch.stack([pad_rows(state, self.dtype) for state in states])

    @property
    def branches(self) -> int:
        """Denoiser passes a step: 2 with classifier-free guidance."""
        return 1 if self.model.config.guidance_scale == 1.0 else 2

    def encode(self, histories: Jagged) -> PackedState:
        order = torch.argsort(histories.lengths, stable=True)
        state = self.encode_sorted(histories.select(order).to(self.device))
        return replace(state, order=order.to(self.device))

    def encode_sorted(self, histories: Jagged) -> PackedState:
        """Encode histories that lie on the device, sorted by length; one launch."""
        config = self.model.config
        last, keys_values = encode_prefix(
            histories.values,
            histories.offsets,
            self.packed_table,
            self.positions,
            self.history_norm,
            self.model.history_norm.eps,
            self.encoder,
            self.encoder_pads,
            heads=config.heads,
            max_length=config.max_length,
            denoiser=self.denoiser,
            denoiser_pads=self.denoiser_pads,
            start_time=self.start_time,
            mix_weight=config.lambda_uncertainty,
            geodesic=config.geodesic,
            unconditional=self.denoiser is not None and self.branches == 2,
        )
        return PackedState(histories.offsets, last, keys_values)

    def sample(self, state: PackedState, table: DiffusionTable | None, noise: PhiloxNoise | ExplicitNoise) -> Tensor:
        assert state.order is not None
        noise = noise.select(state.order)
        if isinstance(noise, ExplicitNoise):
            rows = self.sample_sorted(state, table, noise=noise.values.contiguous())
        else:
            seed = self._seed.fill_(noise.seed)
            rows = self.sample_sorted(state, table, seed=seed, row_keys=noise.row_keys)
        return torch.empty_like(rows).index_copy_(0, state.order, rows)

    def sample_sorted(
        self,
        state: PackedState,
        table: DiffusionTable | None,
        *,
        seed: int | Tensor = 0,
        row_keys: Tensor | None = None,
        noise: Tensor | None = None,
        steps: StepTables | None = None,
    ) -> Tensor:
        """All reverse steps in one launch, users in the order of ``state``; returns `[B, D]` float32.

        seed: an int, or `[1]` int64 on the device, which a captured graph reads anew. row_keys: `[B]` int64. noise:
        `[S + 1, B, D]` float32 instead of the two. steps: `step_tables` of the table, for a caller that keeps them.
        """
        model = self.model
        if table is None or not isinstance(model, ADRec):
            return state.last
        steps = self.step_tables(table) if steps is None else steps
        if not table.starts_noisy:
            noise = self._drawn_from_zero(state.last.shape[0], table, seed, row_keys, noise)
        if isinstance(model.denoiser, MLPDenoiser):
            assert self.mlp is not None
            return denoise_last_mlp(
                state.last,
                *self.mlp,
                steps.times,
                steps.coefficients,
                norm_epsilon=model.denoiser.norm.eps,
                mix_weight=model.config.lambda_uncertainty,
                seed=seed,
                row_keys=row_keys,
                noise=noise,
                guidance_scale=model.config.guidance_scale,
                geodesic=model.config.geodesic,
            )
        assert self.denoiser is not None
        assert state.keys_values is not None
        return denoise_last(
            state.last,
            self.denoiser,
            state.keys_values,
            self.denoiser_pads,
            state.offsets,
            steps.times,
            steps.coefficients,
            mix_weight=model.config.lambda_uncertainty,
            heads=model.config.heads,
            max_length=model.config.max_length,
            seed=seed,
            row_keys=row_keys,
            noise=noise,
            guidance_scale=model.config.guidance_scale,
            geodesic=model.config.geodesic,
        )

    def _drawn_from_zero(
        self, users: int, table: DiffusionTable, seed: int | Tensor, row_keys: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        """Noise `[S + 1, users, D]` of a plan whose x_T is zero: left alone, the kernels would draw x_T.

        Waits for the device where the plan draws noise on the way and the seed lies there.
        """
        drawn = torch.zeros(table.steps + 1, users, self.model.config.width, device=self.device)
        keys = torch.arange(users, device=self.device) if row_keys is None else row_keys
        for draw in range(1, table.steps):
            if table.sigma[table.steps - draw] != 0.0:
                row = philox.row_noise(int(seed), keys, draw, drawn.shape[2]) if noise is None else noise[draw]
                drawn[draw] = row
        return drawn

    @torch.inference_mode()
    def top_k(self, rows: Tensor, k: int, exclude: Jagged | None = None, *, arrivals: Tensor | None = None) -> TopK:
        """Score and keep the best: one launch for k up to 128, more above; ties go to the lower id.

        arrivals: see `score_topk`. Above 1024 results as `Engine.top_k`, which see for the other arguments.
        """
        if k > MOST_RESULTS:
            return super().top_k(rows, k, exclude)
        self._check_top_k(rows, k, exclude)
        exclude = None if exclude is None else exclude.to(self.device)
        items, scores = score_topk(
            rows.to(self.dtype),
            self.scored_table.values,
            k,
            scale=self.scored_table.scale,
            exclude_items=None if exclude is None else exclude.values,
            exclude_offsets=None if exclude is None else exclude.offsets,
            arrivals=arrivals,
        )
        return TopK(items, scores)

    @torch.no_grad()
    def step_tables(self, table: DiffusionTable) -> StepTables:
        """The table's rows on the device; the last table of each number of steps is kept."""
        kept = self._steps.get(table.steps)
        if kept is None or kept[0] is not table:
            assert isinstance(self.model, ADRec)
            columns = torch.stack([table.from_x0, table.from_xt, table.sigma], 1)
            times = self.model.time_embedding(table.time.to(self.device))
            kept = table, StepTables(times.float().contiguous(), columns.to(self.device))
            self._steps[table.steps] = kept
        return kept[1]

    def _check_widths(self) -> None:
        config = self.model.config
        head = config.width // config.heads
        if not NARROWEST <= config.width <= WIDEST or not NARROWEST_HEAD <= head <= WIDEST_HEAD:
            raise ConfigError(
                f"the model has width {config.width} and heads of {head}; engine '{self.name}' allows widths of"
                f" {NARROWEST} to {WIDEST} and heads of {NARROWEST_HEAD} to {WIDEST_HEAD}; use engine 'cached'"
            )


class TritonBFloat16Engine(TritonEngine):
    """`TritonEngine` with bfloat16 weights, item table and keys, and float32 accumulation."""

    name = "triton-bf16"
    dtype = torch.bfloat16


class TritonFloat16Engine(TritonEngine):
    """`TritonEngine` with float16 weights, item table and keys, and float32 accumulation."""

    name = "triton-fp16"
    dtype = torch.float16
