"""The only importer of TensorRT: which versions are allowed, its messages, and which GPU a plan is for."""

from __future__ import annotations

import platform
import re
from types import ModuleType
from typing import Any

import torch

from adrec.config import StrictModel
from adrec.errors import AdrecError, NotSupportedError

# Strongly typed networks, explicit batch and the present engine inspector all exist from here on, in 11 as in 10.
OLDEST = (10, 12)


class TensorRTError(AdrecError):
    """TensorRT refused a graph, a plan or a request, or made something else than was asked for."""


class Gpu(StrictModel):
    """The GPU that a plan was built on. capability: compute capability, such as ``8.9``."""

    name: str
    capability: str


class Platform(StrictModel):
    """All that a plan depends on beside the graph. system: operating system and processor."""

    tensorrt: str
    gpu: Gpu
    system: str


def load() -> ModuleType:
    """The `tensorrt` module. Raises NotSupportedError where it is missing, broken or older than 10.12."""
    try:
        import tensorrt
    except ImportError as error:
        missing = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded ({error})"
        raise NotSupportedError(
            f"TensorRT {missing}: pip install 'adrec[tensorrt]' on a machine with an NVIDIA GPU (Turing or newer)"
        ) from None
    if version_numbers(tensorrt.__version__) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise NotSupportedError(f"TensorRT is {tensorrt.__version__}; allowed: {oldest} or newer")
    return tensorrt


def load_plugins() -> ModuleType:
    """The `tensorrt.plugin` module, which TensorRT calls experimental. Raises NotSupportedError where it is missing."""
    load()
    try:
        import tensorrt.plugin
    except ImportError as error:
        raise NotSupportedError(f"this TensorRT has no Python plugins ({error}): install its full wheel") from None
    return tensorrt.plugin


def available() -> bool:
    """Whether TensorRT can be imported and torch sees a GPU."""
    try:
        load()
    except NotSupportedError:
        return False
    return torch.cuda.is_available()


def version_numbers(version: str) -> tuple[int, ...]:
    """``"10.16.1.11"`` to ``(10, 16, 1, 11)``; what follows the numbers is left out."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


def this_platform(trt: ModuleType) -> Platform:
    """TensorRT, GPU and system here. Raises NotSupportedError without a GPU that torch can use."""
    if not torch.cuda.is_available():
        raise NotSupportedError(f"TensorRT {trt.__version__} is installed, and torch sees no NVIDIA GPU to build for")
    major, minor = torch.cuda.get_device_capability()
    return Platform(
        tensorrt=trt.__version__,
        gpu=Gpu(name=torch.cuda.get_device_name(), capability=f"{major}.{minor}"),
        system=f"{platform.system()} {platform.machine()}",
    )


def current_device() -> torch.device:
    """The GPU that TensorRT uses in this thread, as torch does."""
    return torch.device("cuda", torch.cuda.current_device())


def flag_bits(enumeration: Any, *names: str) -> int:
    """Bit mask of those members that this version has; their integers differ from version to version."""
    members = [getattr(enumeration, name) for name in names if hasattr(enumeration, name)]
    return sum(1 << int(member) for member in members)


def collecting_logger(trt: ModuleType) -> Any:
    """A logger that keeps warnings and errors as lines in ``.messages`` instead of printing them."""
    severities = trt.ILogger.Severity

    class CollectingLogger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (severities.INTERNAL_ERROR, severities.ERROR, severities.WARNING):
                kind = severity.name.lower().replace("_", " ")
                self.messages.append(f"{kind}: {msg.strip()}")

    return CollectingLogger()


def start(kind: Any, logger: Any) -> Any:
    """A `Builder` or `Runtime`. Raises TensorRTError where TensorRT cannot start, without a usable driver for one."""
    try:
        return kind(logger)
    except TypeError:
        # What the bindings raise when the library returns nothing.
        raise TensorRTError(f"TensorRT cannot start: {last_messages(logger)}") from None


def last_messages(logger: Any, count: int = 5) -> str:
    """The last lines that a `collecting_logger` kept, or that there are none."""
    return "; ".join(logger.messages[-count:]) or "TensorRT gave no reason"
