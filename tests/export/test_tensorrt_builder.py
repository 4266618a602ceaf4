"""API SHAPE ONLY: the builder against what TensorRT 10.16, 11.1 and 11.4 accept. Nothing is built here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto
from strict_tensorrt import VERSIONS
from tensorrt_cases import PROFILES, save_graph
from tensorrt_standin import layers, standin

from adrec.engines.tensorrt.library import TensorRTError
from adrec.errors import ConfigError
from compress.export.tensorrt.builder import build
from compress.export.tensorrt.graph import Graph, read_graph
from compress.export.tensorrt.inspection import check_precision, parse_layers
from compress.export.tensorrt.options import BuildOptions

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    return read_graph(save_graph(tmp_path / "small.onnx"))


def test_a_build_asks_for_what_it_should(version: str, graph: Graph) -> None:
    trt = standin(version)
    built = build(trt, graph, PROFILES, BuildOptions(workspace_mib=64))
    assert built.content == b"plan of TensorRT"
    assert built.confirmed
    assert built.layers.counts == {"float32": 2}
    # 1 << STRONGLY_TYPED, whose integer moved; and none of the flags that TensorRT 11 no longer has.
    assert trt.calls("Builder.create_network") == [(2 if version == "10_16" else 1,)]
    assert trt.calls("OnnxParser.parse_from_file") == [(str(graph.path),)]
    assert trt.calls("IBuilderConfig.set_memory_pool_limit") == [(trt.MemoryPoolType.WORKSPACE, 64 << 20)]
    assert trt.calls("IBuilderConfig.profiling_verbosity=") == [(trt.ProfilingVerbosity.DETAILED,)]
    assert trt.calls("IBuilderConfig.clear_flag") == [(trt.BuilderFlag.TF32,)]
    assert trt.calls("IBuilderConfig.set_flag") == []
    assert trt.calls("IOptimizationProfile.set_shape") == [
        ("x", (1, 1, 4), (1, 8, 4), (1, 50, 4)),
        ("x", (2, 1, 4), (4, 8, 4), (8, 40, 4)),
    ]
    assert len(trt.calls("IBuilderConfig.add_optimization_profile")) == 2
    # The formats of a dynamic engine are known for given shapes only.
    assert trt.calls("IExecutionContext.set_input_shape") == [("x", (1, 8, 4))]
    assert len(trt.calls("EngineInspector.execution_context=")) == 1


def test_options_become_flags(version: str, graph: Graph) -> None:
    trt = standin(version)
    options = BuildOptions(
        tf32=True,
        weights="stripped",
        version_compatible=True,
        hardware_compatibility="ampere_plus",
        optimization_level=5,
    )
    build(trt, graph, PROFILES, options)
    names = ("TF32", "VERSION_COMPATIBLE", "REFIT", "STRIP_PLAN")
    assert trt.calls("IBuilderConfig.set_flag") == [(getattr(trt.BuilderFlag, name),) for name in names]
    level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert trt.calls("IBuilderConfig.hardware_compatibility_level=") == [(level,)]
    assert trt.calls("IBuilderConfig.builder_optimization_level=") == [(5,)]
    assert trt.calls("Runtime.engine_host_code_allowed=") == [(True,)]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_the_dtypes_of_a_plan_without_weights_are_read_once_they_are_in(
    version: str, tmp_path: Path, kind: int
) -> None:
    graph = read_graph(save_graph(tmp_path / "small.onnx", kind=kind))
    trt = standin(version)

    def context(engine: Any, **options: Any) -> Any:
        # TensorRT makes none for an engine without weights.
        return trt.make("IExecutionContext") if trt.calls("Refitter.refit_cuda_engine") else None

    trt.replies["ICudaEngine.create_execution_context"] = context
    if kind == TensorProto.FLOAT16:
        # It fell back to float32, which nothing but the formats tells.
        with pytest.raises(TensorRTError, match="no layer in float16, which the matrix products of"):
            build(trt, graph, PROFILES, BuildOptions(weights="stripped"))
    else:
        built = build(trt, graph, PROFILES, BuildOptions(weights="stripped"))
        assert built.confirmed
        assert built.layers.counts == {"float32": 2}
    assert trt.calls("OnnxParserRefitter.refit_from_file") == [(str(graph.path),)]
    assert trt.calls("IExecutionContext.set_input_shape") == [("x", (1, 8, 4))]


def test_own_operators_are_taken_as_plugins_compiled_ahead(version: str, graph: Graph) -> None:
    trt = standin(version)
    build(trt, Graph(**{**vars(graph), "plugins": ("score_splits",)}), PROFILES, BuildOptions())
    flags = trt.NetworkDefinitionCreationFlag
    bits = 1 << flags.STRONGLY_TYPED | 1 << flags.PREFER_AOT_PYTHON_PLUGINS
    assert trt.calls("Builder.create_network") == [(bits,)]
    assert trt.calls("OnnxParser.set_flag") == [(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE,)]


def test_every_parser_error_is_reported(version: str, graph: Graph) -> None:
    operators = iter(["RandomNormal", "QLinearMatMul"])
    trt = standin(
        version,
        OnnxParser__parse_from_file=lambda parser, model: False,
        OnnxParser__num_errors=lambda parser: 2,
        ParserError__node_name=lambda error: "node",
        ParserError__node_operator=lambda error: next(operators),
        ParserError__desc=lambda error: "no importer",
    )
    with pytest.raises(TensorRTError, match=r"node \(RandomNormal\): no importer; node \(QLinearMatMul\): no importer"):
        build(trt, graph, PROFILES, BuildOptions())
    assert trt.calls("OnnxParser.get_error") == [(0,), (1,)]
    assert trt.calls("Builder.build_serialized_network") == []


def test_a_build_that_fails_says_what_tensorrt_said(version: str, graph: Graph) -> None:
    trt = standin(version)

    def fail(builder: Any, network: Any, config: Any) -> None:
        trt.loggers[-1].log(trt.ILogger.Severity.INFO, "chatter")
        trt.loggers[-1].log(trt.ILogger.Severity.ERROR, "out of memory")

    trt.loggers = []
    trt.replies["Builder.build_serialized_network"] = fail
    trt.replies["Builder.__init__"] = lambda builder, logger: trt.loggers.append(logger)
    with pytest.raises(TensorRTError, match=r"built no engine from .*: error: out of memory$"):
        build(trt, graph, PROFILES, BuildOptions())


def test_a_profile_that_tensorrt_refuses_is_an_error(version: str, graph: Graph) -> None:
    def refuse(profile: Any, **shapes: Any) -> None:
        raise ValueError("shape provided for min is inconsistent")

    with pytest.raises(TensorRTError, match="refused the profile 'batch=1:1:1,length=1:8:50' for 'x': shape provided"):
        build(standin(version, IOptimizationProfile__set_shape=refuse), graph, PROFILES, BuildOptions())
    trt = standin(version, IBuilderConfig__add_optimization_profile=lambda config, profile: -1)
    with pytest.raises(TensorRTError, match="refused the profile 'batch=1:1:1,length=1:8:50' for "):
        build(trt, graph, PROFILES, BuildOptions())


def test_profiles_are_checked_before_tensorrt_is_asked(version: str, graph: Graph) -> None:
    trt = standin(version)
    with pytest.raises(ConfigError, match="no --profile was given"):
        build(trt, graph, (), BuildOptions())
    assert trt.log == []


def test_a_timing_cache_is_read_and_written_back(version: str, graph: Graph, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    trt = standin(version)
    build(trt, graph, PROFILES, BuildOptions(), timing_cache=cache)
    assert trt.calls("IBuilderConfig.create_timing_cache") == [(b"",)]
    assert cache.read_bytes() == b"plan of TensorRT"
    trt = standin(version)
    build(trt, graph, PROFILES, BuildOptions(), timing_cache=cache)
    assert trt.calls("IBuilderConfig.create_timing_cache") == [(b"plan of TensorRT",)]
    assert trt.calls("IBuilderConfig.set_timing_cache")[0][1] is False


@pytest.mark.parametrize("damaged", [False, True])
def test_a_refused_timing_cache_is_left_alone(version: str, graph: Graph, tmp_path: Path, damaged: bool) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"of another GPU")
    if damaged:
        trt = standin(version, IBuilderConfig__create_timing_cache=lambda config, serialized_timing_cache: None)
    else:
        trt = standin(version, IBuilderConfig__set_timing_cache=lambda config, cache, ignore_mismatch: False)
    built = build(trt, graph, PROFILES, BuildOptions(), timing_cache=cache)
    assert cache.read_bytes() == b"of another GPU"
    assert any("timing.cache: TensorRT refuses this timing cache" in each for each in built.warnings)


@pytest.mark.parametrize(
    ("kind", "formats", "outcome"),
    [
        (TensorProto.FLOAT, ("Float", "Int64"), True),
        (TensorProto.FLOAT, ("Row major linear FP16 format",), "computes in float16, which small.onnx does not"),
        (TensorProto.FLOAT16, ("Float", "Row major linear FP32"), "no layer in float16, which the matrix products"),
        (TensorProto.FLOAT16, ("Float", "Half"), True),
        (TensorProto.FLOAT16, ("Channel major FP16 format where channel % 8 == 0",), True),
        (TensorProto.FLOAT16, ("Float", "N/A due to dynamic shapes"), False),
        (TensorProto.FLOAT16, ("BF16", "Half"), "computes in bfloat16"),
    ],
)
def test_the_engines_dtypes_are_held_to_the_graphs(
    tmp_path: Path, kind: int, formats: tuple[str, ...], outcome: bool | str
) -> None:
    graph = read_graph(save_graph(tmp_path / "small.onnx", kind=kind))
    found = parse_layers(layers(*formats))
    if isinstance(outcome, str):
        with pytest.raises(TensorRTError, match=outcome):
            check_precision(found, graph)
    else:
        assert check_precision(found, graph) is outcome


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": []}', '{"Layers": ["gemm"]}'])
def test_an_inspector_that_tells_nothing_is_an_error(text: str) -> None:
    with pytest.raises(TensorRTError, match="the engine inspector returned"):
        parse_layers(text)
