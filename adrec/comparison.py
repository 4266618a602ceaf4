"""The rows of `adrec evaluate`: a run beside SASRec+ and popularity, by step count, seed and group of users."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from adrec.checkpoint import Run
from adrec.data.dataset import Dataset
from adrec.engines import Engine, make_engine
from adrec.evaluation import (
    Interval,
    evaluate,
    length_groups,
    popularity_evaluation,
    popularity_groups,
    stratify,
)

Split = Literal["validation", "test"]
System = tuple[str, Engine | None, int | None, int]
"""Name, engine (None: popularity), steps, seed."""


@dataclass(frozen=True)
class Comparison:
    """What is evaluated. exclusions: whether the user's own items are left out, one pass each."""

    run: Run
    baseline: Run | None
    dataset: Dataset
    split: Split
    steps: Sequence[int]
    seeds: Sequence[int]
    engine: str
    exclusions: Sequence[bool]
    strata: bool
    batch_size: int

    def rows(self, progress: Callable[[int, int], None] = lambda done, total: None) -> list[dict[str, Any]]:
        """One row for each system, step count, seed, exclusion and group; metrics as value, low and high in percent.

        progress: called with the rankings done and their total.
        """
        examples = self.dataset.examples(self.split)
        groups = {"all": torch.ones(len(examples), dtype=torch.bool)}
        if self.strata:
            groups |= popularity_groups(examples.targets, self.dataset.item_counts())
            groups |= length_groups(examples.histories.lengths)
        passes = [(system, exclude) for system in self._systems() for exclude in self.exclusions]
        rows, done = [], 0

        def advance(users: int) -> None:
            nonlocal done
            done += users
            progress(done, len(passes) * len(examples))

        for (name, engine, steps, seed), exclude in passes:
            if engine is None:
                result = popularity_evaluation(self.dataset.item_counts(), examples, exclude_history=exclude)
                advance(len(examples))
            else:
                result = evaluate(
                    engine,
                    examples,
                    steps=steps,
                    seed=seed,
                    batch_size=self.batch_size,
                    exclude_history=exclude,
                    progress=advance,
                )
            for group, (users, metrics) in stratify(result.ranks, groups).items():
                head = {"system": name, "steps": steps or "-", "seed": seed, "group": group, "users": users}
                head["own items"] = "left out" if exclude else "ranked"
                rows.append(head | {metric: _values(interval) for metric, interval in metrics.items()})
        return rows

    def _systems(self) -> list[System]:
        systems: list[System] = [("popularity", None, None, 0)]
        if self.baseline is not None:
            model = self.baseline.model.to(self.run.model.table.device)
            systems.append(("sasrec+", make_engine(self.engine, model), None, 0))
        engine = make_engine(self.engine, self.run.model)
        if self.run.settings.model.model == "sasrec":
            return [*systems, ("sasrec+", engine, None, 0)]
        return [*systems, *(("adrec", engine, count, seed) for seed in self.seeds for count in self.steps)]


def _values(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
