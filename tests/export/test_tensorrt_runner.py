"""API SHAPE ONLY: session and runner against what TensorRT 10.16, 11.1 and 11.4 accept. Nothing is run here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from strict_tensorrt import VERSIONS, StrictTensorRT
from tensorrt_cases import HERE, save_plan
from tensorrt_standin import standin

from adrec.engines.tensorrt import library, runner
from adrec.engines.tensorrt.library import TensorRTError, collecting_logger
from adrec.engines.tensorrt.plan import read_plan
from adrec.engines.tensorrt.runner import PlanRunner, deserialise, refit
from adrec.engines.tensorrt.session import Session
from adrec.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def session(trt: StrictTensorRT, tmp_path: Path) -> Session:
    content, record = read_plan(save_plan(tmp_path), HERE)
    logger = collecting_logger(trt)
    return Session(deserialise(trt, logger, content, record), record, logger)


def test_a_request_is_bound_and_launched(version: str, tmp_path: Path) -> None:
    trt = standin(version)
    made = session(trt, tmp_path)
    x = torch.zeros(4, 30, 4)
    outputs = made.bind({"x": x}, lambda shape, dtype: torch.zeros(shape, dtype=dtype), 77)
    made.enqueue(77)
    assert {name: (tuple(each.shape), each.dtype) for name, each in outputs.items()} == {
        "items": ((4, 3), torch.int64),
        "scores": ((4, 3), torch.float32),
    }
    calls = [entry for entry in trt.log if entry[0].startswith("IExecutionContext.")]
    assert calls == [
        ("IExecutionContext.set_optimization_profile_async", (1, 77)),
        ("IExecutionContext.set_input_shape", ("x", (4, 30, 4))),
        ("IExecutionContext.set_tensor_address", ("x", x.data_ptr())),
        ("IExecutionContext.infer_shapes", ()),
        ("IExecutionContext.get_tensor_shape", ("items",)),
        ("IExecutionContext.set_tensor_address", ("items", outputs["items"].data_ptr())),
        ("IExecutionContext.get_tensor_shape", ("scores",)),
        ("IExecutionContext.set_tensor_address", ("scores", outputs["scores"].data_ptr())),
        ("IExecutionContext.execute_async_v3", (77,)),
    ]


def test_the_profile_is_set_only_when_it_changes(version: str, tmp_path: Path) -> None:
    trt = standin(version)
    made = session(trt, tmp_path)
    for batch in (2, 3, 1, 1, 8):
        made.bind({"x": torch.zeros(batch, 5, 4)}, lambda shape, dtype: torch.zeros(shape, dtype=dtype), 77)
    assert trt.calls("IExecutionContext.set_optimization_profile_async") == [(1, 77), (0, 77), (1, 77)]


def test_a_request_that_no_profile_covers_never_reaches_tensorrt(version: str, tmp_path: Path) -> None:
    trt = standin(version)
    made = session(trt, tmp_path)
    before = len(trt.log)
    with pytest.raises(ConfigError, match=r"request of batch 4, length 41; the nearest is 'batch=2:4:8"):
        made.bind({"x": torch.zeros(4, 41, 4)}, torch.zeros, 77)  # type: ignore[arg-type]
    assert len(trt.log) == before


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("set_optimization_profile_async", "refused the profile 1"),
        ("set_input_shape", "refused the shape of 'x'"),
        ("set_tensor_address", "refused the address of 'x'"),
    ],
)
def test_what_the_context_refuses_is_an_error(version: str, tmp_path: Path, method: str, message: str) -> None:
    trt = standin(version)
    made = session(trt, tmp_path)
    trt.replies[f"IExecutionContext.{method}"] = lambda context, **values: False
    with pytest.raises(TensorRTError, match=message):
        made.bind({"x": torch.zeros(4, 5, 4)}, lambda shape, dtype: torch.zeros(shape, dtype=dtype), 77)


def test_a_failed_launch_and_missing_shapes_are_errors(version: str, tmp_path: Path) -> None:
    trt = standin(version, IExecutionContext__execute_async_v3=lambda context, stream_handle: False)
    with pytest.raises(TensorRTError, match="refused the launch"):
        session(trt, tmp_path).enqueue(77)
    trt = standin(version, IExecutionContext__infer_shapes=lambda context: ["mask"])
    with pytest.raises(TensorRTError, match="TensorRT misses mask"):
        session(trt, tmp_path).bind({"x": torch.zeros(4, 5, 4)}, torch.zeros, 77)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        ({"Runtime__deserialize_cuda_engine": lambda runtime, serialized_engine: None}, "cannot read the plan"),
        ({"ICudaEngine__num_io_tensors": lambda engine: 2}, "output tensors are .* and its record says"),
        ({"ICudaEngine__num_optimization_profiles": lambda engine: 1}, "has 1 profiles, and its record 2"),
    ],
)
def test_an_engine_that_is_not_its_record_is_refused(
    version: str, tmp_path: Path, replies: dict[str, Any], message: str
) -> None:
    with pytest.raises(TensorRTError, match=message):
        session(standin(version, **replies), tmp_path)


def test_an_engine_of_another_dtype_is_refused(version: str, tmp_path: Path) -> None:
    trt = standin(version)
    trt.replies["ICudaEngine.get_tensor_dtype"] = lambda engine, name: trt.DataType.HALF
    with pytest.raises(TensorRTError, match="tensor 'x' is HALF, and its record: float32"):
        session(trt, tmp_path)


def test_host_code_is_allowed_only_in_version_compatible_plans(version: str, tmp_path: Path) -> None:
    for options in ({}, {"version_compatible": True}):
        trt = standin(version)
        content, record = read_plan(save_plan(tmp_path, options=options), HERE)
        deserialise(trt, collecting_logger(trt), content, record)
        assert trt.calls("Runtime.engine_host_code_allowed=") == ([(True,)] if options else [])


def test_weights_are_exchanged_by_the_parsers_refitter(version: str, tmp_path: Path) -> None:
    trt = standin(version)
    made = session(trt, tmp_path)
    engine = trt.make("ICudaEngine")
    refit(trt, engine, made.logger, Path("small.onnx"))
    assert trt.calls("OnnxParserRefitter.refit_from_file") == [("small.onnx",)]
    assert len(trt.calls("Refitter.refit_cuda_engine")) == 1
    trt.replies["Refitter.get_missing_weights"] = lambda refitter: ["weight"]
    with pytest.raises(TensorRTError, match="lacks the weights weight"):
        refit(trt, engine, made.logger, Path("small.onnx"))
    trt.replies["OnnxParserRefitter.refit_from_file"] = lambda refitter, model: False
    with pytest.raises(TensorRTError, match="do not fit the plan"):
        refit(trt, engine, made.logger, Path("small.onnx"))
    trt.replies["ICudaEngine.refittable"] = lambda engine: False
    with pytest.raises(TensorRTError, match="weights are fixed"):
        refit(trt, engine, made.logger, Path("small.onnx"))


class Streams:
    """What the runner asks of torch.cuda, without a GPU: numbered streams, and a graph that records its capture."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current, self.events = SimpleNamespace(cuda_stream=7, wait_stream=lambda other: None), []
        patch.setattr(torch.cuda, "current_stream", lambda: self.current)
        patch.setattr(torch.cuda, "default_stream", lambda: SimpleNamespace(cuda_stream=0))
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "graph", self.graph)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.events.append("replay")))
        patch.setattr(
            torch.cuda,
            "Stream",
            lambda: SimpleNamespace(
                cuda_stream=9, wait_stream=lambda other: None, synchronize=lambda: self.events.append("wait")
            ),
        )
        patch.setattr(library, "current_device", lambda: torch.device("cpu"))

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        self.events.append("capture")
        yield
        self.events.append("captured")


@pytest.fixture
def loaded(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[StrictTensorRT, PlanRunner, Streams]:
    trt = standin(version)
    monkeypatch.setattr(library, "load", lambda: trt)
    monkeypatch.setattr(library, "this_platform", lambda module: HERE)
    streams = Streams(monkeypatch)
    return trt, PlanRunner(save_plan(tmp_path)), streams


def test_each_stream_has_a_context_of_its_own(loaded: tuple[StrictTensorRT, PlanRunner, Streams]) -> None:
    trt, made, streams = loaded
    for handle in (7, 8, 7, 8):
        streams.current = SimpleNamespace(cuda_stream=handle)
        made({"x": torch.zeros(2, 5, 4)})
    assert len(trt.calls("ICudaEngine.create_execution_context")) == 2
    assert trt.calls("IExecutionContext.execute_async_v3") == [(7,), (8,), (7,), (8,)]


def test_a_graph_is_captured_after_one_plain_run(loaded: tuple[StrictTensorRT, PlanRunner, Streams]) -> None:
    trt, made, streams = loaded
    trt.replies["IExecutionContext.execute_async_v3"] = lambda context, stream_handle: bool(
        streams.events.append(f"launch on {stream_handle}") or True
    )
    captured = made.capture({"x": torch.zeros(2, 5, 4)})
    assert streams.events == ["launch on 9", "wait", "capture", "launch on 9", "captured"]
    found = captured({"x": torch.ones(2, 5, 4)})
    assert streams.events[-1] == "replay"
    assert found is captured.outputs
    assert bool((captured.inputs["x"] == 1).all())
    with pytest.raises(ConfigError, match=r"\[2, 6, 4\]; the graph was captured for torch.float32 \[2, 5, 4\]"):
        captured({"x": torch.ones(2, 6, 4)})


def test_the_second_request_of_a_shape_is_captured_and_the_third_replayed(
    loaded: tuple[StrictTensorRT, PlanRunner, Streams],
) -> None:
    trt, made, streams = loaded

    def launches(batch: int) -> tuple[int, list[str]]:
        before, streams.events[:] = len(trt.calls("IExecutionContext.execute_async_v3")), []
        made.replay({"x": torch.full((batch, 5, 4), float(batch))})
        return len(trt.calls("IExecutionContext.execute_async_v3")) - before, list(streams.events)

    assert launches(2) == (1, [])
    assert launches(3) == (1, [])
    assert launches(2) == (2, ["wait", "capture", "captured", "replay"])
    assert launches(2) == (0, ["replay"])
    assert launches(3) == (2, ["wait", "capture", "captured", "replay"])
    assert len(made.captures) == 2
    made.captures.most = 2
    assert [launches(4)[1] for _ in range(3)] == [[], [], []]
    # What a graph launches is not what a refitted engine holds.
    made.refit(Path("small.onnx"))
    assert launches(2) == (1, [])


def test_what_cannot_be_captured_says_how_to_go_on(loaded: tuple[StrictTensorRT, PlanRunner, Streams]) -> None:
    trt, made, streams = loaded
    trt.replies["IExecutionContext.execute_async_v3"] = lambda context, stream_handle: "capture" not in streams.events
    made.replay({"x": torch.zeros(2, 5, 4)})
    with pytest.raises(TensorRTError, match=r"x \[2, 5, 4\] cannot be captured .* cuda_graphs=False"):
        made.replay({"x": torch.zeros(2, 5, 4)})


def test_tensors_of_a_cpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="inputs are on cpu; the engine was loaded on cuda:1 and reads tensors there"):
        runner.check_devices({"x": torch.zeros(1)}, torch.device("cuda", 1))
