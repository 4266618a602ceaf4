"""`denoise_last_mlp` by value against its twin, and the twin against what the model's own engine samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adrec.data.jagged import Jagged
from adrec.engines.cached import CachedEngine
from adrec.engines.packing import norm_rows
from adrec.models.adrec import ADRec, MLPDenoiser
from adrec.models.base import SequenceModel
from adrec.noise import ExplicitNoise, PhiloxNoise
from kernels import _runtime, philox
from kernels import denoise_last_mlp as module
from kernels._runtime import UnsupportedError, record_launches
from kernels.denoise_last_mlp import denoise_last_mlp, denoise_last_mlp_twin
from tests.kernels.conftest import COMPILE_BACKEND, assert_matches, embedded, guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance_scale": 1.5},
    "geodesic": {"geodesic": True},
    "guided, geodesic": {"guidance_scale": 0.5, "geodesic": True},
    "one step": {"steps": 1},
    "four steps": {"steps": 4},
    "no row keys": {"row_keys": None},
    "given noise": {"noise": True},
    "weak noise": {"mix_weight": 0.001},
    "wide norm epsilon": {"norm_epsilon": 0.1},
}
ModelFactory = Callable[..., SequenceModel]


def arguments(
    users: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    width: int = 32,
    steps: int = 2,
    **options: Any,
) -> dict[str, Any]:
    """Random arguments between NaN margins; the coefficients and the noise of the last step, not used, are NaN."""
    generator = torch.Generator().manual_seed(0)
    B, D = users, width

    def normal(*size: int, scale: float = 1.0, shift: float = 0.0, kind: torch.dtype = torch.float32) -> Tensor:
        return embedded((torch.randn(*size, generator=generator) * scale + shift).to(kind).to(device))

    coefficients = torch.rand(steps, 3, generator=generator) * 0.7
    coefficients[0] = torch.nan
    noise = normal(steps + 1, B, D) if options.pop("noise", None) else None
    if noise is not None:
        noise[-1] = torch.nan
    return {
        "condition": normal(B, D),
        "up": normal(4 * D, D, scale=D**-0.5, kind=dtype),
        "up_bias": normal(4 * D, scale=0.2),
        "down": normal(D, 4 * D, scale=(4 * D) ** -0.5, kind=dtype),
        "down_bias": normal(D, scale=0.2),
        "norm": normal(2, D, scale=0.2, shift=1.0),
        "times": normal(steps, D),
        "coefficients": embedded(coefficients.to(device)),
        "mix_weight": 1.0,
        "seed": 5,
        "row_keys": embedded(torch.arange(B, device=device) * (2**39 - 1) // max(1, B)),
        "noise": noise,
        **options,
    }


def check(values: dict[str, Any], found: Tensor | None = None) -> Tensor:
    """Hold the kernel to its twin in float64; returns what the kernel found."""
    if found is None:
        with guarded():
            found = denoise_last_mlp(**values)
    assert found.dtype == torch.float32
    expected = denoise_last_mlp_twin(**{**values, "condition": values["condition"].double()})
    assert expected.dtype == torch.float64
    assert_matches(found, expected, values["up"].dtype)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS, ids=lambda name: name.replace(" ", "-"))
def test_it_matches_the_twin(kernel_device: torch.device, option: str, dtype: torch.dtype) -> None:
    check(arguments(5, kernel_device, dtype, **OPTIONS[option]))


@pytest.mark.parametrize("width", [8, 20, 33, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_width(kernel_device: torch.device, width: int, dtype: torch.dtype) -> None:
    check(arguments(3, kernel_device, dtype, width=width, steps=2))


@pytest.mark.parametrize("users", [0, 1, 15, 16, 17, 33])
def test_tiles_at_their_edges(kernel_device: torch.device, users: int) -> None:
    assert check(arguments(users, kernel_device, torch.float16, width=16)).shape == (users, 16)


@settings(max_examples=8, deadline=None)
@given(
    users=st.integers(0, 20),
    width=st.integers(8, 40),
    steps=st.integers(1, 4),
    scale=st.sampled_from([1.0, 1.5]),
    geodesic=st.booleans(),
)
def test_any_shape(
    kernel_device: torch.device, users: int, width: int, steps: int, scale: float, geodesic: bool
) -> None:
    options = {"width": width, "steps": steps, "guidance_scale": scale, "geodesic": geodesic}
    check(arguments(users, kernel_device, torch.float16, **options))


def test_a_user_depends_on_no_other_user(kernel_device: torch.device) -> None:
    values = arguments(18, kernel_device)
    together = check(values)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(1)).tolist()
    for users in (order, order[:1], order[1:12]):
        part = {"condition": values["condition"][users], "row_keys": values["row_keys"][users]}
        torch.testing.assert_close(denoise_last_mlp(**{**values, **part}), together[users], atol=1e-5, rtol=1e-5)


def test_noise_is_that_of_the_contract(kernel_device: torch.device) -> None:
    """Draws 0 .. S - 1 of each row key, whether they are given or drawn; the seed may lie on the device."""
    values = arguments(5, kernel_device)
    for seed in (0, -3, 2**62 + 2**33 + 7):
        drawn = denoise_last_mlp(**{**values, "seed": torch.tensor([seed], device=kernel_device)})
        assert torch.equal(drawn, denoise_last_mlp(**{**values, "seed": seed}))
        rows = [philox.row_noise(seed, values["row_keys"], draw, 32) for draw in range(3)]
        given = denoise_last_mlp(**{**values, "seed": 99, "noise": torch.stack(rows)})
        torch.testing.assert_close(given, drawn, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(drawn, denoise_last_mlp(**{**values, "seed": 1}), atol=1e-3)


@pytest.mark.parametrize(
    "variant",
    [{}, {"lambda_uncertainty": 1.0}, {"geodesic": True, "lambda_uncertainty": 0.1}, {"guidance_scale": 2.0}],
    ids=str,
)
def test_the_twin_computes_what_the_cached_engine_samples(tiny_model: ModelFactory, variant: dict[str, Any]) -> None:
    settings = {"width": 32, "timesteps": 32, "schedule": "sqrt", "condition_dropout": 0.3, "denoiser": "mlp"}
    model = tiny_model(**settings, **variant)
    assert isinstance(model, ADRec)
    mlp = model.denoiser
    assert isinstance(mlp, MLPDenoiser)
    engine = CachedEngine(model)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        state = engine.encode(Jagged.from_lists([[3, 4], [1], [5, 6, 7, 8]]))
        for steps in (1, 4, 32):
            table = engine.table(steps)
            assert table is not None
            row_keys = torch.arange(3) * 1000
            columns = torch.stack([table.from_x0, table.from_xt, table.sigma], 1)
            weights = (mlp.up.weight, mlp.up.bias, mlp.down.weight, mlp.down.bias, norm_rows(mlp.norm))
            values = (state.last, *weights, model.time_embedding(table.time), columns)
            options = {
                "mix_weight": model.config.lambda_uncertainty,
                "guidance_scale": model.config.guidance_scale,
                "geodesic": model.config.geodesic,
            }
            expected = engine.sample(state, table, PhiloxNoise(3, row_keys, 32))[state.order]
            found = denoise_last_mlp_twin(*values, **options, seed=3, row_keys=row_keys[state.order])
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            noise = torch.randn(steps + 1, 3, 32, generator=generator)
            expected = engine.sample(state, table, ExplicitNoise(noise))[state.order]
            found = denoise_last_mlp_twin(*values, **options, noise=noise[:, state.order])
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("noise", [False, True])
def test_the_operator_is_registered_well(kernel_device: torch.device, noise: bool) -> None:
    values = arguments(3, kernel_device, width=16, noise=noise)
    values["coefficients"][0] = 0.0
    names = ("condition", "up", "up_bias", "down", "down_bias", "norm", "times", "coefficients")
    seed = None if noise else torch.zeros(1, dtype=torch.int64, device=kernel_device)
    options = (seed, values["row_keys"], values["noise"], 1e-5, 1.0, 1.5, True)
    operator: Any = module._denoise_last_mlp
    torch.library.opcheck(operator.op, (*(values[name] for name in names), *options))


def test_it_compiles_without_graph_breaks(kernel_device: torch.device) -> None:
    values = arguments(3, kernel_device, width=16)
    compiled = torch.compile(
        lambda condition: denoise_last_mlp(**{**values, "condition": condition}),
        fullgraph=True,
        backend=COMPILE_BACKEND,
    )
    check(values, compiled(values["condition"]))


def test_inputs_that_need_not_be_contiguous(kernel_device: torch.device) -> None:
    values = arguments(5, kernel_device, width=16, noise=True)
    strided = {name: values[name].mT.contiguous().mT for name in ("condition", "noise")}
    assert torch.equal(denoise_last_mlp(**{**values, **strided}), check(values))


def test_without_a_kernel_it_is_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    values = arguments(5, torch.device("cpu"))
    monkeypatch.setattr(_runtime, "AVAILABLE", False)
    assert torch.equal(denoise_last_mlp(**values), denoise_last_mlp_twin(**values))


def test_the_entry_records_one_launch_and_costs_something() -> None:
    (entry,) = module.ENTRIES
    for shape in entry.shapes.values():
        for dtype in entry.dtypes:
            with record_launches() as launches:
                entry.run(**entry.inputs(shape, dtype, torch.device("meta")))
            assert len(launches) == 1
            assert entry.cost(shape, dtype).bytes > 0
    small = {**entry.shapes["guided, geodesic"], "users": 3, "width": 16, "steps": 2}
    values = entry.inputs(small, torch.float32, torch.device("cpu"))
    assert_matches(entry.run(**values), entry.twin(**values))
    # 4 D^2 products up and 4 D^2 down, in one step of one user.
    one = {"users": 1, "width": 128, "steps": 1}
    assert entry.cost(one, torch.float32).flops == 2 * 8 * 128**2


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "condition": ({"condition": torch.zeros(32)}, r"condition has shape \[32\]; expected \[B, D\]"),
    "width": ({"condition": torch.zeros(3, 512)}, "width is 512; allowed: 8 to 256; use engine 'cached' otherwise"),
    "up": ({"up": torch.zeros(32, 32)}, r"up has shape \[32, 32\]; expected \[128, 32\]"),
    "up dtype": ({"up": torch.zeros(128, 32).double()}, "up is torch.float64; allowed: float32, float16, bfloat16"),
    "down": ({"down": torch.zeros(32, 128).half()}, "down is torch.float16; allowed: float32"),
    "bias": ({"down_bias": torch.zeros(32).half()}, "down_bias is torch.float16; allowed: float32"),
    "norm": ({"norm": torch.zeros(32)}, r"norm has shape \[32\]; expected \[2, 32\]"),
    "steps": ({"times": torch.zeros(4096, 32)}, "times has 4096 steps; allowed: 1 to 4095"),
    "noise": ({"noise": torch.zeros(2, 3, 32)}, r"noise has shape \[2, 3, 32\]; expected \[3, 3, 32\]"),
    "strides": ({"up": torch.zeros(32, 128).t()}, r"up is not contiguous; keep up.contiguous\(\) between calls"),
    "devices": ({"times": torch.zeros(2, 32, device="meta")}, "tensors are on cpu, meta; expected one device"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_says_what_is_wrong(mistake: str) -> None:
    changes, message = MISTAKES[mistake]
    with pytest.raises(UnsupportedError, match=message):
        denoise_last_mlp(**{**arguments(3, torch.device("cpu")), **changes})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", module.ENTRIES[0].shapes, ids=lambda name: name.replace(" ", "-"))
def test_natively_at_every_shape(shape: str, dtype: torch.dtype) -> None:
    values = module.ENTRIES[0].inputs(module.ENTRIES[0].shapes[shape], dtype, torch.device("cuda"))
    for mix_weight in (0.001, 1.0):
        check({**values, "mix_weight": mix_weight})
