"""What stands beside a TensorRT plan, and the checks a plan must pass before a byte of it reaches TensorRT.

A plan is executable content. The record beside it tells an intact plan for this machine from a truncated, replaced or
foreign one; it is no signature: whoever can write the plan can write the record, so load plans you trust.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from adrec.config import StrictModel
from adrec.engines.tensorrt.library import Platform, TensorRTError, version_numbers
from adrec.engines.tensorrt.profiles import Profile
from adrec.files import write_text

SCHEMA_VERSION = 1
NAME_DIGITS = 16
_BLOCK = 1 << 20


class TensorInfo(StrictModel):
    """An input or output. dtype: as torch names it (``float16``). shape: sizes, or names of dynamic dimensions."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class PlanKey(StrictModel):
    """All that decides what a plan is; its hash names the plan.

    graph: SHA-256 of the ONNX file and its external data. options: builder options by name.
    """

    graph: str
    profiles: tuple[Profile, ...]
    options: dict[str, Any]
    platform: Platform

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the key, in hexadecimal."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class PlanRecord(StrictModel):
    """The JSON file beside a plan.

    graph_files: SHA-256 of the ONNX file and of each file with its weights, by name, the ONNX file first.
    layers: tensors of the engine by dtype, as the engine inspector counts them.

    precision_confirmed: whether those dtypes prove the precision asked for; `False` where TensorRT showed none.
    """

    schema_version: int = SCHEMA_VERSION
    key: PlanKey
    fingerprint: str
    graph_files: dict[str, str]
    plan_sha256: str
    plan_bytes: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    layers: dict[str, int] = Field(default_factory=dict)
    precision_confirmed: bool = False
    trtexec: str = ""
    notes: tuple[str, ...] = ()

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(self.model_dump(mode="json"), indent=1) + "\n")


def plan_name(stem: str, key: PlanKey) -> str:
    """File name of a plan: what it was built from, and the start of its fingerprint."""
    return f"{stem}.{key.fingerprint[:NAME_DIGITS]}.plan"


def record_path(plan: Path) -> Path:
    """Where the record of a plan stands: beside it, ``.json`` added to its name."""
    return plan.with_name(plan.name + ".json")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def graph_digests(graph: Path, weights: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of an ONNX file and of the files with its weights, by name."""
    return {file.name: digest(file) for file in (graph, *weights)}


def combined(digests: Mapping[str, str]) -> str:
    """One hash of several files', in their order."""
    return hashlib.sha256("".join(digests.values()).encode()).hexdigest()


def read_record(plan: Path) -> PlanRecord:
    """Read and check the record beside a plan. Raises TensorRTError where it is missing, foreign or altered."""
    path = record_path(plan)
    if not path.is_file():
        raise TensorRTError(
            f"{plan} has no {path.name} beside it, so nothing tells what it is; a plan is executable content:"
            " build it again with adrec export --to tensorrt"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise TensorRTError(f"{path} has schema_version {version}; this adrec reads {SCHEMA_VERSION}: export again")
        record = PlanRecord.model_validate(content)
    except (ValueError, ValidationError) as error:
        raise TensorRTError(f"{path} is not the record of a plan ({error}); export the engine again") from None
    if record.key.fingerprint != record.fingerprint or record.fingerprint[:NAME_DIGITS] not in plan.name:
        raise TensorRTError(
            f"{path} does not belong to {plan.name}: its settings hash to {record.key.fingerprint[:NAME_DIGITS]},"
            " which the name of the plan must hold; export the engine again"
        )
    return record


def read_plan(plan: Path, here: Platform) -> tuple[bytes, PlanRecord]:
    """Content and record of a plan that is whole and made for this machine; TensorRTError says what is not.

    here: TensorRT, GPU and system of this machine.
    """
    if not plan.is_file():
        raise TensorRTError(f"{plan} does not exist; build it with adrec export --to tensorrt")
    record = read_record(plan)
    check_platform(record, here)
    content = plan.read_bytes()
    if len(content) != record.plan_bytes:
        raise TensorRTError(f"{plan} has {len(content)} bytes and its record says {record.plan_bytes}: copy it again")
    if hashlib.sha256(content).hexdigest() != record.plan_sha256:
        raise TensorRTError(f"{plan} is not the plan that its record describes (SHA-256 differs): export it again")
    return content, record


def check_platform(record: PlanRecord, here: Platform) -> None:
    """Raise TensorRTError unless a plan was built for this TensorRT, GPU and system, or is made to fit others."""
    built, options = record.key.platform, record.key.options
    again = "build it here: sh build.sh"
    if built.system != here.system:
        raise TensorRTError(f"the plan was built on {built.system} and this is {here.system}; {again}")
    if built.tensorrt != here.tensorrt:
        old, new = version_numbers(built.tensorrt), version_numbers(here.tensorrt)
        if not options.get("version_compatible"):
            raise TensorRTError(
                f"the plan was built by TensorRT {built.tensorrt} and this is {here.tensorrt}; {again}"
                " (or export with --version-compatible)"
            )
        if new[0] != old[0] or new < old:
            raise TensorRTError(
                f"the plan was built by TensorRT {built.tensorrt}, version compatible: that is for the same major"
                f" version, not older; this is {here.tensorrt}; {again}"
            )
    level = options.get("hardware_compatibility", "none")
    mine, theirs = version_numbers(here.gpu.capability), version_numbers(built.gpu.capability)
    asked = f"the plan was built for a {built.gpu.name} ({built.gpu.capability}), hardware compatibility '{level}'"
    this = f"this is a {here.gpu.name} ({here.gpu.capability})"
    if level == "ampere_plus":
        if mine < (8, 0):
            raise TensorRTError(f"{asked}; {this}, older than Ampere (8.0); {again}")
    elif mine != theirs:
        raise TensorRTError(f"{asked}; {this}; {again}")
    elif level == "none" and here.gpu.name != built.gpu.name:
        raise TensorRTError(
            f"{asked}; {this}; {again} (or export with --hardware-compatibility same_compute_capability)"
        )
