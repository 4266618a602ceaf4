"""Where a compressed run comes from: the run it was made of, and what of its accuracy was kept when it was made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from adrec.checkpoint import METRICS_FILE, Run, load_run
from adrec.config import StrictModel, parse
from adrec.errors import AdrecError, ConfigError, RunError

SOURCE = "source"
"""Key of a `Source` in a run's metrics."""


class KeptShare(StrictModel):
    """NDCG@20 in percent of another model's, with its 95 % bootstrap interval over users."""

    value: float
    low: float
    high: float


class Source(StrictModel):
    """The run that a compressed one was made of. run: its folder as given then. validation_kept: None if unmeasured."""

    run: str
    model_fingerprint: str
    validation_kept: KeptShare | None = None


def recorded_source(run: Run) -> Source | None:
    """What a run's metrics say of the run it was made of; None for a run that was trained. Raises RunError."""
    values = run.metrics.get(SOURCE) if isinstance(run.metrics, dict) else None
    if values is None:
        return None
    try:
        return parse(Source, values, f"{run.path / METRICS_FILE}: {SOURCE}")
    except ConfigError as error:
        raise RunError(f"{error}. Restore the file from a copy, or compress the original run again") from None


def reachable_source(run: Run, source: Source, device: str = "cpu") -> Run | None:
    """The run that another was made of, from where it was or from beside that run; None where it is not, or changed."""
    for path in _places(run, source):
        try:
            found = load_run(path, device)
        except AdrecError:
            continue
        if found.fingerprint == source.model_fingerprint:
            return found
    return None


def named_source(run: Run, path: Path, device: str = "cpu") -> Run:
    """Load the run that ``run`` is said to be made of; raises RunError where that cannot be."""
    found, recorded = load_run(path, device), recorded_source(run)
    if recorded is not None and recorded.model_fingerprint != found.fingerprint:
        raise RunError(
            f"--source {path}: is not the run that {run.path} was made of, which was {recorded.run}"
            f" ({recorded.model_fingerprint[:12]}); leave it out, or give that run"
        )
    if found.dataset_fingerprint != run.dataset_fingerprint:
        theirs, ours = (f"'{each.info.dataset_name}' ({each.dataset_fingerprint[:12]})" for each in (found, run))
        raise RunError(f"--source {path}: was trained on {theirs}, the run on {ours}; give a run of the same data set")
    return found


def _places(run: Run, source: Source) -> Iterator[Path]:
    yield Path(source.run)
    yield run.path.resolve().parent / Path(source.run).name
