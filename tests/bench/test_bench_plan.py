"""The axes of a sweep are checked before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from adrec.errors import ConfigError
from bench.plan import Plan, make_plan


def _plan(
    engines: Sequence[str] = ("reference", "cached"),
    steps: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = (1,),
    seeds: Sequence[int] = (0,),
    exact_steps: int = 32,
) -> Plan:
    return make_plan(engines, steps, batch_sizes, seeds, exact_steps=exact_steps, known_engines=("reference", "cached"))


def test_default_steps_are_powers_of_two_up_to_the_trained_count() -> None:
    assert _plan().steps == (1, 2, 4, 8, 16, 32)
    assert _plan(exact_steps=6).steps == (1, 2, 4, 6)


def test_the_exact_count_is_added_and_said() -> None:
    plan = _plan(steps=[4, 1, 4])
    assert plan.steps == (1, 4, 32)
    assert "32 steps are measured as well" in plan.notices[0]


def test_without_the_reference_the_baseline_is_the_first_engine_and_said() -> None:
    plan = _plan(engines=["cached"])
    assert (plan.baseline_engine, plan.accuracy_engine) == ("cached", "cached")
    assert "ratios are to 'cached'" in plan.notices[0]
    assert _plan(engines=["cached", "reference"]).baseline_engine == "reference"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": [0]}, "--steps 0: allowed are 1 to 32"),
        ({"steps": [64]}, "--steps 64: allowed are 1 to 32"),
        (
            {"engines": ["cachd"]},
            r"'cachd': no such engine \(did you mean 'cached'\?\); allowed: cached, reference",
        ),
        ({"engines": []}, "--engines: the list is empty"),
        ({"batch_sizes": [0]}, "--batch-sizes 0: .*at least 1 user"),
        ({"seeds": [-1]}, "--seeds -1"),
    ],
)
def test_wrong_axes(wrong: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _plan(**wrong)  # type: ignore[arg-type]
