"""Raw histories in, raw item ids and scores out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from adrec.checkpoint import Run, load_run
from adrec.config import ServingConfig
from adrec.data.item_index import ItemIndex
from adrec.data.jagged import Jagged
from adrec.devices import check_device
from adrec.engines import Engine, check_engine, make_engine
from adrec.errors import AdrecError, ConfigError, nearest
from adrec.respacing import Steps
from kernels.philox import ROW_KEYS

Source = Literal["model", "popularity"]


class UnknownItemError(AdrecError):
    """A history holds items that the model does not know and ``unknown="raise"`` was asked for."""


@dataclass(frozen=True)
class Recommendation:
    """One user's list. items: raw ids, best first. scores: inner products, or training counts for popularity.

    unknown: how many items of the history were dropped because the model does not know them. source: ``model``, or
    ``popularity`` when no known item was left in the history.
    """

    items: list[Any]
    scores: list[float]
    unknown: int
    source: Source


class Recommender:
    """Serves a run: three lines from a run folder to recommendations.

    >>> recommender = Recommender.load("runs/beauty")
    >>> recommender.recommend([["itemA", "itemB"]], k=20)[0].items
    """

    def __init__(self, run: Run, engine: Engine) -> None:
        self.run, self.engine = run, engine

    @classmethod
    def load(
        cls,
        run: str | Path,
        engine: str = "cached",
        device: str = "cpu",
        exported: str | Path | None = None,
        provider: str | None = None,
    ) -> Recommender:
        """Load a run folder; raises RunError when it is not one, ConfigError for an unknown engine or device.

        exported: folder of `adrec export RUN`, for engines that read one; without it they make what they need.
        provider: ONNX Runtime's ``cpu``, ``cuda`` or ``tensorrt`` (None: that of the device). Raises NotSupportedError
        where the engine cannot run here or cannot sample as the run's settings say.
        """
        check_device(device)
        check_engine(engine, provider)
        loaded = load_run(run, device)
        made = make_engine(engine, loaded.model, None if exported is None else Path(exported), provider)
        recommender = cls(loaded, made)
        recommender.engine.table(loaded.settings.serving or 1)
        return recommender

    def recommend(
        self,
        histories: Sequence[Sequence[Any]],
        k: int = 20,
        *,
        steps: Steps | Literal["run"] = "run",
        seed: int = 0,
        unknown: Literal["drop", "raise"] = "drop",
        exclude_history: bool = False,
        user_keys: Sequence[int] | None = None,
        batch_size: int = 512,
    ) -> list[Recommendation]:
        """Recommend ``k`` items for each history (raw item ids, oldest first).

        steps: reverse steps, 1 to T, evenly spaced; None runs the T the model was trained with; a `ServingConfig` says
        more; "run" is what the run's settings say (``serving``), one step where they say nothing. seed: of the noise;
        the result is a function of (history, seed, steps), or of (user key, history, seed, steps) with ``user_keys`` in
        [0, 2^39), and of nothing else. unknown: drop items the model does not know and count them, or raise
        UnknownItemError. A history without a known item gets the most popular items, with ``source="popularity"`` and
        one warning.
        exclude_history: leave out the user's own items; a list is shorter than k when too few are left. Raises
        ConfigError for a k outside 1..N or steps outside 1..T (1 for a SASRec+ run, which has none).
        """
        if steps == "run":
            steps = self.run.settings.serving or 1
        self._check(k, steps, unknown, batch_size)
        if user_keys is not None and len(user_keys) != len(histories):
            raise ConfigError(f"{len(user_keys)} user keys for {len(histories)} histories; give one each or none")
        for key in user_keys or ():
            if not 0 <= key < ROW_KEYS:
                raise ConfigError(f"user key {key}: allowed are 0 to 2^39 - 1; hash longer ids into that range")
        encoded = [self._encode(row, history, unknown) for row, history in enumerate(histories)]
        known = [row for row, ids in enumerate(encoded) if ids]
        results: list[Recommendation | None] = [None] * len(histories)
        for first in range(0, len(known), batch_size):
            rows = known[first : first + batch_size]
            batch = Jagged.from_lists([encoded[row] for row in rows])
            keys = None if user_keys is None else torch.tensor([user_keys[row] for row in rows])
            exclude = batch.to(self.engine.device) if exclude_history else None
            top = self.engine.recommend(batch, k, steps, seed, keys, exclude)
            for row, ids, scores in zip(rows, top.items.tolist(), top.scores.tolist(), strict=True):
                dropped = len(histories[row]) - len(encoded[row])
                results[row] = self._result(ids, scores, dropped, "model")
        for row, ids in enumerate(encoded):
            if not ids:
                results[row] = self._popular(k, len(histories[row]))
        if len(known) < len(histories):
            warnings.warn(
                f"{len(histories) - len(known)} of {len(histories)} histories hold no known item;"
                " they get the most popular items",
                stacklevel=2,
            )
        return [result for result in results if result is not None]

    def _check(self, k: Any, steps: Any, unknown: str, batch_size: Any) -> None:
        model = self.run.settings.model
        check_whole(k, "k", 1, model.items, "the size of the catalogue")
        if isinstance(steps, ServingConfig):
            self.engine.table(steps)
        elif steps is not None:
            longest = model.timesteps if model.model == "adrec" else 1
            meaning = (
                "the steps it was trained with" if model.model == "adrec" else "a SASRec+ run has no reverse steps"
            )
            check_whole(steps, "steps", 1, longest, meaning)
        if unknown not in ("drop", "raise"):
            raise ConfigError(f"unknown is {unknown!r}{nearest(str(unknown), ['drop', 'raise'])}; allowed: drop, raise")
        check_whole(batch_size, "batch_size", 1, 2**31 - 1, "users at a time")

    def _encode(self, row: int, history: Any, unknown: str) -> list[int]:
        if isinstance(history, str | bytes):
            raise ConfigError(f"history {row} is the text {history!r}; expected a list of item ids")
        if not isinstance(history, Sequence | np.ndarray) or any(isinstance(value, list | tuple) for value in history):
            raise ConfigError(f"history {row} is {history!r}; expected a flat list of item ids")
        ids = [self._index[value] for value in history]
        if unknown == "raise" and 0 in ids:
            missing = [history[place] for place, item in enumerate(ids) if item == 0]
            raise UnknownItemError(
                f"history {row} holds {len(missing)} unknown items, the first is {missing[0]!r};"
                ' unknown="drop" leaves them out'
            )
        return [item for item in ids if item]

    @cached_property
    def _index(self) -> ItemIndex:
        return ItemIndex(self.run.item_ids)

    @cached_property
    def _popularity(self) -> tuple[list[int], list[float]]:
        counts = self.run.item_counts[1:]
        order = counts.argsort(descending=True, stable=True)
        return (order + 1).tolist(), counts[order].tolist()

    def _popular(self, k: int, unknown: int) -> Recommendation:
        items, counts = self._popularity
        return self._result(items[:k], [float(count) for count in counts[:k]], unknown, "popularity")

    def _result(self, ids: list[int], scores: list[float], unknown: int, source: Source) -> Recommendation:
        kept = [place for place, item in enumerate(ids) if item]
        return Recommendation([self._index.raw[ids[i] - 1] for i in kept], [scores[i] for i in kept], unknown, source)


def check_whole(value: Any, name: str, low: int, high: int, meaning: str) -> None:
    """Raise ConfigError unless ``value`` is a whole number from ``low`` to ``high``; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; allowed: {low} to {high}, {meaning}")
