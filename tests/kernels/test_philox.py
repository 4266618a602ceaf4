"""The noise stream by value: Random123's known answers, a plain-integer twin, and Triton's own numbers."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import philox

HERE = Path(__file__).resolve().parent
STORED = HERE / "triton_randn.npz"
# kernels/philox.py promises Triton's numbers to this: logarithm and cosine differ in the last bit.
TRITON_TOLERANCE = 5e-7
MASK = 0xFFFFFFFF


def integer_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 in Python integers, written from the paper's definition."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & MASK, (a >> 32) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_integer_twin_gives_random123s_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    assert integer_philox(counter, key) == words


def test_counter_zero_and_key_zero_give_the_known_answer() -> None:
    first, second = philox.philox(0, torch.tensor([0]))
    assert (first.item(), second.item()) == (0x6627E8D5, 0xE169C58D)
    assert first.dtype == second.dtype == torch.int64


@given(seed=st.integers(-(2**63), 2**63 - 1), offset=st.integers(0, 2**63 - 1))
@settings(max_examples=200, deadline=None)
def test_words_equal_the_integer_twin(seed: int, offset: int) -> None:
    words = integer_philox([offset & MASK, offset >> 32, 0, 0], [seed & MASK, (seed >> 32) & MASK])
    first, second = philox.philox(seed, torch.tensor(offset))
    assert [first.item(), second.item()] == words[:2]


def test_values_equal_tritons_stored_ones() -> None:
    stored = np.load(STORED)
    offsets = torch.from_numpy(stored["offsets"])
    seeds = stored["seeds"].tolist()
    assert max(seeds) > 2**32
    assert int(offsets.max()) > 2**32
    for seed, expected in zip(seeds, stored["values"], strict=True):
        difference = np.abs(philox.randn(seed, offsets).numpy() - expected).max()
        assert difference <= TRITON_TOLERANCE, f"seed {seed}"


def test_the_clamp_of_the_logarithm_is_among_the_stored_values() -> None:
    """Without the clamp at 1e-7 a uniform of 0 would give an infinite radius."""
    near_zero = torch.tensor([14_883_995, 17_758_991, 34_829_342, 38_471_471])
    word, other = philox.philox(0, near_zero)
    first = torch.where(word > 0x7FFFFFFF, MASK - word, word).double() * 4.6566127342e-10
    second = torch.where(other > 0x7FFFFFFF, MASK - other, other).double() * 4.6566127342e-10
    assert bool((first < 1e-7).all())
    expected = (-2.0 * torch.tensor(1e-7).double().log()).sqrt() * (2.0 * torch.pi * second).cos()
    # The angle is rounded to float32 twice, and the radius here is 5.7.
    torch.testing.assert_close(philox.randn(0, near_zero).double(), expected, rtol=0.0, atol=2e-6)
    assert set(near_zero.tolist()) <= set(np.load(STORED)["offsets"].tolist())


def test_values_equal_tritons_made_now(tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: nothing to compare with beyond the stored values")
    out = tmp_path / "made.npz"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(HERE / "triton_randn.py"), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    made, stored = np.load(out), np.load(STORED)
    assert made["seeds"].tolist() == stored["seeds"].tolist()
    assert made["offsets"].tolist() == stored["offsets"].tolist()
    offsets = torch.from_numpy(made["offsets"])
    for seed, expected in zip(made["seeds"].tolist(), made["values"], strict=True):
        assert np.abs(philox.randn(seed, offsets).numpy() - expected).max() <= TRITON_TOLERANCE, f"seed {seed}"


@given(
    keys=st.lists(st.integers(0, philox.ROW_KEYS - 1), min_size=1, max_size=9),
    order=st.randoms(use_true_random=False),
    draw=st.integers(0, 4095),
    width=st.integers(1, 37),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=60, deadline=None)
def test_a_rows_noise_does_not_depend_on_the_other_rows(
    keys: list[int], order: random.Random, draw: int, width: int, seed: int
) -> None:
    whole = philox.row_noise(seed, torch.tensor(keys), draw, width)
    rows = order.choices(range(len(keys)), k=order.randint(1, 2 * len(keys)))
    some = philox.row_noise(seed, torch.tensor([keys[row] for row in rows]), draw, width)
    assert torch.equal(some, whole[rows])
    assert torch.equal(philox.row_noise(seed, torch.tensor(keys), draw, width + 5)[:, :width], whole)


@given(
    keys=st.lists(st.integers(0, philox.ROW_KEYS - 1), max_size=4),
    draws=st.lists(st.integers(0, 4095), max_size=5),
    width=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=60, deadline=None)
def test_several_draws_are_those_draws(keys: list[int], draws: list[int], width: int, seed: int) -> None:
    rows = torch.tensor(keys, dtype=torch.int64)
    found = philox.row_noise(seed, rows, draws, width)
    assert found.shape == (len(draws), len(keys), width)
    for draw, noise in zip(draws, found, strict=True):
        assert torch.equal(noise, philox.row_noise(seed, rows, draw, width))
    assert np.array_equal(philox.draw_noise(seed, rows.numpy(), draws, width), found.numpy())


def test_working_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    offset = torch.arange(1000).view(8, 125)
    whole = philox.randn(7, offset)
    monkeypatch.setattr(philox, "CHUNK", 33)
    assert torch.equal(philox.randn(7, offset), whole)
    assert torch.equal(philox.randn(7, offset.T), whole.T)
    assert philox.randn(7, torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)


@given(
    one=st.tuples(st.integers(0, philox.ROW_KEYS - 1), st.integers(0, 4095), st.integers(0, 4095)),
    other=st.tuples(st.integers(0, philox.ROW_KEYS - 1), st.integers(0, 4095), st.integers(0, 4095)),
)
@settings(max_examples=100, deadline=None)
def test_no_two_elements_share_a_counter(one: tuple[int, int, int], other: tuple[int, int, int]) -> None:
    places = [
        philox.offsets(torch.tensor([key]), draw, 4096)[0, dimension].item() for key, draw, dimension in (one, other)
    ]
    assert (places[0] == places[1]) == (one == other)
    assert places[0] == one[0] * 2**24 + one[1] * 2**12 + one[2] < 2**63


@pytest.mark.parametrize("seed", [0, 2**33 + 9])
def test_moments_are_those_of_a_standard_normal(seed: int) -> None:
    values = philox.row_noise(seed, torch.arange(3001), 3, 101).double()
    count = values.numel()
    # Four standard errors of each sample moment.
    assert abs(values.mean().item()) < 4 * count**-0.5
    assert abs(values.var().item() - 1.0) < 4 * (2 / count) ** 0.5
    assert abs((values**3).mean().item()) < 4 * (15 / count) ** 0.5
    assert abs((values**4).mean().item() - 3.0) < 4 * (96 / count) ** 0.5
    ordered = values.flatten().sort().values
    uniform = 0.5 * (1.0 + torch.erf(ordered / 2**0.5))
    place = torch.arange(1, count + 1, dtype=torch.float64) / count
    # Kolmogorov-Smirnov at about one in ten thousand.
    assert (uniform - place).abs().max().item() < 2.2 * count**-0.5


def test_rows_draws_dimensions_and_seeds_are_uncorrelated() -> None:
    keys = torch.arange(20_001)
    base = philox.row_noise(0, keys, 0, 3).double()
    others = [
        philox.row_noise(1, keys, 0, 3),
        philox.row_noise(2**32, keys, 0, 3),
        philox.row_noise(0, keys, 1, 3),
        philox.row_noise(0, keys + 1, 0, 3),
        base.roll(1, 1),
    ]
    for other in others:
        assert abs((base * other).mean().item()) < 4 * base.numel() ** -0.5


@pytest.mark.parametrize(
    ("keys", "draw", "width", "message"),
    [
        ([0], -1, 4, "draw is -1; allowed: 0 to 4095"),
        ([0], 4096, 4, "draw is 4096; allowed: 0 to 4095"),
        ([0], 0, 0, "width is 0; allowed: 1 to 4096"),
        ([0], 0, 4097, "width is 4097; allowed: 1 to 4096"),
        ([5, -1], 0, 4, "row keys span -1 to 5; allowed: 0 to 2^39 - 1"),
        ([2**39, 3], 0, 4, f"row keys span 3 to {2**39}; allowed: 0 to 2^39 - 1"),
    ],
)
def test_values_out_of_range_are_named(keys: list[int], draw: int, width: int, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared below
        philox.row_noise(0, torch.tensor(keys), draw, width)
    assert str(caught.value) == message


def test_the_largest_counter_still_fits_and_no_rows_give_no_noise() -> None:
    assert philox.offsets(torch.tensor([2**39 - 1]), 4095, 4096)[0, -1].item() == 2**63 - 1
    assert philox.row_noise(0, torch.zeros(0, dtype=torch.int64), 0, 5).shape == (0, 5)


@given(
    seed=st.integers(0, 2**64 - 1),
    values=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_the_path_of_other_devices_gives_the_same_words(seed: int, values: list[int]) -> None:
    """On a CPU the rounds run in numpy; the torch rounds that a GPU runs must agree bit for bit."""
    offset = torch.tensor(values)
    words = philox._philox_on_device(seed, offset)
    for ours, theirs in zip(philox.philox(seed, offset), words, strict=True):
        assert torch.equal(ours, theirs)
    difference = philox.randn(seed, offset) - philox._normals_on_device(*words)
    assert difference.abs().max() <= TRITON_TOLERANCE


@pytest.mark.parametrize("draw", [3, (), (0, 4095)])
def test_offsets_have_the_same_shape_on_other_devices(draw: int | tuple[int, ...]) -> None:
    keys = torch.zeros(2, dtype=torch.int64)
    assert philox.offsets(keys.to("meta"), draw, 5).shape == philox.offsets(keys, draw, 5).shape
