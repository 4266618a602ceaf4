"""The promise of the engines: the same numbers whatever the engine, the batch, its order and its size."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adrec.config import ServingConfig
from adrec.data.jagged import Jagged
from adrec.engines import ENGINES, Engine, exact_engines, make_engine
from adrec.engines.base import history_key, history_keys
from adrec.errors import ConfigError
from adrec.models.base import SequenceModel, TokenBatch
from adrec.models.layout import Layout
from adrec.noise import PhiloxNoise
from adrec.respacing import sampling_table
from adrec.sampler import reverse_process
from kernels import philox

ITEMS, WIDTH = 40, 16
TOLERANCE = 1e-5
ModelFactory = Callable[..., SequenceModel]

options = st.fixed_dictionaries(
    {
        "lambda_uncertainty": st.sampled_from([0.001, 0.1, 1.0]),
        "padding": st.sampled_from(["released", "masked"]),
        "positions": st.sampled_from(["none", "learned", "released"]),
        "denoiser": st.sampled_from(["att", "mlp"]),
        "guidance": st.booleans(),
        "geodesic": st.booleans(),
        "seed": st.integers(0, 3),
    }
)
histories_lists = st.one_of(
    st.lists(st.integers(1, 50), min_size=1, max_size=6),
    st.lists(st.just(1), min_size=1, max_size=6),
    st.lists(st.just(50), min_size=1, max_size=3),
    st.lists(st.sampled_from([1, 2, 49, 50]), min_size=1, max_size=6),
)


@lru_cache(maxsize=64)
def _engine(factory: ModelFactory, name: str, frozen: tuple[tuple[str, Any], ...]) -> Engine:
    return make_engine(name, factory(**dict(frozen)))


def engines(factory: ModelFactory, guidance: bool = False, **overrides: Any) -> list[Engine]:
    """One engine of every kind over the same weights."""
    if guidance:
        overrides |= {"condition_dropout": 0.3, "guidance_scale": 2.0}
    return [_engine(factory, name, tuple(sorted(overrides.items()))) for name in ("reference", "cached")]


def histories_of(lengths: list[int], seed: int = 0) -> Jagged:
    generator = torch.Generator().manual_seed(seed)
    return Jagged.from_lists(torch.randint(1, ITEMS + 1, (length,), generator=generator).tolist() for length in lengths)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0.0, atol=TOLERANCE)


def test_every_engine_is_compared_here() -> None:
    # The fused engines are held to `cached` in test_triton_engine.py (the interpreter is slow), those that export a
    # graph first in test_onnxruntime_engine.py and tests/export.
    elsewhere = ("triton", "onnxruntime", "aotinductor", "tensorrt")
    others = [name for name in sorted(ENGINES) if not name.startswith(elsewhere)]
    assert others == ["cached", "reference"]


@given(option=options, lengths=histories_lists, seed=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_cached_equals_reference(
    tiny_model: ModelFactory, option: dict[str, Any], lengths: list[int], seed: int
) -> None:
    reference, cached = engines(tiny_model, **option)
    histories = histories_of(lengths, seed)
    close(cached.represent(histories, seed=seed), reference.represent(histories, seed=seed))


@pytest.mark.parametrize("denoiser", ["att", "mlp"])
@pytest.mark.parametrize("padding", ["released", "masked"])
@pytest.mark.parametrize("positions", ["none", "learned", "released"])
@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("geodesic", [False, True])
def test_cached_equals_reference_in_every_mode(
    tiny_model: ModelFactory, denoiser: str, padding: str, positions: str, guidance: bool, geodesic: bool
) -> None:
    """Each combination once, whatever the random search above happens to draw."""
    reference, cached = engines(
        tiny_model, guidance, denoiser=denoiser, padding=padding, positions=positions, geodesic=geodesic,
        lambda_uncertainty=1.0,
    )  # fmt: skip
    histories = histories_of([7, 1, 50, 6, 2])
    close(cached.represent(histories, 7, seed=5), reference.represent(histories, 7, seed=5))


@pytest.mark.slow
@given(option=options, lengths=histories_lists, seed=st.integers(0, 2**40), steps=st.integers(1, 32))
@settings(max_examples=400, deadline=None)
def test_cached_equals_reference_at_any_number_of_steps(
    tiny_model: ModelFactory, option: dict[str, Any], lengths: list[int], seed: int, steps: int
) -> None:
    reference, cached = engines(tiny_model, **option)
    histories = histories_of(lengths, seed)
    close(cached.represent(histories, steps, seed), reference.represent(histories, steps, seed))


@pytest.mark.parametrize("steps", [1, 2, 7, 32])
@pytest.mark.parametrize("schedule", ["trunc_lin", "cosine", "beta"])
def test_cached_equals_reference_with_fewer_steps(tiny_model: ModelFactory, steps: int, schedule: str) -> None:
    reference, cached = engines(tiny_model, lambda_uncertainty=1.0, schedule=schedule)
    histories = histories_of([1, 50, 3, 17, 3])
    rows = cached.represent(histories, steps, seed=4)
    close(rows, reference.represent(histories, steps, seed=4))
    other = {1: 2, 2: 1, 7: 8, 32: 31}[steps]
    assert (rows - cached.represent(histories, other, seed=4)).abs().max() > 1e-3, "steps must matter at lambda 1"


@given(
    padding=st.sampled_from(["released", "masked"]),
    positions=st.sampled_from(["none", "learned", "released"]),
    lengths=histories_lists,
)
@settings(max_examples=20, deadline=None)
def test_cached_equals_reference_for_sasrec(
    tiny_model: ModelFactory, padding: str, positions: str, lengths: list[int]
) -> None:
    reference, cached = engines(tiny_model, model="sasrec", padding=padding, positions=positions)
    histories = histories_of(lengths)
    close(cached.represent(histories), reference.represent(histories))


@pytest.mark.parametrize("name", ["adrec", "sasrec"])
def test_one_block_everywhere(tiny_model: ModelFactory, name: str) -> None:
    """The cache skips the last block's outputs at the prefix; with one block that is all of them."""
    reference, cached = engines(tiny_model, model=name, encoder_blocks=1, denoiser_blocks=1, lambda_uncertainty=0.1)
    histories = histories_of([1, 7, 50, 2])
    close(cached.represent(histories), reference.represent(histories))


@given(
    option=options,
    lengths=st.lists(st.integers(1, 50), min_size=2, max_size=8),
    order=st.randoms(use_true_random=False),
    cuts=st.lists(st.integers(0, 8), max_size=3),
)
@settings(max_examples=20, deadline=None)
def test_a_users_result_does_not_depend_on_the_batch(
    tiny_model: ModelFactory, option: dict[str, Any], lengths: list[int], order: Any, cuts: list[int]
) -> None:
    """Users in another order, cut into batches anywhere: each keeps its representation and its list."""
    histories = histories_of(lengths)
    users = list(range(len(lengths)))
    order.shuffle(users)
    borders = [0, *sorted(min(cut, len(users)) for cut in cuts), len(users)]
    for engine in engines(tiny_model, **option):
        whole = engine.represent(histories, seed=3)
        best = engine.recommend(histories, 5, seed=3)
        for first, last in pairwise(borders):
            part = torch.tensor(users[first:last], dtype=torch.int64)
            some = histories.select(part)
            close(engine.represent(some, seed=3), whole[part])
            again = engine.recommend(some, 5, seed=3)
            close(again.scores, best.scores[part])
            moved = (again.items != best.items[part]).nonzero().tolist()
            # Two items of one list may swap only where rounding makes their own scores meet.
            for row, place in moved:
                scores = again.scores[row]
                others = torch.cat([scores[:place], scores[place + 1 :]])
                meets_another = float((others - scores[place]).abs().min()) <= 2 * TOLERANCE
                assert meets_another or place == scores.numel() - 1


@pytest.mark.parametrize("name", ["reference", "cached"])
def test_a_user_alone_gets_the_list_it_gets_among_others(tiny_model: ModelFactory, name: str) -> None:
    engine = make_engine(name, tiny_model(lambda_uncertainty=1.0))
    histories = histories_of([3, 50, 1, 12, 3, 7, 1, 28, 9])
    best = engine.recommend(histories, 10, seed=11)
    for user in range(len(histories)):
        alone = engine.recommend(histories.select(torch.tensor([user])), 10, seed=11)
        assert alone.items[0].tolist() == best.items[user].tolist()


def test_equal_histories_get_equal_results_and_row_keys_tell_them_apart(tiny_model: ModelFactory) -> None:
    engine = make_engine("cached", tiny_model(lambda_uncertainty=1.0))
    histories = Jagged.from_lists([[3, 1, 4], [9, 2], [3, 1, 4]])
    rows = engine.represent(histories)
    close(rows[0], rows[2])
    keyed = engine.represent(histories, row_keys=torch.tensor([5, 6, 7]))
    assert (keyed[0] - keyed[2]).abs().max() > 1e-3
    # The key is the user's: another batch, the same key, the same noise.
    close(engine.represent(histories.select(torch.tensor([2])), row_keys=torch.tensor([7]))[0], keyed[2])


@given(
    rows=st.lists(st.lists(st.integers(1, 10**7), min_size=1, max_size=12), min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=80, deadline=None)
def test_history_keys_belong_to_the_history(rows: list[list[int]], order: Any) -> None:
    keys = history_keys(Jagged.from_lists(rows)).tolist()
    assert all(0 <= key < philox.ROW_KEYS for key in keys)
    for row, key in zip(rows, keys, strict=True):
        for other, other_key in zip(rows, keys, strict=True):
            assert (row == other) == (key == other_key)
    order.shuffle(rows)
    alone = {tuple(row): history_keys(Jagged.from_lists([row])).item() for row in rows}
    assert history_keys(Jagged.from_lists(rows)).tolist() == [alone[tuple(row)] for row in rows]
    assert all(history_key(np.array(row)) == key for row, key in alone.items())


def test_the_order_of_a_history_is_part_of_its_key() -> None:
    assert len(set(history_keys(Jagged.from_lists([[1, 2], [2, 1], [1], [2], [1, 1], [2, 1, 2]])).tolist())) == 6


@pytest.mark.parametrize("name", ["reference", "cached"])
@pytest.mark.parametrize("overrides", [{}, {"positions": "learned"}, {"positions": "released"}, {"model": "sasrec"}])
def test_only_the_last_max_length_items_are_read(
    tiny_model: ModelFactory, name: str, overrides: dict[str, Any]
) -> None:
    engine = make_engine(name, tiny_model(max_length=9, lambda_uncertainty=1.0, **overrides))
    long = histories_of([23, 9, 10, 4])
    assert torch.equal(engine.represent(long), engine.represent(long.tail(9)))
    reading_more = make_engine(name, tiny_model(max_length=10, lambda_uncertainty=1.0, **overrides))
    assert (engine.represent(long)[0] - reading_more.represent(long)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["reference", "cached"])
@pytest.mark.parametrize("steps", [1, 2, 7, 32])
def test_explicit_noise_is_philox_noise_given_as_a_tensor(tiny_model: ModelFactory, name: str, steps: int) -> None:
    engine = make_engine(name, tiny_model(lambda_uncertainty=1.0))
    histories = histories_of([5, 1, 50, 5])
    keys = history_keys(histories)
    noise = torch.stack([philox.row_noise(2**33, keys, draw, WIDTH) for draw in range(steps + 1)])
    # The row of t = 0 must never be read.
    noise[-1] = float("nan")
    assert torch.equal(engine.represent(histories, steps, noise=noise), engine.represent(histories, steps, seed=2**33))


@pytest.mark.parametrize("name", ["reference", "cached"])
@pytest.mark.parametrize("guidance", [False, True])
def test_encoded_histories_can_be_sampled_again(tiny_model: ModelFactory, name: str, guidance: bool) -> None:
    """The cache is written to by every step; another seed or number of steps must not see what the last one left."""
    engine = next(one for one in engines(tiny_model, guidance=guidance, lambda_uncertainty=1.0) if one.name == name)
    histories = histories_of([5, 1, 50, 7, 6])
    with torch.inference_mode():
        state = engine.encode(histories)
        for seed, steps in ((1, 32), (2, 3), (1, 32)):
            source = PhiloxNoise(seed, history_keys(histories), WIDTH)
            rows = engine.sample(state, engine.table(steps), source)
            assert torch.equal(rows, engine.represent(histories, steps, seed))


@given(
    rows=st.integers(0, 5),
    planned=st.lists(st.integers(0, 20), unique=True, max_size=8).map(tuple),
    asked=st.lists(st.integers(0, 20), max_size=12),
    chunk=st.integers(1, 60),
)
@settings(max_examples=80, deadline=None)
def test_noise_computed_ahead_is_the_noise_asked_for(
    rows: int, planned: tuple[int, ...], asked: list[int], chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(philox, "CHUNK", chunk)
        noise = PhiloxNoise(7, torch.arange(rows), 3, planned)
        for source in (noise, noise.select(torch.arange(rows).flip(0))):
            for draw in asked:
                assert torch.equal(source(draw), philox.row_noise(7, source.row_keys, draw, 3))


@pytest.mark.parametrize(
    ("plan", "draws"),
    [
        (1, 1),
        (7, 7),
        (None, 32),
        ({"sampler": "ddim"}, 1),
        ({"sampler": "ddim", "eta": 0.5, "times": [0, 3, 31]}, 3),
        ({"sampler": "dpm++2m", "start": "zero"}, 0),
        ({"start": "zero"}, 31),
    ],
)
def test_a_table_says_which_noise_sampling_reads(tiny_model: ModelFactory, plan: Any, draws: int) -> None:
    steps = ServingConfig.model_validate(plan) if isinstance(plan, dict) else plan
    table, asked = sampling_table(tiny_model().betas, steps), []

    class Recorded(PhiloxNoise):
        def __call__(self, draw: int) -> Tensor:
            asked.append(draw)
            return super().__call__(draw)

    reverse_process(lambda x_t, row: x_t, table, Recorded(0, torch.arange(2), 4))
    assert tuple(asked) == table.draws
    assert len(asked) == draws


def test_seeds_differ_and_a_seed_repeats(tiny_model: ModelFactory) -> None:
    engine = make_engine("cached", tiny_model(lambda_uncertainty=1.0))
    histories = histories_of([5, 1, 50])
    first = engine.represent(histories, seed=1)
    assert torch.equal(first, engine.represent(histories, seed=1))
    for other in (0, 2, 1 + 2**32):
        difference = (engine.represent(histories, seed=other) - first).abs().amax(-1)
        assert difference.min().item() > 1e-3, f"seed {other}"


@pytest.mark.parametrize("name", ["reference", "cached"])
@pytest.mark.parametrize("overrides", [{}, {"model": "sasrec"}, {"denoiser": "mlp"}])
def test_an_empty_batch_gives_empty_results(tiny_model: ModelFactory, name: str, overrides: dict[str, Any]) -> None:
    engine = make_engine(name, tiny_model(**overrides))
    nobody = Jagged.from_lists([])
    assert engine.represent(nobody).shape == (0, WIDTH)
    best = engine.recommend(nobody, 3)
    assert best.items.shape == best.scores.shape == (0, 3)


@pytest.mark.parametrize("name", ["reference", "cached"])
def test_an_empty_history_is_refused_by_its_row(tiny_model: ModelFactory, name: str) -> None:
    engine = make_engine(name, tiny_model())
    with pytest.raises(ValueError, match="history 1 is empty; an engine needs 1 item or more"):
        engine.represent(Jagged.from_lists([[1], [], [2], []]))


@pytest.mark.parametrize("name", ["reference", "cached"])
@pytest.mark.parametrize("overrides", [{}, {"denoiser": "mlp"}, {"model": "sasrec"}, {"guidance": True}])
def test_masked_padding_makes_max_length_irrelevant(
    tiny_model: ModelFactory, name: str, overrides: dict[str, Any]
) -> None:
    """Without positions the weights do not know max_length, so the same ones serve any that reads the histories."""
    overrides = {"lambda_uncertainty": 1.0, **overrides}
    if overrides.pop("guidance", False):
        overrides |= {"condition_dropout": 0.3, "guidance_scale": 2.0}
    short, long = (tiny_model(max_length=length, padding="masked", **overrides) for length in (13, 50))
    long.load_state_dict(short.state_dict())
    histories = histories_of([1, 13, 6, 2, 13])
    one, other = (make_engine(name, model).represent(histories) for model in (short, long))
    close(one, other)


def test_released_padding_depends_on_max_length(tiny_model: ModelFactory) -> None:
    """The counterpart: otherwise the test above would prove nothing about masking."""
    histories = histories_of([1, 13, 6, 2, 13])
    one, other = (
        make_engine("cached", tiny_model(max_length=length, padding="released")).represent(histories)
        for length in (13, 50)
    )
    assert (one - other).abs().amax(-1).min().item() > 1e-3


def test_bad_engine_names_and_steps_say_what_is_allowed(tiny_model: ModelFactory) -> None:
    with pytest.raises(ConfigError, match=r"unknown engine 'cache' \(did you mean 'cached'\?\); allowed: reference, "):
        make_engine("cache", tiny_model())
    engine = make_engine("cached", tiny_model(timesteps=32))
    for steps in (0, 33):
        with pytest.raises(ConfigError, match=rf"steps is {steps}; allowed: 1 to 32"):
            engine.represent(histories_of([2]), steps)
    plain = make_engine("cached", tiny_model(model="sasrec"))
    with pytest.raises(ConfigError, match="steps is 4, but a 'sasrec' model has no reverse steps"):
        plain.represent(histories_of([2]), 4)
    assert torch.equal(plain.represent(histories_of([2]), 1), plain.represent(histories_of([2])))


@pytest.mark.parametrize("padding", ["released", "masked"])
@pytest.mark.parametrize("positions", ["none", "learned", "released"])
def test_training_outputs_at_the_last_position_are_what_the_engine_computes(
    tiny_model: ModelFactory, padding: str, positions: str
) -> None:
    """SASRec has no noise, so the packed training forward must agree with every engine."""
    model = tiny_model(model="sasrec", padding=padding, positions=positions)
    histories = histories_of([1, 1, 4, 5, 23, 50])
    batch = TokenBatch(histories.values, histories.values, Layout.from_sorted_lengths(histories.lengths))
    with torch.inference_mode():
        rows = model(batch)[batch.layout.last]
    for name in exact_engines(torch.device("cpu")):
        close(make_engine(name, model).represent(histories), rows)
