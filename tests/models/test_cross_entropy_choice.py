"""Which cross-entropy computes the catalogue loss: the choice, its errors, and Liger-Kernel's loss by value."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from adrec import losses
from adrec.errors import ConfigError
from adrec.losses import catalogue_cross_entropy, cross_entropy_for

CALLS: list[str] = []


def fake_liger(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
) -> Tensor:
    """Names, order and defaults of Liger-Kernel 0.6; like it, no gradient of the weight without one of the input."""
    CALLS.append(reduction)
    assert bias is None
    assert ce_weight is None
    weight = weight if input.requires_grad else weight.detach()
    return F.cross_entropy(input @ weight.T, target, ignore_index=ignore_index, reduction=reduction)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """The import is tried once in a process; every test here begins without its outcome."""
    losses.liger_cross_entropy.cache_clear()
    CALLS.clear()
    yield
    losses.liger_cross_entropy.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Put a module tree of Liger-Kernel in place; None: as if it were not installed."""
    names = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional")
    for name in names:
        module: Any = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, None if function is None else module)
    if function is not None:
        monkeypatch.setattr(sys.modules[names[-1]], "liger_fused_linear_cross_entropy", function, raising=False)


def problem(count: int = 7, items: int = 11, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, width, generator=generator, requires_grad=True)
    table = torch.randn(items + 1, width, generator=generator)
    table[0] = 0.0
    return rows, table.requires_grad_(), torch.randint(1, items + 1, (count,), generator=generator)


def tensors(device: str, dtype: torch.dtype = torch.float32, count: int = 3) -> tuple[Tensor, Tensor]:
    """Rows and table on a device that need not exist."""
    with FakeTensorMode():
        return torch.empty(count, 5, device=device, dtype=dtype), torch.empty(9, 5, device=device, dtype=dtype)


def test_auto_is_liger_on_cuda_where_it_is_installed_and_chunks_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_liger)
    assert cross_entropy_for(*tensors("cuda")) == "liger"
    assert cross_entropy_for(*tensors("cuda", torch.bfloat16)) == "liger"
    assert cross_entropy_for(*tensors("cuda"), "liger") == "liger"
    assert cross_entropy_for(*tensors("cpu")) == "chunks"
    assert cross_entropy_for(*tensors("cuda", torch.float64)) == "chunks"
    assert cross_entropy_for(*tensors("cuda", count=0)) == "chunks"
    assert cross_entropy_for(*tensors("cuda"), "chunks") == "chunks"


def test_auto_is_chunks_without_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    assert cross_entropy_for(*tensors("cuda")) == "chunks"


@pytest.mark.parametrize(
    ("device", "dtype", "function", "message"),
    [
        ("cuda", torch.float32, None, r"not installed: pip install 'adrec\[liger\]'; 'auto' and 'chunks' work here"),
        ("cpu", torch.float32, fake_liger, "runs on CUDA devices and the rows are on cpu"),
        ("cuda", torch.float64, fake_liger, "takes float32, float16 and bfloat16, not torch.float64 rows"),
    ],
)
def test_liger_that_cannot_run_is_an_error_that_says_why(
    device: str, dtype: torch.dtype, function: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, function)
    with pytest.raises(ConfigError, match=message):
        cross_entropy_for(*tensors(device, dtype), "liger")


def test_an_unknown_choice_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'chunk'; allowed: auto, liger, chunks \(did you mean 'chunks'\?\)"):
        catalogue_cross_entropy(*problem(), choice="chunk")


def test_on_a_cpu_auto_is_bit_for_bit_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_liger)
    rows, table, targets = problem()
    found = [catalogue_cross_entropy(rows, table, targets, 20, choice) for choice in ("auto", "chunks")]
    assert torch.equal(*found)
    assert CALLS == []


def by_value(device: torch.device) -> None:
    """The loss and all gradients by Liger's function are those of torch, whatever requires a gradient."""
    for rows_train, table_train in [(True, True), (True, False), (False, True), (False, False)]:
        rows, table, targets = (values.to(device).detach() for values in problem())
        rows.requires_grad_(rows_train)
        table.requires_grad_(table_train)
        loss = losses._by_liger(rows, table, targets)
        expected = F.cross_entropy(rows @ table.T, targets)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        trained = [values for values in (rows, table) if values.requires_grad]
        assert loss.requires_grad == bool(trained)
        if trained:
            ours, theirs = (torch.autograd.grad(-2.5 * value, trained) for value in (loss, expected))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_call_of_liger_is_the_mean_over_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_liger)
    by_value(torch.device("cpu"))
    assert CALLS == ["sum"] * 4


def test_the_dispatch_reaches_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_liger)
    monkeypatch.setattr(losses, "cross_entropy_for", lambda rows, table, choice: choice)
    rows, table, targets = problem()
    loss = catalogue_cross_entropy(rows, table, targets, choice="liger")
    assert CALLS == ["sum"]
    torch.testing.assert_close(loss, catalogue_cross_entropy(rows, table, targets, choice="chunks"))


def test_liger_itself_takes_the_call_and_agrees() -> None:
    """Where Liger-Kernel is installed: its signature, and its numbers (on a CPU in Triton's interpreter)."""
    pytest.importorskip("liger_kernel")
    function = losses.liger_cross_entropy()
    assert function is not None
    real, imitated = (inspect.signature(one).parameters for one in (function, fake_liger))
    assert list(real)[: len(imitated)] == list(imitated)
    assert all(real[name].default == imitated[name].default for name in imitated)
    by_value(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_against_chunks_on_a_gpu(dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1001, 128, generator=generator).to("cuda", dtype).requires_grad_()
    table = (0.1 * torch.randn(12302, 128, generator=generator)).to("cuda", dtype).requires_grad_()
    targets = torch.randint(1, 12302, (1001,), generator=generator).cuda()
    assert cross_entropy_for(rows, table) == "liger"
    found = [catalogue_cross_entropy(rows, table, targets, choice=choice) for choice in ("liger", "chunks")]
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[0].float(), found[1].float(), rtol=tolerance, atol=tolerance)
    ours, theirs = (torch.autograd.grad(loss, [rows, table]) for loss in found)
    for one, other in zip(ours, theirs, strict=True):
        difference = (one.double() - other.double()).square().mean().sqrt()
        assert difference <= tolerance * other.double().square().mean().sqrt()
