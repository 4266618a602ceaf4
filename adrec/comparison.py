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
from adrec.errors import DataError
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
OF_SOURCE = "NDCG@20 of source"
"""NDCG@20 in percent of that of the run that this one was made of, users resampled in pairs."""
SOURCE_ROW = "source"


@dataclass(frozen=True)
class Comparison:
    """What is evaluated. exclusions: whether the user's own items are left out, one pass each.

    source: the run that this one was made of, sampled as its settings say, else with every trained step.
    """

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
    source: Run | None = None

    def rows(self, progress: Callable[[int, int], None] = lambda done, total: None) -> list[dict[str, Any]]:
        """One row for each system, plan, seed, exclusion and group; metrics as value, low and high in percent.

        Rows of adrec also say what share of the accuracy is kept, where T DDPM steps are among the plans, and those of
        a run with a source what share of the source's. progress: called with the rankings done and their total. Raises
        DataError for a split without targets.
        """
        examples = self.dataset.examples(self.split)
        if len(examples) == 0:
            another = "validation" if self.split == "test" else "test"
            raise DataError(
                f"{self.dataset.name}: no user has a target in the {self.split} split; choose --split {another}"
            )
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
            own = engine is not None and engine.model is self.run.model
            sampled = self.run if own else self.source if name == SOURCE_ROW else None
            diffuses = sampled is not None and sampled.config.model == "adrec"
            head: dict[str, Any] = {"system": name, "steps": "-", "sampler": "-", "seed": seed}
            if sampled is not None and diffuses:
                count = step_count(steps, sampled.config)
                head |= {"steps": count, "sampler": sampler_name(steps), "mean steps": result.mean_steps}
            if isinstance(steps, ServingConfig):
                head["times"] = None if steps.times is None else list(steps.times)
            every = ("adrec", self.run.config.timesteps, seed, exclude)
            exact = _found(passes, results, every) if own and diffuses else None
            of = _found(passes, results, (SOURCE_ROW, self._source_steps, seed, exclude)) if own else None
            for group, (users, metrics) in stratify(result.ranks, groups).items():
                row = head | {"group": group, "users": users, "own items": "left out" if exclude else "ranked"}
                row |= {metric: _values(interval) for metric, interval in metrics.items()}
                for key, other in ((KEPT, exact), (OF_SOURCE, of)):
                    if other is not None:
                        kept = kept_percent(result.ranks[groups[group]], other.ranks[groups[group]])
                        row[key] = None if kept is None else _values(kept)
                rows.append(row)
        return rows

    @property
    def _source_steps(self) -> Steps:
        return None if self.source is None else self.source.settings.serving

    def _systems(self) -> list[System]:
        systems: list[System] = [("popularity", None, None, 0)]
        if self.baseline is not None:
            model = self.baseline.model.to(self.run.model.table.device)
            systems.append(("sasrec+", make_engine(self.engine, model), None, 0))
        diffuses = self.run.config.model == "adrec"
        if self.source is not None:
            taught = make_engine(self.engine, self.source.model)
            systems += [(SOURCE_ROW, taught, self._source_steps, seed) for seed in (self.seeds if diffuses else (0,))]
        engine = make_engine(self.engine, self.run.model)
        if not diffuses:
            # Beside a baseline it is another network, such as a student without denoiser blocks.
            return [*systems, ("sasrec+" if self.baseline is None else "this run", engine, None, 0)]
        return [*systems, *(("adrec", engine, count, seed) for seed in self.seeds for count in self.steps)]


def _found(
    passes: list[tuple[System, bool]], results: list[Evaluation], wanted: tuple[str, Steps, int, bool]
) -> Evaluation | None:
    """The result of a system, plan, seed and exclusion, if it is among the passes."""
    for ((name, _, steps, seed), exclude), result in zip(passes, results, strict=True):
        if (name, steps, seed, exclude) == wanted:
            return result
    return None


def _values(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
