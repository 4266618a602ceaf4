"""What a measurement ran on: machine, versions, revision; nothing that names a person or a place."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from adrec.versions import installed_versions

GIBIBYTE = 2**30
_X86 = {"avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"}
_ARM = {"asimddp", "i8mm", "bf16", "sve", "sve2"}
INSTRUCTIONS = _X86 | _ARM


class Frozen(BaseModel):
    """Base of every part of a record: unknown keys are refused and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Accelerator(Frozen):
    """One CUDA device as the driver describes it."""

    name: str
    memory_gib: float
    compute_capability: str
    driver: str | None


class Machine(Frozen):
    """The hardware and operating system of a measurement; `None` where the system does not tell.

    ``instructions``: what the processor has of those that decide how fast, and how exactly, products of small numbers
    are (`None` in older records). A virtual machine may hide them, so that a name alone does not tell two apart.
    """

    processor: str
    instructions: str | None = None
    cores_physical: int | None
    cores_logical: int
    cores_usable: int
    threads: int
    memory_gib: float | None
    system: str
    governor: str | None
    load_one_minute: float | None
    accelerators: list[Accelerator]

    @property
    def kind(self) -> str:
        """The processor in words, with its instructions where they are known."""
        return self.processor if self.instructions is None else f"{self.processor} ({self.instructions})"


class Revision(Frozen):
    """Source revision of a checkout; both `None` for an installed wheel (see `versions`)."""

    git: str | None
    dirty: bool | None


class Environment(Frozen):
    """Everything that identifies the place of a measurement; a missing library is `None` in `versions`."""

    machine: Machine
    versions: dict[str, str | None]
    revision: Revision


def read_environment() -> Environment:
    """Describe machine, versions and revision now; ``machine.threads`` is `torch.get_num_threads()`."""
    return Environment(machine=_machine(), versions=installed_versions(), revision=_revision())


def utc_now() -> str:
    """The time now, in UTC, to the second, as ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def printable_command(arguments: Sequence[str], folder: Path | None = None) -> str:
    """Return a command line without absolute paths: relative to ``folder`` or the last name.

    Where the first of `sys.argv` is no command (``-c``, empty, a package's main file), python as it was started: a
    program given with ``-c`` is not known and stands as three dots.
    """
    here = (folder or Path.cwd()).resolve()

    def shorten(match: re.Match[str]) -> str:
        path = Path(match.group(2))
        inside = path.is_relative_to(here) and path != here
        return match.group(1) + (str(path.relative_to(here)) if inside else path.name or ".")

    words = [re.sub(r"(^|=)([/~].*)$", shorten, str(argument)) for argument in arguments]
    if words and Path(words[0]).name == "__main__.py":
        words[:1] = ["python", "-m", Path(str(arguments[0])).parent.name]
    elif words and words[0] in ("-c", ""):
        words[:1] = ["python", "-c", "..."] if words[0] else ["python"]
    elif words:
        words[0] = Path(words[0]).name
    return " ".join(f"'{word}'" if " " in word else word for word in words)


def _machine() -> Machine:
    return Machine(
        processor=_processor(),
        instructions=processor_instructions(),
        cores_physical=_physical_cores(),
        cores_logical=os.cpu_count() or 1,
        cores_usable=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_gib=_memory_gib(),
        system=_system(),
        governor=_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        load_one_minute=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        accelerators=_accelerators(),
    )


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo") or "", re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def processor_instructions() -> str | None:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _text("/proc/cpuinfo") or "", re.MULTILINE)
    return None if found is None else " ".join(sorted(set(found.group(1).split()) & INSTRUCTIONS))


def _physical_cores() -> int | None:
    blocks = (_text("/proc/cpuinfo") or "").split("\n\n")
    pairs = {tuple(re.findall(r"^(?:physical id|core id)\s*:\s*(\d+)$", block, re.MULTILINE)) for block in blocks}
    return len(pairs - {()}) or None


def _memory_gib() -> float | None:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _text("/proc/meminfo") or "", re.MULTILINE)
    return round(int(found.group(1)) * 1024 / GIBIBYTE, 1) if found else None


def _system() -> str:
    release = re.search(r'^PRETTY_NAME="?([^"\n]+)', _text("/etc/os-release") or "", re.MULTILINE)
    name = release.group(1) if release else platform.system()
    return f"{name}, {platform.system()} {platform.release()} {platform.machine()}"


def _accelerators() -> list[Accelerator]:
    if not torch.cuda.is_available():
        return []
    driver = _command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            Accelerator(
                name=properties.name,
                memory_gib=round(properties.total_memory / GIBIBYTE, 1),
                compute_capability=f"{properties.major}.{properties.minor}",
                driver=driver.splitlines()[0] if driver else None,
            )
        )
    return found


def _revision() -> Revision:
    root = Path(__file__).resolve().parent.parent
    top = _command_output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    # An installed wheel may lie inside somebody else's repository, whose revision would say nothing about it.
    if top is None or Path(top).resolve() != root:
        return Revision(git=None, dirty=None)
    changes = _command_output("git", "-C", str(root), "status", "--porcelain")
    return Revision(
        git=_command_output("git", "-C", str(root), "rev-parse", "--verify", "HEAD"),
        dirty=None if changes is None else bool(changes),
    )


def _command_output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
