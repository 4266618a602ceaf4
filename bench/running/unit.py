"""What a suite is made of: units that are measured whole, and the context that they are measured in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from pydantic import BaseModel

from adrec.checkpoint import Run
from adrec.errors import ConfigError, NotSupportedError
from bench.compression.networks import load_networks
from bench.subject import Subject, load_subject
from bench.timing import TimingProtocol

Report = Callable[[float, float], None]
"""Progress of a unit: seconds done, seconds expected."""

SMOKE_USERS = 400
SMOKE_ITEMS = 500


@dataclass(frozen=True)
class Unit:
    """The smallest part that is measured, kept and resumed whole: cells that are timed against each other.

    name: ``suite/...``, what patterns match. seconds: expected. measure: returns records of any kind, each with an
    ``error`` that is None unless it failed.
    """

    name: str
    seconds: float
    measure: Callable[[Report], Iterable[BaseModel]]

    @property
    def suite(self) -> str:
        """The part of the name before the first slash."""
        return self.name.split("/", 1)[0]


@dataclass
class Context:
    """What a user chose. Without a run, suites that need a model get an untrained one on synthetic data.

    smoke: the smallest shapes and the shortest times that still exercise everything. folder: where results lie.
    compressed: folders of runs that were made from ``run``. engines_named: whether the user chose the engines, which
    then are those of every suite.
    """

    folder: Path
    device: torch.device
    command: str
    smoke: bool = False
    run: Path | None = None
    data: Path | None = None
    users: int | None = None
    seconds: float | None = None
    engines: tuple[str, ...] = ("reference", "cached")
    compressed: tuple[Path, ...] = ()
    engines_named: bool = False
    notices: list[str] = field(default_factory=list)

    @property
    def protocol(self) -> TimingProtocol:
        """Protocol of timed cells."""
        if self.smoke:
            return TimingProtocol(seconds=self.seconds or 0.1, rounds=3, rounds_slow=3, rounds_most=5, warmup_calls=1)
        return TimingProtocol(seconds=self.seconds or 2.0)

    @cached_property
    def subject(self) -> Subject:
        """The run with its data, or the untrained one."""
        if self.run is not None:
            users = self.users or (SMOKE_USERS if self.smoke else None)
            found = load_subject(self.run, self.data, "test", users)
            self.notices += found.notices
            if found.run.config.model != "adrec":
                raise NotSupportedError(
                    f"{self.run}: a run of {found.run.config.model!r} has no steps; give the folder of an 'adrec' run"
                )
            return found
        self.notices.append(
            "no --run: an untrained model on synthetic data is measured, so that accuracies mean nothing"
        )
        return load_subject(untrained_run(self.folder / "untrained-run"), None, "test", self.users)

    @cached_property
    def networks(self) -> list[Run]:
        """The compressed runs, loaded; of the same data as the run."""
        if not self.compressed:
            return []
        if self.run is None:
            raise ConfigError(f"--with {self.compressed[0]}: give the run that it was made from with --run")
        return load_networks(self.subject.run, self.compressed, "--with")


def untrained_run(folder: Path) -> Path:
    """Make (once) a small run with random weights, its baseline, and its synthetic data; returns the run's folder."""
    from adrec.checkpoint import save_run
    from adrec.config import ModelConfig, RunConfig, TrainConfig
    from adrec.data.synthesize import synthetic_dataset
    from adrec.models import build_model

    run, data = folder / "run", folder / "data"
    if (run / "run.json").is_file():
        return run
    dataset = synthetic_dataset(SMOKE_USERS, SMOKE_ITEMS, 8.0, 0, name="synthetic")
    dataset.save(data, overwrite=True)
    config = ModelConfig(items=dataset.item_count, width=64, timesteps=8, schedule="cosine")
    baseline = config.baseline(TrainConfig())
    for path, settings in ((run / "baseline", baseline), (run, config)):
        torch.manual_seed(0)
        save_run(path, RunConfig(model=settings), build_model(settings), dataset, str(data), {})
    return run
