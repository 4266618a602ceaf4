"""Which trained steps to keep: greedy search and dynamic programming, held against the result of every step.

Dynamic programming over paths of kept steps is that of Watson et al. (arXiv 2106.03802), whose cost is the terms of the
variational bound. They report that the bound and sample quality part ways, and a recommender serves x0_hat; so the cost
here is ours: how far x0_hat ends from that of the full trajectory, on the same x_T. Everything runs without noise on
the way (DDIM with eta 0, or DPM-Solver++), so that a distance is one between plans, not between draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adrec.config import ServingConfig
from adrec.data.dataset import Examples
from adrec.engines import CachedEngine
from adrec.evaluation import top_overlap
from adrec.models.adrec import ADRec
from adrec.noise import PhiloxNoise
from adrec.respacing import sampling_table

LISTED = 20


@dataclass(frozen=True)
class Choice:
    """Trained steps kept, rising, and what the search saw on the way, in words by name."""

    times: tuple[int, ...]
    seen: dict[str, str]


class StepSearch:
    """Histories of some users, encoded once, and the result of every step for them.

    plan: the settings whose steps are chosen; its ``times`` are every step, rising.
    """

    @torch.inference_mode()
    def __init__(self, model: ADRec, examples: Examples, plan: ServingConfig, seed: int) -> None:
        assert plan.times is not None
        self.model, self.every = model, plan.times
        sampler = "dpm++2m" if plan.sampler == "dpm++2m" else "ddim"
        self.plan = ServingConfig(sampler=sampler, start=plan.start, times=plan.times)
        self.engine = CachedEngine(model)
        self.state = self.engine.encode(examples.histories.tail(model.config.max_length))
        self.noise = PhiloxNoise(seed, examples.users.to(self.engine.device), model.config.width)
        self.exact = self.result(self.every)

    @torch.inference_mode()
    def result(self, times: tuple[int, ...]) -> Tensor:
        """x0_hat of a plan that keeps ``times``, `[B, D]`."""
        table = sampling_table(self.model.betas, self.plan.model_copy(update={"times": times}))
        return self.engine.sample(self.state, table, self.noise)

    def distance(self, times: tuple[int, ...], exact: Tensor | None = None) -> float:
        """``|x0_hat - x0_hat of every step|^2 / |x0_hat of every step|^2``, both summed over users.

        exact: x0_hat `[B, D]` to be held against instead.
        """
        exact = self.exact if exact is None else exact
        return float((self.result(times) - exact).square().sum() / exact.square().sum())

    def overlap(self, times: tuple[int, ...]) -> float:
        """Share of the top 20 that a plan has in common with every step, averaged over users."""
        k = min(LISTED, self.model.config.items)
        mine, exact = (self.engine.top_k(rows, k).items for rows in (self.result(times), self.exact))
        return float(top_overlap(mine, exact).mean())

    def greedy(self, steps: int, grid: tuple[int, ...]) -> Choice:
        """Begin with the last step of ``grid``; then add the one that brings the distance down most, one by one."""
        kept: tuple[int, ...] = (grid[-1],)
        seen: dict[str, str] = {}
        while len(kept) < steps:
            tried = {time: self.distance(tuple(sorted((*kept, time)))) for time in grid if time not in kept}
            best = min(tried, key=lambda time: tried[time])
            name = f"distance with {', '.join(map(str, kept))} and"
            seen[name] = "; ".join(f"{time}: {distance:.3e}" for time, distance in tried.items())
            kept = tuple(sorted((*kept, best)))
        return Choice(kept, seen)

    def dynamic(self, steps: int, grid: tuple[int, ...]) -> Choice:
        """The path of ``steps`` steps of ``grid`` whose jumps have the least sum of errors, see `jump_errors`.

        To first order in the errors that sum bounds the root of the distance of the plan (Minkowski's inequality).
        """
        jumps, ends = self.jump_errors(grid)
        places = len(grid)
        cost, choices = ends, [np.full(places, -1)]
        seen = {"bound on the error with 1 step": f"{cost[-1]:.3e}"}
        for count in range(2, steps + 1):
            through = jumps + cost[None, :]
            choices.append(through.argmin(1))
            cost = through.min(1)
            seen[f"bound on the error with {count} steps"] = f"{cost[-1]:.3e}"
        path = [places - 1]
        for choice in reversed(choices[1:]):
            path.append(int(choice[path[-1]]))
        return Choice(tuple(grid[place] for place in reversed(path)), seen)

    def jump_errors(self, grid: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """How far x0_hat ends from that of all steps of ``grid`` after one jump; relative root mean square over users.

        jumps: `[G, G]`, entry (t, s) of the plan that leaves out the steps between t and s, and no other; infinite
        unless s < t. ends: `[G]`, entry t of the plan that ends there. About G^3 / 3 denoiser calls.
        """
        places, exact = len(grid), self.result(grid)
        jumps, ends = np.full((places, places), np.inf), np.zeros(places)
        for place in range(1, places):
            ends[place] = math.sqrt(self.distance(grid[place:], exact))
            jumps[place, place - 1] = 0.0
            for target in range(place - 1):
                plan = (*grid[: target + 1], *grid[place:])
                jumps[place, target] = math.sqrt(self.distance(plan, exact))
        return jumps, ends
