"""A run's one-step model and its SASRec+ beside RecBole's SASRec: same data, batches and threads, rounds in turn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from adrec.errors import NotSupportedError
from bench.plan import ACCURACY_ENGINE, Plan
from bench.progress import StageProgress
from bench.rivals.recbole_sasrec import RecBoleSasrec, start
from bench.subject import Subject
from bench.sweep import Sweep
from bench.timing import TimingProtocol

STAGE = "training RecBole's SASRec"
STEPS = 1


@contextmanager
def recbole_sweep(
    subject: Subject,
    python: str,
    batch_sizes: Sequence[int],
    protocol: TimingProtocol,
    command: str,
    progress: StageProgress,
    epochs: int | None = None,
) -> Iterator[Sweep]:
    """Train RecBole's SASRec in the process of ``python``, which ends with the block, and prepare the sweep.

    Ratios are to the run at one step in `cached`. epochs: of RecBole, at most. Raises ConfigError where RecBole cannot
    be imported, NotSupportedError for a run without steps, ChildError when RecBole fails.
    """
    config = subject.run.config
    if config.model != "adrec":
        raise NotSupportedError(f"{subject.run.path}: a run of {config.model!r}; give the folder of an 'adrec' run")
    plan = Plan(
        engines=(ACCURACY_ENGINE,),
        steps=(STEPS,),
        batch_sizes=tuple(batch_sizes),
        seeds=(0,),
        exact_steps=config.timesteps,
        accuracy_engine=ACCURACY_ENGINE,
        baseline_engine=ACCURACY_ENGINE,
        baseline_steps=STEPS,
    )
    started = time.perf_counter()

    def tell(news: dict[str, Any]) -> None:
        seconds = time.perf_counter() - started
        progress.update(STAGE, seconds, seconds * news["of"] / news["epoch"])

    child, versions = start(python)
    with child:
        rival = RecBoleSasrec.train(child, versions, subject.dataset, config, epochs, tell)
        done = time.perf_counter() - started
        progress.update(STAGE, done, done)
        yield Sweep(subject, plan, protocol, torch.device("cpu"), command, progress, (rival,))
