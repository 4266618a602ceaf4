"""Which devices there are."""

from __future__ import annotations

import re

import torch

from adrec.errors import ConfigError, nearest

ACCELERATORS = ("auto", "cpu", "gpu")


def check_device(name: str) -> torch.device:
    """Return the device ``cpu``, ``cuda`` or ``cuda:N``; raises ConfigError for another or one that is not there."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,2})?", name):
        raise ConfigError(f"device is {name!r}; allowed: cpu, cuda, or cuda:N for GPU number N")
    device = torch.device(name)
    count = _cuda_devices()
    if device.type == "cuda" and (device.index or 0) >= count:
        allowed = f"cuda:0 to cuda:{count - 1} or cpu" if count else "cpu"
        raise ConfigError(f"device is {name!r}, but torch finds {count or 'no'} CUDA devices here; allowed: {allowed}")
    return device


def check_accelerator(name: str) -> None:
    """Raise ConfigError unless ``name`` is auto, cpu, or gpu where there is one: what training takes."""
    if name not in ACCELERATORS:
        allowed = ", ".join(ACCELERATORS)
        raise ConfigError(f"--device is '{name}'{nearest(name, ACCELERATORS)}; allowed: {allowed}")
    if name == "gpu" and not _cuda_devices():
        raise ConfigError("--device is 'gpu', but torch finds no CUDA devices here; allowed: auto, cpu")


def _cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
