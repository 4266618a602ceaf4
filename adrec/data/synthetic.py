"""Synthetic interactions from a law that is known, so that what a perfect recommender reaches is known too.

Items lie in clusters of a hidden order, and a cluster is a ring. A user's next item is, with probability ``1
- noise``, one of the ``S`` items that follow the last one on its ring (the ``k``-th with probability
``step_weights[k - 1]``), and otherwise a draw from the popularity distribution: cluster ``c`` (from 0) with
probability proportional to ``(c + 1) ** -exponent`` times its size, then an item of it uniformly. The first
item is such a draw. Ids are a random permutation, so they show nothing of clusters or rings.

Steps along a ring keep the popularity distribution, so it is the stationary distribution at every position of
a sequence. The chain is of first order: the best recommender ranks by the probabilities given the last item
alone, and items of the history are recommended like any other (a target may repeat).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adrec.errors import DataError

MAX_ITEMS = 10_000_000
CLUSTERS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class RingLaw:
    """The law above.

    items: catalogue size. cluster_size: items on a ring; the last one takes what is left. exponent: of the
    Zipf law over clusters. noise: probability of a draw that ignores the last item. step_weights:
    probabilities of moving 1, 2, ... places along the ring, summing to 1. Raises: `DataError` for parameters
    outside these ranges.
    """

    items: int
    cluster_size: int = 50
    exponent: float = 0.8
    noise: float = 0.3
    step_weights: tuple[float, ...] = (0.5, 0.25, 0.15, 0.1)

    def __post_init__(self) -> None:
        least = len(self.step_weights) + 1
        for value, allowed, text in (
            (self.items, least <= self.items <= MAX_ITEMS, f"items must be from {least} to {MAX_ITEMS}"),
            (self.cluster_size, self.cluster_size >= least, f"cluster_size must be at least {least}"),
            (self.exponent, 0 <= self.exponent <= 10, "exponent must be from 0 to 10"),
            (self.noise, 0 <= self.noise <= 1, "noise must be from 0 to 1"),
        ):
            if not allowed:
                raise DataError(f"{text}, got {value}")
        if not self.step_weights or min(self.step_weights) < 0 or abs(sum(self.step_weights) - 1) > 1e-9:
            raise DataError(f"step_weights must be probabilities that sum to 1, got {self.step_weights}")

    def cluster_sizes(self) -> NDArray[np.int64]:
        """Items of each cluster, `[C]` int64; a last cluster too small for a ring joins its neighbour."""
        whole, rest = divmod(self.items, self.cluster_size)
        sizes = [self.cluster_size] * whole
        if rest > len(self.step_weights) or not sizes:
            sizes.append(rest)
        else:
            sizes[-1] += rest
        return np.array(sizes, dtype=np.int64)

    def item_probabilities(self) -> NDArray[np.float64]:
        """Stationary probability of one item of each cluster, `[C]` float64, descending."""
        sizes = self.cluster_sizes()
        weights = np.arange(1, len(sizes) + 1, dtype=np.float64) ** -self.exponent
        return weights / (weights * sizes).sum()

    def popularity_hit_rate(self, k: int = 20) -> float:
        """HR@k in percent of recommending the ``k`` most popular items: their stationary probability."""
        probabilities, sizes = self.item_probabilities(), self.cluster_sizes()
        return 100 * float(np.repeat(probabilities[:k], sizes[:k])[:k].sum())

    def bayes_hit_rate(self, k: int = 20) -> float:
        """HR@k in percent of the best possible recommender, by enumeration over where the last item lies.

        Given a last item in cluster ``c``, its ``S`` followers have probability ``(1 - noise) w_s + noise
        q_c`` and every other item ``j`` has ``noise q_j``. All items of a cluster see the same probabilities,
        so the sum of the ``k`` largest is taken once per cluster and weighted with the cluster's stationary
        probability.
        """
        probabilities, sizes = self.item_probabilities(), self.cluster_sizes()
        followers = len(self.step_weights)
        # Popularity falls with the cluster: the k most popular items that are no followers lie among these.
        head = np.repeat(np.arange(len(sizes))[: k + followers], sizes[: k + followers])[: k + followers]
        stepping = (1 - self.noise) * np.array(self.step_weights)
        total = 0.0
        for cluster in range(int(head[-1]) + 1):
            own = np.flatnonzero(head == cluster)[:followers]
            others = self.noise * probabilities[np.delete(head, own)]
            largest = np.sort(np.concatenate([stepping + self.noise * probabilities[cluster], others]))[::-1]
            total += sizes[cluster] * probabilities[cluster] * largest[:k].sum()
        # From any later cluster the popular items that compete with its followers are the same.
        popular = self.noise * probabilities[head[:k]]
        for start in range(int(head[-1]) + 1, len(sizes), CLUSTERS_AT_ONCE):
            later = slice(start, start + CLUSTERS_AT_ONCE)
            own_values = stepping + self.noise * probabilities[later, None]
            others = np.broadcast_to(popular, (len(own_values), len(popular)))
            largest = np.sort(np.concatenate([own_values, others], axis=1), axis=1)[:, ::-1]
            total += float((sizes[later] * probabilities[later] * largest[:, :k].sum(1)).sum())
        return 100 * total

    def describe(self) -> dict[str, object]:
        """The parameters and what they imply, as stored in ``dataset.json``."""
        return {
            "law": "rings",
            "cluster_size": self.cluster_size,
            "exponent": self.exponent,
            "noise": self.noise,
            "step_weights": list(self.step_weights),
            "popularity_hr20": self.popularity_hit_rate(20),
            "bayes_hr20": self.bayes_hit_rate(20),
        }


def sequence_lengths(users: int, mean_length: float, generator: np.random.Generator) -> NDArray[np.int64]:
    """Draw `[users]` int64 lengths: 3 plus a geometric number, skewed like real logs, of the given mean."""
    return 2 + generator.geometric(1 / (mean_length - 2), size=users)


def draw_sequences(
    law: RingLaw, lengths: NDArray[np.int64], generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw one sequence of each length.

    Returns item ids 1..N `[M]` int64 back to back, and offsets `[U + 1]` int64. All users advance together,
    longest first, so that time and memory are linear in ``M`` and in the catalogue.
    """
    sizes = law.cluster_sizes()
    starts = np.concatenate([[0], np.cumsum(sizes)])
    edges = np.cumsum(sizes * law.item_probabilities())
    step_edges = np.cumsum(law.step_weights)
    ids = generator.permutation(np.arange(1, law.items + 1, dtype=np.int32))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    order = np.argsort(-lengths, kind="stable")
    longest_first = lengths[order]
    values = np.empty(offsets[-1], dtype=np.int64)
    cluster = np.zeros(len(lengths), dtype=np.int64)
    place = np.zeros(len(lengths), dtype=np.int64)
    for position in range(int(longest_first[0]) if len(lengths) else 0):
        active = int(np.searchsorted(-longest_first, -position, side="left"))
        # Rounding may leave the last edge just below 1: the clip keeps such a draw inside.
        step = 1 + np.searchsorted(step_edges, generator.random(active), side="right").clip(max=len(step_edges) - 1)
        place[:active] = (place[:active] + step) % sizes[cluster[:active]]
        fresh = np.flatnonzero(generator.random(active) < law.noise) if position else np.arange(active)
        cluster[fresh] = np.searchsorted(edges, generator.random(len(fresh)), side="right").clip(max=len(sizes) - 1)
        place[fresh] = generator.integers(0, sizes[cluster[fresh]])
        values[offsets[order[:active]] + position] = ids[starts[cluster[:active]] + place[:active]]
    return values, offsets
