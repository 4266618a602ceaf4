"""The own operators: their kernels by value as TensorRT would launch them, and their functions on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from plugin_launches import run
from torch import Tensor

from adrec.errors import ConfigError, NotSupportedError
from adrec.respacing import sampling_table
from compress.export.graphs import Graph, GraphPlan
from compress.export.lint import lint
from compress.export.onnx_export import ExportOptions, export_onnx, save_graph
from compress.export.request import RequestGraph
from compress.export.tensorrt.operators import DOMAIN, OPERATORS
from compress.export.tensorrt.plugin_request import PluginRequest
from kernels import _runtime
from kernels.plugin_kernels import Integers, ScorePlugin
from kernels.score_topk import score_topk_twin

needs_triton = pytest.mark.skipif(not _runtime.AVAILABLE, reason="Triton is not installed")
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="launches are interpreted on CPU tensors")
MODELS: dict[str, dict[str, Any]] = {
    "released padding": {},
    "masked padding": {"padding": "masked", "positions": "learned"},
    "padding with positions": {"positions": "released"},
    "guided, geodesic": {"guidance_scale": 1.5, "condition_dropout": 0.3, "geodesic": True},
    "mlp": {"denoiser": "mlp"},
}


def request(model: Any, batch: int, longest: int, steps: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    lengths = torch.randint(1, longest + 1, (batch,), generator=generator)
    histories = torch.randint(1, model.config.items + 1, (batch, longest), generator=generator)
    return histories, lengths, torch.randn(steps + 1, batch, model.config.width, generator=generator)


def check_nodes(path: Path, names: set[str]) -> None:
    """The file has these own nodes with all that TensorRT's parser looks for, and a function for each."""
    found = onnx.load(str(path))
    nodes = {node.op_type: node for node in found.graph.node if node.domain == DOMAIN}
    assert set(nodes) == names
    for name, node in nodes.items():
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        operator = OPERATORS[name]
        assert (attributes["plugin_namespace"], attributes["plugin_version"], attributes["aot"]) == (b"adrec", b"1", 1)
        assert set(operator.attributes) <= set(attributes)
        assert len(node.input) == len(operator.inputs)
        assert len(node.output) == len(operator.outputs)
        assert all(node.output), "an output without a name is one the plugin does not have"
    assert {(each.domain, each.name) for each in found.functions} == {(DOMAIN, name) for name in nodes}


def graphs(model: Any, steps: int, dtype: torch.dtype = torch.float32) -> tuple[Graph, Graph]:
    plan = GraphPlan("request", sampling_table(model.betas, steps), k=5)
    plain, plugged = (kind(model, dtype=dtype) for kind in (RequestGraph, PluginRequest))
    return Graph(plain, plan, model).eval(), Graph(plugged, plan, model).eval()


@needs_triton
@on_cpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("batch", "longest", "steps"), [(1, 1, 1), (2, 9, 3), (19, 4, 2)])
def test_the_kernels_compute_the_request(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, name: str, batch: int, longest: int, steps: int
) -> None:
    def launched(self: Any, name: str, inputs: Sequence[Tensor], attributes: dict[str, Any], outputs: Any) -> Any:
        return run(name, inputs, attributes)

    monkeypatch.setattr(PluginRequest, "_node", launched)
    model = tiny_model(timesteps=32, max_length=9, **MODELS[name])
    plain, plugged = graphs(model, steps)
    given = request(model, batch, longest, steps)
    (items, scores, rows), (their_items, their_scores, their_rows) = plain(*given), plugged(*given)
    torch.testing.assert_close(their_rows, rows, atol=1e-5, rtol=0)
    torch.testing.assert_close(their_scores, scores, atol=1e-5, rtol=0)
    assert torch.equal(their_items, items)


@needs_triton
@on_cpu
def test_half_precision_is_within_its_rounding(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PluginRequest, "_node", lambda self, name, inputs, attributes, _: run(name, inputs, attributes))
    model = tiny_model(timesteps=32, max_length=9)
    plain, plugged = graphs(model, 2, torch.float16)
    given = request(model, 5, 9, 2)
    torch.testing.assert_close(plugged(*given)[2], plain(*given)[2], atol=2e-2, rtol=0)


@needs_triton
@on_cpu
@pytest.mark.parametrize(
    ("batch", "count", "width", "k", "first"),
    [(1, 41, 16, 5, 1), (3, 3001, 24, 20, 1), (17, 50, 16, 7, 3), (2, 6, 8, 20, 1)],
)
def test_scoring_is_exact_with_ties_and_too_few_items(batch: int, count: int, width: int, k: int, first: int) -> None:
    torch.manual_seed(count)
    # Small integers: sums are exact, and equal scores are many.
    rows, table = torch.randint(-2, 3, (batch, width)).float(), torch.randint(-2, 3, (count, width)).float()
    attributes = {"count": count, "width": width, "k": k, "first": first}
    candidates, bounds = run("score_splits", [rows, table], attributes)
    _, items, scores = run("merge_splits", [candidates, bounds], attributes)
    expected_items, expected_scores = score_topk_twin(rows, table, k, first=first)
    assert torch.equal(items, expected_items)
    assert torch.equal(scores, expected_scores)


@pytest.mark.parametrize("count", [2, 1000, 12102, 1_000_001, 10_000_001])
@pytest.mark.parametrize("k", [1, 20, 100, 1024])
def test_the_splits_cover_the_catalogue(count: int, k: int) -> None:
    plugin = ScorePlugin(count, 128, k, 1, torch.float16, torch.float16)
    merged = plugin.merge()
    for batch in (1, 16, 17, 512, 100_000):
        splits, items = plugin.splits(batch, Integers())
        assert splits * items >= count - 1 > (splits - 1) * items
        assert splits <= merged.constants["FAN"]
        assert merged.constants["FAN"] * merged.constants["BEST"] <= 4096 or splits == 1


@pytest.mark.slow
def test_an_exported_file_runs_on_onnxruntime_and_is_the_same(tiny_model: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tiny_model(timesteps=32, max_length=9, **MODELS["guided, geodesic"])
    found = []
    for name, graph in zip(("plain", "plugged"), graphs(model, 2), strict=True):
        path = tmp_path / f"{name}.onnx"
        save_graph(graph, path, 2**31, {"adrec.version.adrec": "0"})
        assert [each for each in lint(path) if each.severity == "error"] == []
        check_nodes(path, set(OPERATORS) if name == "plugged" else set())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 2
        found.append(onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]))
    for batch, longest in ((1, 1), (2, 9), (7, 4)):
        given = [each.numpy() for each in request(model, batch, longest, 2)]
        feeds = dict(zip(("histories", "lengths", "noise"), given, strict=True))
        (items, scores, rows), (their_items, their_scores, their_rows) = (each.run(None, feeds) for each in found)
        np.testing.assert_allclose(their_rows, rows, atol=1e-6)
        np.testing.assert_allclose(their_scores, scores, atol=1e-6)
        np.testing.assert_array_equal(their_items, items)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_scoring_by_the_functions_is_that_of_the_plain_graph(
    shallow_model: Any, tmp_path: Path, precision: str
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = shallow_model(model="sasrec", positions="learned", max_length=9)
    found = []
    for plugins in (False, True):
        out = tmp_path / str(plugins)
        options = ExportOptions(k=5, plugins=plugins, precision=precision)  # type: ignore[arg-type]
        manifest = export_onnx(model, out, options)
        path = out / manifest.graphs[0].file
        check_nodes(path, {"score_splits", "merge_splits"} if plugins else set())
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        histories, lengths, _ = request(model, 6, 7, 0)
        found.append(session.run(None, {"histories": histories.numpy(), "lengths": lengths.numpy()}))
    # On a CPU ONNX Runtime leaves out some of float16's roundings, before the scoring too, and not the same in both.
    tolerance = 0.0 if precision == "fp32" else 2.0**-9
    for plain, plugged in zip(*found, strict=True):
        np.testing.assert_allclose(plugged, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"width": 264, "heads": 3}, "width is 264; the kernels have up to 256"),
        ({"width": 16, "heads": 4}, "heads are 4 wide; the kernel has widths 8 to 256 and heads 8 to 128"),
    ],
)
def test_widths_that_the_kernels_lack_are_refused(tiny_model: Any, overrides: dict[str, int], message: str) -> None:
    with pytest.raises(NotSupportedError, match=message):
        PluginRequest(tiny_model(timesteps=32, **overrides))


def test_what_no_node_computes_is_refused(tiny_model: Any) -> None:
    model = tiny_model(timesteps=32)
    core, rows = PluginRequest(model), torch.zeros(1, 16)
    with pytest.raises(ConfigError, match="k is 1025; allowed with --plugins: 1 to 1024"):
        core.score(rows, 1025)
    with pytest.raises(NotSupportedError, match="--plugins needs the item table inside of the graph"):
        core.score(rows, 5, torch.zeros(41, 16))
    encoded = RequestGraph(model).encode(torch.zeros(1, 2, 16), torch.ones(1, dtype=torch.int64))
    with pytest.raises(NotSupportedError, match="export without --split"):
        core.reverse(encoded, torch.zeros(2, 1, 16), torch.zeros(1, 16), sampling_table(model.betas, 1))
    for options in ({"loop": True}, {"split": True}, {"catalogue": "input"}, {"quantised": ("int8-dynamic",)}):
        with pytest.raises(ConfigError, match="--plugins has whole requests of float graphs"):
            ExportOptions(plugins=True, **options)  # type: ignore[arg-type]
