"""What students are taught with: altered histories, and the teacher's answers to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adrec.config import ServingConfig
from adrec.data.dataset import Dataset
from adrec.data.jagged import Jagged
from adrec.engines import CachedEngine
from adrec.models import ADRec, build_model
from adrec.respacing import sampling_table
from compress.distillation import Lessons, thinned, with_replacements
from compress.every_prefix import represent_prefixes

ONE_STEP = ServingConfig(sampler="ddim", times=(7,), start="zero")


@pytest.fixture(scope="module")
def teacher(tiny_model: Any) -> ADRec:
    """An untrained ADRec: what it answers must be the same however it is asked."""
    model = tiny_model(max_length=12, timesteps=8, schedule="sqrt", lambda_uncertainty=0.1)
    assert isinstance(model, ADRec)
    return model.eval()


def test_thinning_keeps_order_and_windows() -> None:
    sequences = Jagged.from_lists([range(1, 101), [7, 9], range(200, 230)])
    generator = torch.Generator().manual_seed(0)
    lengths = torch.stack([thinned(sequences, 51, 0.4, generator).lengths for _ in range(200)]).double().mean(0)
    torch.testing.assert_close(lengths, torch.tensor([51 * 0.6, 2.0, 30 * 0.6]).double(), rtol=0.05, atol=0)
    starts = set()
    for _ in range(50):
        thin = thinned(sequences, 51, 0.4, generator)
        for row in range(3):
            items = thin[row]
            assert items.numel() >= 2
            assert torch.equal(items, items.sort().values)
            assert int(items[-1] - items[0]) < 51
            assert torch.isin(items, sequences[row]).all()
        starts.add(int(thin[0][0]))
    assert min(starts) < 15
    assert max(starts) > 40


def test_replacing_draws_from_the_interactions() -> None:
    sequences = Jagged.from_lists([range(1, 1001), range(1001, 1004), range(2000, 3000)])
    pool = torch.tensor([5000, 5001, 5001, 5001])
    generator = torch.Generator().manual_seed(0)
    found = with_replacements(sequences, pool, 0.25, generator)
    assert torch.equal(found.offsets, sequences.offsets)
    drawn = found.values >= 5000
    assert torch.equal(found.values[~drawn], sequences.values[~drawn])
    assert float(drawn.double().mean()) == pytest.approx(0.25, abs=0.03)
    # As often as each occurs in the pool.
    assert float((found.values[drawn] == 5001).double().mean()) == pytest.approx(0.75, abs=0.06)
    assert torch.equal(with_replacements(sequences, pool, 0.0, generator).values, sequences.values)


def test_altered_histories_differ_by_epoch_and_are_answered(teacher: ADRec, tiny_dataset: Dataset) -> None:
    table = sampling_table(teacher.betas, ONE_STEP)
    lessons = Lessons(tiny_dataset.training_sequences(), 12, teacher, table, left_out=0.2, replaced=0.3)
    assert lessons.answers is None
    users = torch.tensor([7, 3, 11])
    first, again, later = lessons.batch(users, 0), lessons.batch(users, 0), lessons.batch(users, 1)
    assert torch.equal(first.tokens.inputs, again.tokens.inputs)
    assert not torch.equal(first.tokens.inputs, later.tokens.inputs)
    with torch.no_grad():
        expected = represent_prefixes(teacher, first.tokens, table, _Zeros())
    torch.testing.assert_close(first.answers, expected, atol=2e-5, rtol=1e-5)


def test_stored_answers_are_those_of_an_engine(teacher: ADRec, tiny_dataset: Dataset) -> None:
    masked = build_model(teacher.config.model_copy(update={"padding": "masked"})).eval()
    lessons = Lessons(tiny_dataset.training_sequences(), 12, masked, sampling_table(masked.betas, ONE_STEP))
    assert lessons.answers is not None
    assert lessons.bytes == lessons.answers.numel() * 4
    user = 7
    items = tiny_dataset.training_sequences()[user].tolist()[-13:]
    histories = Jagged.from_lists([items[: place + 1] for place in range(len(items) - 1)])
    found = lessons.answers[lessons.prefixes[user]]
    torch.testing.assert_close(found, CachedEngine(masked).represent(histories, ONE_STEP), atol=2e-5, rtol=1e-5)
    taught = lessons.batch(torch.tensor([7, 3, 11]))
    with torch.no_grad():
        torch.testing.assert_close(
            taught.answers, represent_prefixes(masked, taught.tokens, lessons.table, _Zeros()), atol=2e-5, rtol=1e-5
        )
    computed = Lessons(tiny_dataset.training_sequences(), 12, masked, lessons.table, stored=False)
    assert computed.answers is None
    torch.testing.assert_close(computed.batch(torch.tensor([7, 3, 11])).answers, taught.answers, atol=2e-5, rtol=1e-5)


class _Zeros:
    def __call__(self, draw: int) -> torch.Tensor:
        raise AssertionError("a start from zero draws nothing")

    def zeros(self) -> torch.Tensor:
        return torch.zeros(1, 16)

    def select(self, rows: torch.Tensor) -> _Zeros:
        return self
