"""Peak memory of one call."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

MEBIBYTE = 2**20
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")

CUDA_MEANING = "most CUDA memory allocated by tensors during one call, weights included"
RESIDENT_MEANING = "rise of the resident set during one call; memory that the allocator already held is not counted"
UNKNOWN_MEANING = "not measured: this system does not let a process reset its peak resident set"


def peak_memory_mib(call: Callable[[], object], device: torch.device) -> tuple[float | None, str]:
    """Run ``call`` once and return (MiB, what the figure means); `None` MiB where the system cannot tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / MEBIBYTE, CUDA_MEANING
    _return_free_memory()
    resettable = _reset_peak()
    before = _status_mib("VmRSS")
    call()
    after = _status_mib("VmHWM")
    if not resettable or before is None or after is None:
        return None, UNKNOWN_MEANING
    return max(0.0, after - before), RESIDENT_MEANING


def _return_free_memory() -> None:
    # Pages that glibc keeps for itself would hide what the call really needs.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    try:
        # Documented in proc(5): 5 resets the peak resident set ("high water mark") of the process.
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _status_mib(name: str) -> float | None:
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB", STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) / 1024 if found else None
