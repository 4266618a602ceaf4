"""Distillation losses against values computed by hand, closed forms and finite differences in float64."""

from __future__ import annotations

import math

import pytest
import torch

from compress.distillation_losses import (
    catalogue_sample,
    ddim_step,
    halving_target,
    level_weight,
    listwise_loss,
    ranking_divergence,
    weighted_error,
)

DOUBLE = torch.float64


def test_divergence_of_three_quarters_against_a_half() -> None:
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=DOUBLE)
    student = torch.zeros(1, 2, dtype=DOUBLE)
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(ranking_divergence(student, teacher)) == pytest.approx(by_hand, rel=1e-12)
    # At temperature 2 twice the scores give the same shares, and the square of the temperature stands before them.
    assert float(ranking_divergence(2 * student, 2 * teacher, 2.0)) == pytest.approx(4 * by_hand, rel=1e-12)


def test_divergence_is_zero_for_equal_rankings_up_to_a_shift() -> None:
    scores = torch.randn(5, 7, dtype=DOUBLE)
    assert float(ranking_divergence(scores + 3.0, scores, 1.5)) == pytest.approx(0.0, abs=1e-14)
    assert float(ranking_divergence(scores.roll(1, -1), scores)) > 0.01


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradient_of_the_divergence_has_its_closed_form(temperature: float) -> None:
    student = torch.randn(3, 11, dtype=DOUBLE, requires_grad=True)
    teacher = torch.randn(3, 11, dtype=DOUBLE)
    (gradient,) = torch.autograd.grad(ranking_divergence(student, teacher, temperature), student)
    shares = [(scores.detach() / temperature).softmax(-1) for scores in (student, teacher)]
    torch.testing.assert_close(gradient, temperature * (shares[0] - shares[1]) / 3)


def test_listwise_loss_of_three_items_by_hand() -> None:
    # The teacher's order is items 2, 0, 1; the student scores them ln 4, ln 1, ln 2.
    teacher = torch.tensor([[0.0, -1.0, 5.0]], dtype=DOUBLE)
    student = torch.tensor([[1.0, 2.0, 4.0]], dtype=DOUBLE).log()
    first, second = -math.log(4 / 7), -math.log(1 / 3)
    assert float(listwise_loss(student, teacher, 1)) == pytest.approx(first, rel=1e-12)
    assert float(listwise_loss(student, teacher, 2)) == pytest.approx((first + second) / 2, rel=1e-12)
    # The last place is certain; more places than items are as many as there are.
    assert float(listwise_loss(student, teacher, 9)) == pytest.approx((first + second) / 3, rel=1e-12)


def test_gradients_agree_with_finite_differences() -> None:
    student = torch.randn(3, 9, dtype=DOUBLE, requires_grad=True)
    teacher = torch.randn(3, 9, dtype=DOUBLE)
    assert torch.autograd.gradcheck(lambda scores: listwise_loss(scores, teacher, 4), student)
    assert torch.autograd.gradcheck(lambda scores: ranking_divergence(scores, teacher, 2.0), student)
    weight = torch.rand(3, dtype=DOUBLE)
    assert torch.autograd.gradcheck(lambda rows: weighted_error(rows, teacher, weight), student)


def test_weighted_error_by_hand() -> None:
    rows, targets = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    # Means over the width are 2.5 and 2.
    assert float(weighted_error(rows, targets)) == pytest.approx(2.25)
    assert float(weighted_error(rows, targets, torch.tensor([3.0, 0.5]))) == pytest.approx((7.5 + 1.0) / 2)


def test_sample_of_the_catalogue_holds_targets_and_no_item_twice() -> None:
    targets = torch.tensor([7, 7, 93, 100])
    for seed in range(5):
        torch.manual_seed(seed)
        sample = catalogue_sample(targets, 100, 30)
        assert sample is not None
        assert 30 <= sample.numel() <= 33
        assert torch.equal(sample, sample.unique())
        assert torch.isin(targets, sample).all()
        assert 1 <= int(sample.min()) <= int(sample.max()) <= 100
    assert catalogue_sample(targets, 100, None) is None
    assert catalogue_sample(targets, 100, 100) is None


def test_deterministic_step_by_hand() -> None:
    # x_t = .6 x0 + .8 e with x0_hat = 2 and x_t = 2: e is 1; at (.8, .6) that is 1.6 + .6.
    one = torch.tensor
    assert float(ddim_step(one(2.0), one(2.0), one(0.6), one(0.8), one(0.8), one(0.6))) == pytest.approx(2.2)
    # A step to the clean level is the answer itself.
    assert float(ddim_step(one(2.0), one(-3.5), one(0.6), one(0.8), one(1.0), one(0.0))) == pytest.approx(-3.5)


def test_halving_target_leads_where_two_steps_lead() -> None:
    level = [torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=DOUBLE) for angle in (1.4, 0.9, 0.3)]
    x_t, first, second = torch.randn(3, 6, 4, dtype=DOUBLE)
    signals, noises = [pair[:, :1] for pair in level], [pair[:, 1:] for pair in level]
    middle = ddim_step(x_t, first, signals[0], noises[0], signals[1], noises[1])
    end = ddim_step(middle, second, signals[1], noises[1], signals[2], noises[2])
    goal = halving_target(x_t, end, signals[0], noises[0], signals[2], noises[2])
    torch.testing.assert_close(ddim_step(x_t, goal, signals[0], noises[0], signals[2], noises[2]), end)
    # A teacher that answers the same twice is its own target, and to the clean level the target is the last answer.
    again = ddim_step(middle, first, signals[1], noises[1], signals[2], noises[2])
    torch.testing.assert_close(halving_target(x_t, again, signals[0], noises[0], signals[2], noises[2]), first)
    clean = torch.ones(1, 1, dtype=DOUBLE), torch.zeros(1, 1, dtype=DOUBLE)
    torch.testing.assert_close(halving_target(x_t, second, signals[0], noises[0], *clean), second)


def test_level_weight_is_the_signal_to_noise_ratio_from_one_on() -> None:
    signal, noise = torch.tensor([0.8, 0.6, 0.0]), torch.tensor([0.6, 0.8, 1.0])
    torch.testing.assert_close(level_weight(signal, noise), torch.tensor([16 / 9, 1.0, 1.0]))
