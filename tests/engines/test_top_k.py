"""Scores and top lists: a full sort at any chunk size, exclusion, ties with the catalogue's end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adrec.data.jagged import Jagged
from adrec.engines import Engine, TopK, base, make_engine
from adrec.models.base import SequenceModel

ITEMS, WIDTH = 40, 16
TOLERANCE = 1e-5
ModelFactory = Callable[..., SequenceModel]


def full_sort(engine: Engine, rows: Tensor, k: int, exclude: list[list[int]]) -> tuple[list[list[int]], Tensor]:
    """Top lists by sorting all scores, item 0 where fewer than k are left."""
    lists, values = [], torch.full((rows.shape[0], k), -torch.inf)
    for row, scores in enumerate(engine.score(rows)):
        allowed = [item for item in range(1, ITEMS + 1) if item not in exclude[row]]
        allowed.sort(key=lambda item: -scores[item].item())
        best = allowed[:k]
        values[row, : len(best)] = scores[best]
        lists.append(best + [0] * (k - len(best)))
    return lists, values


@given(data=st.data(), budget=st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_top_k_equals_a_full_sort_at_any_chunk_size(tiny_model: ModelFactory, data: st.DataObject, budget: int) -> None:
    engine = make_engine("cached", tiny_model())
    batch, k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, ITEMS))
    rows = torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(budget))
    # Repeated ids and id 0, which an unknown item has, are allowed.
    exclude = data.draw(st.lists(st.lists(st.integers(0, ITEMS), max_size=45), min_size=batch, max_size=batch))
    lists, values = full_sort(engine, rows, k, exclude)
    patch = pytest.MonkeyPatch()
    patch.setattr(base, "SCORES_BUDGET", budget)
    try:
        chunked = engine.top_k(rows, k, Jagged.from_lists(exclude))
        unfiltered = engine.top_k(rows, k)
    finally:
        patch.undo()
    whole = engine.top_k(rows, k, Jagged.from_lists(exclude))
    for best in (whole, chunked):
        assert best.items.tolist() == lists
        torch.testing.assert_close(best.scores, values, rtol=0.0, atol=TOLERANCE)
    assert unfiltered.items.tolist() == full_sort(engine, rows, k, [[]] * batch)[0]


@pytest.mark.parametrize("budget", [base.SCORES_BUDGET, 2 * 11])
def test_excluded_ids_beyond_the_catalogue_have_no_effect_in_any_chunk(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """40 items in chunks of 11 leave a last chunk of 7: ids 41 to 44 fall into it by number only."""
    engine = make_engine("cached", tiny_model())
    rows = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = engine.top_k(rows, 5)
    monkeypatch.setattr(base, "SCORES_BUDGET", budget)
    best = engine.top_k(rows, 5, Jagged.from_lists([[ITEMS + 1, ITEMS + 60], [0]]))
    assert best.items.tolist() == expected.items.tolist()


def test_fewer_than_k_left_gives_id_zero(tiny_model: ModelFactory) -> None:
    engine = make_engine("cached", tiny_model())
    rows = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    exclude = Jagged.from_lists([[item for item in range(1, ITEMS + 1) if item not in (7, 9)], range(1, ITEMS + 1)])
    best = engine.top_k(rows, 4, exclude)
    assert sorted(best.items[0, :2].tolist()) == [7, 9]
    assert best.items[0, 2:].tolist() == [0, 0]
    assert best.items[1].tolist() == [0] * 4
    assert bool(best.scores[best.items == 0].isneginf().all())


def test_the_whole_catalogue_can_be_asked_for_and_no_more(tiny_model: ModelFactory) -> None:
    engine = make_engine("cached", tiny_model())
    rows = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    best: TopK = engine.top_k(rows, ITEMS)
    assert all(sorted(items) == list(range(1, ITEMS + 1)) for items in best.items.tolist())
    for k in (0, -1, ITEMS + 1):
        with pytest.raises(ValueError, match=rf"k is {k}; allowed: 1 to {ITEMS}"):
            engine.top_k(rows, k)


def test_scoring_never_holds_more_than_its_budget(tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row more than the budget allows at once still gives the same list, in chunks of the budget."""
    engine = make_engine("cached", tiny_model())
    rows = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(5))
    whole = engine.top_k(rows, 3)
    monkeypatch.setattr(base, "SCORES_BUDGET", 7 * 5)
    seen: list[int] = []
    product = Tensor.__matmul__

    def watched(one: Tensor, other: Tensor) -> Tensor:
        out = product(one, other)
        seen.append(out.numel())
        return out

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    chunked = engine.top_k(rows, 3)
    monkeypatch.undo()
    assert seen == [35] * 8
    assert torch.equal(chunked.items, whole.items)


def test_score_covers_the_whole_table(tiny_model: ModelFactory) -> None:
    engine = make_engine("cached", tiny_model())
    rows = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(5))
    scores = engine.score(rows)
    assert scores.shape == (3, ITEMS + 1)
    assert bool((scores[:, 0] == 0.0).all())
    expected = torch.einsum("bd,nd->bn", rows, engine.model.table.detach())
    torch.testing.assert_close(scores, expected, rtol=0.0, atol=TOLERANCE)
