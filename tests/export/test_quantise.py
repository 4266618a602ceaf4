"""Q/DQ pairs: around which products, with which scales, and in float16 graphs; by hand and against the float graph."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adrec.data.jagged import Jagged
from adrec.engines import CachedEngine, make_engine
from adrec.engines.exported import load_manifest
from adrec.engines.onnxruntime import OnnxRuntimeEngine
from adrec.errors import ConfigError, NotSupportedError
from adrec.models.base import SequenceModel
from compress.export.onnx_export import ExportOptions, export_onnx
from compress.export.verify import candidates

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ITEMS, WIDTH = 40, 16
ModelFactory = Callable[..., SequenceModel]


def histories(users: int) -> Jagged:
    generator = torch.Generator().manual_seed(users)
    lengths = torch.randint(1, 51, (users,), generator=generator).tolist()
    return Jagged.from_lists(torch.randint(1, ITEMS + 1, (each,), generator=generator).tolist() for each in lengths)


@pytest.fixture(scope="module")
def model(tiny_model: ModelFactory) -> SequenceModel:
    return tiny_model(lambda_uncertainty=1.0, encoder_blocks=1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, model: SequenceModel) -> Callable[[str], Path]:
    """Folder of one step and of a loop, made once for each precision: ``exported("fp16")``."""

    @cache
    def export(precision: Any) -> Path:
        out = tmp_path_factory.mktemp("quantised") / precision
        kinds: Any = ("int8-qdq", "fp8-qdq", *(("int8-dynamic",) if precision == "fp32" else ()))
        options = ExportOptions(quantised=kinds, loop=True, k=10, precision=precision, calibration=histories(40))
        export_onnx(model, out, options)
        return out

    return export


@pytest.fixture(params=["fp32", "fp16"])
def folder(request: pytest.FixtureRequest, exported: Callable[[str], Path]) -> Path:
    return exported(request.param)


def graph_of(folder: Path, kind: str, steps: str = "s1") -> Any:
    rest = "" if folder.name in ("fp32", kind) else f"-{folder.name}"
    return onnx.load(folder / f"request-{kind}{rest}-{steps}.onnx").graph


def loop_of(graph: Any) -> Any:
    """The body of the only loop."""
    (node,) = (node for node in graph.node if node.op_type == "Loop")
    return next(attribute.g for attribute in node.attribute if attribute.name == "body")


def constants(graph: Any) -> dict[str, np.ndarray]:
    return {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}


@pytest.mark.parametrize(
    ("steps", "products"),
    # For users two blocks and the score. Of a loop: the score, and the two of the steps' embeddings.
    [("s1", 4 + 4 + 1), ("loop", 1 + 2)],
)
@pytest.mark.parametrize("kind", ["int8-qdq", "fp8-qdq"])
def test_products_of_items_are_quantised_and_those_of_users_are_not(
    folder: Path, kind: str, steps: str, products: int
) -> None:
    graph = graph_of(folder, kind, steps)
    made = {name: node for node in graph.node for name in node.output}
    weights: dict[bool, list[str]] = {True: [], False: []}
    for node in graph.node:
        if node.op_type == "Gemm":
            pair = [made[name].op_type if name in made else "" for name in node.input[:2]]
            quantised = pair == ["DequantizeLinear"] * 2
            assert quantised or "DequantizeLinear" not in pair
            weights[quantised].append(node.input[1])
    # Over items an encoder block, a denoiser block and a part of the next.
    assert (len(weights[True]), len(weights[False])) == (4 + 4 + 1, products)
    assert "core.model.item_embedding.weight" in weights[False]
    # Neither is what `represent` reads, nor the table that items are looked up in.
    (rows,) = (output for output in graph.output if output.name == "rows")
    assert made[rows.name].op_type != "DequantizeLinear"
    table = constants(graph)["core.model.item_embedding.weight"]
    assert table.dtype == (np.float16 if folder.name == "fp16" else np.float32)


@pytest.mark.parametrize("kind", ["int8-qdq", "fp8-qdq"])
def test_the_body_of_a_loop_is_that_of_the_float_graph(folder: Path, kind: str) -> None:
    quantised, exact = graph_of(folder, kind, "loop"), graph_of(folder, folder.name, "loop")
    body, wanted = loop_of(quantised), loop_of(exact)
    assert [(node.op_type, *node.input) for node in body.node] == [(node.op_type, *node.input) for node in wanted.node]
    # A weight that runs in it and over items is there as both.
    weight = "core.model.denoiser.blocks.0.feed_forward.up.weight"
    assert weight in {name for node in body.node for name in node.input}
    np.testing.assert_array_equal(constants(quantised)[weight], constants(exact)[weight])
    assert f"{weight}_quantised" in constants(quantised) or f"{weight}_quantized" in constants(quantised)


def test_a_dynamic_loop_computes_its_steps_in_float_and_serves_any(
    exported: Callable[[str], Path], model: SequenceModel
) -> None:
    graph = graph_of(exported("fp32"), "int8-dynamic", "loop")
    products = Counter(node.op_type for node in graph.node if node.op_type.startswith("MatMul"))
    # Over items an encoder block, a denoiser block and a part of the next; for users the score.
    assert products["MatMulInteger"] == 4 + 4 + 1 + 1
    assert "MatMulInteger" not in {node.op_type for node in loop_of(graph).node}
    # What embeds the steps is in float, too: a step would else depend on the others.
    assert {node.input[1] for node in graph.node if node.op_type == "MatMul"} >= {
        f"core.model.time_embedding.{part}.weight_Transposed" for part in ("up", "down")
    }
    made, exact, given = make_engine("onnxruntime-int8", model, exported("fp32")), CachedEngine(model), histories(9)
    for steps in (2, 4, 32):
        rows, wanted = (each.represent(given, steps, seed=3) for each in (made, exact))
        assert 1e-4 < float((rows - wanted).norm() / wanted.norm()) < 0.08
        assert made.recommend(given, 5, steps, seed=3).items.shape == (9, 5)


def test_loops_are_compared_at_the_fewest_some_and_all_steps(folder: Path, model: SequenceModel) -> None:
    run: Any = SimpleNamespace(model=model, config=model.config)
    found = [(each.precision, each.steps) for each in candidates(folder, load_manifest(folder), run, ["cpu"])]
    for kind in ("int8-qdq", "fp8-qdq"):
        # The first is of the unrolled graph.
        assert [steps for precision, steps in found if precision == kind] == [1, 1, 4, 32]


def test_every_weight_has_a_scale_for_each_channel(folder: Path) -> None:
    """Also the half of a projection that the export slices, which a quantiser takes for an activation."""
    graph = graph_of(folder, "int8-qdq")
    found, made = constants(graph), {name: node for node in graph.node for name in node.output}
    assert all(node.op_type != "Slice" or not set(node.input) <= set(found) for node in graph.node)
    widths = []
    for node in graph.node:
        if node.op_type == "Gemm" and node.input[1] in made:
            quantised, scale = (found[name] for name in made[node.input[1]].input[:2])
            assert scale.shape == (quantised.shape[0],)
            assert scale.dtype == (np.float16 if folder.name == "fp16" else np.float32)
            assert np.abs(quantised.astype(int)).max(1).min() >= 126
            widths.append(quantised.shape[0])
    assert 2 * WIDTH in widths


def test_the_largest_value_is_float8s_largest(folder: Path) -> None:
    graph = graph_of(folder, "fp8-qdq")
    found, made = constants(graph), {name: node for node in graph.node for name in node.output}
    exact = constants(onnx.load(folder / f"request-{folder.name}-s1.onnx").graph)
    name = "core.model.encoder.blocks.0.feed_forward.up.weight"
    stored, scale = found[f"{name}_quantised"].astype(np.float32), float(found[f"{name}_scale"])
    assert np.abs(stored).max() == 448.0
    assert scale == pytest.approx(float(np.abs(exact[name]).max()) / 448.0, rel=1e-3)
    # e4m3 keeps three bits behind the first: half of a sixteenth is the largest relative error of normal numbers.
    normal = np.abs(exact[name]) > scale * 2.0**-6
    relative = np.abs(stored * scale - exact[name].astype(np.float32))[normal] / np.abs(exact[name])[normal]
    assert relative.max() <= 1 / 16 + 1e-3
    activations = {
        node.input[0]: float(found[node.input[1]]) for node in graph.node if node.op_type == "QuantizeLinear"
    }
    assert len(activations) == 9
    assert made[next(iter(activations))].op_type == "LayerNormalization"


# One step is unrolled there, more are the loop.
@pytest.mark.parametrize("steps", [1, 4, 32])
@pytest.mark.parametrize(("kind", "bound"), [("int8-qdq", 0.05), ("fp8-qdq", 0.1)])
def test_quantised_graphs_stay_near_in_both_floats(
    folder: Path, model: SequenceModel, kind: Any, bound: float, steps: int
) -> None:
    given, noise = histories(33), torch.randn(steps + 1, 33, WIDTH, generator=torch.Generator().manual_seed(0))
    wanted = CachedEngine(model).represent(given, steps, noise=noise)
    rows = OnnxRuntimeEngine.from_export(folder, model, precision=kind).represent(given, steps, noise=noise)
    assert 1e-4 < float((rows - wanted).norm() / wanted.norm()) < bound


@pytest.mark.parametrize("catalogue", ["input", "outside"])
def test_a_table_that_is_no_constant_is_calibrated_with_the_models(
    tmp_path: Path, shallow_model: ModelFactory, catalogue: Any
) -> None:
    model = shallow_model(lambda_uncertainty=1.0)
    options = ExportOptions(
        quantised=("int8-qdq",), k=10, catalogue=catalogue, split=catalogue == "outside", calibration=histories(20)
    )
    manifest = export_onnx(model, tmp_path / "out", options)
    (made,) = (each for each in manifest.graphs if each.precision == "int8-qdq")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / made.file), providers=["CPUExecutionProvider"])
    given, noise = histories(9), torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(0))
    table, items = model.table.detach(), given.padded(50)
    inputs = {"histories": items, "embedded": table[items], "table": table, "lengths": given.lengths, "noise": noise}
    rows = session.run(["rows"], {spec.name: inputs[spec.name].numpy() for spec in made.inputs})[0]
    wanted = CachedEngine(model).represent(given, 1, noise=noise)
    assert float((torch.from_numpy(rows) - wanted).norm() / wanted.norm()) < 0.05


def test_quantised_alone_leaves_no_float_graph(tmp_path: Path, shallow_model: ModelFactory) -> None:
    said: list[str] = []
    options = ExportOptions(
        precision="fp16", quantised=("int8-qdq",), keep_float=False, inline_limit=1000, calibration=histories(9), k=5
    )
    model = shallow_model(model="sasrec", positions="learned")
    manifest = export_onnx(model, tmp_path / "out", options, report=said.append)
    assert said == ["request-int8-qdq-fp16.onnx"]
    assert [(graph.file, graph.precision) for graph in manifest.graphs] == [("request-int8-qdq-fp16.onnx", "int8-qdq")]
    assert {each.name for each in (tmp_path / "out").iterdir()} == {
        "export.json", "request-int8-qdq-fp16.onnx", "request-int8-qdq-fp16.data"
    }  # fmt: skip
    facts = {each.key: each.value for each in onnx.load(tmp_path / "out" / said[0]).metadata_props}
    assert (facts["adrec.precision"], facts["adrec.floats"]) == ("int8-qdq", "float16")
    assert facts["adrec.ids"] == "1 to 40, 0 for padding; unchecked"


def test_what_cannot_be_quantised_is_refused_before_anything_is_traced(
    tmp_path: Path, model: SequenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="dynamic int8 is for CPUs, which compute the rest in float32"):
        ExportOptions(precision="fp16", quantised=("int8-dynamic",))
    with pytest.raises(
        ConfigError, match="--quantiser is modelopt, which is for unrolled steps here; drop it, or --loop"
    ):
        ExportOptions(loop=True, quantised=("int8-qdq",), calibration=histories(9), quantiser="modelopt")

    def traced(*arguments: Any) -> None:
        raise AssertionError("a graph was traced")

    monkeypatch.setattr("compress.export.onnx_export.save_graph", traced)
    monkeypatch.setitem(sys.modules, "modelopt.onnx.quantization", None)
    options = ExportOptions(quantised=("int8-qdq",), calibration=histories(9), quantiser="modelopt")
    with pytest.raises(NotSupportedError, match=r"pip install 'adrec\[modelopt\]', or leave --quantiser out"):
        export_onnx(model, tmp_path / "out", options)
