"""A model that another process computes: it takes part in a sweep without being an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from adrec.data.dataset import Examples
from adrec.data.jagged import Jagged
from adrec.evaluation import Evaluation
from bench.timing import Turn

MEMORY_MEANING = "not measured: the calls are made in another process"


class Guest(Protocol):
    """model, engine: what rows call it. fingerprint: of its weights. versions: of what computes it, by name.

    measured_with: what rows say of its accuracy.
    """

    @property
    def model(self) -> str: ...

    @property
    def engine(self) -> str: ...

    @property
    def precision(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def versions(self) -> Mapping[str, str]: ...

    @property
    def measured_with(self) -> str: ...

    def evaluation(self, examples: Examples) -> Evaluation:
        """Rank the whole catalogue for every example, by the rules of `adrec.evaluation.evaluate`."""

    def turn(self, batches: Sequence[Jagged], results: int) -> Turn:
        """What times calls on these batches in turn: from item ids to the ids of the best ``results``."""


def settled(turn: Turn) -> Turn:
    """A turn after one call that does not count: another process has just left the cores and their caches."""

    def after_one(number: int, seconds: float) -> list[float]:
        if seconds > 0:
            turn(number, 0.0)
        return turn(number, seconds)

    return after_one
