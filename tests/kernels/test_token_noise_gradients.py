"""Gradients of noise injection: to the item table, dense and sparse, to the condition and to the time table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck

from kernels import token_noise as module
from kernels._token_noise_gradients import draw_token_steps, table_gradient, time_gradient
from kernels.token_noise import token_noise, token_noise_twin
from tests.kernels.conftest import COMPILE_BACKEND, assert_matches, embedded, guarded
from tests.kernels.test_token_noise import DTYPES, TIMESTEPS, arguments, in_float32

LEARNED = ("table", "condition", "time_table")


def upstream(values: dict[str, Any]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    like = values["condition"]
    draws = (torch.randn(like.shape, generator=generator).to(like.device, like.dtype) for _ in range(2))
    to_z, to_x = draws
    return embedded(to_z), embedded(to_x)


def gradients(function: Any, values: dict[str, Any], to_z: Tensor | None, to_x: Tensor | None) -> list[Tensor | None]:
    """Gradients to E, c and the time table for the given upstream gradients."""
    leaves = {name: values[name].detach().requires_grad_() for name in LEARNED}
    result = function(**{**values, **leaves}, return_x_t=to_x is not None)
    pairs = [(out, given) for out, given in ((result.z, to_z), (result.x_t, to_x)) if given is not None]
    outputs, given = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, list(leaves.values()), given, allow_unused=True))


def compare(values: dict[str, Any], to_z: Tensor | None, to_x: Tensor | None) -> None:
    """Hold the gradients of the kernel to those of the twin in float32 on the same numbers."""
    with guarded():
        found = gradients(token_noise, values, to_z, to_x)
    wide = [None if given is None else given.float() for given in (to_z, to_x)]
    expected = gradients(token_noise_twin, in_float32(values), *wide)
    for name, actual, twin in zip(LEARNED, found, expected, strict=True):
        assert (actual is None) == (twin is None), name
        if actual is not None and twin is not None:
            assert actual.dtype == values[name].dtype
            assert_matches(actual.to_dense(), twin.to_dense(), actual.dtype)


@pytest.mark.parametrize("geodesic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 20, 96, 192])
def test_every_gradient_matches_the_twins(
    kernel_device: torch.device, width: int, dtype: torch.dtype, geodesic: bool
) -> None:
    values = arguments(kernel_device, width=width, dtype=dtype, geodesic=geodesic)
    to_z, to_x = upstream(values)
    compare(values, to_z, None)
    compare(values, to_z, to_x)


@pytest.mark.parametrize(
    ("width", "dtype"), [(32, torch.float32), (64, torch.bfloat16), (128, torch.float16), (256, torch.float32)], ids=str
)
def test_gradients_at_the_other_widths_of_models(kernel_device: torch.device, width: int, dtype: torch.dtype) -> None:
    values = arguments(kernel_device, width=width, dtype=dtype, geodesic=True)
    compare(values, *upstream(values))


@pytest.mark.parametrize("geodesic", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("given", ["steps", "gaussian", "sequences"])
def test_gradients_with_given_draws(kernel_device: torch.device, given: str, sparse: bool, geodesic: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    draws = {
        "steps": torch.randint(TIMESTEPS, (37,), generator=generator),
        "gaussian": torch.randn(37, 20, generator=generator),
        "sequences": torch.arange(37) // 6,
    }
    values = arguments(kernel_device, geodesic=geodesic, sparse=sparse, **{given: draws[given]})
    compare(values, *upstream(values))


@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(0, 40),
    width=st.integers(4, 36),
    items=st.integers(1, 5),
    timesteps=st.integers(1, 40),
    geodesic=st.booleans(),
)
def test_gradients_of_any_shape_match(
    kernel_device: torch.device, tokens: int, width: int, items: int, timesteps: int, geodesic: bool
) -> None:
    values = arguments(kernel_device, tokens=tokens, width=width, items=items, timesteps=timesteps, geodesic=geodesic)
    compare(values, *upstream(values))


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_no_tokens_and_of_one(kernel_device: torch.device, tokens: int, sparse: bool) -> None:
    values = arguments(kernel_device, tokens=tokens, sparse=sparse, geodesic=True)
    compare(values, *upstream(values))


@pytest.mark.parametrize("tokens", [64, 65, 300])
@pytest.mark.parametrize("geodesic", [False, True])
def test_a_batch_of_one_item_and_one_step_adds_up_in_one_run(
    kernel_device: torch.device, tokens: int, geodesic: bool
) -> None:
    """Runs longer than a tile, and ending with one: 64 rows of width 16 are a tile, 32 tokens of one step another."""
    values = arguments(kernel_device, tokens=tokens, width=16, geodesic=geodesic, steps=torch.full((tokens,), 3))
    values["targets"] = torch.full_like(values["targets"], 2)
    compare(values, *upstream(values))


def test_steps_and_items_that_no_token_has_get_zeros(kernel_device: torch.device) -> None:
    values = arguments(kernel_device, tokens=3, items=50, timesteps=200, geodesic=True)
    to_z, to_x = upstream(values)
    compare(values, to_z, to_x)
    table, _, time = gradients(token_noise, values, to_z, to_x)
    assert table is not None
    assert time is not None
    assert int((table != 0).any(1).sum()) == 3
    assert int((time != 0).any(1).sum()) == 3


@pytest.mark.parametrize("geodesic", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_padding_has_no_gradient_to_its_row(kernel_device: torch.device, sparse: bool, geodesic: bool) -> None:
    values = arguments(kernel_device, geodesic=geodesic, sparse=sparse)
    table, condition, _ = gradients(token_noise, values, *upstream(values))
    assert table is not None
    assert condition is not None
    assert bool((table.to_dense()[0] == 0.0).all())
    assert torch.equal(condition, upstream(values)[0])
    values["targets"] = torch.zeros_like(values["targets"])
    compare(values, *upstream(values))


@pytest.mark.parametrize("geodesic", [False, True])
def test_only_a_gradient_of_x_t(kernel_device: torch.device, geodesic: bool) -> None:
    values = arguments(kernel_device, geodesic=geodesic)
    _, to_x = upstream(values)
    found = gradients(token_noise, values, None, to_x)
    assert found[1] is None
    assert found[2] is None
    compare(values, None, to_x)


@pytest.mark.parametrize("learned", LEARNED)
def test_only_one_input_learns(kernel_device: torch.device, learned: str) -> None:
    values = arguments(kernel_device)
    every = gradients(token_noise, values, upstream(values)[0], None)
    leaf = values[learned].detach().requires_grad_()
    token_noise(**{**values, learned: leaf}).z.backward(upstream(values)[0])
    assert leaf.grad is not None
    twin = every[LEARNED.index(learned)]
    assert twin is not None
    assert torch.equal(leaf.grad, twin)


def test_the_tables_of_the_schedule_and_given_noise_have_no_gradient(kernel_device: torch.device) -> None:
    for function in (token_noise, token_noise_twin):
        values = arguments(kernel_device, gaussian=torch.ones(37, 20))
        fixed = ("signal", "noise_level", "gaussian")
        leaves = {name: values[name].detach().requires_grad_() for name in fixed}
        values["table"] = values["table"].detach().requires_grad_()
        function(**{**values, **leaves}).z.sum().backward()
        assert all(leaf.grad is None for leaf in leaves.values())


def test_the_upstream_gradient_may_be_strided(kernel_device: torch.device) -> None:
    values = arguments(kernel_device)
    ones = torch.ones((), device=kernel_device).expand(37, 20)
    found = gradients(token_noise, values, ones, ones)
    expected = gradients(token_noise, values, ones.contiguous(), ones.contiguous())
    for actual, twin in zip(found, expected, strict=True):
        assert actual is not None
        assert twin is not None
        assert torch.equal(actual, twin)


def test_a_sparse_gradient_is_that_of_an_embedding(kernel_device: torch.device) -> None:
    """With x_0 alone (no noise, all signal) the layer is a lookup."""
    values = arguments(kernel_device, sparse=True)
    values |= {"signal": torch.ones_like(values["signal"]), "noise_level": torch.zeros_like(values["signal"])}
    to_z, _ = upstream(values)
    (table, _, _) = gradients(token_noise, values, to_z / values["weight"], None)
    embedding = nn.Embedding.from_pretrained(values["table"], freeze=False, sparse=True, padding_idx=0)
    embedding(values["targets"]).backward(to_z)
    twin = embedding.weight.grad
    assert table is not None
    assert twin is not None
    assert table.layout == twin.layout == torch.sparse_coo
    assert table.shape == twin.shape
    assert_matches(table.coalesce().to_dense(), twin.to_dense())
    optimiser = torch.optim.SparseAdam([embedding.weight], lr=0.1)
    embedding.weight.grad = table
    optimiser.step()
    assert bool((embedding.weight[0] == 0.0).all())


@pytest.mark.parametrize("geodesic", [False, True])
def test_a_row_shorter_than_the_epsilon(kernel_device: torch.device, geodesic: bool) -> None:
    values = arguments(kernel_device, geodesic=geodesic)
    values["table"] = values["table"] * 1e-15
    values["table"][3] = 0.0
    compare(values, *upstream(values))


@pytest.mark.parametrize("geodesic", [False, True])
def test_the_twins_gradients_are_those_of_finite_differences(geodesic: bool) -> None:
    values = arguments(torch.device("cpu"), tokens=6, width=4, items=4, geodesic=geodesic)
    values = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}
    table = values.pop("table")

    def run(rows: Tensor, condition: Tensor, time_table: Tensor) -> tuple[Tensor, Tensor]:
        # The padding row has no gradient by design, so differences are taken in the others.
        full = torch.cat([table[:1], rows])
        given = {**values, "condition": condition, "time_table": time_table}
        result = token_noise_twin(full, **given, return_x_t=True)
        assert result.x_t is not None
        return result.z, result.x_t

    inputs = (table[1:].clone(), values["condition"].clone(), values["time_table"].clone())
    assert torch.autograd.gradcheck(run, tuple(value.requires_grad_() for value in inputs))


def test_a_seed_changed_before_the_backward_pass_is_noticed(kernel_device: torch.device) -> None:
    """The noise is drawn again from it, so another value would give a gradient of another forward pass."""
    seed = torch.tensor([5], device=kernel_device)
    values = arguments(kernel_device, geodesic=True, seed=seed)
    values["table"] = values["table"].detach().requires_grad_()
    loss = token_noise(**values).z.sum()
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_table_may_change_before_a_euclidean_backward_pass(kernel_device: torch.device) -> None:
    values = arguments(kernel_device)
    leaf = values["table"].detach().clone().requires_grad_()
    loss = token_noise(**{**values, "table": leaf}).z.sum()
    with torch.no_grad():
        leaf += 1.0
    loss.backward()
    assert leaf.grad is not None


def operator_arguments(values: dict[str, Any], **options: Any) -> tuple[Any, ...]:
    tensors = [values[name] for name in ("table", "targets", "condition", "time_table", "signal", "noise_level")]
    for place in (0, 2, 3):
        tensors[place] = tensors[place].detach().requires_grad_()
    seed = torch.tensor([5], device=tensors[0].device)
    given = [options.get(name) for name in ("steps", "gaussian", "sequences")]
    return (*tensors, seed, *given, 0.7, options.get("geodesic", False), False, True, True)


def test_operators_keep_their_contract(kernel_device: torch.device) -> None:
    values = arguments(kernel_device)
    opcheck(module._token_noise.op, operator_arguments(values))
    gaussian = torch.zeros(37, 20, device=kernel_device)
    opcheck(module._token_noise.op, operator_arguments(values, geodesic=True, gaussian=gaussian))
    targets, seed = values["targets"], torch.tensor([5], device=kernel_device)
    opcheck(draw_token_steps.op, (targets, seed, None, TIMESTEPS))
    steps = draw_token_steps(targets, seed, None, TIMESTEPS)
    to_z, _ = upstream(values)
    opcheck(time_gradient.op, (to_z, steps, 0.7, TIMESTEPS, torch.float32))
    levels = (values["signal"], values["noise_level"], seed, None)
    for sparse in (False, True):
        rest = (12, torch.float32, 0.7, sparse)
        opcheck(table_gradient.op, (to_z, None, values["table"], targets, steps, *levels, *rest))


@pytest.mark.parametrize("sparse", [False, True])
def test_it_compiles_without_a_break(kernel_device: torch.device, sparse: bool) -> None:
    values = arguments(kernel_device, geodesic=True, sparse=sparse)
    leaves = {name: values[name].detach().requires_grad_() for name in LEARNED}

    def loss(leaves: dict[str, Tensor]) -> Tensor:
        result = token_noise(**{**values, **leaves}, return_x_t=True)
        assert result.x_t is not None
        return F.softplus(result.z).sum() + result.x_t.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=COMPILE_BACKEND)
    found = torch.autograd.grad(compiled(leaves), list(leaves.values()))
    expected = torch.autograd.grad(loss(leaves), list(leaves.values()))
    for actual, twin in zip(found, expected, strict=True):
        assert actual.layout == twin.layout
        assert_matches(actual.to_dense(), twin.to_dense())


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that torch can use")


@pytest.mark.gpu
@gpu
def test_equal_inputs_give_equal_bits_on_a_gpu() -> None:
    """Most tokens share a few items and steps: atomic sums would differ from run to run."""
    values = arguments(torch.device("cuda"), tokens=20_000, width=128, items=7, timesteps=5, geodesic=True)
    to_z, to_x = upstream(values)
    first = gradients(token_noise, values, to_z, to_x)
    for _ in range(5):
        for actual, again in zip(first, gradients(token_noise, values, to_z, to_x), strict=True):
            assert actual is not None
            assert again is not None
            assert torch.equal(actual, again)


@pytest.mark.gpu
@gpu
def test_rows_past_two_to_the_31_elements_on_a_gpu() -> None:
    device, D, N = torch.device("cuda"), 128, 2**24 + 5
    values = arguments(device, width=D, tokens=9, items=3, dtype=torch.bfloat16, sparse=True)
    values["targets"] = torch.tensor([1, N, N - 1, 0, 2, N, 7, N - 3, 5], device=device)
    rows = torch.randn(N + 1, 1, device=device, dtype=torch.bfloat16)
    values["table"] = rows.expand(N + 1, D).contiguous()
    to_z, _ = upstream(values)
    found, expected = (gradients(function, values, to_z, None)[0] for function in (token_noise, token_noise_twin))
    assert found is not None
    assert expected is not None
    found, expected = found.coalesce(), expected.coalesce()
    kept = found.indices()[0] != 0
    assert torch.equal(found.indices()[:, kept], expected.indices())
    assert_matches(found.values()[kept], expected.values())


@pytest.mark.gpu
@gpu
def test_a_captured_graph_draws_by_the_seeds_current_value() -> None:
    device = torch.device("cuda")
    seed = torch.tensor([5], device=device)
    values = arguments(device, width=128, tokens=300, seed=seed)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        token_noise(**values)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = token_noise(**values).z
    for value in (5, 6, 2**40):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(captured, token_noise(**{**values, "seed": value}).z)
