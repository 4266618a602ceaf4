"""`score_topk` from outside: errors, torch's checks and compiler, sizes of its launches, what only a GPU can show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from kernels._runtime import UnsupportedError, record_launches
from kernels._score_topk_op import _score_topk, counters, plan
from kernels.inventory import Entry
from kernels.score_topk import (
    ENTRIES,
    FLOAT8,
    MOST_ITEMS,
    ROW_DTYPES,
    TABLE_DTYPES,
    score_topk,
    score_topk_twin,
)
from tests.kernels.conftest import COMPILE_BACKEND, guarded
from tests.kernels.topk_cases import check_close, check_exact, exclusions, problem

CPU = torch.device("cpu")


def valid() -> dict[str, Any]:
    return {
        "rows": torch.zeros(2, 8),
        "table": torch.zeros(6, 8),
        "k": 3,
        "scale": torch.zeros(6),
        **exclusions([[1], [2, 3]], CPU),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": torch.zeros(8)}, r"rows has shape \[8\]; expected \[B, D\]"),
        ({"table": torch.zeros(6)}, r"table has shape \[6\]; expected \[N \+ 1, D\]"),
        ({"table": torch.zeros(6, 9)}, "table has width 9 and rows has 8; expected one width"),
        (
            {"rows": torch.zeros(2, 257), "table": torch.zeros(6, 257)},
            "rows has width 257; allowed: 1 to 256; score_topk_twin takes any",
        ),
        ({"rows": torch.zeros(2, 0), "table": torch.zeros(6, 0)}, "rows has width 0; allowed: 1 to 256"),
        ({"table": torch.zeros(1, 8).expand(MOST_ITEMS + 1, 8)}, f"table has {MOST_ITEMS + 1} rows; allowed: up to"),
        ({"k": 0}, "k is 0; allowed: 1 to 1024"),
        ({"k": 1025}, "k is 1025; allowed: 1 to 1024; score_topk_twin takes any"),
        ({"first": -1}, "first is -1; allowed: 0 or more"),
        ({"rows": torch.zeros(2, 8).double()}, "rows is torch.float64; allowed: float32, float16, bfloat16"),
        ({"table": torch.zeros(6, 8).double()}, "table is torch.float64; allowed: .*float8_e4m3fn, int8"),
        ({"table": torch.zeros(8, 6).T}, r"table has strides \(1, 6\); expected contiguous rows: table.contiguous\(\)"),
        ({"scale": torch.zeros(5)}, r"scale is torch.float32 of shape \[5\]; expected float32 \[6\]"),
        ({"scale": torch.zeros(6).half()}, r"scale is torch.float16 of shape \[6\]; expected float32 \[6\]"),
        ({"exclude_items": None}, "exclude_items and exclude_offsets: one is missing; give both or none"),
        ({"exclude_offsets": None}, "exclude_items and exclude_offsets: one is missing"),
        ({"exclude_items": torch.zeros(3)}, r"exclude_items is torch.float32 of shape \[3\]; expected int64 \[X\]"),
        ({"exclude_offsets": torch.zeros(2, dtype=torch.int64)}, r"exclude_offsets is .* \[2\]; expected int64 \[3\]"),
        (
            {"arrivals": torch.zeros(1023, dtype=torch.int32)},
            r"arrivals is torch.int32 of shape \[1023\]; expected 1024",
        ),
        ({"arrivals": torch.zeros(1024)}, "arrivals is torch.float32 .*; expected 1024 contiguous int32 zeros or more"),
        ({"rows": torch.zeros(2, 8, device="meta")}, "tensors are on cpu, meta; expected one device"),
    ],
)
def test_each_error_names_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        score_topk(**{**valid(), **changes})


def test_rows_need_not_be_contiguous_and_nothing_needs_a_gradient(kernel_device: torch.device) -> None:
    values = problem(kernel_device, batch=6, items=40, whole=True)
    expected = check_exact(5, {**values, "rows": values["rows"][::2].contiguous()})
    table = values["table"].clone().requires_grad_()
    found = score_topk(values["rows"].requires_grad_()[::2], table, 5)
    assert not found[1].requires_grad
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("excludes", [False, True])
def test_torch_checks_the_operator(excludes: bool, kernel_device: torch.device) -> None:
    values = problem(kernel_device, batch=2, items=40, dtype=torch.float16, scaled=True)
    lists = exclusions([[1, 2], []], kernel_device) if excludes else {"exclude_items": None, "exclude_offsets": None}
    table = values["table"]
    for stored in (table, table.to(FLOAT8).view(torch.uint8)):
        opcheck(_score_topk.op, (values["rows"], stored, values["scale"], *lists.values(), None, 4, 1))  # type: ignore[attr-defined]


@pytest.mark.parametrize("excludes", [False, True])
def test_the_compiler_sees_one_operator(excludes: bool, kernel_device: torch.device) -> None:
    def best(rows: torch.Tensor, table: torch.Tensor, **lists: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        items, scores = score_topk(2.0 * rows, table, 4, **lists)
        return items + 1, scores

    values = problem(kernel_device, batch=3, items=40, whole=True)
    if excludes:
        values |= exclusions([[1, 2, 3], [], [7]], kernel_device)
    found = torch.compile(best, fullgraph=True, backend=COMPILE_BACKEND)(**values)
    assert all(torch.equal(one, other) for one, other in zip(found, best(**values), strict=True))


@given(
    batch=st.integers(1, 5000), items=st.integers(0, 2**25), width=st.integers(1, 256), k=st.integers(1, 1024),
    rows=st.sampled_from(ROW_DTYPES), table=st.sampled_from([*ROW_DTYPES, torch.uint8, torch.int8]),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_any_plan_covers_the_catalogue_in_bounded_memory(
    batch: int, items: int, width: int, k: int, rows: torch.dtype, table: torch.dtype
) -> None:
    found = plan(batch, items, width, k, rows, table)
    assert (found.splits - 1) * found.split_items < max(1, items) <= found.splits * found.split_items
    assert batch * found.splits <= max(batch, 16384)
    assert found.splits <= 512
    # Keys and bounds of all lists: 8 MiB, half the bytes of all float32 scores, or one list a row; and a multiple of
    # the results of a large batch.
    scratch, one_list = batch * found.splits * (8 * found.capacity + 4), 8 * batch * found.capacity
    assert scratch <= 1.01 * max(8 << 20, batch * items * 4 / 2, one_list)
    least = 512 if items >= 1 << 17 else 128 if width <= 128 else 256
    assert found.capacity <= max(least, 5 * (k + 39))
    assert scratch <= max(batch, 16384) * (8 * max(least, 5 * (k + 39)) + 4)
    assert found.compacted_rows == (max(1, 512 // found.capacity) if width <= 128 else 1)
    depth = found.capacity // found.items
    assert k <= found.most <= found.reserved * found.items
    # After a compaction a run of tiles is longer than what triggers the next one.
    assert depth - found.reserved >= depth // 4 >= 1
    assert found.lift or found.chunk == found.block_width >= width
    # One counter for each merge of each tile of rows, and the lists of a group are no more than it merges.
    tiles = -(-batch // found.rows)
    assert tiles * found.groups <= counters(batch)
    assert (found.fan > 0) == (k <= 128)
    if found.fan:
        lists, groups = found.splits, 0
        while groups == 0 or lists > 1:
            lists = -(-lists // found.fan)
            groups += lists
        assert groups == found.groups
        assert k <= found.best < 2 * k
        assert found.merged_rows * found.fan * found.best <= 512 * found.num_warps
        assert 1 <= found.merged_rows <= found.rows
    # Offsets inside a tile of rows are 32-bit.
    assert found.rows * found.splits * found.capacity < 2**31


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_entries_run_without_values_and_within_the_memory_they_promise(entry: Entry) -> None:
    for shape in entry.shapes.values():
        for dtype in entry.dtypes:
            inputs = entry.inputs(shape, dtype, torch.device("meta"))
            with record_launches() as launches:
                items, scores = entry.run(**inputs)
            assert items.shape == scores.shape == (shape["users"], shape["results"])
            given = {value.data_ptr() for value in inputs.values() if isinstance(value, torch.Tensor)}
            assert given == {0}
            candidates, bounds = launches[0].arguments[5:7]
            assert candidates.shape[0] == shape["users"]
            # At the paper's shape a quarter of the bytes of all scores.
            scores_bytes = 4 * shape["users"] * shape["items"]
            most = scores_bytes / 4 * 1.01 if shape is entry.shapes["paper"] else max(8 << 20, scores_bytes / 2 * 1.01)
            assert candidates.nbytes + bounds.nbytes <= most
            assert len(launches) == 1 if shape["results"] <= 128 else 2 <= len(launches) <= 6
            cost = entry.cost(shape, dtype)
            assert cost.flops == 2 * shape["users"] * shape["items"] * shape["width"]
            assert cost.bytes > shape["items"] * shape["width"] * dtype.itemsize


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_entries_agree_with_their_twins(entry: Entry, dtype: torch.dtype, kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    inputs = entry.inputs({"users": 2, "items": 60, "width": 24, "results": 5, "excluded": 7}, dtype, kernel_device)
    with guarded():
        _, scores = entry.run(**inputs)
    torch.testing.assert_close(scores, entry.twin(**inputs)[1], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TABLE_DTYPES)
@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_natively_by_value_in_both_presets(dtype: torch.dtype, width: int) -> None:
    rows = dtype if dtype in ROW_DTYPES else torch.bfloat16
    for batch, items in [(5, 12301), (70, 200_001)]:
        shape = {"batch": batch, "items": items, "width": width, "dtype": rows, "stored": dtype}
        values = problem(torch.device("cuda"), **shape, scaled=dtype not in ROW_DTYPES)
        check_close(20, values)
        check_close(300, values)
        check_exact(20, problem(torch.device("cuda"), **shape, whole=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_natively_a_score_depends_neither_on_the_batch_nor_on_k(dtype: torch.dtype) -> None:
    rows = dtype if dtype in ROW_DTYPES else torch.bfloat16
    values = problem(torch.device("cuda"), batch=200, items=300_000, width=128, dtype=rows, stored=dtype)
    items, scores = score_topk(k=100, **values)
    for batch, k in [(1, 100), (16, 1), (16, 500), (17, 20), (64, 100), (65, 1024)]:
        part = {**values, "rows": values["rows"][:batch]}
        few_items, few = score_topk(k=k, **part)
        least = min(k, 100)
        assert torch.equal(few_items[:, :least], items[:batch, :least])
        assert torch.equal(few[:, :least], scores[:batch, :least])


@pytest.mark.gpu
def test_natively_in_a_captured_graph() -> None:
    values = problem(torch.device("cuda"), batch=33, items=5000, width=128, dtype=torch.bfloat16)
    values.update(exclusions([[3, 5]] * 33, torch.device("cuda")))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        score_topk(k=20, **values)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        items, scores = score_topk(k=20, **values)
    values["rows"].copy_(values["rows"].flip(0))
    graph.replay()
    expected_items, expected = score_topk(k=20, **values)
    assert torch.equal(items, expected_items)
    assert torch.equal(scores, expected)


@pytest.mark.gpu
def test_natively_beyond_31_bits_and_in_bounded_memory() -> None:
    device, width = torch.device("cuda"), 256
    count = 2**31 // width + 5000
    table = torch.randint(-127, 128, (count, width), dtype=torch.int8, device=device)
    rows = torch.randn(32, width, device=device, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    items, scores = score_topk(rows, table, 20)
    assert torch.cuda.max_memory_allocated() - before < 2 * 16384 * 512 * 8
    expected_items, expected = score_topk_twin(rows, table, 20)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-2)
    assert float((items == expected_items).float().mean()) > 0.9


@pytest.mark.parametrize("offsets", [[0, 4], [1, 3], [0, 5], [3, 3]])
def test_lists_that_their_offsets_do_not_divide_are_refused(offsets: list[int]) -> None:
    with pytest.raises(UnsupportedError, match=r"exclude_offsets is \[.*\]; expected to rise from 0 to 3"):
        score_topk(
            torch.randn(1, 8), torch.randn(11, 8), 4,
            exclude_items=torch.tensor([5, 4, 8]), exclude_offsets=torch.tensor(offsets),
        )  # fmt: skip
