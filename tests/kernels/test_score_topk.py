"""The best items of the whole catalogue by value: dtypes, ties, special scores, exclusion, splits and compaction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adrec.data.jagged import Jagged
from adrec.engines.cached import CachedEngine
from kernels import _score_topk_op as op
from kernels import score_topk as module
from kernels.score_topk import FLOAT8, score_topk, score_topk_twin
from tests.conftest import make_tiny_model
from tests.kernels.conftest import guarded
from tests.kernels.topk_cases import check_close, check_exact, exclusions, margins, problem

PAIRS = [
    (torch.float32, torch.float32, False),
    (torch.float16, torch.float16, False),
    (torch.bfloat16, torch.bfloat16, True),
    (torch.float32, torch.bfloat16, False),
    (torch.float16, torch.bfloat16, False),
    (torch.float32, torch.int8, True),
    (torch.float16, torch.int8, True),
    (torch.bfloat16, torch.int8, False),
    (torch.float32, FLOAT8, True),
    (torch.float16, FLOAT8, False),
    (torch.bfloat16, FLOAT8, True),
]


@pytest.mark.parametrize(("dtype", "stored", "scaled"), PAIRS)
@pytest.mark.parametrize("whole", [True, False])
def test_every_pair_of_dtypes_by_value(
    dtype: torch.dtype, stored: torch.dtype, scaled: bool, whole: bool, kernel_device: torch.device
) -> None:
    values = problem(kernel_device, width=50, dtype=dtype, stored=stored, scaled=scaled, whole=whole)
    (check_exact if whole else check_close)(20, values)


@pytest.mark.parametrize("width", [32, 64, 96, 128, 192, 256])
def test_every_width_of_a_model(width: int, kernel_device: torch.device) -> None:
    check_close(7, problem(kernel_device, batch=3, items=70, width=width))
    check_exact(7, problem(kernel_device, batch=3, items=70, width=width, dtype=torch.bfloat16, whole=True))


@given(
    batch=st.integers(0, 6), items=st.integers(0, 90), width=st.integers(1, 40), k=st.integers(1, 100),
    first=st.integers(0, 9), data=st.data(),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_any_shape_and_any_exclusion(
    kernel_device: torch.device, batch: int, items: int, width: int, k: int, first: int, data: st.DataObject
) -> None:
    values = problem(kernel_device, batch=batch, items=items, width=width, whole=True, seed=k)
    ids = st.integers(-1, items + 1)
    lists = data.draw(st.lists(st.lists(ids, max_size=9), min_size=batch, max_size=batch))
    twin_lists = [[item for item in one if 0 <= item <= items] for one in lists]
    with guarded():
        found = score_topk(k=k, first=first, **values, **exclusions(lists, kernel_device))
    expected = score_topk_twin(k=k, first=first, **values, **exclusions(twin_lists, kernel_device))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def with_scores(scores: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A single row of ones and zeros and a table that give these scores to items 1, 2, ..."""
    table = torch.zeros(len(scores) + 1, 16, dtype=dtype)
    table[1:, 0] = scores.to(dtype)
    rows = torch.zeros(1, 16, dtype=dtype)
    rows[0, 0] = 1.0
    return {"rows": rows.to(device), "table": margins(table.to(device))}


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("k", [20, 200])
@pytest.mark.parametrize(
    "order", ["equal", "rising", "falling", "rising then equal", "two values", "shuffled", "one lane"]
)
def test_orders_that_fill_the_lists(order: str, k: int, kernel_device: torch.device) -> None:
    """Every item passes, or one in two: lists fill and are compacted again and again, and ties go to lower ids."""
    count = torch.arange(1000.0)
    scores = {
        "equal": torch.ones(1000),
        "rising": count,
        "falling": -count,
        "rising then equal": count.clamp(max=700.0),
        "two values": count % 2,
        # One item of 32 has a score: a lane is full before a row has k items, which bounds nothing yet.
        "one lane": torch.where(count % 32 == 5, -count, -torch.inf),
        "shuffled": torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float(),
    }[order]
    items, _ = check_exact(k, with_scores(scores, kernel_device))
    if order == "equal":
        assert items.tolist() == [list(range(1, k + 1))]


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_nan_and_infinities(kernel_device: torch.device) -> None:
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([nan, 1.0, -inf, inf, -3e38, nan, inf, 0.0, 1e-45])
    # A float32 product of 0 and inf is NaN, so the other columns of the row hold zeros of the table only.
    values = with_scores(scores, kernel_device)
    items, found = check_exact(9, values)
    assert items.tolist() == [[4, 7, 2, 9, 8, 5, 0, 0, 0]]
    assert found[0, -3:].tolist() == [-inf] * 3
    values["rows"] = values["rows"] * nan
    items, found = check_exact(9, values)
    assert items.tolist() == [[0] * 9]


def test_any_k_cuts_a_run_of_ties_by_id(kernel_device: torch.device) -> None:
    """Keys of neighbours then differ by 1, the least that the search for the k-th key must tell apart."""
    values = with_scores(torch.ones(40), kernel_device)
    for k in (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 39, 40, 41):
        items, _ = score_topk(k=k, **values)
        assert items.tolist() == [[*range(1, min(k, 40) + 1), *[0] * (k - 40)]]


def test_the_two_zeros_tie(kernel_device: torch.device) -> None:
    values = with_scores(torch.tensor([0.0, 0.0, 1.0, 0.0, -1.0, 0.0]), kernel_device)
    # A sum that starts at 0.0 is never -0.0, but its product with a negative scale is.
    scale = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0], device=kernel_device)
    items, found = check_exact(6, {**values, "scale": scale})
    assert items.tolist() == [[1, 2, 4, 6, 3, 5]]
    assert not bool(found.signbit()[:, :4].any())


def test_every_float8(kernel_device: torch.device) -> None:
    """All 256 bytes: 2 NaN, 2 zeros, and the rest at exactly torch's values, largest first."""
    numbers = torch.arange(256).to(torch.uint8).view(FLOAT8).to(torch.float32)
    stored = torch.zeros(257, 16, dtype=torch.uint8)
    stored[1:, 0] = torch.arange(256).to(torch.uint8)
    rows = torch.zeros(1, 16)
    rows[0, 0] = 1.0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        values = {"rows": rows.to(kernel_device, dtype), "table": margins(stored.view(FLOAT8).to(kernel_device))}
        items, scores = check_exact(256, values)
        assert scores[0, :254].tolist() == sorted(numbers[~numbers.isnan()].tolist(), reverse=True)
        assert items[0, -2:].tolist() == [0, 0]


def test_exclusion_takes_the_best_items_of_each_row(kernel_device: torch.device) -> None:
    values = problem(kernel_device, batch=4, items=130, whole=True)
    everything = torch.argsort(values["rows"].cpu() @ values["table"].cpu().T, descending=True)
    lists = [everything[0, :60].tolist() * 2, [], list(range(131)), [everything[3, 0].item()]]
    items, scores = check_exact(30, {**values, **exclusions(lists, kernel_device)})
    assert not set(items[0].tolist()) & set(lists[0])
    assert items[2].tolist() == [0] * 30
    assert bool((scores[2] == -torch.inf).all())
    assert everything[3, 0] not in items[3].tolist()


def test_ids_that_no_item_has_exclude_nothing(kernel_device: torch.device) -> None:
    """Among them 2^32 + 5, whose low bits are those of item 5."""
    values = problem(kernel_device, batch=1, items=40, whole=True)
    plain = check_exact(40, values)
    found = score_topk(k=40, **values, **exclusions([[-1, 41, 2**32 + 5, 2**62, -(2**62)]], kernel_device))
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


def test_fewer_items_than_k_and_none_at_all(kernel_device: torch.device) -> None:
    values = problem(kernel_device, batch=2, items=3, whole=True)
    items, scores = check_exact(8, values)
    assert bool((items[:, 3:] == 0).all())
    assert bool((scores[:, 3:] == -torch.inf).all())
    for first in (4, 9):
        items, scores = check_exact(8, {**values, "first": first})
        assert not bool(items.any())
    empty = {"rows": values["rows"], "table": values["table"][:0]}
    assert not bool(check_exact(2, empty)[0].any())
    items, scores = check_exact(8, {**values, "rows": values["rows"][:0]})
    assert (items.shape, scores.shape) == ((0, 8), (0, 8))


def test_the_padding_row_and_those_below_first_are_never_returned(kernel_device: torch.device) -> None:
    values = with_scores(-torch.arange(1.0, 41.0), kernel_device)
    assert check_exact(3, values)[0].tolist() == [[1, 2, 3]]
    assert check_exact(3, {**values, "first": 0})[0].tolist() == [[0, 1, 2]]
    assert check_exact(3, {**values, "first": 11})[0].tolist() == [[11, 12, 13]]


def in_seven_splits(device: torch.device, patch: pytest.MonkeyPatch, batch: int = 3) -> dict[str, Any]:
    """Items whose scores are whole numbers that tie within and across splits; 16 rows are a tile."""
    patch.setattr(op, "_FEWEST_SPLIT_ITEMS", 60)
    values = problem(device, batch=batch, items=420, width=16, whole=True)
    lists = [[5, 6], [], list(range(1, 300)), *[[]] * (batch - 3)]
    return {**values, **exclusions(lists, device)}


@pytest.mark.parametrize("k", [3, 40])
@pytest.mark.parametrize(
    "sizes",
    [
        {"_FEWEST_SPLIT_ITEMS": 1024},
        {},
        {"_CLIMBED_KEYS": 1},
        {"_ONE_LAUNCH_RESULTS": 0},
        {"_ONE_LAUNCH_RESULTS": 0, "_MERGED_KEYS": 1},
    ],
    ids=["one split", "merged at once", "two by two", "by a launch", "by launches"],
)
def test_splits_and_levels_of_the_merge_do_not_matter(
    k: int, sizes: dict[str, int], kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = in_seven_splits(kernel_device, monkeypatch)
    for name, size in sizes.items():
        monkeypatch.setattr(op, name, size)
    check_exact(k, values)


@pytest.mark.parametrize(("order", "climbed"), [("backwards", 512), ("shuffled", 1)])
def test_whoever_comes_last_merges_the_same(
    order: str, climbed: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter runs programs in turn; renumbering them brings the splits of a tile in any order, tiles mixed."""
    if kernel_device.type != "cpu":
        pytest.skip("a GPU orders programs itself")
    values = in_seven_splits(kernel_device, monkeypatch, batch=17)
    monkeypatch.setattr(op, "_CLIMBED_KEYS", climbed)
    builder = pytest.importorskip("triton.runtime.interpreter").interpreter_builder
    tiles, splits = 2, 7
    places = torch.arange(tiles * splits).flip(0)
    if order == "shuffled":
        places = torch.randperm(tiles * splits, generator=torch.Generator().manual_seed(0))
    came, plain = [], builder.set_grid_idx

    def renumbered(x: int, y: int, z: int) -> None:
        tile, split = divmod(int(places[x * splits + y]), splits)
        came.append((tile, split))
        plain(tile, split, z)

    monkeypatch.setattr(builder, "set_grid_idx", renumbered)
    check_exact(5, values)
    assert sorted(came) == [(tile, split) for tile in range(tiles) for split in range(splits)]
    assert came != sorted(came)


@pytest.mark.parametrize("climbed", [1, 512])
def test_counters_are_zeros_again(climbed: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the next call, or the replay of a graph, finds what it needs; one call after another uses them."""
    values = in_seven_splits(kernel_device, monkeypatch)
    monkeypatch.setattr(op, "_CLIMBED_KEYS", climbed)
    arrivals = torch.zeros(1024, dtype=torch.int32, device=kernel_device)
    expected = score_topk_twin(k=6, **values)
    for _ in range(2):
        found = score_topk(k=6, arrivals=arrivals, **values)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert not bool(arrivals.any())


def test_both_presets(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64 rows, as of a large catalogue; 66 rows are a whole tile and a part of one."""
    values = problem(kernel_device, batch=66, items=110, width=16, whole=True)
    small = check_exact(4, values)
    monkeypatch.setattr(op, "_LARGE_CATALOGUE", 100)
    large = check_exact(4, values)
    assert all(torch.equal(one, other) for one, other in zip(small, large, strict=True))


@pytest.mark.parametrize("k", [129, *(pytest.param(k, marks=pytest.mark.slow) for k in (300, 500, 1024))])
def test_long_lists(k: int, kernel_device: torch.device) -> None:
    items = 2500 if k == 129 else 5000
    check_exact(k, problem(kernel_device, batch=2, items=items, width=16, whole=True))
    check_close(k, problem(kernel_device, batch=2, items=items, width=16))


def test_the_most_results_of_a_smaller_catalogue(kernel_device: torch.device) -> None:
    items, _ = check_exact(1024, problem(kernel_device, batch=2, items=700, width=16, whole=True))
    assert bool((items[:, :700] > 0).all())
    assert not bool(items[:, 700:].any())


def test_addresses_beyond_31_bits(kernel_device: torch.device) -> None:
    """The last rows of an int8 table of more than 2^31 elements; its other pages are never touched."""
    if kernel_device.type != "cpu":
        pytest.skip("allocates 2 GiB; a GPU test does this natively")
    count = 2**31 // 256 + 90
    table = torch.empty(count, 256, dtype=torch.int8)
    first = count - 70
    last_rows = problem(kernel_device, batch=2, items=69, width=256, dtype=torch.bfloat16, stored=torch.int8)
    table[first:] = last_rows["table"]
    items, scores = score_topk(last_rows["rows"], table, 5, first=first)
    expected_items, expected = score_topk(last_rows["rows"], last_rows["table"], 5, first=0)
    assert torch.equal(items, expected_items + first)
    assert torch.equal(scores, expected)


def test_the_twin_is_the_engine_on_a_cpu() -> None:
    engine = CachedEngine(make_tiny_model())
    rows = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    lists = [[1, 2, 3], [], [40], [7, 7], [5], list(range(1, 38))]
    exclude = Jagged.from_lists(lists)
    expected = engine.top_k(rows, 10, exclude)
    items, scores = score_topk_twin(rows, engine.model.table, 10, **exclusions(lists, rows.device))
    assert torch.equal(items, expected.items)
    assert torch.equal(scores, expected.scores)
    assert not scores.requires_grad


def test_the_twin_in_chunks_and_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    values = problem(torch.device("cpu"), batch=3, items=97, whole=True, scaled=True)
    whole = score_topk_twin(k=6, **values)
    monkeypatch.setattr(module, "_SCORES_BUDGET", 40)
    chunks = score_topk_twin(k=6, **values)
    wide = score_topk_twin(k=6, **{**values, "rows": values["rows"].double()})
    assert wide[1].dtype == torch.float64
    for items, scores in (chunks, wide):
        assert torch.equal(items, whole[0])
        assert torch.equal(scores.float(), whole[1])
