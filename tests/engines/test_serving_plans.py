"""Engines under serving settings: every sampler in every engine, early stopping, and what an engine refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adrec.config import EarlyStop, ServingConfig
from adrec.data.jagged import Jagged
from adrec.engines import CachedEngine, make_engine
from adrec.engines.base import history_keys
from adrec.engines.graphs import FixedRequest
from adrec.engines.triton import TritonEngine
from adrec.errors import ConfigError, NotSupportedError
from adrec.models.base import SequenceModel
from adrec.noise import ExplicitNoise, PhiloxNoise
from adrec.sampler import reverse_process, until_stable
from kernels import _runtime, philox

ITEMS, WIDTH, TRAINED = 40, 16, 8
TOLERANCE = 1e-5
ModelFactory = Callable[..., SequenceModel]
needs_triton = pytest.mark.skipif(not _runtime.AVAILABLE, reason="Triton is not installed")

samplers = st.sampled_from([("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.4), ("ddim", 1.0), ("dpm++2m", 0.0)])
times_kept = st.lists(st.integers(0, TRAINED - 1), min_size=1, max_size=TRAINED, unique=True).map(sorted)
GUIDANCE = {"condition_dropout": 0.3, "guidance_scale": 2.0}


def model_of(factory: ModelFactory, **overrides: Any) -> SequenceModel:
    return factory(
        **{"timesteps": TRAINED, "schedule": "sqrt", "max_length": 20, "lambda_uncertainty": 1.0} | overrides
    )


def histories_of(lengths: list[int], seed: int = 0) -> Jagged:
    generator = torch.Generator().manual_seed(seed)
    return Jagged.from_lists(torch.randint(1, ITEMS + 1, (n,), generator=generator).tolist() for n in lengths)


def plan_of(sampler: str = "ddim", **values: Any) -> ServingConfig:
    return ServingConfig.model_validate({"sampler": sampler, **values})


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0.0, atol=TOLERANCE)


@given(
    sampler=samplers,
    times=times_kept,
    start=st.sampled_from(["noise", "zero"]),
    options=st.fixed_dictionaries(
        {
            "padding": st.sampled_from(["released", "masked"]),
            "positions": st.sampled_from(["none", "released"]),
            "denoiser": st.sampled_from(["att", "mlp"]),
            "geodesic": st.booleans(),
        }
    ),
    guidance=st.booleans(),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None)
def test_cached_equals_reference_under_every_plan(
    tiny_model: ModelFactory,
    sampler: tuple[str, float],
    times: list[int],
    start: str,
    options: dict[str, Any],
    guidance: bool,
    lengths: list[int],
    seed: int,
) -> None:
    model = model_of(tiny_model, **options, **(GUIDANCE if guidance else {}))
    plan = plan_of(sampler[0], eta=sampler[1], times=times, start=start)
    histories = histories_of(lengths, seed)
    reference, cached = (make_engine(name, model).represent(histories, plan, seed) for name in ("reference", "cached"))
    close(cached, reference)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m"])
def test_a_plan_is_what_it_says(tiny_model: ModelFactory, sampler: str) -> None:
    """A hand-written walk over the engine's own denoiser, coefficient by coefficient."""
    engine = CachedEngine(model_of(tiny_model))
    histories, times = histories_of([3, 1, 7]), (0, 2, 4, 7)
    plan = plan_of(sampler, times=times)
    with torch.inference_mode():
        state, table = engine.encode(histories), engine.table(plan)
        assert table is not None
        assert table.time.tolist() == list(times)
        denoise = engine.denoiser(state, table)
        noise = PhiloxNoise(5, history_keys(histories), WIDTH).select(state.order)
        x_t, previous = noise(0), torch.zeros(3, WIDTH)
        for draw, row in enumerate((3, 2, 1), start=1):
            x0_hat = denoise(x_t, row)
            x_t = table.from_x0[row] * x0_hat + table.from_xt[row] * x_t + table.sigma[row] * noise(draw)
            if table.from_previous is not None:
                x_t += table.from_previous[row] * previous
            previous = x0_hat
        expected = denoise(x_t, 0)
    found = engine.represent(histories, plan, seed=5)
    close(found[state.order], expected)
    plans = [plan_of(name, times=times) for name in ("ddpm", "ddim", "dpm++2m") if name != sampler]
    for other in plans:
        assert (engine.represent(histories, other, seed=5) - found).abs().max() > 1e-3


def test_counts_and_plans_that_say_the_same_are_the_same(tiny_model: ModelFactory) -> None:
    engine, histories = CachedEngine(model_of(tiny_model)), histories_of([3, 1, 7])
    assert torch.equal(engine.represent(histories), engine.represent(histories, ServingConfig()))
    same = plan_of("ddpm", times=(0, 4, 7))
    assert torch.equal(engine.represent(histories, 3), engine.represent(histories, same))
    assert engine.table(same) is engine.table(plan_of("ddpm", times=(0, 4, 7)))
    assert engine.generate(histories, same).steps.tolist() == [3, 3, 3]


@pytest.mark.parametrize("name", ["reference", "cached"])
def test_one_step_from_zero_draws_nothing(tiny_model: ModelFactory, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, histories = make_engine(name, model_of(tiny_model)), histories_of([3, 1, 7])
    plan = plan_of("ddpm", times=(7,), start="zero")
    zeros = torch.zeros(2, 3, WIDTH)
    expected = engine.represent(histories, 1, noise=zeros)

    def drawn(*arguments: Any) -> Tensor:
        raise AssertionError("noise was drawn")

    monkeypatch.setattr(philox, "row_noise", drawn)
    found = engine.represent(histories, plan, seed=1)
    close(found, expected)
    assert torch.equal(found, engine.represent(histories, plan, seed=2))
    longer = plan_of("ddim", start="zero")
    assert torch.equal(engine.represent(histories, longer, seed=1), engine.represent(histories, longer, seed=2))


@needs_triton
@pytest.mark.parametrize(
    ("sampler", "eta", "times", "start"),
    [
        ("ddim", 0.7, (1, 2, 6), "noise"),
        ("ddpm", 0.0, (2, 3, 7), "zero"),
        ("ddpm", 0.0, (7,), "zero"),
    ],
)
def test_the_fused_engine_runs_linear_plans(
    tiny_model: ModelFactory, sampler: str, eta: float, times: tuple[int, ...], start: str
) -> None:
    model = model_of(tiny_model, width=32)
    histories, plan = histories_of([3, 1, 7]), plan_of(sampler, eta=eta, times=times, start=start)
    cached, fused = (make_engine(name, model) for name in ("cached", "triton"))
    close(fused.represent(histories, plan, seed=3), cached.represent(histories, plan, seed=3))
    noise = torch.randn(len(times) + 1, 3, 32)
    close(fused.represent(histories, plan, noise=noise), cached.represent(histories, plan, noise=noise))
    assert isinstance(fused, TritonEngine)
    if start == "zero" and sampler == "ddpm" and len(times) > 1:
        with pytest.raises(NotSupportedError, match="cannot start from zero and draw noise on the way"):
            FixedRequest(fused, users=4, tokens=16, k=5, steps=plan)
    else:
        found = FixedRequest(fused, users=4, tokens=16, k=5, steps=plan)(histories, seed=3)
        close(found.scores, cached.recommend(histories, 5, plan, seed=3).scores)


@needs_triton
def test_what_the_fused_engine_cannot_run_is_refused(tiny_model: ModelFactory) -> None:
    engine = make_engine("triton", model_of(tiny_model, width=32))
    assert isinstance(engine, TritonEngine)
    message = r"engine 'triton' cannot sample with sampler dpm\+\+2m; use engine 'cached', or a plan without it"
    with pytest.raises(NotSupportedError, match=message):
        engine.represent(histories_of([3]), plan_of("dpm++2m"))
    with pytest.raises(NotSupportedError, match="cannot sample with early stop"):
        FixedRequest(engine, users=2, tokens=9, k=5, steps=plan_of(early_stop={}))


def test_what_reference_cannot_run_is_refused(tiny_model: ModelFactory) -> None:
    engine = make_engine("reference", model_of(tiny_model))
    with pytest.raises(
        NotSupportedError, match="engine 'reference' cannot sample with early stop; use engine 'cached'"
    ):
        engine.represent(histories_of([3]), plan_of(early_stop={}))


def test_plans_that_do_not_fit_the_model_are_refused(tiny_model: ModelFactory) -> None:
    engine = CachedEngine(model_of(tiny_model))
    with pytest.raises(ConfigError, match="times hold 8; allowed: 0 to 7"):
        engine.represent(histories_of([3]), plan_of(times=(0, 8)))
    with pytest.raises(ConfigError, match=r"early_stop\.top is 41; allowed: 1 to 40"):
        engine.represent(Jagged.from_lists([]), plan_of(early_stop={"top": 41}))
    plain = CachedEngine(model_of(tiny_model, model="sasrec"))
    with pytest.raises(ConfigError, match="steps is a plan, but a 'sasrec' model has no reverse steps"):
        plain.represent(histories_of([3]), plan_of())
    assert plain.generate(histories_of([3, 4])).steps.tolist() == [0, 0]


def stopped_by_hand(
    engine: CachedEngine, histories: Jagged, plan: ServingConfig, seed: int
) -> tuple[Tensor, list[int]]:
    """Each user alone, the whole plan; then the first x0_hat whose list has stayed for long enough."""
    assert plan.early_stop is not None
    stop = plan.early_stop
    rows, taken = [], []
    for user in range(len(histories)):
        alone = histories.select(torch.tensor([user]))
        with torch.inference_mode():
            state, table = engine.encode(alone), engine.table(plan)
            assert table is not None
            walk: list[Tensor] = []
            denoise = engine.denoiser(state, table)

            def watched(x_t: Tensor, row: int, denoise: Any = denoise, walk: list[Tensor] = walk) -> Tensor:
                walk.append(denoise(x_t, row))
                return walk[-1]

            final = reverse_process(watched, table, PhiloxNoise(seed, history_keys(alone), WIDTH))
        lists = [engine.top_k(x0_hat, stop.top).items.tolist() for x0_hat in walk]
        end = len(walk)
        for step in range(stop.patience, len(walk) - 1):
            if all(lists[step - back] == lists[step - back - 1] for back in range(stop.patience)):
                end = step + 1
                break
        rows.append(walk[end - 1] if end < len(walk) else final)
        taken.append(end)
    return torch.cat(rows), taken


@given(
    sampler=samplers,
    top=st.integers(1, 6),
    patience=st.integers(1, 3),
    weight=st.sampled_from([0.02, 0.1, 0.4]),
    options=st.sampled_from([{}, {"denoiser": "mlp"}, GUIDANCE, {"padding": "masked", "positions": "learned"}]),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=7),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40, deadline=None)
def test_a_user_stops_when_its_list_has_stayed(
    tiny_model: ModelFactory,
    sampler: tuple[str, float],
    top: int,
    patience: int,
    weight: float,
    options: dict[str, Any],
    lengths: list[int],
    seed: int,
) -> None:
    """Together, with users leaving the batch, as each alone: the same number of steps and the same x0_hat."""
    engine = CachedEngine(model_of(tiny_model, **{"lambda_uncertainty": weight} | options))
    histories = histories_of(lengths, seed)
    plan = plan_of(sampler[0], eta=sampler[1], early_stop={"top": top, "patience": patience})
    found = engine.generate(histories, plan, seed)
    rows, taken = stopped_by_hand(engine, histories, plan, seed)
    assert found.steps.tolist() == taken
    close(found.rows, rows)
    assert torch.equal(engine.represent(histories, plan, seed), found.rows)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++2m"])
def test_who_never_stops_gets_the_full_result_to_the_bit(tiny_model: ModelFactory, sampler: str) -> None:
    engine, histories = CachedEngine(model_of(tiny_model)), histories_of([3, 20, 1, 7, 3])
    patient = plan_of(sampler, early_stop={"top": 1, "patience": TRAINED})
    found = engine.generate(histories, patient, seed=4)
    assert found.steps.tolist() == [TRAINED] * 5
    assert torch.equal(found.rows, engine.represent(histories, plan_of(sampler), seed=4))


def test_users_leave_at_different_steps_and_the_state_survives(tiny_model: ModelFactory) -> None:
    engine = CachedEngine(model_of(tiny_model, lambda_uncertainty=0.1))
    histories = histories_of([3, 20, 1, 7, 3, 12, 5, 5])
    plan = plan_of("ddpm", early_stop={"top": 5})
    first = engine.generate(histories, plan, seed=1)
    assert len(set(first.steps.tolist())) > 2, "the case must have users that stop early, late and between"
    with torch.inference_mode():
        state, table = engine.encode(histories), engine.table(plan)
        assert table is not None
        noise = PhiloxNoise(1, history_keys(histories), WIDTH)
        for _ in range(2):
            again = engine.sample_until_stable(state, table, noise, EarlyStop(top=5))
            assert torch.equal(again.rows, first.rows)
            assert torch.equal(again.steps, first.steps)
        close(engine.sample(state, table, noise), engine.represent(histories, seed=1))


def test_a_stopped_user_is_served_by_what_it_has(tiny_model: ModelFactory) -> None:
    """Lists given by hand: users 0 and 2 stop after steps 2 and 3 of 4, user 1 never does."""
    table = CachedEngine(model_of(tiny_model)).table(4)
    assert table is not None
    lists = {3: [1, 1, 1], 2: [1, 2, 2], 1: [9, 3, 2]}
    asked: list[list[int]] = []
    at = {"row": 0}

    def narrow(users: Tensor) -> Callable[[Tensor, int], Tensor]:
        asked.append(users.tolist())

        def denoise(x_t: Tensor, row: int) -> Tensor:
            assert len(x_t) == len(users)
            at["row"] = row
            return (10.0 * row + users.float())[:, None]

        return denoise

    def best(rows: Tensor) -> Tensor:
        return torch.tensor([[lists[at["row"]][user]] for user in asked[-1]])

    noise = ExplicitNoise(torch.randn(5, 3, 1))
    found = until_stable(narrow, table, noise, best)
    assert asked == [[0, 1, 2], [1, 2], [1]]
    assert found.steps.tolist() == [2, 4, 3]
    assert found.rows[:, 0].tolist() == [20.0, 1.0, 12.0]


def test_evaluation_says_how_many_steps_were_taken(tiny_model: ModelFactory, tiny_dataset: Any) -> None:
    from adrec.evaluation import evaluate

    engine = CachedEngine(model_of(tiny_model, lambda_uncertainty=0.1))
    examples = tiny_dataset.examples("test")
    plan = plan_of("ddim", early_stop={"top": 5})
    found = evaluate(engine, examples, steps=plan, seed=3, batch_size=17)
    steps = engine.generate(examples.histories, plan, 3, row_keys=examples.users).steps
    assert found.mean_steps == pytest.approx(float(steps.float().mean()))
    assert 2.0 <= found.mean_steps < TRAINED
    assert evaluate(engine, examples, steps=3).mean_steps == 3.0
    assert evaluate(CachedEngine(model_of(tiny_model, model="sasrec")), examples).mean_steps is None


def test_another_plan_of_as_many_steps_is_read(tiny_model: ModelFactory) -> None:
    """Engines keep time embeddings by number of steps; a table of the same number with other times is another."""
    engine, histories = CachedEngine(model_of(tiny_model)), histories_of([3, 1])
    first, second = plan_of(times=(0, 7)), plan_of(times=(4, 7))
    fresh = CachedEngine(model_of(tiny_model)).represent(histories, second)
    engine.represent(histories, first)
    assert torch.equal(engine.represent(histories, second), fresh)
