"""Accuracy of a step count, measured once per seed, and its agreement with the exact result."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from adrec.data.dataset import Examples
from adrec.engines import Engine
from adrec.evaluation import Evaluation, evaluate, kept_percent, top_overlap
from adrec.respacing import Steps
from bench.places import pack_places
from bench.record import Accuracy, Estimate

RESULTS = 20
RESAMPLES = 1000
AGREEMENT_USERS = 128


class AccuracyBook:
    """Evaluates one engine on one set of examples, at most once for every (steps, seed).

    Other float32 engines of the model compute the same to rounding: they are compared with it on a few users. An engine
    that rounds more has an accuracy of its own, measured on all of them.

    ``exact_steps`` is the step count that the model was trained with: the reference of every overlap, and
    of the share of the accuracy that fewer steps keep. `None` for a model without steps.
    """

    def __init__(self, engine: Engine, examples: Examples, exact_steps: int | None) -> None:
        self.engine = engine
        self.examples = examples
        self.exact_steps = exact_steps
        self._found: dict[tuple[Steps, int], Evaluation] = {}
        self._rounding: dict[str, AccuracyBook] = {}
        # A fixed sample: every engine and step count is compared on the same users.
        users = len(examples.histories)
        picked = np.random.default_rng(0).permutation(users)[:AGREEMENT_USERS]
        self._sample = torch.from_numpy(np.sort(picked))

    def evaluation(self, steps: Steps, seed: int) -> Evaluation:
        """Return the evaluation at ``steps`` and ``seed``, measuring it on the first request."""
        key = (steps, seed)
        if key not in self._found:
            self._found[key] = evaluate(self.engine, self.examples, steps=steps, seed=seed, bootstrap=RESAMPLES)
        return self._found[key]

    def exact_name(self, seed: int) -> str:
        """Describe the result that the overlaps refer to."""
        return f"{self.engine.name}, {self.exact_steps} steps, seed {seed}, {len(self.examples.histories)} users"

    def accuracy(self, steps: Steps, seed: int, engine: Engine, exact: AccuracyBook) -> Accuracy:
        """Return the accuracy of ``engine`` at ``steps``: its own if it rounds, else that measured here, if it agrees.

        ``exact`` is the book whose evaluation at its exact step count the top-20 overlap refers to.
        """
        own = engine is not self.engine and engine.dtype != torch.float32
        book = self._book_of(engine) if own else self
        measured = book.evaluation(steps, seed)
        best = exact.evaluation(exact.exact_steps, seed)
        overlap = float(top_overlap(measured.top_items, best.top_items).mean())
        agreement, own_overlap, sampled = None, overlap, measured.users
        if engine is not book.engine:
            listed, sampled = self._sample_lists(steps, seed, engine), len(self._sample)
            agreement = float(top_overlap(listed, measured.top_items[self._sample]).mean())
            own_overlap = float(top_overlap(listed, best.top_items[self._sample]).mean())
        return Accuracy(
            metrics_percent=estimates(measured),
            users=measured.users,
            measured_with=book.engine.name,
            ndcg20_kept_percent=_kept(measured, best) if exact is self else None,
            top20_overlap_fraction=overlap,
            top20_overlap_against=exact.exact_name(seed),
            engine_agreement_fraction=agreement,
            engine_agreement_users=0 if agreement is None else sampled,
            engine_top20_overlap_fraction=own_overlap,
            engine_top20_overlap_users=sampled,
            places_base64=pack_places(measured.ranks),
        )

    def _book_of(self, engine: Engine) -> AccuracyBook:
        if engine.name not in self._rounding:
            self._rounding[engine.name] = AccuracyBook(engine, self.examples, self.exact_steps)
        return self._rounding[engine.name]

    def _sample_lists(self, steps: Steps, seed: int, engine: Engine) -> Tensor:
        """The top lists of another engine for the sampled users, `[n, k]`."""
        histories = self.examples.histories.select(self._sample)
        keys = self.examples.users[self._sample]
        count = min(RESULTS, engine.model.config.items)
        return engine.recommend(histories, k=count, steps=steps, seed=seed, row_keys=keys).items.cpu()


def estimates(evaluation: Evaluation) -> dict[str, Estimate]:
    """Return every metric of an evaluation, in percent, with its interval."""
    return {
        name: Estimate(value=metric.value, low=metric.low, high=metric.high)
        for name, metric in evaluation.metrics.items()
    }


def _kept(measured: Evaluation, exact: Evaluation) -> Estimate | None:
    kept = kept_percent(measured.ranks, exact.ranks, resamples=RESAMPLES)
    return None if kept is None else Estimate(value=kept.value, low=kept.low, high=kept.high)
