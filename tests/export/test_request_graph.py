"""The module that is exported, in torch: the numbers of `cached` in every mode, whatever the batch is padded to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adrec.config import ServingConfig
from adrec.data.jagged import Jagged
from adrec.engines import CachedEngine
from adrec.errors import ConfigError, NotSupportedError
from adrec.models.base import SequenceModel
from adrec.respacing import sampling_table
from compress.export.graphs import Graph, GraphPlan
from compress.export.request import RequestGraph

ITEMS, WIDTH, TOLERANCE = 40, 16, 1e-5
ModelFactory = Callable[..., SequenceModel]


def histories_of(lengths: list[int], seed: int = 0) -> Jagged:
    generator = torch.Generator().manual_seed(seed)
    return Jagged.from_lists(torch.randint(1, ITEMS + 1, (length,), generator=generator).tolist() for length in lengths)


def run(model: SequenceModel, plan: GraphPlan, histories: Jagged, width: int, *others: Tensor) -> tuple[Tensor, ...]:
    graph = Graph(RequestGraph(model), plan, model)
    with torch.inference_mode():
        return graph(histories.padded(width), histories.lengths, *others)


def check(found: tuple[Tensor, ...], engine: CachedEngine, rows: Tensor, k: int) -> None:
    best = engine.top_k(rows, k)
    torch.testing.assert_close(found[2], rows, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found[1], best.scores, rtol=0, atol=TOLERANCE)
    assert torch.equal(found[0], best.items)


@pytest.mark.parametrize("denoiser", ["att", "mlp"])
@pytest.mark.parametrize("padding", ["released", "masked"])
@pytest.mark.parametrize("positions", ["none", "learned", "released"])
@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("geodesic", [False, True])
def test_every_mode_equals_cached(
    tiny_model: ModelFactory, denoiser: str, padding: str, positions: str, guidance: bool, geodesic: bool
) -> None:
    extra: dict[str, Any] = {"condition_dropout": 0.3, "guidance_scale": 2.0} if guidance else {}
    model = tiny_model(
        denoiser=denoiser, padding=padding, positions=positions, geodesic=geodesic, lambda_uncertainty=1.0, **extra
    )
    histories = histories_of([7, 1, 50, 6, 2])
    noise = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    found = run(model, GraphPlan("request", sampling_table(model.betas, 3), k=5), histories, 50, noise)
    engine = CachedEngine(model)
    check(found, engine, engine.represent(histories, 3, noise=noise), 5)


@pytest.mark.parametrize("padding", ["released", "masked"])
@pytest.mark.parametrize("positions", ["none", "learned", "released"])
def test_sasrec_equals_cached(tiny_model: ModelFactory, padding: str, positions: str) -> None:
    model = tiny_model(model="sasrec", padding=padding, positions=positions)
    histories = histories_of([7, 1, 50, 6, 2])
    engine = CachedEngine(model)
    check(run(model, GraphPlan("request", k=5), histories, 50), engine, engine.represent(histories), 5)


@pytest.mark.parametrize("blocks", [1, 3])
def test_other_depths_and_a_short_max_length(tiny_model: ModelFactory, blocks: int) -> None:
    model = tiny_model(encoder_blocks=blocks, denoiser_blocks=blocks, max_length=9, lambda_uncertainty=1.0)
    histories, noise = histories_of([9, 1, 4]), torch.randn(2, 3, WIDTH)
    engine = CachedEngine(model)
    found = run(model, GraphPlan("request", sampling_table(model.betas, 1)), histories, 9, noise)
    check(found, engine, engine.represent(histories, 1, noise=noise), 20)


@pytest.mark.parametrize("padding", ["released", "masked"])
def test_width_of_the_rectangle_changes_nothing(tiny_model: ModelFactory, padding: str) -> None:
    """Columns before a history are no padding of the model: any number of them gives the same list."""
    model = tiny_model(padding=padding, positions="learned", lambda_uncertainty=1.0)
    histories, noise = histories_of([3, 1, 2]), torch.randn(2, 3, WIDTH)
    plan = GraphPlan("request", sampling_table(model.betas, 1))
    narrow = run(model, plan, histories, 3, noise)
    for width in (4, 17, 50):
        wide = run(model, plan, histories, width, noise)
        torch.testing.assert_close(wide[2], narrow[2], rtol=0, atol=TOLERANCE)
        assert torch.equal(wide[0], narrow[0])


@pytest.mark.parametrize(
    "serving",
    [
        ServingConfig(sampler="ddim", times=(0, 5, 31)),
        ServingConfig(sampler="dpm++2m", times=(0, 9, 20, 31)),
        ServingConfig(times=(3,), start="zero"),
    ],
    ids=["ddim", "dpm++2m", "zero start"],
)
def test_serving_settings_are_unrolled_too(tiny_model: ModelFactory, serving: ServingConfig) -> None:
    model = tiny_model(lambda_uncertainty=1.0)
    histories, table = histories_of([5, 2]), sampling_table(model.betas, serving)
    noise = torch.randn(table.steps + 1, 2, WIDTH)
    engine = CachedEngine(model)
    found = run(model, GraphPlan("request", table), histories, 5, noise)
    check(found, engine, engine.represent(histories, serving, noise=noise), 20)


def test_the_row_of_the_last_step_is_not_read_when_unrolled(tiny_model: ModelFactory) -> None:
    model = tiny_model(lambda_uncertainty=1.0)
    noise = torch.randn(3, 2, WIDTH)
    noise[-1] = float("nan")
    found = run(model, GraphPlan("request", sampling_table(model.betas, 2)), histories_of([5, 2]), 5, noise)
    assert all(bool(torch.isfinite(each.float()).all()) for each in found)


@pytest.mark.parametrize("guidance", [False, True])
def test_the_parts_make_the_whole(tiny_model: ModelFactory, guidance: bool) -> None:
    extra: dict[str, Any] = {"condition_dropout": 0.3, "guidance_scale": 2.0} if guidance else {}
    model = tiny_model(lambda_uncertainty=1.0, **extra)
    core, table = RequestGraph(model), sampling_table(model.betas, 3)
    histories, noise = histories_of([5, 2, 9]), torch.randn(4, 3, WIDTH)
    padded = histories.padded(9)
    with torch.inference_mode():
        whole = Graph(core, GraphPlan("request", table), model)(padded, histories.lengths, noise)
        encode = Graph(core, GraphPlan("encode", catalogue="outside"), model)
        encoded = encode(model.table[padded], histories.lengths)
        rows = Graph(core, GraphPlan("denoise", table), model)(*encoded, noise)[0]
        items, scores = Graph(core, GraphPlan("score", catalogue="input"), model)(rows, model.table)
        shapes = {spec.name: spec.shape for spec in encode.outputs}
        assert [len(shapes[name]) for name in ("last", "keys", "values", "mask")] == [each.dim() for each in encoded]
    assert torch.equal(rows, whole[2])
    assert torch.equal(items, whole[0])
    assert torch.equal(scores, whole[1])


def test_the_padding_row_is_never_listed(tiny_model: ModelFactory) -> None:
    """Also where every real item scores below zero, which is what the padding row scores by itself."""
    model = tiny_model(lambda_uncertainty=1.0)
    with torch.no_grad():
        model.table[1:] = 0.0
        model.table[1:, 0] = -1.0
        rows = torch.zeros(1, WIDTH)
        rows[0, 0] = 1.0
        items, scores = RequestGraph(model).score(rows, ITEMS)
    assert sorted(items[0].tolist()) == list(range(1, ITEMS + 1))
    assert scores.max() == -1.0


def test_float16_stays_finite_and_close(tiny_model: ModelFactory) -> None:
    """Masks, padding weights and norms of zero rows are what overflows or vanishes in float16."""
    for overrides in ({}, {"geodesic": True}, {"padding": "masked"}, {"positions": "released"}):
        model = tiny_model(lambda_uncertainty=1.0, **overrides)
        histories, noise = histories_of([50, 1, 7]), torch.randn(3, 3, WIDTH)
        graph = Graph(
            RequestGraph(model, dtype=torch.float16), GraphPlan("request", sampling_table(model.betas, 2)), model
        )
        with torch.inference_mode():
            rows = graph(histories.padded(50), histories.lengths, noise)[2]
        wanted = CachedEngine(model).represent(histories, 2, noise=noise)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, wanted, rtol=0, atol=0.05)


def test_bad_plans_are_refused(tiny_model: ModelFactory) -> None:
    model, plain = tiny_model(), tiny_model(model="sasrec")
    core = RequestGraph(model)
    for k in (0, ITEMS + 1):
        with pytest.raises(ConfigError, match=rf"k is {k}; allowed: 1 to {ITEMS}"):
            Graph(core, GraphPlan("score", k=k), model)
    with pytest.raises(NotSupportedError, match="has no reverse steps to export"):
        Graph(RequestGraph(plain), GraphPlan("denoise"), plain)
    with pytest.raises(NotSupportedError, match="its table cannot be outside"):
        Graph(core, GraphPlan("score", catalogue="outside"), model)
    with pytest.raises(NotSupportedError, match="there is no loop to export"):
        Graph(RequestGraph(plain), GraphPlan("request", loop=True), plain)
