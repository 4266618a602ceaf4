"""`encode_prefix` and its twin compute what adrec's models and its cached engine do; natively on a GPU as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adrec.data.jagged import Jagged
from adrec.engines.cached import CachedEngine
from adrec.engines.packing import block_weights, norm_rows, pad_rows
from adrec.models.adrec import ADRec
from adrec.models.base import SequenceModel
from adrec.models.layers import CausalTransformer
from kernels.encode_prefix import ENTRIES, encode_prefix, encode_prefix_twin
from tests.conftest import ModelFactory
from tests.kernels.conftest import assert_matches

LENGTHS = [3, 1, 9, 2, 12, 1]
MODELS: dict[str, dict[str, Any]] = {
    "released padding": {},
    "masked padding": {"padding": "masked"},
    "learned positions": {"positions": "learned"},
    "masked padding with positions": {"padding": "masked", "positions": "learned"},
    "positions on padding": {"positions": "released"},
    "guided": {"condition_dropout": 0.3, "guidance_scale": 2.0, "lambda_uncertainty": 0.5},
    "guided, positions on padding": {"condition_dropout": 0.3, "guidance_scale": 2.0, "positions": "released"},
    "geodesic": {"geodesic": True, "lambda_uncertainty": 0.5},
    "three blocks after one": {"encoder_blocks": 1, "denoiser_blocks": 3},
    "sasrec": {"model": "sasrec", "positions": "learned"},
    "sasrec, masked padding": {"model": "sasrec", "padding": "masked"},
}


def arguments_of(model: SequenceModel, histories: Jagged) -> dict[str, Any]:
    """What the kernel is given for a model, all in float32."""
    pads, config = model.pad_rows(), model.config
    states = None if pads is None else model.encoder.pad_states(pads)
    positions = model.position_embedding
    given = {
        "items": histories.values,
        "offsets": histories.offsets,
        "table": model.table.detach(),
        "positions": None if positions is None else positions.weight.detach(),
        "history_norm": norm_rows(model.history_norm),
        "history_norm_epsilon": model.history_norm.eps,
        "encoder": block_weights(model.encoder, torch.float32),
        "encoder_pads": None if states is None else pad_rows(states, torch.float32),
        "heads": config.heads,
        "max_length": config.max_length,
    }
    if not isinstance(model, ADRec):
        return given
    assert isinstance(model.denoiser, CausalTransformer)
    start, guided = torch.zeros(1, dtype=torch.int64), config.guidance_scale != 1.0
    padding = None
    if states is not None:
        conditions = [states.output, torch.zeros_like(states.output)][: 1 + guided]
        rows = [model.denoiser.pad_states(model.mix_pads(condition, start)) for condition in conditions]
        padding = torch.stack([pad_rows(state, torch.float32) for state in rows])
    return {
        **given,
        "denoiser": block_weights(model.denoiser, torch.float32),
        "denoiser_pads": padding,
        "start_time": model.time_embedding(start)[0],
        "mix_weight": config.lambda_uncertainty,
        "geodesic": config.geodesic,
        "unconditional": guided,
    }


def prefix_of(caches: list[list[Any]], offsets: Tensor, width: int) -> Tensor:
    """The cached engine's prefix `[n, 2, M, D]`, zero at the last tokens."""
    prefix = torch.zeros(len(caches), 2, int(offsets[-1]), width)
    lengths = offsets.diff()
    for block, groups in enumerate(caches):
        for cache in groups:
            # Before the prefix stand the pads, behind it the place of the new token.
            skip = cache.keys.shape[2] - int(lengths[cache.users].max())
            for row, user in enumerate(range(cache.users.start, cache.users.stop)):
                count, first = int(lengths[user]) - 1, int(offsets[user])
                for side, kept in enumerate((cache.keys, cache.values)):
                    own = kept[row, :, skip : skip + count].transpose(0, 1).flatten(1)
                    prefix[block, side, first : first + count] = own
    return prefix


@pytest.mark.parametrize("kind", MODELS, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("encode", [encode_prefix_twin, encode_prefix], ids=["twin", "kernel"])
@torch.no_grad()
def test_it_computes_what_the_cached_engine_does(tiny_model: ModelFactory, kind: str, encode: Any) -> None:
    model = tiny_model(max_length=12, timesteps=6, schedule="sqrt", **MODELS[kind])
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 41, (length,), generator=generator).tolist() for length in sorted(LENGTHS)]
    histories, engine = Jagged.from_lists(rows), CachedEngine(model)
    state = engine.encode(histories)
    last, keys_values = encode(**arguments_of(model, histories))
    if not isinstance(model, ADRec):
        assert keys_values is None
        assert_matches(last, engine.represent(histories), torch.float32)
        return
    assert_matches(last, state.last, torch.float32)
    assert keys_values.shape[0] == len(state.caches)
    for branch, cache in enumerate(state.caches):
        expected = prefix_of(cache.caches, histories.offsets, model.config.width)
        assert_matches(keys_values[branch], expected, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ENTRIES[0].dtypes, ids=str)
@pytest.mark.parametrize("shape", ENTRIES[0].shapes, ids=lambda name: name.replace(" ", "-"))
def test_natively_at_every_shape(kernel_device: torch.device, shape: str, dtype: torch.dtype) -> None:
    given = ENTRIES[0].inputs(ENTRIES[0].shapes[shape], dtype, kernel_device)
    last, keys_values = encode_prefix(**given)
    wanted_last, wanted = encode_prefix_twin(**given)
    assert_matches(last, wanted_last, dtype)
    if keys_values is not None and wanted is not None:
        assert_matches(keys_values, wanted, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ENTRIES[0].dtypes, ids=str)
def test_a_captured_launch_reads_the_offsets_anew(kernel_device: torch.device, dtype: torch.dtype) -> None:
    shape = {**ENTRIES[0].shapes["paper"], "users": 64}
    given = ENTRIES[0].inputs(shape, dtype, kernel_device)
    encode_prefix(**given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        last, keys_values = encode_prefix(**given)
    # The same number of users and of tokens, longest first.
    lengths = given["offsets"].diff().flip(0)
    given["offsets"][1:] = lengths.cumsum(0)
    given["items"].copy_(given["items"].flip(0))
    graph.replay()
    wanted_last, wanted = encode_prefix_twin(**given)
    assert_matches(last, wanted_last, dtype)
    assert keys_values is not None
    assert wanted is not None
    assert_matches(keys_values, wanted, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ENTRIES[0].dtypes, ids=str)
def test_repeated_launches_agree_bit_for_bit(kernel_device: torch.device, dtype: torch.dtype) -> None:
    """A read that races with a write of another thread would not."""
    shape = {**ENTRIES[0].shapes["paper"], "users": 256, "length": 200, "max_length": 200, "guided": 1}
    given = ENTRIES[0].inputs(shape, dtype, kernel_device)
    first = encode_prefix(**given)
    for _ in range(20):
        last, keys_values = encode_prefix(**given)
        assert torch.equal(last, first[0])
        assert keys_values is not None
        assert first[1] is not None
        assert torch.equal(keys_values, first[1])
