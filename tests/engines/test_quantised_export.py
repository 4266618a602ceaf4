"""Exports of models that store fewer bits: graphs of the numbers they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adrec.checkpoint import model_fingerprint
from adrec.config import LayerFormat, QuantizationConfig, TableFormat
from adrec.data.jagged import Jagged
from adrec.engines import CachedEngine, OnnxRuntimeEngine
from adrec.engines.exported import load_manifest
from adrec.models import build_model, in_float32, quantization_of
from adrec.models.base import SequenceModel
from adrec.models.item_tables import QuantizedTable
from adrec.models.quantized import QuantizedLinear, linear_layers, pack

FORMATS = {
    "int8": (LayerFormat(format="int8"), TableFormat(format="int8")),
    "int4": (LayerFormat(format="int4", group_size=8), TableFormat(format="int4", group_size=8)),
    "bf16": (LayerFormat(format="bf16", compute="bfloat16"), TableFormat(format="bf16")),
    "dynamic, table in float32": (LayerFormat(format="int8-dynamic"), None),
}
HISTORIES = Jagged.from_lists([[3], [5, 1, 40, 2], list(range(1, 13)), [7, 7]])


def quantised(model: SequenceModel, layer: LayerFormat, table: TableFormat | None) -> SequenceModel:
    """The same network with all linear layers, and the table, stored in a format."""
    layers = linear_layers(model)
    made = build_model(model.config, QuantizationConfig(layers=dict.fromkeys(layers, layer), table=table))
    for name, linear in layers.items():
        packed = pack(linear.weight, layer.format, layer.group_size)
        made.set_submodule(name, QuantizedLinear(packed, linear.bias, layer))
    if table is not None:
        made.item_embedding = QuantizedTable.of(model.table, table)
    kept = {name: value for name, value in model.state_dict().items() if name in made.state_dict()}
    made.load_state_dict({**made.state_dict(), **{name: kept[name] for name in kept if not name.endswith("bias")}})
    return made.eval()


@pytest.fixture(params=FORMATS)
def stored(request: pytest.FixtureRequest, shallow_model: Callable[..., SequenceModel]) -> SequenceModel:
    return quantised(shallow_model(lambda_uncertainty=1.0), *FORMATS[request.param])


def test_in_float32_holds_what_the_stored_numbers_stand_for(stored: SequenceModel) -> None:
    plain = in_float32(stored)
    assert quantization_of(plain) is None
    assert all(value.dtype == torch.float32 for value in plain.state_dict().values())
    assert torch.equal(plain.table, stored.table)
    for name, layer in linear_layers(plain).items():
        source = stored.get_submodule(name)
        assert torch.equal(layer.weight, source.weight)
        assert torch.equal(layer.bias, source.bias)
    assert in_float32(plain) is plain


# Of every format the graph is that of its numbers in float32, above.
@pytest.mark.parametrize(
    "stored",
    ["int4", "dynamic, table in float32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8", "bf16"))],
    indirect=True,
)
def test_a_graph_of_it_answers_as_its_numbers_do(
    stored: SequenceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = OnnxRuntimeEngine(stored)
    found = engine.recommend(HISTORIES, 5, 1, seed=3)
    exact = CachedEngine(in_float32(stored)).recommend(HISTORIES, 5, 1, seed=3)
    assert torch.equal(found.items, exact.items)
    torch.testing.assert_close(found.scores, exact.scores, atol=1e-5, rtol=1e-5)
    # The folder is of the model as it is stored: another run with the same numbers is another model.
    (folder,) = (tmp_path / "adrec" / "exports").glob("*/*")
    assert load_manifest(folder).model_fingerprint == model_fingerprint(stored.state_dict())


def test_with_the_weights_alone_nothing_else_is_lost(tiny_model: Callable[..., SequenceModel]) -> None:
    stored = quantised(tiny_model(lambda_uncertainty=1.0), *FORMATS["int8"])
    found, exact = (CachedEngine(each).represent(HISTORIES, 2, seed=3) for each in (stored, in_float32(stored)))
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=1e-6)
