"""The moving average of the weights: a weighted mean of what it has seen that forgets its start."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from adrec.training.module import moving_average


def averaged(values: list[float], decay: float) -> float:
    model = nn.Linear(1, 1, bias=False)
    average = AveragedModel(model, multi_avg_fn=moving_average(decay))
    for value in values:
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
    return average.module.weight.item()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=30), st.floats(0.1, 0.999))
def test_it_stays_within_what_it_has_seen(values: list[float], decay: float) -> None:
    assert min(values) - 1e-5 <= averaged(values, decay) <= max(values) + 1e-5


def test_a_short_training_forgets_its_start() -> None:
    # With a fixed decay of .998 the first value would still weigh 82 %.
    assert averaged([100.0] + [0.0] * 100, 0.998) < 0.01


def test_a_long_training_reaches_the_full_decay() -> None:
    values = [0.0] * 2000 + [1.0] * 500
    assert averaged(values, 0.998) == pytest.approx(1.0 - 0.998**500, abs=1e-4)


def test_the_first_step_is_copied() -> None:
    torch.manual_seed(0)
    assert averaged([3.5], 0.998) == 3.5
