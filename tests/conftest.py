"""What every test folder shares: a tiny model with random weights, a tiny learnable data set, the reference files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import pytest
import torch

from adrec.config import ModelConfig
from adrec.data.dataset import Dataset
from adrec.models import build_model
from adrec.models.base import SequenceModel

if not torch.cuda.is_available():
    # Before anything imports Triton: without a GPU its interpreter runs the kernels on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

TESTS = Path(__file__).resolve().parent
ITEMS, WIDTH, HEADS, USERS = 40, 16, 2, 60


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where there is none: the interpreter would need many minutes."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device that torch can use"))


@pytest.fixture(scope="session", autouse=True)
def _language_patched_once() -> Iterator[None]:
    """Where kernels are interpreted, put the interpreter's language in place once a launch: a third of a launch's time.

    Triton lists and replaces all of `tl` at a launch, and again for every call inside the kernel.
    """
    from kernels import _runtime

    if not _runtime.INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    # Its own names: where a version of Triton has others, tests only take longer.
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "_LangPatchScope"):
        yield
        return
    tl, patch_lang = _runtime.tl, interpreter._patch_lang
    # Kernels name the first, what they call of Triton's own library the second.
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def once(kernel: Any) -> Any:
        return patch_lang(both) if tl.core.is_builtin(tl.load) else interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield


class ModelFactory(Protocol):
    """Builds a model of 40 items, width 16 and 2 heads; keywords override settings of `ModelConfig`."""

    def __call__(self, *, seed: int = 0, **overrides: Any) -> SequenceModel: ...


def make_tiny_model(*, seed: int = 0, **overrides: Any) -> SequenceModel:
    """Model in eval mode whose every parameter is random, so that no bias or gain hides by being 0 or 1."""
    config = ModelConfig(**{"items": ITEMS, "width": WIDTH, "heads": HEADS, **overrides})
    torch.manual_seed(seed)
    model = build_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") or "norm" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_model() -> ModelFactory:
    """A factory: ``tiny_model(timesteps=8, padding="masked")`` is a model of 40 items with random weights."""
    return make_tiny_model


@pytest.fixture(scope="session")
def shallow_model() -> ModelFactory:
    """`tiny_model` with one block where it has two, for exports: each block and step is a second of tracing."""
    return partial(make_tiny_model, encoder_blocks=1, denoiser_blocks=1)


@pytest.fixture(scope="session")
def tiny_dataset() -> Dataset:
    """60 users, 40 items, leave-one-out; item i is always followed by i + 1 (40 by 1), so a model can learn it."""
    rows = []
    for user in range(USERS):
        start, length = user * 7 % ITEMS, 4 + user * 5 % 13
        rows.append([(start + place) % ITEMS + 1 for place in range(length)])
    return Dataset.from_lists(
        [row[:-2] for row in rows], [[row[-2]] for row in rows], [[row[-1]] for row in rows], name="tiny"
    )


@pytest.fixture(scope="session")
def golden_path() -> Callable[[str], Path]:
    """Path of a reference file of the authors' code: a copy in tests/golden, or the folder kept next to the checkout.

    ``golden_path("adrec_small.npz")``; skips the test when neither place has the file.
    """

    def find(name: str) -> Path:
        beside = TESTS.parents[1] / "shared" / "golden"
        for folder in (TESTS / "golden", beside):
            if (folder / name).is_file():
                return folder / name
        pytest.skip(f"reference file {name} is neither in tests/golden nor in shared/golden next to the checkout")

    return find
