"""Step reduction: serve a trained run with fewer reverse steps, without training. Weights stay as they are.

What it keeps depends on lambda, the weight of x_t next to the condition (ADRec, arXiv 2505.19544, section 4.2). At the
paper's .001 one step gives the recommendations of all 32, and nothing here can do better; the receipt says so.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from adrec.config import EarlyStop, Sampler, ServingConfig, parse
from adrec.data.dataset import Examples
from adrec.errors import ConfigError
from adrec.models.adrec import ADRec
from adrec.respacing import kept_times, sampler_name
from adrec.schedule import spaced_times
from compress.step_search import Choice, StepSearch
from compress.technique import Change, Draft, Receipt, Skip, Technique, parameter_count, stored_bytes

ENOUGH = 0.99
"""Share of the top 20 in common from which one step is called as good as all."""


class StepsConfig(Technique):
    """Serve with fewer reverse steps: which trained ones, by which sampler (arXiv 2102.09672, 2010.02502, 2211.01095).

    Only what is said changes: sampler, eta, start and early_stop left out (null) stay those the run is served with, or
    become DDPM's from noise where a run says nothing. eta belongs to its sampler and goes with it. Searches (greedy,
    dynamic: `compress.step_search`) need the data set and cost seconds to minutes on a CPU.
    """

    technique: Literal["steps"] = "steps"
    steps: int = Field(1, ge=1, description="S, the reverse steps kept")
    spacing: Literal["uniform", "quadratic", "greedy", "dynamic"] = Field(
        "uniform", description="quadratic: dense where little noise is left; greedy, dynamic: searched on validation"
    )
    sampler: Sampler | None = Field(None, description="ddpm, ddim or dpm++2m; null: as the run is served")
    eta: float | None = Field(
        None, ge=0.0, le=1.0, description="of ddim: 0 is deterministic, 1 has DDPM's posterior variance; null: likewise"
    )
    start: Literal["noise", "zero"] | None = Field(None, description="x_T, noise or zero; null: as the run is served")
    early_stop: EarlyStop | Literal["never"] | None = Field(
        None, description="top and patience, or never; null: as the run is served"
    )
    users: int = Field(64, ge=1, description="validation users that distances are measured on")
    candidates: int = Field(32, ge=2, description="trained steps that a search chooses from at most, evenly spaced")

    @model_validator(mode="after")
    def _samples(self) -> StepsConfig:
        if self.eta and self.sampler not in (None, "ddim"):
            raise ValueError(f"eta is {self.eta}, but only sampler 'ddim' has one; leave it out of '{self.sampler}'")
        return self

    def serving(self, before: ServingConfig) -> ServingConfig:
        """How a run that was served as ``before`` says is sampled now, but for its times, which are those of before.

        Raises ConfigError for an eta that the sampler has not.
        """
        said: dict[str, Any] = {
            name: value
            for name in ("sampler", "eta", "start", "early_stop")
            if (value := getattr(self, name)) is not None
        }
        if self.early_stop == "never":
            said["early_stop"] = None
        if said.get("sampler", before.sampler) != before.sampler:
            said.setdefault("eta", 0.0)
        return parse(ServingConfig, dict(before) | said, f"'{self.technique}'")


def apply(draft: Draft, config: StepsConfig) -> Receipt:
    """Set how the draft is sampled; raises ConfigError for more steps than it has.

    The steps are chosen from those the draft is sampled with now: a model distilled for some knows no others.
    """
    model = draft.model
    size, parameters = stored_bytes(model), parameter_count(model)
    receipt = Receipt(
        settings=config.model_dump(mode="json"),
        bytes_before=size,
        bytes_after=size,
        parameters_before=parameters,
        parameters_after=parameters,
    )
    if not isinstance(model, ADRec):
        why = f"a '{model.config.model}' model has none: it is served in one pass"
        return receipt.model_copy(update={"skipped": (Skip(what="reverse steps", why=why),)})
    before = draft.settings.serving or ServingConfig()
    plan = config.serving(before)
    known = tuple(range(model.config.timesteps)) if before.times is None else before.times
    if config.steps > len(known):
        raise ConfigError(
            f"steps is {config.steps}; allowed: 1 to {len(known)}, the steps the run is sampled with; to take more than"
            " an earlier reduction left, start from the run before it"
        )
    search = _search(draft, model, config, plan.model_copy(update={"times": known}))
    if config.spacing in ("greedy", "dynamic"):
        choice = _searched(draft, config, search, known)
    else:
        choice = Choice(_spaced(known, config.steps, config.spacing), {})
    serving = plan.model_copy(update={"times": choice.times})
    serving.check(model.config)
    detail: dict[str, float | int | str] = {**_measured(search, choice.times), **choice.seen}
    change = Change(
        what="reverse steps",
        before=f"{len(known)} ({sampler_name(before)})",
        after=f"{len(choice.times)} ({sampler_name(serving)}): trained steps {', '.join(map(str, choice.times))}",
        detail=detail,
    )
    draft.settings = draft.settings.model_copy(update={"serving": serving})
    return receipt.model_copy(update={"changed": (change,), "notes": _notes(model, serving, search)})


def _spaced(known: tuple[int, ...], steps: int, spacing: str) -> tuple[int, ...]:
    places = kept_times(len(known), steps, "quadratic" if spacing == "quadratic" else "uniform")
    return tuple(known[place] for place in places.tolist())


def _search(draft: Draft, model: ADRec, config: StepsConfig, plan: ServingConfig) -> StepSearch | None:
    """The users that distances are measured on; None without data, which only a search needs."""
    if draft.dataset is None and config.spacing in ("uniform", "quadratic"):
        return None
    examples = draft.validation("steps")
    rows = np.random.default_rng(draft.seed).permutation(len(examples))[: config.users]
    picked = torch.from_numpy(np.sort(rows))
    some = Examples(examples.histories.select(picked), examples.targets[picked], examples.users[picked])
    return StepSearch(model, some, plan, draft.seed)


def _searched(draft: Draft, config: StepsConfig, search: StepSearch | None, known: tuple[int, ...]) -> Choice:
    assert search is not None
    if config.steps > config.candidates:
        raise ConfigError(
            f"candidates is {config.candidates}, but steps is {config.steps}; allowed: {config.steps} or more, or a"
            " spacing that is not searched"
        )
    grid = tuple(known[place] for place in spaced_times(len(known), min(len(known), config.candidates)).tolist())
    draft.report(f"searching {config.steps} of {len(grid)} trained steps ({config.spacing})")
    return search.greedy(config.steps, grid) if config.spacing == "greedy" else search.dynamic(config.steps, grid)


def _measured(search: StepSearch | None, times: tuple[int, ...]) -> dict[str, float]:
    """Distances of the plan and of the spacings that need no search, and the top-20 overlap; all without noise."""
    if search is None:
        return {}
    plans = {"distance": times}
    for spacing in ("uniform", "quadratic"):
        plans[f"distance of {spacing}"] = _spaced(search.every, len(times), spacing)
    measured = {name: search.distance(plan) for name, plan in plans.items()}
    return {**measured, "top-20 overlap": search.overlap(times)}


def _notes(model: ADRec, serving: ServingConfig, search: StepSearch | None) -> tuple[str, ...]:
    steps = serving.count(model.config.timesteps)
    weight = model.config.lambda_uncertainty
    notes = []
    if search is not None:
        overlap = search.overlap((search.every[-1],))
        found = f"at lambda {weight:g} one step gives {overlap:.4f} of the top 20 of {len(search.every)} steps"
        if overlap >= ENOUGH and steps > 1:
            notes.append(f"{found}: {steps} steps cost more and buy next to nothing; use 1")
        if overlap < ENOUGH and steps == 1:
            from_zero = "" if serving.start == "zero" else "start from zero, "
            notes.append(f"{found}: look at the accuracy, and {from_zero}take more steps or distil them if it matters")
    if serving.early_stop is not None:
        notes.append(
            "early stop ranks the catalogue after every step: it saves time only where steps cost more than ranking"
        )
    return tuple(notes)
