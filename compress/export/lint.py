"""The ONNX linter: what a runtime refuses, or gets wrong without a word, found before it reads the file.

Works on any ONNX file. Each finding names the rule, where it is, why it matters and what to do. Rules that only
TensorRT has are left out for files that say they are for ONNX Runtime (``adrec.runtime`` in their metadata), or with
``target="onnxruntime"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adrec.config import StrictModel
from adrec.engines.exported import ExportError
from adrec.errors import ConfigError
from compress.export.onnx_graph import GraphView, read_view

Target = Literal["any", "onnxruntime"]
Severity = Literal["error", "warning"]
TARGETS: tuple[Target, ...] = ("any", "onnxruntime")


class Finding(StrictModel):
    """One fault. where: a node, tensor or dimension of the file. An error fails the lint, a warning does not."""

    rule: str
    severity: Severity
    where: str
    reason: str
    fix: str


@dataclass(frozen=True)
class Rule:
    """A check: yields ``(where, reason)`` pairs. tensorrt: only TensorRT minds."""

    name: str
    check: Callable[[GraphView], Iterable[tuple[str, str]]]
    fix: str
    severity: Severity = "error"
    tensorrt: bool = False


def lint(path: Path, *, target: Target = "any", profiles: Mapping[str, tuple[int, int]] | None = None) -> list[Finding]:
    """Check an ONNX file, errors first.

    profiles: smallest and largest size of each named dimension that requests will have; given, every dimension of the
    inputs must be in it. Raises ExportError for what is no ONNX file.
    """
    from compress.export.lint_rules import RULES

    view = read_view(path, profiles)
    tensorrt = target == "any" and view.runtime not in ("onnxruntime", "onnxruntime-cpu")
    found = [
        Finding(rule=rule.name, severity=rule.severity, where=where, reason=reason, fix=rule.fix)
        for rule in RULES
        if tensorrt or not rule.tensorrt
        for where, reason in _faults(rule, view)
    ]
    return sorted(found, key=lambda finding: finding.severity)


def _faults(rule: Rule, view: GraphView) -> Iterator[tuple[str, str]]:
    """What a rule finds; a file too malformed for it is a fault as well, and no reason to stop."""
    try:
        yield from rule.check(view)
    except Exception as error:
        yield "file", f"is malformed, so that this rule cannot be checked: {str(error).strip().splitlines()[0]}"


def require_clean(path: Path, profiles: Mapping[str, tuple[int, int]] | None = None) -> None:
    """Raise ExportError listing the errors of a file just exported, if there are any. profiles: as for `lint`."""
    faults = [finding for finding in lint(path, profiles=profiles) if finding.severity == "error"]
    if faults:
        lines = "\n".join(f"  {each.rule}, {each.where}: {each.reason}" for each in faults[:10])
        raise ExportError(f"{path.name}: the exported graph breaks {len(faults)} rules and was not kept:\n{lines}")


def parse_target(text: str) -> Target:
    """``any`` or ``onnxruntime``; raises ConfigError for another word."""
    for target in TARGETS:
        if text == target:
            return target
    raise ConfigError(f"--target is '{text}'; allowed: {', '.join(TARGETS)}")
