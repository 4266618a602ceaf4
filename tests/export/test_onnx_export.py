"""Exported files run by ONNX Runtime: the numbers of `cached`, named sizes, metadata, and nothing half-written."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adrec.data.jagged import Jagged
from adrec.engines import CachedEngine
from adrec.engines.exported import ExportError, GraphFile, Manifest, check_graph, load_manifest
from adrec.errors import ConfigError, NotSupportedError
from adrec.models.base import SequenceModel
from compress.export.folder import export_folder
from compress.export.onnx_export import ExportOptions, export_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ITEMS, WIDTH, TOLERANCE = 40, 16, 1e-5
LENGTHS = [1, 2, 3, 7, 50, 49, 9]
ModelFactory = Callable[..., SequenceModel]


def histories_of(lengths: list[int], seed: int = 0) -> Jagged:
    generator = torch.Generator().manual_seed(seed)
    return Jagged.from_lists(torch.randint(1, ITEMS + 1, (length,), generator=generator).tolist() for length in lengths)


@dataclass
class Exported:
    """A model with the folder it was exported to."""

    model: SequenceModel
    folder: Path
    manifest: Manifest

    @property
    def engine(self) -> CachedEngine:
        return CachedEngine(self.model)

    def graph(self, name: str) -> GraphFile:
        return next(graph for graph in self.manifest.graphs if graph.file == name)

    def run(self, name: str, **inputs: Any) -> dict[str, torch.Tensor]:
        session = onnxruntime.InferenceSession(str(self.folder / name), providers=["CPUExecutionProvider"])
        outputs = [output.name for output in session.get_outputs()]
        given = {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        return {key: torch.from_numpy(value) for key, value in zip(outputs, session.run(None, given), strict=True)}

    def request(self, name: str, histories: Jagged, width: int, steps: int, **more: Any) -> dict[str, torch.Tensor]:
        noise = torch.randn(steps + 1, len(histories), WIDTH, generator=torch.Generator().manual_seed(steps))
        return self.run(name, histories=histories.padded(width), lengths=histories.lengths, noise=noise, **more)

    def loop(self, precision: str, steps: int) -> dict[str, torch.Tensor]:
        """The looped request for histories of `LENGTHS`."""
        table = self.engine.table(steps)
        assert table is not None
        columns = torch.stack([table.from_x0, table.from_xt, table.sigma], 1)
        return self.request(
            f"request-{precision}-loop.onnx", histories_of(LENGTHS), 50, steps, times=table.time, coefficients=columns
        )

    def expected(self, histories: Jagged, steps: int) -> torch.Tensor:
        noise = torch.randn(steps + 1, len(histories), WIDTH, generator=torch.Generator().manual_seed(steps))
        return self.engine.represent(histories, steps, noise=noise)

    def check(self, found: dict[str, torch.Tensor], rows: torch.Tensor) -> None:
        best = self.engine.top_k(rows, found["items"].shape[1])
        torch.testing.assert_close(found["rows"], rows, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(found["scores"], best.scores, rtol=0, atol=TOLERANCE)
        assert torch.equal(found["items"], best.items)


def export(folder: Path, model: SequenceModel, **options: Any) -> Exported:
    manifest = export_onnx(model, folder, ExportOptions(**options))
    return Exported(model, folder, manifest)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelFactory) -> Exported:
    """The paper's form: three unrolled steps, the loop, and the three quantised variants."""
    return export(
        tmp_path_factory.mktemp("plain") / "export",
        tiny_model(lambda_uncertainty=1.0),
        steps=(3,),
        loop=True,
        k=10,
        quantised=("int8-dynamic", "int8-qdq", "fp8-qdq"),
        calibration=histories_of(LENGTHS * 4, seed=9),
    )


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelFactory) -> Exported:
    """Everything that the first has not: masked, learned positions, guided, geodesic, table an input, in three."""
    model = tiny_model(
        padding="masked", positions="learned", geodesic=True, condition_dropout=0.3, guidance_scale=2.0,
        lambda_uncertainty=1.0, encoder_blocks=1,
    )  # fmt: skip
    return export(tmp_path_factory.mktemp("split") / "export", model, steps=(2,), split=True, catalogue="input")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelFactory) -> Exported:
    """float16, the MLP denoiser, and weights in a file of their own."""
    model = tiny_model(denoiser="mlp", positions="released", lambda_uncertainty=1.0)
    return export(tmp_path_factory.mktemp("half") / "export", model, precision="fp16", inline_limit=1000)


@pytest.fixture(scope="module")
def sasrec(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelFactory) -> Exported:
    return export(tmp_path_factory.mktemp("sasrec") / "export", tiny_model(model="sasrec", positions="learned"))


@pytest.mark.parametrize("batch", [1, 2, 33, 512])
def test_unrolled_steps_equal_cached_at_every_batch_size(plain: Exported, batch: int) -> None:
    histories = histories_of((LENGTHS * (batch // len(LENGTHS) + 1))[:batch])
    found = plain.request("request-fp32-s3.onnx", histories, int(histories.lengths.max()), 3)
    plain.check(found, plain.expected(histories, 3))


@pytest.mark.parametrize("length", range(1, 51))
def test_every_history_length_equals_cached(plain: Exported, length: int) -> None:
    histories = histories_of([length], seed=length)
    plain.check(plain.request("request-fp32-s3.onnx", histories, length, 3), plain.expected(histories, 3))


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelFactory) -> Exported:
    """The loop without padding, whose keys and values are views of one tensor."""
    model = tiny_model(padding="masked", positions="learned", encoder_blocks=1)
    return export(
        tmp_path_factory.mktemp("masked") / "export",
        model,
        steps=(),
        loop=True,
        quantised=("int8-dynamic", "int8-qdq"),
        calibration=histories_of(LENGTHS * 4, seed=9),
    )


@pytest.mark.parametrize("steps", [1, 4, 32])
@pytest.mark.parametrize("padding", ["plain", "masked"])
def test_the_loop_runs_any_number_of_steps(padding: str, steps: int, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(padding)
    exported.check(exported.loop("fp32", steps), exported.expected(histories_of(LENGTHS), steps))


@pytest.mark.parametrize("steps", [1, 4, 32])
@pytest.mark.parametrize("kind", ["int8-dynamic", "int8-qdq"])
@pytest.mark.parametrize("padding", ["plain", "masked"])
def test_a_loop_in_eight_bits_stays_near(padding: str, kind: str, steps: int, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(padding)
    wanted = exported.expected(histories_of(LENGTHS), steps)
    found = exported.loop(kind, steps)
    assert 1e-4 < float((found["rows"] - wanted).norm() / wanted.norm()) < 0.08
    # Ten lists of forty items: most are the model's.
    best = exported.engine.top_k(wanted, found["items"].shape[1]).items
    assert float((found["items"][:, :, None] == best[:, None]).any(-1).float().mean()) > 0.9


def test_the_manifest_holds_what_the_loop_is_given(plain: Exported) -> None:
    table = plain.engine.table(3)
    assert table is not None
    kept = plain.manifest.step_tables[3]
    assert kept.times == tuple(table.time.tolist())
    np.testing.assert_allclose(np.array(kept.coefficients)[:, 0], table.from_x0.numpy(), rtol=1e-6)


@pytest.mark.parametrize(("kind", "bound"), [("int8-dynamic", 0.08), ("int8-qdq", 0.1), ("fp8-qdq", 0.2)])
def test_quantised_variants_stay_near(plain: Exported, kind: str, bound: float) -> None:
    histories = histories_of(LENGTHS)
    rows = plain.request(f"request-{kind}-s3.onnx", histories, 50, 3)["rows"]
    wanted = plain.expected(histories, 3)
    error = (rows - wanted).norm() / wanted.norm()
    assert 0.0 < float(error) < bound


def test_quantised_operators_are_those_of_their_runtime(plain: Exported) -> None:
    operators = {
        kind: Counter(node.op_type for node in onnx.load(plain.folder / f"request-{kind}-s3.onnx").graph.node)
        for kind in ("int8-dynamic", "int8-qdq", "fp8-qdq")
    }
    # Products over items and the score, whose candidates are ranked again; none is dequantised to be read as floats.
    assert operators["int8-dynamic"]["MatMulInteger"] == 13 + 1
    assert operators["int8-dynamic"]["TopK"] == 3
    assert {"Gemm", "DequantizeLinear"}.isdisjoint(operators["int8-dynamic"])
    for kind in ("int8-qdq", "fp8-qdq"):
        assert "MatMulInteger" not in operators[kind]
        # Of each product over items the weights and what they multiply.
        assert operators[kind]["DequantizeLinear"] == 2 * operators[kind]["QuantizeLinear"] == 2 * 13


def test_dynamic_weights_use_eight_bits_and_no_sum_saturates(plain: Exported) -> None:
    graph = onnx.load(plain.folder / "request-int8-dynamic-s3.onnx").graph
    weights = {node.input[1] for node in graph.node if node.op_type == "MatMulInteger"}
    stored = [onnx.numpy_helper.to_array(each) for each in graph.initializer if each.name in weights]
    assert len(stored) == len(weights) == 13 + 1
    assert {each.dtype for each in stored} == {np.dtype(np.uint8)}
    assert all(int(each.min()) == 0 and int(each.max()) == 255 for each in stored)


def test_the_parts_equal_cached_with_the_table_as_an_input(split: Exported) -> None:
    histories = histories_of(LENGTHS)
    table = split.model.table.detach()
    noise = torch.randn(3, len(LENGTHS), WIDTH, generator=torch.Generator().manual_seed(2))
    padded = histories.padded(50)
    encoded = split.run("encode-fp32.onnx", histories=padded, lengths=histories.lengths, table=table)
    rows = split.run("denoise-fp32-s2.onnx", **encoded, noise=noise)["rows"]
    found = split.run("score-fp32.onnx", rows=rows, table=table)
    split.check({**found, "rows": rows}, split.expected(histories, 2))
    whole = split.request("request-fp32-s2.onnx", histories, 50, 2, table=table)
    split.check(whole, split.expected(histories, 2))


def test_a_table_given_at_run_time_may_have_other_items(split: Exported) -> None:
    table = torch.cat([split.model.table.detach(), 100.0 * torch.ones(1, WIDTH)])
    rows = torch.ones(2, WIDTH)
    items = split.run("score-fp32.onnx", rows=rows, table=table)["items"]
    assert items[:, 0].tolist() == [ITEMS + 1] * 2


def test_float16_lists_are_those_of_float32(half: Exported) -> None:
    histories = histories_of(LENGTHS)
    found = half.request("request-fp16-s1.onnx", histories, 50, 1)
    wanted = half.expected(histories, 1)
    torch.testing.assert_close(found["rows"], wanted, rtol=0, atol=0.02)
    best = half.engine.top_k(wanted, 20)
    assert float((found["items"][:, :, None] == best.items[:, None]).any(-1).float().mean()) > 0.97
    weights = [each for each in onnx.load(half.folder / "request-fp16-s1.onnx").graph.initializer if len(each.dims) > 1]
    assert len(weights) > 10
    assert {each.data_type for each in weights} == {onnx.TensorProto.FLOAT16}


def test_large_weights_go_to_a_file_of_their_own(half: Exported) -> None:
    graph = half.manifest.graphs[0]
    assert graph.data == "request-fp16-s1.data"
    assert (half.folder / graph.file).stat().st_size < (half.folder / graph.data).stat().st_size
    check_graph(half.folder, graph)


def test_sasrec_equals_cached(sasrec: Exported) -> None:
    histories = histories_of(LENGTHS)
    found = sasrec.run("request-fp32.onnx", histories=histories.padded(50), lengths=histories.lengths)
    sasrec.check(found, sasrec.engine.represent(histories))


def test_the_file_says_what_it_is(plain: Exported) -> None:
    model = onnx.load(plain.folder / "request-fp32-s3.onnx")
    facts = {each.key: each.value for each in model.metadata_props}
    expected = {
        "kind": "request", "model": "adrec", "precision": "fp32", "steps": "3", "trained_steps": "32", "k": "10",
        "schedule": "trunc_lin", "padding": "released", "model_fingerprint": plain.manifest.model_fingerprint,
    }  # fmt: skip
    assert expected.items() <= {key.removeprefix("adrec."): value for key, value in facts.items()}.items()
    assert {each.version for each in model.opset_import if each.domain == ""} == {20}
    sizes = {
        each.name: [size.dim_param or size.dim_value for size in each.type.tensor_type.shape.dim]
        for each in (*model.graph.input, *model.graph.output)
    }
    assert sizes == {
        "histories": ["batch", "length"], "lengths": ["batch"], "noise": [4, "batch", WIDTH],
        "items": ["batch", 10], "scores": ["batch", 10], "rows": ["batch", WIDTH],
    }  # fmt: skip


def test_no_file_names_a_path_of_this_machine(plain: Exported) -> None:
    for graph in plain.manifest.graphs:
        content = (plain.folder / graph.file).read_bytes()
        for trace in (b"stack_trace", b"site-packages", str(Path.cwd()).encode(), b".py"):
            assert trace not in content, f"{graph.file}: {trace!r}"


def test_weights_keep_the_names_of_the_model(plain: Exported) -> None:
    names = {each.name for each in onnx.load(plain.folder / "request-fp32-s3.onnx").graph.initializer}
    for name in (
        "item_embedding.weight",
        "encoder.blocks.1.attention.qkv.weight",
        "denoiser.blocks.0.feed_forward.up.bias",
    ):
        assert f"core.model.{name}" in names


def test_the_item_table_is_stored_once(plain: Exported) -> None:
    """Looked up and multiplied as it lies; constant folding would store a transposed copy."""
    shapes = Counter(tuple(each.dims) for each in onnx.load(plain.folder / "request-fp32-s3.onnx").graph.initializer)
    assert shapes[ITEMS + 1, WIDTH] == 1
    assert shapes[WIDTH, ITEMS + 1] == 0


def test_a_folder_is_written_whole_or_not_at_all(
    tmp_path: Path, tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise ExportError("the disk is full")

    monkeypatch.setattr("compress.export.onnx_export.save_graph", fails)
    with pytest.raises(ExportError, match="the disk is full"):
        export(tmp_path / "export", tiny_model())
    assert list(tmp_path.iterdir()) == []


def test_bad_requests_are_refused_before_anything_is_traced(tmp_path: Path, tiny_model: ModelFactory) -> None:
    model, out = tiny_model(), tmp_path / "export"
    with pytest.raises(ConfigError, match="steps is 33; allowed: 1 to 32"):
        export(out, model, steps=(33,))
    with pytest.raises(ConfigError, match="k is 41; allowed: 1 to 40, the size of the catalogue"):
        export(out, model, k=41)
    with pytest.raises(ConfigError, match="a 'sasrec' model has no reverse steps"):
        export(out, tiny_model(model="sasrec"), steps=(4,))
    with pytest.raises(ConfigError, match="dynamic int8 is for CPUs, which compute the rest in float32; drop one"):
        export(out, model, precision="fp16", quantised=("int8-dynamic",))
    with pytest.raises(ConfigError, match="int8-qdq needs histories to calibrate with; name the data with --data"):
        export(out, model, quantised=("int8-qdq",))
    with pytest.raises(ConfigError, match=r"--table is outside, .* add --split"):
        export(out, model, catalogue="outside")
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"holds 'notes\.txt', which no export wrote"):
        export(out, model)
    assert [each.name for each in out.iterdir()] == ["notes.txt"]


def test_what_only_tensorrt_cannot_rank_is_still_exported_for_onnxruntime(
    tmp_path: Path, shallow_model: ModelFactory
) -> None:
    made = export(tmp_path / "export", shallow_model(model="sasrec", items=4000), k=3841)
    facts = {each.key: each.value for each in onnx.load(made.folder / "request-fp32.onnx").metadata_props}
    assert facts["adrec.runtime"] == "onnxruntime"
    histories = histories_of(LENGTHS)
    found = made.run("request-fp32.onnx", histories=histories.padded(50), lengths=histories.lengths)
    assert found["items"].shape == (len(LENGTHS), 3841)
    torch.testing.assert_close(found["scores"], made.engine.recommend(histories, 3841).scores, rtol=0, atol=TOLERANCE)


def test_limits_are_checked_for_the_sizes_of_requests(tmp_path: Path, shallow_model: Any, monkeypatch: Any) -> None:
    model = shallow_model(model="sasrec")
    made = export(tmp_path / "small", model, sizes={"batch": (1, 2**25), "length": (1, 50)})
    # Whatever the sizes, the graph is the same.
    file = (made.folder / "request-fp32.onnx").read_bytes()
    monkeypatch.setattr("compress.export.onnx_export.save_graph", lambda _, to, *more: to.write_bytes(file) and None)
    with pytest.raises(ExportError, match=r"top-k, TopK .*: ranks up to 2751463424 numbers at once; TensorRT allows"):
        export(tmp_path / "large", model, sizes={"batch": (1, 2**26), "length": (1, 50)})
    with pytest.raises(ExportError, match=r"profile, dimension 'length': no profile covers it"):
        export(tmp_path / "short", model, sizes={"batch": (1, 2)})


def test_what_a_killed_export_left_is_cleared(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed, replaced = tmp_path / ".out.abc.partial", tmp_path / ".out.abc.replaced"
    other = tmp_path / ".outer.abc.partial"
    for folder in (killed, other, replaced):
        folder.mkdir()
    (killed / "request.onnx").write_text("half of it")
    (replaced / "export.json").write_text('{"graphs": []}')
    # Killed while the new folder took the old one's place: the old one is put back, and is not replaced unasked.
    with pytest.raises(ConfigError, match="already holds an export; pass --overwrite"), export_folder(out):
        pass
    assert {each.name for each in tmp_path.iterdir()} == {"out", other.name}
    with export_folder(out, overwrite=True) as staged:
        (staged / "export.json").write_text("{}")
        # An export that is under way is let be.
        with export_folder(tmp_path / "out", overwrite=True) as second:
            (second / "export.json").write_text('{"graphs": []}')
        assert staged.is_dir()
    assert (out / "export.json").read_text() == "{}"
    assert {each.name for each in tmp_path.iterdir()} == {"out", other.name}


def test_missing_packages_say_what_to_install(
    tmp_path: Path, tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(NotSupportedError, match=r"needs onnxscript: pip install 'adrec\[onnx\]'"):
        export(tmp_path / "export", tiny_model())


def test_a_changed_or_missing_file_is_noticed(plain: Exported, half: Exported, tmp_path: Path) -> None:
    graph = half.manifest.graphs[0]
    for name in (graph.file, "export.json"):
        (tmp_path / name).write_bytes((half.folder / name).read_bytes())
    with pytest.raises(ExportError, match=r"request-fp16-s1\.data: the file of the weights is missing"):
        check_graph(tmp_path, graph)
    (tmp_path / str(graph.data)).write_bytes(b"other weights")
    with pytest.raises(ExportError, match="was changed or cut after it was exported"):
        check_graph(tmp_path, graph)
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(ExportError, match="the manifest cannot be read"):
        load_manifest(tmp_path)
    with pytest.raises(ExportError, match=r"holds no export\.json"):
        load_manifest(tmp_path / "nowhere")
