"""Techniques whose effect is known: one changes nothing that counts, one skips, one fails half-way, one forgets."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from pydantic import Field

from adrec.config import ServingConfig
from compress.recipe import Entry
from compress.technique import (
    Change,
    CompressionError,
    Draft,
    Receipt,
    Skip,
    Technique,
    parameter_count,
    stored_bytes,
)


class ScaleConfig(Technique):
    """Multiplies the item table, which leaves every ranking as it is for a positive factor of 2^n."""

    technique: Literal["scale"] = "scale"
    factor: float = Field(2.0, gt=0.0, description="what the table is multiplied by")


class IdleConfig(Technique):
    """Skips everything."""

    technique: Literal["idle"] = "idle"


class BreakConfig(Technique):
    """Changes the draft and then fails, which a technique must not do."""

    technique: Literal["break"] = "break"


class ForgetConfig(Technique):
    """Sets all but the first rows of the item table to zero."""

    technique: Literal["forget"] = "forget"
    keep: int = Field(0, ge=0, description="items that keep their row")


class ServeConfig(Technique):
    """Changes the settings of the run alone."""

    technique: Literal["serve"] = "serve"
    times: tuple[int, ...] = Field((0,), min_length=1, description="trained steps kept")


def changed_receipt(config: Technique, before: Draft, after: Draft, *changed: Change, **more: object) -> Receipt:
    return Receipt(
        settings=config.model_dump(mode="json"),
        changed=changed,
        bytes_before=stored_bytes(before.model),
        bytes_after=stored_bytes(after.model),
        parameters_before=parameter_count(before.model),
        parameters_after=parameter_count(after.model),
        **more,
    )


def scale(draft: Draft, config: ScaleConfig) -> Receipt:
    model = copy.deepcopy(draft.model)
    with torch.no_grad():
        model.item_embedding.weight.mul_(config.factor)
    draft.model = model
    change = Change(what="item table", before="as trained", after=f"times {config.factor:g}")
    return changed_receipt(config, draft, draft, change)


def idle(draft: Draft, config: IdleConfig) -> Receipt:
    skip = Skip(what="encoder.0", why="its SQNR would be 3.1 dB")
    return changed_receipt(config, draft, draft, skipped=(skip,), notes=("nothing was worth it",))


def break_(draft: Draft, config: BreakConfig) -> Receipt:
    draft.model = copy.deepcopy(draft.model)
    draft.settings = draft.settings.model_copy(update={"serving": ServingConfig(times=(0,))})
    raise CompressionError("the model is quantised already; start from the original run")


def forget(draft: Draft, config: ForgetConfig) -> Receipt:
    model = copy.deepcopy(draft.model)
    with torch.no_grad():
        model.item_embedding.weight[config.keep + 1 :] = 0.0
    draft.model = model
    return changed_receipt(config, draft, draft, Change(what="item table", before="all rows", after=str(config.keep)))


def serve(draft: Draft, config: ServeConfig) -> Receipt:
    draft.settings = draft.settings.model_copy(update={"serving": ServingConfig(times=config.times)})
    change = Change(what="reverse steps", before=str(draft.model.config.timesteps), after=str(len(config.times)))
    return changed_receipt(config, draft, draft, change)


TOYS = {
    entry.name: entry
    for entry in (
        Entry(ScaleConfig, scale),
        Entry(IdleConfig, idle),
        Entry(BreakConfig, break_),
        Entry(ForgetConfig, forget, trains=True),
        Entry(ServeConfig, serve),
    )
}
