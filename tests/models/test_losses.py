"""The chunked cross-entropy against torch's own, the reconstruction loss by hand, merged gradients by value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adrec.losses import catalogue_cross_entropy, reconstruction_loss
from adrec.models.layout import Layout
from adrec.training.gradients import merge_gradients


def problem(count: int, items: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator, dtype=dtype, requires_grad=True)
    table = torch.randn(items + 1, width, generator=generator, dtype=dtype)
    table[0] = 0.0
    targets = torch.randint(1, items + 1, (count,), generator=generator)
    return [rows, table.requires_grad_(), targets]


@given(
    count=st.integers(1, 23), items=st.integers(1, 31), width=st.integers(1, 9), budget=st.integers(1, 900),
    upstream=st.sampled_from([1.0, -2.5, 0.0]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_value_and_gradients_are_those_of_torch(
    count: int, items: int, width: int, budget: int, upstream: float
) -> None:
    rows, table, targets = problem(count, items, width, seed=count)
    loss = catalogue_cross_entropy(rows, table, targets, budget)
    gradients = torch.autograd.grad(upstream * loss, [rows, table])
    expected = F.cross_entropy(rows @ table.T, targets)
    expected_gradients = torch.autograd.grad(upstream * expected, [rows, table])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_extreme_logits_stay_finite() -> None:
    rows, table, targets = problem(5, 11, 3)
    loss = catalogue_cross_entropy(1e4 * rows, table, targets, 20)
    torch.testing.assert_close(loss, F.cross_entropy(1e4 * rows @ table.T, targets))
    assert all(bool(part.isfinite().all()) for part in torch.autograd.grad(loss, [rows, table]))


class LogitsWatch(TorchDispatchMode):
    """Largest tensor made, and largest with one column for each row of the table."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.largest, self.logits = columns, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
            if out.dim() == 2 and self.columns in out.shape:
                self.logits = max(self.logits, out.numel())
        return out


# A budget of 1 is a tile for each logit: few rows.
@pytest.mark.parametrize(
    ("budget", "count"), [(1, 7), *((budget, count) for budget in (100, 250, 1000) for count in (503, 2011))]
)
def test_memory_is_bounded_by_the_budget_and_one_row(budget: int, count: int) -> None:
    columns, width = 101, 2
    rows, table, targets = problem(count, columns - 1, width)
    with LogitsWatch(columns) as watch:
        catalogue_cross_entropy(rows, table, targets, budget).backward()
    # The table and its gradient have 202 elements themselves, a row of logits has 101.
    assert watch.logits <= max(budget, columns * width)
    assert watch.largest <= max(budget, columns * width, count * width)
    with LogitsWatch(columns) as plain:
        F.cross_entropy(rows @ table.T, targets).backward()
    assert plain.logits == count * columns, "the watch must see the logits of the plain computation"


def test_gradcheck_in_double_precision() -> None:
    rows, table, targets = problem(5, 7, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda r, t: catalogue_cross_entropy(r, t, targets, 17), (rows, table))


def test_a_frozen_table_gets_no_gradient_and_rows_the_same() -> None:
    rows, table, targets = problem(9, 13, 5)
    frozen = table.detach()
    loss = catalogue_cross_entropy(rows, frozen, targets, 40)
    loss.backward()
    assert frozen.grad is None
    expected = torch.autograd.grad(F.cross_entropy(rows @ frozen.T, targets), rows)[0]
    torch.testing.assert_close(rows.grad, expected, rtol=1e-5, atol=1e-7)


def test_frozen_rows_give_the_tables_gradient_only() -> None:
    rows, table, targets = problem(9, 13, 5)
    catalogue_cross_entropy(rows.detach(), table, targets, 40).backward()
    expected = torch.autograd.grad(F.cross_entropy(rows.detach() @ table.T, targets), table)[0]
    torch.testing.assert_close(table.grad, expected, rtol=1e-5, atol=1e-7)
    assert not catalogue_cross_entropy(rows.detach(), table.detach(), targets, 40).requires_grad


def test_bfloat16_autocast_keeps_the_result_and_the_softmax_in_float32() -> None:
    rows, table, targets = problem(19, 23, 8)
    expected = F.cross_entropy(rows @ table.T, targets)
    expected_gradients = torch.autograd.grad(expected, [rows, table])
    with torch.autocast("cpu", torch.bfloat16):
        loss = catalogue_cross_entropy(rows, table, targets, 50)
    gradients = torch.autograd.grad(loss, [rows, table])
    assert loss.dtype == torch.float32
    # bfloat16 keeps 8 bits: logits of up to about 10 are off by up to 0.04.
    torch.testing.assert_close(loss, expected, rtol=0.0, atol=0.04)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=0.04 * theirs.abs().max().item())


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7).map(sorted), width=st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_reconstruction_loss_by_hand(lengths: list[int], width: int) -> None:
    layout = Layout.from_sorted_lengths(torch.tensor(lengths))
    generator = torch.Generator().manual_seed(width)
    guess, target = (torch.randn(sum(lengths), width, generator=generator, requires_grad=True) for _ in range(2))
    loss = reconstruction_loss(guess, target, layout)
    # As the released code: left-padded squares, summed over the sequence, divided by its length, then a plain mean.
    padded = torch.zeros(len(lengths), max(lengths), width)
    squares = (guess - target) ** 2
    rows = []
    for row, part in zip(padded, squares.split(lengths), strict=True):
        rows.append(torch.cat([row[: len(row) - len(part)], part]))
    expected = (torch.stack(rows).sum(1) / torch.tensor(lengths)[:, None]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    ours = torch.autograd.grad(loss, [guess, target])
    theirs = torch.autograd.grad(expected, [guess, target])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert bool((ours[1] == -ours[0]).all()), "the target is not detached"


@pytest.mark.parametrize("pcgrad", [True, False])
def test_merged_gradients_are_the_authors(golden_path: Callable[[str], Path], pcgrad: bool) -> None:
    stored = {key: torch.from_numpy(value) for key, value in np.load(golden_path(f"pcgrad_{pcgrad}.npz")).items()}
    weight, bias = stored["weight"].requires_grad_(), stored["bias"].requires_grad_()
    guess = stored["x"] @ weight.T + bias
    losses = [((guess - stored["y"]) ** 2).mean(), (guess + stored["y"]).abs().mean()]
    per_loss = [torch.autograd.grad(loss, [weight, bias], retain_graph=True) for loss in losses]
    merged = merge_gradients(per_loss, pcgrad=pcgrad)
    for ours, name in zip(merged, ["grad_weight", "grad_bias"], strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, stored[name], rtol=0.0, atol=1e-6)


def test_a_conflict_is_projected_away_by_hand() -> None:
    """The reference files hold two losses that do not conflict (both give the plain mean), so they cannot show this."""
    merged = merge_gradients([[torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]], pcgrad=True)
    # g1 + g2 / 2 = (.5, .5) and g2 + g1 = (0, 1), each projected against the other's original; then the mean.
    assert merged[0] is not None
    torch.testing.assert_close(merged[0], torch.tensor([0.25, 0.75]))


def test_a_parameter_reached_by_one_loss_gets_the_sum_and_shared_ones_the_mean() -> None:
    shared = [torch.tensor([2.0, 0.0]), torch.tensor([4.0, 2.0])]
    only = torch.tensor([[3.0]])
    merged = merge_gradients([[shared[0], only, None], [shared[1], None, None]], pcgrad=False)
    assert torch.equal(merged[0], torch.tensor([3.0, 1.0]))  # type: ignore[arg-type]
    assert torch.equal(merged[1], only)  # type: ignore[arg-type]
    assert merged[2] is None


def test_gradients_without_conflict_are_left_alone() -> None:
    first = [torch.tensor([1.0, 2.0]), None, torch.tensor([0.5])]
    second = [torch.tensor([3.0, -1.0]), torch.tensor([7.0]), torch.tensor([1.0])]
    on, off = (merge_gradients([first, second], pcgrad=flag) for flag in (True, False))
    for one, other in zip(on, off, strict=True):
        assert one is not None
        assert torch.equal(one, other)  # type: ignore[arg-type]
    assert first[0].tolist() == [1.0, 2.0]
    assert second[0].tolist() == [3.0, -1.0]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_projection_equals_a_flat_twin(data: st.DataObject) -> None:
    """Gradients laid flat with zeros where a loss does not reach: PCGrad as its paper writes it."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    present = [[data.draw(st.booleans()) for _ in sizes] for _ in range(2)]
    per_loss = [
        [torch.randn(size, generator=generator) if has else None for size, has in zip(sizes, row, strict=True)]
        for row in present
    ]
    flat = [
        np.concatenate(
            [np.zeros(size) if part is None else part.double().numpy() for size, part in zip(sizes, loss, strict=True)]
        )
        for loss in per_loss
    ]
    projected = []
    for own, other in [flat, flat[::-1]]:
        dot = own @ other
        projected.append(own - dot / (other @ other) * other if dot < 0 else own)
    parts = np.split(projected[0] + projected[1], np.cumsum(sizes)[:-1])
    for index, (ours, total) in enumerate(zip(merge_gradients(per_loss, pcgrad=True), parts, strict=True)):
        reached = present[0][index] + present[1][index]
        if reached == 0:
            assert ours is None
        else:
            assert ours is not None
            np.testing.assert_allclose(ours.numpy(), total / reached, rtol=0.0, atol=1e-5)
