"""What a sweep measures: the run, its stage-1 baseline, and real histories drawn from its data set."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from adrec.checkpoint import Run, load_run
from adrec.comparison import Split
from adrec.data.dataset import Dataset, Examples
from adrec.data.jagged import Jagged
from adrec.data.of_run import open_data
from adrec.engines import ENGINES
from adrec.errors import ConfigError, DataError
from bench.compression.networks import FLOAT, stored_precision

MOST_BATCHES = 256
MOST_BATCH_USERS = 4096


@dataclass
class Subject:
    """A run with its data; ``notices`` are sentences for the user about what is not as it might seem."""

    run: Run
    baseline: Run | None
    dataset: Dataset
    examples: Examples
    split: Split
    notices: list[str] = field(default_factory=list)


def load_subject(run_path: Path, data: Path | None, split: Split, users: int | None) -> Subject:
    """Load a run and a split of its data; ``users`` limits the evaluated users to a fixed random sample.

    Raises RunError for another data set than the run's, and DataError without an example in the split.
    """
    run = load_run(run_path)
    notices = []
    dataset = open_data(run, data)
    examples = dataset.examples(split)
    total = len(examples.histories)
    if total == 0:
        raise DataError(f"{dataset.name}: no user has a target in the {split} split; choose the other --split")
    if users is not None and users < 1:
        raise ConfigError(f"--users {users}: at least 1 user is needed; leave it out to evaluate all {total}")
    if users is not None and users < total:
        examples = sample_examples(examples, users)
        notices.append(f"accuracy is measured on a fixed random sample of {users} of {total} users")
    return Subject(run, run.baseline(), dataset, examples, split, notices)


def served_precision(run: Run, engine: str) -> str:
    """Name of what an engine computes a run with: its dtype, or what the run stores where that is fewer bits."""
    dtype = str(ENGINES[engine].dtype).removeprefix("torch.")
    return dtype if dtype != FLOAT else stored_precision(run)


def sample_examples(examples: Examples, users: int, seed: int = 0) -> Examples:
    """Return a fixed random sample of ``users`` examples, in their original order."""
    picked = np.random.default_rng(seed).permutation(len(examples.histories))[:users]
    rows = torch.from_numpy(np.sort(picked))
    return Examples(examples.histories.select(rows), examples.targets[rows], examples.users[rows])


def draw_batches(histories: Jagged, batch_size: int, seed: int = 0) -> list[Jagged]:
    """Draw batches of ``batch_size`` real histories, so that the distribution of lengths is that of the data.

    The number of batches falls with their size, from 256 to 8. A batch larger than the data repeats users.
    """
    users, count = len(histories), batch_count(batch_size)
    generator = np.random.default_rng(seed)
    return [
        histories.select(torch.from_numpy(generator.choice(users, batch_size, replace=batch_size > users)))
        for _ in range(count)
    ]


def batch_count(batch_size: int) -> int:
    """Number of batches that `draw_batches` draws."""
    return max(8, min(MOST_BATCHES, MOST_BATCH_USERS // batch_size))
