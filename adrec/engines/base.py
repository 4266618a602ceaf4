"""The engine interface: encode histories, sample a representation, score the catalogue, take the top k."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adrec.config import EarlyStop, ServingConfig
from adrec.data.jagged import Jagged
from adrec.engines.top_k import TopK, chunked_top_k, quantized_top_k
from adrec.errors import ConfigError, NotSupportedError
from adrec.models.adrec import ADRec
from adrec.models.base import SequenceModel
from adrec.models.item_tables import QuantizedTable
from adrec.noise import ExplicitNoise, PhiloxNoise
from adrec.respacing import Steps, sampling_table
from adrec.sampler import Sampled
from adrec.schedule import DiffusionTable
from kernels import philox

PlanFeature = Literal["sampler dpm++2m", "start zero", "early stop"]

SCORES_BUDGET = 2**25


class Engine(ABC):
    """Computes recommendations of one trained model.

    Every engine returns the same numbers up to rounding: noise is a function of (seed, row key, draw, dimension), so a
    user's recommendations depend neither on the batch nor on the engine.
    """

    name: ClassVar[str]
    dtype: ClassVar[torch.dtype] = torch.float32
    """Storage of weights, item table and keys."""
    features: ClassVar[frozenset[PlanFeature]] = frozenset()
    """What it samples beyond linear updates (DDPM, DDIM) from noise; the rest is refused."""
    exports: ClassVar[bool] = False
    """Whether it makes a file for each number of steps first, which takes seconds."""

    @classmethod
    def runs_on(cls, device: torch.device) -> bool:
        """Whether this engine can compute on a device here."""
        return True

    def __init__(self, model: SequenceModel) -> None:
        self.model = model.eval()
        self._tables: dict[Steps, DiffusionTable] = {}

    @property
    def device(self) -> torch.device:
        return self.model.device

    @abstractmethod
    def encode(self, histories: Jagged) -> Any:
        """Everything about the histories that no reverse step changes. Each needs 1 item or more.

        histories: on any device; an engine moves them to its own.
        """

    @abstractmethod
    def sample(self, state: Any, table: DiffusionTable | None, noise: PhiloxNoise | ExplicitNoise) -> Tensor:
        """Run the reverse process of ``table`` (None for models without one); returns `[B, D]` in input order."""

    def sample_until_stable(
        self, state: Any, table: DiffusionTable, noise: PhiloxNoise | ExplicitNoise, stop: EarlyStop
    ) -> Sampled:
        """`sample`, each user only until its best items stay; see `adrec.sampler.until_stable`."""
        raise NotSupportedError(f"engine '{self.name}' cannot sample with early stop; use engine 'cached'")

    def table(self, steps: Steps) -> DiffusionTable | None:
        """Coefficients of a plan (a count, settings, or None: as trained); None for a model without diffusion.

        Raises ConfigError for steps the model was not trained with, NotSupportedError for a plan that this engine
        cannot run.
        """
        if not isinstance(self.model, ADRec):
            if steps not in (None, 1):
                wanted = steps if isinstance(steps, int) else "a plan"
                raise ConfigError(f"steps is {wanted}, but a '{self.model.config.model}' model has no reverse steps")
            return None
        steps = self.model.config.timesteps if steps is None else steps
        if steps not in self._tables:
            if isinstance(steps, ServingConfig):
                steps.check(self.model.config)
                self._check_features(steps)
            self._tables[steps] = sampling_table(self.model.betas, steps)
        return self._tables[steps]

    def _check_features(self, plan: ServingConfig) -> None:
        asked: dict[PlanFeature, bool] = {
            "sampler dpm++2m": plan.sampler == "dpm++2m",
            "start zero": plan.start == "zero",
            "early stop": plan.early_stop is not None,
        }
        for feature, wanted in asked.items():
            if wanted and feature not in self.features:
                raise NotSupportedError(
                    f"engine '{self.name}' cannot sample with {feature}; use engine 'cached', or a plan without it"
                )

    @torch.inference_mode()
    def represent(
        self,
        histories: Jagged,
        steps: Steps = None,
        seed: int = 0,
        noise: Tensor | None = None,
        row_keys: Tensor | None = None,
    ) -> Tensor:
        """Generate the representation of each history's next item, `[B, D]`.

        histories: item ids 1..N, oldest first; the last ``max_length`` are read. steps: S of 1..T (None: T), evenly
        spaced DDPM steps, or `ServingConfig`. seed: of the noise. noise: `[S + 1, B, D]` instead of a seed. row_keys:
        `[B]` int64 in [0, 2^39), the identity of each user in the noise (None: a hash of the history). Raises
        ValueError for an empty history.
        """
        return self.generate(histories, steps, seed, noise, row_keys).rows

    @torch.inference_mode()
    def generate(
        self,
        histories: Jagged,
        steps: Steps = None,
        seed: int = 0,
        noise: Tensor | None = None,
        row_keys: Tensor | None = None,
    ) -> Sampled:
        """`represent`, and the reverse steps that each user took (none for a model without); same arguments."""
        if len(histories) == 0:
            self.table(steps)
            return Sampled(
                torch.empty(0, self.model.config.width, device=self.device),
                torch.empty(0, dtype=torch.int64, device=self.device),
            )
        table = self.table(steps)
        histories, source = self._checked(histories, table, seed, noise, row_keys)
        state = self.encode(histories)
        if table is not None and isinstance(steps, ServingConfig) and steps.early_stop is not None:
            return self.sample_until_stable(state, table, source, steps.early_stop)
        rows = self.sample(state, table, source)
        taken = 0 if table is None else table.steps
        return Sampled(rows, torch.full((rows.shape[0],), taken, dtype=torch.int64, device=rows.device))

    def _checked(
        self,
        histories: Jagged,
        table: DiffusionTable | None,
        seed: int,
        noise: Tensor | None = None,
        row_keys: Tensor | None = None,
    ) -> tuple[Jagged, PhiloxNoise | ExplicitNoise]:
        """The items that are read, and the source of the noise; raises ValueError for what does not fit together."""
        self.check_histories(histories)
        histories = histories.tail(self.model.config.max_length)
        if noise is not None and (row_keys is not None or table is None):
            raise ValueError("noise was given with row_keys, or to a model that draws none; give one of them at most")
        if noise is not None and table is not None:
            expected = (table.steps + 1, len(histories), self.model.config.width)
            if noise.shape != expected:
                raise ValueError(f"noise is {tuple(noise.shape)}; expected {expected}: steps + 1, histories, width")
            return histories, ExplicitNoise(noise.to(self.device))
        if row_keys is None:
            row_keys = history_keys(histories)
        elif row_keys.shape != (len(histories),):
            raise ValueError(f"row_keys is {tuple(row_keys.shape)}; expected [{len(histories)}], one for each history")
        philox.check_row_keys(row_keys)
        planned = () if table is None else table.draws
        return histories, PhiloxNoise(seed, row_keys.to(self.device), self.model.config.width, planned)

    @torch.inference_mode()
    def score(self, rows: Tensor) -> Tensor:
        """Inner products with the whole table, `[B, D] -> [B, N + 1]`; column 0 is the padding row."""
        return rows @ self.model.table.T

    @torch.inference_mode()
    def top_k(self, rows: Tensor, k: int, exclude: Jagged | None = None) -> TopK:
        """Best k items of each representation `[B, D]`, holding at most 2^25 scores or B k of them at a time.

        exclude: items to leave out of each row's list. A large quantised table is read as it is stored, see
        `quantized_top_k`. Raises ValueError unless 1 <= k <= N.
        """
        self._check_top_k(rows, k, exclude)
        stored = self.model.item_embedding
        if isinstance(stored, QuantizedTable) and stored.dense is None:
            return quantized_top_k(stored, rows, k, exclude)
        items = self.model.config.items
        chunk = max(k, min(items, SCORES_BUDGET // max(1, rows.shape[0])))
        table = self.model.table
        return chunked_top_k(lambda first, last: rows @ table[first:last].T, rows, items, chunk, k, exclude)

    def check_histories(self, histories: Jagged) -> None:
        """Raise ValueError for an empty history or an item id outside 1..N."""
        if len(histories) == 0:
            return
        if int(histories.lengths.min()) < 1:
            row = int((histories.lengths < 1).nonzero()[0])
            raise ValueError(
                f"history {row} is empty; an engine needs 1 item or more (Recommender falls back to popularity)"
            )
        least, most = (int(bound) for bound in histories.values.aminmax())
        if least < 1 or most > self.model.config.items:
            raise ValueError(f"item ids span {least} to {most}; allowed: 1 to {self.model.config.items} (0 is padding)")

    def _check_top_k(self, rows: Tensor, k: int, exclude: Jagged | None) -> None:
        if not 1 <= k <= self.model.config.items:
            raise ValueError(f"k is {k}; allowed: 1 to {self.model.config.items}, the size of the catalogue")
        if exclude is not None and len(exclude) != rows.shape[0]:
            raise ValueError(f"exclude has {len(exclude)} rows; expected {rows.shape[0]}, one for each representation")

    def recommend(
        self,
        histories: Jagged,
        k: int,
        steps: Steps = None,
        seed: int = 0,
        row_keys: Tensor | None = None,
        exclude: Jagged | None = None,
    ) -> TopK:
        """Represent, score and take the top k in one call; see `represent` and `top_k`."""
        return self.top_k(self.represent(histories, steps, seed, row_keys=row_keys), k, exclude)


def history_keys(histories: Jagged) -> Tensor:
    """Hash each history to a row key in [0, 2^39): equal histories share their noise. Returns `[B]` int64."""
    if histories.values.numel() == 0:
        return torch.zeros_like(histories.lengths)
    if len(histories) == 1 and histories.values.device.type == "cpu":
        return torch.tensor([history_key(histories.values.numpy())])
    multipliers = _place_multipliers(histories.longest).to(histories.values.device)
    # Products wrap around in int64 on purpose; the odd multiplier of each place keeps the order of items relevant.
    rows = histories.rows
    from_end = histories.offsets[1:][rows] - torch.arange(rows.numel(), device=rows.device)
    mixed = (histories.values + 1) * multipliers[from_end]
    total = torch.zeros_like(histories.lengths).index_add_(0, rows, mixed)
    return (total ^ (total >> 29)) & (philox.ROW_KEYS - 1)


def history_key(items: NDArray[np.int64]) -> int:
    """`history_keys` of one history `[L]` in a tenth of the time, which is much of what a single user waits for."""
    total = int(((items + 1) * _place_multipliers(len(items)).numpy()[:0:-1]).sum())
    return (total ^ (total >> 29)) & (philox.ROW_KEYS - 1)


@cache
def _place_multipliers(longest: int) -> Tensor:
    high, low = philox.philox(0, torch.arange(longest + 1))
    return (high << 31) ^ low | 1
