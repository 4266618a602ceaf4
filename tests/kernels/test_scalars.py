"""Numbers and seeds that are none: every kernel and its twin refuse them alike, by name, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import _runtime
from kernels._runtime import UnsupportedError
from kernels.inventory import entries
from tests.kernels.conftest import small_inputs

ENTRIES = {entry.name: entry for entry in entries()}
NUMBERS = [
    ("token_noise", "weight"),
    ("token_noise.backward", "weight"),
    ("denoise_last", "mix_weight"),
    ("denoise_last", "guidance_scale"),
    ("denoise_last_mlp", "mix_weight"),
    ("denoise_last_mlp", "norm_epsilon"),
    ("encode_prefix", "history_norm_epsilon"),
    ("prefix_attention", "dropout"),
    ("prefix_attention.backward", "dropout"),
]
INTEGERS = [
    ("score_topk", "k"),
    ("score_topk", "first"),
    ("denoise_update", "row"),
    ("denoise_last", "heads"),
    ("denoise_last", "max_length"),
    ("encode_prefix", "heads"),
]
SEEDED = [
    *("token_noise", "token_noise.backward", "denoise_update", "prefix_attention", "prefix_attention.backward"),
    *("denoise_last", "denoise_last_mlp"),
]


@pytest.fixture(params=["kernel", "twin"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels run, and where their twins do."""
    if request.param == "kernel" and not _runtime.AVAILABLE:
        pytest.skip("Triton is not installed")
    if request.param == "twin":
        monkeypatch.setattr(_runtime, "AVAILABLE", False)


def call(name: str, **changes: Any) -> Any:
    """Run a kernel on small inputs of its entry, some of them changed."""
    return ENTRIES[name].run(**{**small_inputs(ENTRIES[name]), **changes})


@pytest.mark.parametrize(("name", "argument"), NUMBERS)
@pytest.mark.parametrize(
    ("value", "said"), [("0.5", "'0.5', a str"), (True, "True, a bool"), (None, "None, a NoneType")]
)
def test_a_number_must_be_one(name: str, argument: str, value: object, said: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"{argument} is {said}; expected a number"):
        call(name, **{argument: value})


@pytest.mark.parametrize(("name", "argument"), NUMBERS)
def test_a_number_must_be_finite(name: str, argument: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{argument} is nan; expected a finite number"):
        call(name, **{argument: float("nan")})


@pytest.mark.parametrize(("name", "argument"), INTEGERS)
@pytest.mark.parametrize("value", ["3", 3.0, True, None])
def test_a_whole_number_must_be_one(name: str, argument: str, value: object) -> None:
    with pytest.raises(UnsupportedError, match=rf"{argument} is {value!r}, a \w+; expected an int"):
        call(name, **{argument: value})


@pytest.mark.parametrize("name", SEEDED)
@pytest.mark.parametrize(
    ("seed", "message"),
    [
        ("1", "seed is '1', a str; expected an int or 1 int64 on cpu"),
        (1.5, "seed is 1.5, a float; expected an int"),
        (True, "seed is True, a bool; expected an int"),
        (1 << 63, "seed is 9223372036854775808; allowed: -2.63 to 2.63 - 1"),
        (torch.zeros(1), "seed is torch.float32 of 1 elements on cpu; expected 1 int64 on cpu"),
        (torch.zeros(2, dtype=torch.int64), "seed is torch.int64 of 2 elements on cpu; expected 1"),
    ],
)
def test_a_seed_must_be_one(name: str, seed: object, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        call(name, seed=seed)


@pytest.mark.parametrize("name", ["denoise_last", "denoise_last_mlp"])
def test_a_seed_is_needed_unless_noise_is_given(name: str) -> None:
    with pytest.raises(UnsupportedError, match="seed is None, a NoneType; expected an int"):
        call(name, seed=None)
