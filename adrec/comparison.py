"""The rows of `adrec evaluate`: a run beside SASRec+ and popularity, by step count, seed and group of users."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from adrec.checkpoint import Run
from adrec.config import ServingConfig
from adrec.data.dataset import Dataset
from adrec.engines import Engine, make_engine
from adrec.evaluation import (
    Evaluation,
    Interval,
    evaluate,
    kept_percent,
    length_groups,
    popularity_evaluation,
    popularity_groups,
    stratify,
)
from adrec.respacing import Steps, sampler_name, step_count

Split = Literal["validation", "test"]
System = tuple[str, Engine | None, Steps, int]
"""Name, engine (None: popularity), steps, seed."""
KEPT = "NDCG@20 kept"
"""NDCG@20 in percent of that with every trained step, users resampled in pairs."""


@dataclass(frozen=True)
class Comparison:
    """What is evaluated. exclusions: whether the user's own items are left out, one pass each."""

    run: Run
    baseline: Run | None
    dataset: Dataset
    split: Split
    steps: Sequence[int | ServingConfig]
    seeds: Sequence[int]
    engine: str
    exclusions: Sequence[bool]
    strata: bool
    batch_size: int

    def rows(self, progress: Callable[[int, int], None] = lambda done, total: None) -> list[dict[str, Any]]:
        """One row for each system, plan, seed, exclusion and group; metrics as value, low and high in percent.

        Rows of adrec also say what share of the accuracy is kept, where T DDPM steps are among the plans. progress:
        called with the rankings done and their total.
        """
        examples = self.dataset.examples(self.split)
        groups = {"all": torch.ones(len(examples), dtype=torch.bool)}
        if self.strata:
            groups |= popularity_groups(examples.targets, self.dataset.item_counts())
            groups |= length_groups(examples.histories.lengths)
        passes = [(system, exclude) for system in self._systems() for exclude in self.exclusions]
        results: list[Evaluation] = []
        done = 0

        def advance(users: int) -> None:
            nonlocal done
            done += users
            progress(done, len(passes) * len(examples))

        for (_, engine, steps, seed), exclude in passes:
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
            results.append(result)
        rows = []
        for ((name, engine, steps, seed), exclude), result in zip(passes, results, strict=True):
            diffuses = engine is not None and name == "adrec"
            head: dict[str, Any] = {"system": name, "steps": "-", "sampler": "-", "seed": seed}
            if diffuses:
                count = step_count(steps, self.run.settings.model)
                head |= {"steps": count, "sampler": sampler_name(steps), "mean steps": result.mean_steps}
            if isinstance(steps, ServingConfig):
                head["times"] = None if steps.times is None else list(steps.times)
            exact = self._exact(passes, results, seed, exclude) if diffuses else None
            for group, (users, metrics) in stratify(result.ranks, groups).items():
                row = head | {"group": group, "users": users, "own items": "left out" if exclude else "ranked"}
                row |= {metric: _values(interval) for metric, interval in metrics.items()}
                if exact is not None:
                    kept = kept_percent(result.ranks[groups[group]], exact.ranks[groups[group]])
                    row[KEPT] = None if kept is None else _values(kept)
                rows.append(row)
        return rows

    def _exact(
        self, passes: list[tuple[System, bool]], results: list[Evaluation], seed: int, exclude: bool
    ) -> Evaluation | None:
        """The run with every trained step, same seed and exclusion, if it is among the passes."""
        wanted = ("adrec", self.run.settings.model.timesteps, seed, exclude)
        for ((name, _, steps, drawn), left_out), result in zip(passes, results, strict=True):
            if (name, steps, drawn, left_out) == wanted:
                return result
        return None

    def _systems(self) -> list[System]:
        systems: list[System] = [("popularity", None, None, 0)]
        if self.baseline is not None:
            model = self.baseline.model.to(self.run.model.table.device)
            systems.append(("sasrec+", make_engine(self.engine, model), None, 0))
        engine = make_engine(self.engine, self.run.model)
        if self.run.settings.model.model == "sasrec":
            # Beside a baseline it is another network, such as a student without denoiser blocks.
            return [*systems, ("sasrec+" if self.baseline is None else "this run", engine, None, 0)]
        return [*systems, *(("adrec", engine, count, seed) for seed in self.seeds for count in self.steps)]


def _values(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
