"""Files of a run of suites: the journal that fits the user's choices, and record files written whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from adrec.environment import read_environment
from adrec.files import write_text
from adrec.versions import installed_versions
from bench.json_lines import json_line
from bench.running.journal import Journal, Settings
from bench.running.registry import engine_paths_of
from bench.running.unit import Context


def open_journal(context: Context, suites: Sequence[str], *, resume: bool) -> Journal:
    """The journal of the context's folder, new or gone on with."""
    machine = read_environment().machine
    run, data = "untrained", "synthetic"
    if context.run is not None:
        run, data = context.subject.run.fingerprint, context.subject.dataset.fingerprint
    engines = tuple(dict.fromkeys((*context.engines, *engine_paths_of(context))))
    settings = Settings(
        smoke=context.smoke,
        run_fingerprint=run,
        dataset_fingerprint=data,
        users=context.users,
        seconds=context.protocol.seconds,
        engines=list(engines),
        networks=[each.fingerprint for each in context.networks],
        device=str(context.device),
        threads=machine.threads,
        processor=machine.kind,
        adrec=installed_versions()["adrec"] or "unknown",
    )
    return Journal(context.folder, settings, suites, resume=resume)


def write_whole(path: Path, records: Sequence[BaseModel]) -> None:
    """Write records to a file that is either complete or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json_line(record) for record in records))
