"""Options shared by commands: comma-separated lists, ``key=value`` settings, and which were given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from adrec.errors import ConfigError, nearest

if TYPE_CHECKING:
    import typer


def integers(text: str, option: str, low: int, high: int) -> list[int]:
    """Parse ``1,2,4``; raise ConfigError naming the option, the value and the range."""
    values = []
    for part in text.split(","):
        try:
            value = int(part)
        except ValueError:
            raise ConfigError(
                f"{option} is '{text}'; expected whole numbers separated by commas, such as 1,2,4"
            ) from None
        if not low <= value <= high:
            raise ConfigError(f"{option} holds {value}; allowed: {low} to {high}")
        values.append(value)
    return list(dict.fromkeys(values))


def chosen(text: str, option: str, allowed: Sequence[str]) -> list[str]:
    """Parse names separated by commas; raise ConfigError with the nearest name for one that is not allowed."""
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in allowed:
            raise ConfigError(f"{option} is '{name}'{nearest(name, allowed)}; allowed: {', '.join(allowed)}")
    return names


def choice(value: str, allowed: Sequence[str], option: str) -> str:
    """A name out of those allowed; raises ConfigError with the nearest one for another."""
    if value not in allowed:
        raise ConfigError(f"{option} is '{value}'{nearest(value, allowed)}; allowed: {', '.join(allowed)}")
    return value


def section(values: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """The section ``name`` of nested settings, made when missing or empty; raises ConfigError when it is a value."""
    found = values.get(name)
    if found is None:
        found = values[name] = {}
    if not isinstance(found, dict):
        raise ConfigError(
            f"{where}: '{name}' is a value, not a section: {str(found)[:80]}; expected settings, {name}: {{key: value}}"
        )
    return found


def apply_settings(values: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Put ``section.key=value`` assignments (values read as YAML) into nested settings; returns ``values``."""
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set '{assignment}': expected section.key=value, such as model.width=64")
        *sections, name = key.strip().split(".")
        target = values
        for part in sections:
            target = section(target, part, f"--set '{assignment}'")
        try:
            target[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set '{assignment}': the value is not YAML: {error}") from None
    return values


def given(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Those of some options, by parameter name, that stand on the command line, as they are written there."""
    # By name: some releases of Typer bring a Click of their own, others need the package.
    found = [name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    return [f"--{name.replace('_', '-')}" for name in found]
