"""Top lists from stored numbers: a full sort of what they stand for, whatever path computes it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adrec.config import ProductQuantization, TableFormat
from adrec.data.jagged import Jagged
from adrec.engines import make_engine, top_k
from adrec.engines.top_k import quantized_top_k
from adrec.engines.triton import TritonEngine
from adrec.errors import ConfigError, NotSupportedError
from adrec.models import item_tables
from adrec.models.base import SequenceModel
from adrec.models.item_tables import QuantizedTable
from adrec.models.quantized import sqnr_db
from kernels import _runtime

FORMATS = ["int8", "bf16", "fp8", "int4"]


def table_of(items: int, width: int, name: str, seed: int = 0) -> Tensor:
    table = torch.randn(items + 1, width, generator=torch.Generator().manual_seed(seed))
    table[0] = 0.0
    return table


def stored(table: Tensor, name: str, **options: object) -> QuantizedTable:
    """A table as a large catalogue has it: without its float32 copy."""
    group = 2 if name == "int4" else None
    found = QuantizedTable.of(table, TableFormat.model_validate({"format": name, "group_size": group, **options}))
    found.dense = None
    return found


def sorted_scores(table: QuantizedTable, rows: Tensor, k: int, exclude: list[list[int]]) -> Tensor:
    scores = (rows.double() @ table.weight.double().T).float()
    scores[:, 0] = -torch.inf
    for row, items in enumerate(exclude):
        scores[row, items] = -torch.inf
    return scores.sort(1, descending=True).values[:, :k]


@given(
    name=st.sampled_from(FORMATS),
    items=st.integers(1, 90),
    half=st.integers(1, 20),
    users=st.integers(0, 5),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_lists_are_a_full_sort(name: str, items: int, half: int, users: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, items))
    chosen = st.lists(st.integers(1, items), max_size=items)
    exclude = data.draw(st.lists(chosen, min_size=users, max_size=users))
    table = stored(table_of(items, 2 * half, name, seed=items), name)
    rows = torch.randn(users, 2 * half, generator=torch.Generator().manual_seed(half))
    patch = pytest.MonkeyPatch()
    patch.setattr(top_k, "_PROXY_BUDGET", 1)
    patch.setattr(top_k, "_PROXY_ITEMS", data.draw(st.sampled_from([1, 7, 4096])))
    patch.setattr(top_k, "_UNPACKED_ITEMS", data.draw(st.sampled_from([1, 11, 4096])))
    patch.setattr(top_k, "_RESCORED_NUMBERS", data.draw(st.sampled_from([1, 2**20])))
    try:
        found = quantized_top_k(table, rows, k, Jagged.from_lists(exclude))
    finally:
        patch.undo()
    expected = sorted_scores(table, rows, k, exclude)
    assert found.items.shape == (users, k)
    torch.testing.assert_close(found.scores, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.items == 0, expected == -torch.inf)
    weight = table.weight
    for row in range(users):
        listed = found.items[row][found.items[row] != 0]
        assert listed.unique().numel() == listed.numel()
        assert not set(listed.tolist()) & set(exclude[row])
        torch.testing.assert_close(
            weight[listed] @ rows[row], found.scores[row, : listed.numel()], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["int8", "bf16"])
def test_what_the_proxy_cannot_tell_apart_is_scored_in_full(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All items differ only where the rounded query is zero: the candidates are arbitrary, the list must not be."""
    table = torch.ones(401, 8)
    table[0] = 0.0
    # Whole hundredths, which int8 keeps beside the 1.0 that sets each row's scale; multiples of 2^-7 for bfloat16.
    table[1:, 1] = torch.arange(400) % 97 / 128.0
    rows = torch.tensor([[1.0, 0.003, 0, 0, 0, 0, 0, 0], [1.0, -0.003, 0, 0, 0, 0, 0, 0]])
    if name == "bf16":
        rows = torch.tensor([[1.0, 1e-4, 0, 0, 0, 0, 0, 0], [1.0, -1e-4, 0, 0, 0, 0, 0, 0]])
    kept = stored(table, name)
    seen: list[int] = []
    full = top_k._unpacked_top_k

    def watched(table: QuantizedTable, rows: Tensor, *rest: object) -> object:
        seen.append(rows.shape[0])
        return full(table, rows, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(top_k, "_unpacked_top_k", watched)
    found = quantized_top_k(kept, rows, 5, None)
    assert seen == [2]
    torch.testing.assert_close(found.scores, sorted_scores(kept, rows, 5, [[], []]), rtol=0.0, atol=1e-6)


@given(items=st.integers(2, 60), width=st.integers(1, 24), seed=st.integers(0, 999), spread=st.integers(-3, 3))
@settings(max_examples=50, deadline=None)
@pytest.mark.parametrize("name", ["int8", "bf16"])
def test_the_bound_on_the_proxy_holds_for_every_item(name: str, items: int, width: int, seed: int, spread: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(items + 1, width, generator=generator) * 10.0**spread
    rows = torch.randn(4, width, generator=generator).exp()
    kept = stored(table, name)
    proxy = kept.proxy(rows)
    assert proxy is not None
    scores, bound = proxy
    exact = rows.double() @ kept.weight.double().T
    found = scores(0, items + 1)
    for item in range(items + 1):
        limit = bound(found[:, item]).double()
        assert bool((exact[:, item] <= limit + 1e-5 * exact.abs().amax(1)).all())


def test_one_bad_query_spoils_no_other() -> None:
    kept = stored(table_of(50, 8, "int8"), "int8")
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    expected = quantized_top_k(kept, rows, 4, None)
    rows[1] = float("nan")
    found = quantized_top_k(kept, rows, 4, None)
    for row in (0, 2):
        assert torch.equal(found.items[row], expected.items[row])


@pytest.mark.parametrize("name", FORMATS)
def test_padding_is_exactly_zero_and_lookup_reads_the_stored_numbers(name: str) -> None:
    table = table_of(30, 8, name)
    small = QuantizedTable.of(table, TableFormat(format=name, group_size=2 if name == "int4" else None))  # type: ignore[arg-type]
    large = stored(table, name)
    assert small.dense is not None
    ids = torch.tensor([[0, 3, 30], [7, 0, 1]])
    for each in (small, large):
        assert bool((each.weight[0] == 0.0).all())
        assert torch.equal(each(ids), each.weight[ids])
        assert torch.equal(each.rows(4, 9), each.weight[4:9])
    assert torch.equal(small.weight, large.weight)
    assert sqnr_db(table, small.weight) > {"int8": 42.0, "bf16": 54.0, "fp8": 30.0, "int4": 20.0}[name]


def test_a_large_table_is_never_unpacked_as_a_whole(
    tiny_model: Callable[..., SequenceModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_tables, "DENSE_ITEMS", 2)
    model = tiny_model()
    exact = make_engine("cached", tiny_model())
    model.item_embedding = QuantizedTable.of(model.table, TableFormat(format="int8"))
    assert model.item_embedding.dense is None
    engine = make_engine("cached", model)
    histories = Jagged.from_lists([[1, 2, 3], [7], [9, 4]])
    expected = exact.recommend(histories, 5, 1)

    def refuse(self: QuantizedTable) -> Tensor:
        raise AssertionError("unpacked")

    monkeypatch.setattr(QuantizedTable, "weight", property(refuse))
    found = engine.recommend(histories, 5, 1, exclude=Jagged.from_lists([[], [], []]))
    assert found.items.shape == (3, 5)
    # Rounding moves scores of some 10 by .05 at most.
    torch.testing.assert_close(found.scores, expected.scores, rtol=0.0, atol=0.2)


def test_product_codes_give_candidates_that_are_scored_exactly() -> None:
    pytest.importorskip("faiss")
    table = table_of(700, 16, "int8")
    kept = stored(table, "int8", product={"subspaces": 8, "candidates": 10})
    assert kept.codes is not None
    assert kept.codes.shape == (700, 4)
    rows = torch.randn(40, 16, generator=torch.Generator().manual_seed(3))
    exact = sorted_scores(kept, rows, 10, [[]] * 40)
    found = quantized_top_k(kept, rows, 10, None)
    for row in range(40):
        torch.testing.assert_close(kept.weight[found.items[row]] @ rows[row], found.scores[row], rtol=1e-4, atol=1e-4)
    assert float((found.scores >= exact[:, -1:] - 1e-4).float().mean()) > 0.9
    # With the whole catalogue as candidates nothing can be missed, and items left out stay out.
    everything = stored(table, "int8", product={"subspaces": 8, "candidates": 70})
    exclude = [[int(found.items[row, 0])] for row in range(40)]
    complete = quantized_top_k(everything, rows, 10, Jagged.from_lists(exclude))
    torch.testing.assert_close(complete.scores, sorted_scores(everything, rows, 10, exclude), rtol=1e-4, atol=1e-4)


def test_product_codes_survive_a_state_dict() -> None:
    pytest.importorskip("faiss")
    table_format = TableFormat(format="int8", product=ProductQuantization(subspaces=4))
    source = QuantizedTable.of(table_of(200, 16, "int8"), table_format)
    target = QuantizedTable.empty(200, 16, table_format)
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    target.product_candidates(rows, 5)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.product_candidates(rows, 20), source.product_candidates(rows, 20))


@pytest.mark.parametrize("subspaces", [3, 6, 32])
def test_subspaces_that_do_not_fit_are_refused(subspaces: int) -> None:
    table_format = TableFormat(format="int8", product=ProductQuantization(subspaces=subspaces))
    with pytest.raises(ConfigError, match=f"subspaces is {subspaces}; allowed: even numbers that divide the width, 16"):
        QuantizedTable.of(table_of(40, 16, "int8"), table_format)


def test_faiss_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    table_format = TableFormat(format="int8", product=ProductQuantization(subspaces=4))
    with pytest.raises(NotSupportedError, match=r"pip install 'adrec\[faiss\]'"):
        QuantizedTable.of(table_of(40, 16, "int8"), table_format)
    with pytest.raises(NotSupportedError, match="needs FAISS"):
        quantized_top_k(QuantizedTable.empty(40, 16, table_format), torch.ones(1, 16), 3, None)


@pytest.mark.parametrize("name", FORMATS)
def test_the_fused_engine_scores_the_stored_table(tiny_model: Callable[..., SequenceModel], name: str) -> None:
    if not _runtime.AVAILABLE:
        pytest.skip("Triton is not installed")
    model = tiny_model(width=32, max_length=20, timesteps=4, schedule="cosine")
    group = 8 if name == "int4" else None
    model.item_embedding = QuantizedTable.of(
        model.table,
        TableFormat(format=name, group_size=group),  # type: ignore[arg-type]
    )
    cached, fused = make_engine("cached", model), make_engine("triton", model)
    assert isinstance(fused, TritonEngine)
    expected_dtype = {"int8": torch.int8, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int4": torch.float32}
    assert fused.scored_table.values.dtype == expected_dtype[name]
    histories = Jagged.from_lists([[1, 2, 3], [7]])
    expected, found = cached.recommend(histories, 5, 1), fused.recommend(histories, 5, 1)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.items, expected.items)
