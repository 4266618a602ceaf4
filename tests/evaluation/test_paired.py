"""What fewer steps keep of the accuracy, by value and against the evaluation's own metric."""

from __future__ import annotations

import pytest
import torch

from adrec.evaluation import kept_percent, ndcg_gains, point_metrics


def test_gains_are_those_of_the_evaluation() -> None:
    ranks = torch.tensor([0, 1, 19, 20, 500])
    assert 100.0 * float(ndcg_gains(ranks).mean()) == pytest.approx(point_metrics(ranks)["NDCG@20"], rel=1e-12)


def test_equal_ranks_keep_everything_without_uncertainty() -> None:
    ranks = torch.arange(50)
    kept = kept_percent(ranks, ranks)
    assert kept is not None
    assert (kept.value, kept.low, kept.high) == pytest.approx((100.0, 100.0, 100.0))


def test_kept_share_by_value() -> None:
    # Half of the users fall out of the list, the others stay first.
    exact = torch.zeros(400, dtype=torch.int64)
    here = torch.where(torch.arange(400) < 200, 0, 20)
    kept = kept_percent(here, exact)
    assert kept is not None
    assert kept.value == pytest.approx(50.0)
    assert 44.0 < kept.low < 50.0 < kept.high < 56.0


def test_no_exact_accuracy_no_share() -> None:
    assert kept_percent(torch.tensor([0]), torch.tensor([99])) is None
