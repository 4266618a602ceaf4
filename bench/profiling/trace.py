"""A torch.profiler trace of one request, cleaned of what it says about the place where it was made."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from adrec.errors import DataError
from adrec.files import write_text

# Kineto writes the file's path, and on some builds the host.
PRIVATE = ("traceName", "hostname", "host_name")


def record_trace(call: Callable[[], object], path: Path, device: torch.device) -> int:
    """Run a call under torch.profiler and write its Chrome trace, which Perfetto opens; returns the events."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(raw))
        content = json.loads(raw.read_text(encoding="utf-8", errors="replace"))
    cleaned = clean_trace(content)
    check_trace(cleaned)
    write_text(path, json.dumps(cleaned, separators=(",", ":")))
    return len(cleaned["traceEvents"])


def clean_trace(content: dict[str, Any]) -> dict[str, Any]:
    """A copy without host, file names and other processes' command lines."""
    kept = {key: value for key, value in content.items() if key not in PRIVATE}
    events = []
    for event in kept.get("traceEvents", []):
        if event.get("ph") == "M" and event.get("name") == "process_name" and "/" in str(event.get("args")):
            event = {**event, "args": {"name": "adrec"}}
        events.append(event)
    return {**kept, "traceEvents": events}


def check_trace(content: dict[str, Any]) -> None:
    """Raise DataError for what Perfetto's JSON importer does not read: the Trace Event Format's required fields."""
    events = content.get("traceEvents")
    if not isinstance(events, list) or not events:
        raise DataError("the trace has no list of events under 'traceEvents'")
    for number, event in enumerate(events):
        phase = event.get("ph")
        needed = {"X": ("name", "ts", "dur", "pid", "tid"), "M": ("name", "pid", "args")}.get(phase, ("ph",))
        missing = [field for field in needed if field not in event]
        if missing:
            raise DataError(f"event {number} of the trace, phase {phase!r}, lacks {', '.join(missing)}")
        if phase == "X" and not (event["ts"] >= 0 and event["dur"] >= 0):
            raise DataError(f"event {number} of the trace, {event['name']!r}, has a negative time")
