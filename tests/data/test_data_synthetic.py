"""The synthetic law: its stated HR@20 against brute force and against draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adrec.data.dataset import Dataset
from adrec.data.prepare import PrepareOptions, prepare
from adrec.data.synthesize import synthetic_dataset, write_raw
from adrec.data.synthetic import RingLaw, draw_sequences, sequence_lengths
from adrec.errors import DataError


def transition_matrix(law: RingLaw) -> tuple[np.ndarray, np.ndarray]:
    """The law spelled out: stationary probabilities `[N]` and transition probabilities `[N, N]`."""
    sizes = law.cluster_sizes()
    cluster = np.repeat(np.arange(len(sizes)), sizes)
    weights = (cluster + 1.0) ** -law.exponent
    popularity = weights / weights.sum()
    matrix = np.tile(law.noise * popularity, (law.items, 1))
    starts = np.cumsum(sizes) - sizes
    for item in range(law.items):
        start, size = starts[cluster[item]], sizes[cluster[item]]
        for step, weight in enumerate(law.step_weights, start=1):
            matrix[item, start + (item - start + step) % size] += (1 - law.noise) * weight
    return popularity, matrix


@given(
    items=st.integers(6, 120),
    cluster_size=st.integers(6, 40),
    exponent=st.floats(0, 2),
    noise=st.floats(0, 1),
    weights=st.sampled_from([(1.0,), (0.5, 0.5), (0.5, 0.25, 0.15, 0.1), (0.1, 0.2, 0.3, 0.4), (0.2,) * 5]),
    k=st.sampled_from([1, 3, 20]),
)
@settings(deadline=None)
def test_stated_hit_rates_agree_with_enumeration(
    items: int, cluster_size: int, exponent: float, noise: float, weights: tuple[float, ...], k: int
) -> None:
    law = RingLaw(items, cluster_size, exponent, noise, weights)
    popularity, matrix = transition_matrix(law)
    np.testing.assert_allclose(matrix.sum(1), 1)
    np.testing.assert_allclose(popularity @ matrix, popularity, atol=1e-12)
    best = (popularity * np.sort(matrix, axis=1)[:, ::-1][:, :k].sum(1)).sum()
    assert law.bayes_hit_rate(k) == pytest.approx(100 * best, abs=1e-8)
    assert law.popularity_hit_rate(k) == pytest.approx(100 * np.sort(popularity)[::-1][:k].sum(), abs=1e-8)


def test_draws_reach_the_stated_hit_rates() -> None:
    law = RingLaw(200, cluster_size=30, exponent=0.7, noise=0.4)
    generator = np.random.default_rng(3)
    values, offsets = draw_sequences(law, sequence_lengths(20_000, 8, generator), generator)
    # The hidden order is the generator's own permutation, drawn right after the lengths.
    repeat = np.random.default_rng(3)
    sequence_lengths(20_000, 8, repeat)
    place = np.empty(law.items + 1, dtype=np.int64)
    place[repeat.permutation(np.arange(1, law.items + 1, dtype=np.int32))] = np.arange(law.items)
    popularity, matrix = transition_matrix(law)
    last, target = place[values[offsets[1:] - 2]], place[values[offsets[1:] - 1]]
    top = np.argsort(-matrix, axis=1, kind="stable")[:, :20]
    hits = 100 * (top[last] == target[:, None]).any(1).mean()
    popular = 100 * np.isin(target, np.argsort(-popularity, kind="stable")[:20]).mean()
    # Standard error of a share of 20,000 draws is at most .36 points; four of them.
    assert hits == pytest.approx(law.bayes_hit_rate(), abs=1.5)
    assert popular == pytest.approx(law.popularity_hit_rate(), abs=1.5)
    assert law.bayes_hit_rate() > law.popularity_hit_rate() + 30


def test_demo_size_has_room_between_popularity_and_bayes() -> None:
    info = synthetic_dataset(users=4000, items=1000, mean_length=12).info
    assert info.synthetic is not None
    assert info.synthetic["popularity_hr20"] < 10
    assert 65 < info.synthetic["bayes_hr20"] < 80
    assert info.interactions / info.users == pytest.approx(12, rel=0.05)


def test_a_bigram_count_learns_what_popularity_cannot() -> None:
    dataset = synthetic_dataset(users=4000, items=200, mean_length=15, seed=1)
    training = dataset.training_sequences()
    values, offsets = training.values.numpy(), training.offsets.numpy()
    inside = np.ones(len(values), dtype=bool)
    inside[offsets[:-1]] = False
    follow = np.flatnonzero(inside)
    counts = np.zeros((201, 201))
    np.add.at(counts, (values[follow - 1], values[follow]), 1)
    counts += dataset.item_counts().numpy() / 1e6
    examples = dataset.examples("test")
    last = examples.histories.values[examples.histories.offsets[1:] - 1].numpy()
    top = np.argsort(-counts, axis=1)[:, :20]
    hits = 100 * (top[last] == examples.targets.numpy()[:, None]).any(1).mean()
    assert dataset.info.synthetic is not None
    assert hits > dataset.info.synthetic["bayes_hr20"] - 5
    assert hits > dataset.info.synthetic["popularity_hr20"] + 30


def test_same_seed_same_data() -> None:
    first, again, other = (synthetic_dataset(50, 60, 5, seed).fingerprint for seed in (4, 4, 5))
    assert first == again != other


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_raw_file_prepares_to_the_same_sequences(tmp_path: Path, suffix: str) -> None:
    direct = synthetic_dataset(300, 40, 6, seed=2)
    raw = tmp_path / f"raw{suffix}"
    assert write_raw(raw, 300, 40, 6, seed=2) == direct.info.interactions
    prepared = prepare(raw, tmp_path / "out", PrepareOptions(core=0))
    assert prepared.item_count == 40
    assert prepared.fingerprint == direct.fingerprint
    with pytest.raises(DataError, match="exists; choose a new file"):
        write_raw(raw, 300, 40, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", raw.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 100, 5.0), "--users must be at least 1, got 0"),
        ((10, 100, 2.0), "--mean-length must be from 3 to 10000, got 2.0"),
        ((10, 3, 5.0), "items must be from 5 to 10000000, got 3"),
        ((10, 10_000_001, 5.0), "items must be from 5 to 10000000, got 10000001"),
    ],
)
def test_bad_sizes(arguments: tuple[int, int, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        synthetic_dataset(*arguments)


def test_bad_law() -> None:
    with pytest.raises(DataError, match="noise must be from 0 to 1, got 2"):
        RingLaw(100, noise=2)
    with pytest.raises(DataError, match="step_weights must be probabilities that sum to 1"):
        RingLaw(100, step_weights=(0.5, 0.4))
    with pytest.raises(DataError, match="cluster_size must be at least 5, got 4"):
        RingLaw(100, cluster_size=4)


def test_largest_catalogue(tmp_path: Path) -> None:
    dataset = synthetic_dataset(users=1000, items=10_000_000, mean_length=5)
    assert dataset.item_count == 10_000_000
    assert isinstance(dataset, Dataset)
