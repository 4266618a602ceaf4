"""RecBole's SASRec as a guest of a sweep: our data and split, its own trainer, our metrics."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from adrec.config import ModelConfig
from adrec.data.dataset import Dataset, Examples
from adrec.data.jagged import Jagged
from adrec.errors import ConfigError, DataError
from adrec.evaluation import Evaluation, interval_table
from bench.accuracy import RESAMPLES, RESULTS
from bench.recommendation import counted
from bench.rivals import PYTHON_VARIABLE
from bench.rivals.child import Child
from bench.timing import MOST_CALLS_A_TURN, Turn

# To import RecBole takes half a minute on a busy machine.
GREETING_SECONDS = 300.0
SCRIPT = Path(__file__).with_name("recbole_child.py")
INSTALL = (
    "pip install 'adrec[recbole]' in an environment of its own (Python 3.11 or older), and name its python with "
    f"--python or {PYTHON_VARIABLE}"
)

Tell = Callable[[dict[str, Any]], None]


def interpreter() -> str | None:
    """The python that RecBole is looked for in: the one that `PYTHON_VARIABLE` names, or this one if it has it."""
    return os.environ.get(PYTHON_VARIABLE) or (sys.executable if find_spec("recbole") else None)


def start(python: str) -> tuple[Child, dict[str, str]]:
    """RecBole's process, and the versions that compute in it; ConfigError when the interpreter lacks RecBole."""
    child = Child(python, SCRIPT, "RecBole")
    try:
        answer = child.greet("versions", GREETING_SECONDS)
        if "missing" in answer:
            raise ConfigError(f"--python {python}: cannot import RecBole ({answer['missing']}); {INSTALL}")
    except BaseException:
        child.close()
        raise
    return child, answer["versions"]


@dataclass(frozen=True)
class RecBoleSasrec:
    """A trained SASRec in RecBole's process; see `bench.guest.Guest`. epochs: how many it trained, of how many."""

    child: Child
    versions: dict[str, str]
    fingerprint: str
    epochs: int
    epochs_most: int
    items: int
    model: str = "recbole-sasrec"
    engine: str = "recbole"
    precision: str = "float32"

    @property
    def measured_with(self) -> str:
        """What computed the accuracy, and how long it was trained."""
        return f"{self.engine}, best of {counted(self.epochs, 'epoch')} trained, at most {self.epochs_most}"

    @classmethod
    def train(
        cls,
        child: Child,
        versions: dict[str, str],
        dataset: Dataset,
        config: ModelConfig,
        epochs: int | None = None,
        tell: Tell | None = None,
    ) -> RecBoleSasrec:
        """Train on our split with RecBole's trainer, stopped early on validation NDCG@20.

        config: gives width, blocks, heads and longest history. epochs: at most, None for RecBole's default. tell: is
        handed ``epoch``, ``of`` and ``ndcg20_percent`` after each epoch. Raises DataError where nothing can be trained
        or validated on, ChildError when RecBole fails.
        """
        folder = child.folder / "data"
        write_files(folder / "rival", dataset, config.max_length)
        answer = child.ask(
            "train",
            tell,
            folder=str(folder),
            items=dataset.item_count,
            max_length=config.max_length,
            width=config.width,
            blocks=config.encoder_blocks,
            heads=config.heads,
            threads=torch.get_num_threads(),
            epochs=epochs,
        )
        return cls(child, versions, answer["fingerprint"], answer["epochs"], answer["most"], dataset.item_count)

    def evaluation(self, examples: Examples) -> Evaluation:
        """Rank the whole catalogue, a user's own items left in, as `adrec.evaluation.evaluate` does by default."""
        answer = self.child.ask(
            "rank",
            histories=rows_of(examples.histories),
            targets=examples.targets.tolist(),
            count=min(RESULTS, self.items),
        )
        ranks = torch.tensor(answer["ranks"])
        return Evaluation(ranks, torch.tensor(answer["top_items"]), interval_table(ranks, RESAMPLES))

    def turn(self, batches: Sequence[Jagged], results: int) -> Turn:
        """Times RecBole's full-sort path: from item ids, which it pads to the longest history, to the best ids."""
        self.child.ask("batches", batches=[rows_of(batch) for batch in batches], count=results)

        def timed(number: int, seconds: float) -> list[float]:
            answer = self.child.ask("time", number=number, seconds=seconds, most=MOST_CALLS_A_TURN)
            return [float(each) for each in answer["ms"]]

        return timed


def write_files(folder: Path, dataset: Dataset, longest: int) -> None:
    """Write the training and validation examples and the catalogue as RecBole's atomic files, already split.

    Every training interaction but a user's first is an example, with the ``longest`` items before it, as RecBole makes
    them of a sequence. Raises DataError without examples.
    """
    training = rows_of(dataset.training_sequences())
    validation = dataset.examples("validation")
    examples = {
        "train": [
            (user, row[max(0, place - longest) : place], row[place])
            for user, row in enumerate(training)
            for place in range(1, len(row))
        ],
        "validation": list(
            zip(
                validation.users.tolist(),
                rows_of(validation.histories.tail(longest)),
                validation.targets.tolist(),
                strict=True,
            )
        ),
    }
    folder.mkdir(parents=True)
    for name, rows in examples.items():
        if not rows:
            raise DataError(f"{dataset.name}: has no {name} examples, which RecBole's training needs")
        lines = (f"{user}\t{' '.join(map(str, history))}\t{target}\n" for user, history, target in rows)
        head = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
        (folder / f"{folder.name}.{name}.inter").write_text(head + "".join(lines), encoding="utf-8")
    catalogue = "".join(f"{item}\n" for item in range(1, dataset.item_count + 1))
    (folder / f"{folder.name}.item").write_text("item_id:token\n" + catalogue, encoding="utf-8")


def rows_of(sequences: Jagged) -> list[list[int]]:
    """Sequences as lists of ids."""
    values, ends = sequences.values.tolist(), sequences.offsets.tolist()
    return [values[first:last] for first, last in pairwise(ends)]
