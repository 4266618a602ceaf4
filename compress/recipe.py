"""Recipes: a sequence of techniques and the accuracy they may cost, from YAML or from those that come with adrec.

max_loss: 1%
stages:
  - technique: steps
    steps: 1
  - technique: item_table
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, SerializeAsAny, field_validator

from adrec.config import StrictModel, load_yaml, parse
from adrec.errors import ConfigError, nearest
from compress.technique import CompressionError, Draft, Percent, Receipt, Technique

MAX_LOSS = 1.0


@dataclass(frozen=True)
class Entry:
    """One technique: its settings, the function that applies them, and whether that trains (takes minutes, not ms)."""

    config: type[Technique]
    apply: Callable[[Draft, Any], Receipt]
    trains: bool = False

    @property
    def name(self) -> str:
        """The name that recipes use, which is the default of ``technique``."""
        return str(self.config.model_fields["technique"].default)

    @property
    def summary(self) -> str:
        """What the settings say of themselves in their first line."""
        return (self.config.__doc__ or "").strip().split("\n")[0]


@cache
def _registry() -> dict[str, Entry]:
    # At use: the techniques that train bring Lightning with them.
    from compress.distill import StepDistillConfig
    from compress.distill import apply as distill
    from compress.item_table import ItemTableConfig
    from compress.item_table import apply as item_table
    from compress.quantize import QuantizeConfig
    from compress.quantize import apply as quantize
    from compress.steps import StepsConfig
    from compress.steps import apply as steps
    from compress.student import StudentConfig
    from compress.student import apply as student

    entries = [
        Entry(StepsConfig, steps),
        Entry(StudentConfig, student, trains=True),
        Entry(StepDistillConfig, distill, trains=True),
        Entry(QuantizeConfig, quantize),
        Entry(ItemTableConfig, item_table),
    ]
    return {entry.name: entry for entry in entries}


def techniques() -> Mapping[str, Entry]:
    """Every registered technique by name."""
    return _registry()


def register_technique(entry: Entry) -> None:
    """Add a technique of your own; raises ConfigError when its name is taken."""
    if entry.name in _registry():
        raise ConfigError(f"technique '{entry.name}' is registered already; give yours another name")
    _registry()[entry.name] = entry


def entry_of(config: Technique) -> Entry:
    """The technique that settings belong to; raises CompressionError when it is not registered."""
    entry = techniques().get(config.technique)
    if entry is None or not isinstance(config, entry.config):
        raise CompressionError(
            f"{type(config).__name__} belongs to no registered technique{nearest(config.technique, techniques())};"
            f" registered: {', '.join(techniques())}. Add yours with compress.register_technique"
        )
    return entry


class Recipe(StrictModel):
    """Stages in order, and how much NDCG@20 they may lose together.

    >>> Recipe(stages=[{"technique": "steps", "steps": 1}, {"technique": "item_table"}], max_loss="1%")
    """

    stages: tuple[SerializeAsAny[Technique], ...] = Field(min_length=1)
    max_loss: Percent = Field(MAX_LOSS, description="largest loss of NDCG@20 against the run handed in, percent")

    @field_validator("stages", mode="before")
    @classmethod
    def _read_stages(cls, stages: Any) -> Any:
        try:
            return read_stages(stages)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    def bound(self, stage: Technique) -> float:
        """The loss allowed after a stage, percent: its own bound, else the recipe's."""
        return self.max_loss if stage.max_loss is None else stage.max_loss


def read_stages(stages: Any, where: str = "recipe") -> tuple[Technique, ...]:
    """Validate stages given as settings, mappings or bare names; ConfigError names stage, key and nearest name."""
    if isinstance(stages, str | bytes | Mapping) or not isinstance(stages, Iterable):
        raise ConfigError(f"{where}: stages is {stages!r}; expected a list of stages, `- technique: NAME` each")
    return tuple(_stage(stage, f"{where}: stage {number}") for number, stage in enumerate(stages, 1))


def _stage(stage: Any, where: str) -> Technique:
    if isinstance(stage, Technique):
        return stage
    values = {"technique": stage} if isinstance(stage, str) else stage
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is {stage!r}; expected settings, `technique: NAME` among them")
    name = values.get("technique")
    allowed = ", ".join(techniques())
    if name is None:
        raise ConfigError(f"{where} names no technique; add `technique: NAME`, one of {allowed}")
    if not isinstance(name, str) or name not in techniques():
        raise ConfigError(f"{where}: unknown technique {name!r}{nearest(str(name), techniques())}; allowed: {allowed}")
    return parse(techniques()[name].config, values, f"{where} ({name})")


def shipped_recipes() -> dict[str, str]:
    """Text of every recipe that comes with adrec, by name."""
    found = (each for each in files("compress").joinpath("recipes").iterdir() if each.name.endswith(".yaml"))
    return {each.name.removesuffix(".yaml"): each.read_text(encoding="utf-8") for each in sorted(found, key=str)}


def read_recipe(source: str, assignments: Iterable[str] = ()) -> Recipe:
    """Read a YAML file, or the shipped recipe of that name, and apply ``technique.key=value`` assignments.

    Raises ConfigError naming the file, the stage, the key and the nearest allowed name.
    """
    values = _values(source)
    where = f"recipe {source}"
    stages = values.get("stages")
    if isinstance(stages, list):
        # A stage given as a bare name must be able to take settings.
        stages = values["stages"] = [{"technique": stage} if isinstance(stage, str) else stage for stage in stages]
    for assignment in assignments:
        _assign(values, stages if isinstance(stages, list) else [], assignment, where)
    if stages is None or stages == []:
        names = ", ".join(techniques())
        raise ConfigError(f"{where}: names no stages; add a list `stages`, `- technique: NAME` each, one of {names}")
    values["stages"] = read_stages(values["stages"], where)
    return parse(Recipe, values, where)


def _values(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.is_file():
        return load_yaml(path)
    shipped = shipped_recipes()
    if source in shipped:
        return dict(yaml.safe_load(shipped[source]))
    what = "a folder" if path.is_dir() and source else "neither a file nor a recipe that comes with adrec"
    raise ConfigError(
        f"--recipe '{source}': {what}{nearest(source, shipped)}; give a YAML file or one that comes with adrec:"
        f" {', '.join(shipped)}"
    )


def _assign(values: dict[str, Any], stages: list[Any], assignment: str, where: str) -> None:
    key, equals, text = assignment.partition("=")
    head, dot, name = key.strip().partition(".")
    if not equals or not head or (dot and not name):
        raise ConfigError(f"--set '{assignment}': expected technique.key=value, such as steps.steps=2, or max_loss=1%")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set '{assignment}': the value is not YAML: {error}") from None
    if not dot:
        values[head] = value
        return
    chosen = [stage for stage in stages if isinstance(stage, dict) and stage.get("technique") == head]
    if not chosen:
        names = [str(stage.get("technique")) for stage in stages if isinstance(stage, dict)]
        raise ConfigError(
            f"--set '{assignment}': {where} has no stage '{head}'{nearest(head, names)}; its stages: {', '.join(names)}"
        )
    for stage in chosen:
        stage[name] = value
