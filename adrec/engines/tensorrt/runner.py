"""Run a TensorRT plan on torch tensors: streams, contexts, and the weights of a plan that holds none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adrec.engines.tensorrt import library
from adrec.engines.tensorrt.capture import CapturedPlan, Captures
from adrec.engines.tensorrt.library import TensorRTError, last_messages, start
from adrec.engines.tensorrt.plan import PlanRecord, digest, read_plan
from adrec.engines.tensorrt.session import Session, allocate_like, check_tensors
from adrec.errors import ConfigError


class PlanRunner:
    """A plan on the current GPU. Call it with tensors by input name; it returns tensors by output name.

    The record beside the plan is checked before TensorRT sees the plan (`read_plan`); deserialising runs what the plan
    holds, so load plans you trust. Each CUDA stream has its own execution context; a call from the default stream runs
    on a stream of the runner, between two waits. Not thread-safe: give each thread its own stream.
    """

    def __init__(self, plan: Path) -> None:
        self.trt = library.load()
        self.plan = plan
        content, self.record = read_plan(plan, library.this_platform(self.trt))
        self.device = library.current_device()
        self.logger = library.collecting_logger(self.trt)
        self.engine = deserialise(self.trt, self.logger, content, self.record)
        self._sessions: dict[int, Session] = {}
        self.captures = Captures(lambda inputs: CapturedPlan(self, inputs))
        self._stream: torch.cuda.Stream | None = None
        if self.record.key.options.get("weights") == "stripped":
            self.refit(self._own_graph())

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one request. inputs: contiguous CUDA tensors of the plan's dtypes. Raises ConfigError, TensorRTError."""
        check_devices(inputs, self.device)
        caller = torch.cuda.current_stream()
        stream = caller if caller != torch.cuda.default_stream() else self.stream
        if stream == caller:
            return self._run(inputs, stream)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            outputs = self._run(inputs, stream)
        caller.wait_stream(stream)
        # The allocator must not hand out memory of either side while the other may still use it.
        for tensor in inputs.values():
            tensor.record_stream(stream)
        for tensor in outputs.values():
            tensor.record_stream(caller)
        return outputs

    @property
    def stream(self) -> torch.cuda.Stream:
        """The runner's own stream."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        return self._stream

    def refit(self, graph: Path) -> None:
        """Exchange the weights for those of an ONNX file with the same graph; not while a request runs. See `refit`."""
        refit(self.trt, self.engine, self.logger, graph)
        self.captures.clear()

    def _own_graph(self) -> Path:
        """The ONNX file that a stripped plan was built from: others' weights would pass unseen."""
        for name, known in self.record.graph_files.items():
            file = self.plan.with_name(name)
            if not file.is_file():
                raise TensorRTError(f"{file} is missing: the plan holds no weights and reads them from it")
            if digest(file) != known:
                raise TensorRTError(f"{file} is not the file that the plan was built from; export both again")
        return self.plan.with_name(next(iter(self.record.graph_files)))

    def session(self) -> Session:
        """A new execution context of the engine."""
        return Session(self.engine, self.record, self.logger)

    def capture(self, inputs: Mapping[str, Tensor]) -> CapturedPlan:
        """Capture requests of these shapes as a CUDA graph; see `CapturedPlan`."""
        check_devices(inputs, self.device)
        return CapturedPlan(self, inputs)

    def replay(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one request as a CUDA graph where its shapes came before, plainly else; see `Captures`.

        inputs: as for a call, but also on the CPU. The next `replay` of these shapes overwrites the outputs.
        """
        captured = self.captures.find(inputs)
        if captured is not None:
            return captured(inputs)
        return self({name: tensor.to(self.device) for name, tensor in inputs.items()})

    def _run(self, inputs: Mapping[str, Tensor], stream: torch.cuda.Stream) -> dict[str, Tensor]:
        handle = stream.cuda_stream
        if handle not in self._sessions:
            self._sessions[handle] = self.session()
        session = self._sessions[handle]
        outputs = session.bind(inputs, allocate_like(inputs), handle)
        session.enqueue(handle)
        return outputs


def deserialise(trt: ModuleType, logger: Any, content: bytes, record: PlanRecord) -> Any:
    """The engine of a checked plan. Raises TensorRTError where TensorRT refuses it or its record says otherwise."""
    runtime = start(trt.Runtime, logger)
    if record.key.options.get("version_compatible"):
        # Such plans may carry a runtime of their own as host code.
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise TensorRTError(f"TensorRT cannot read the plan: {last_messages(logger)}")
    check_tensors(trt, engine, record)
    if engine.num_optimization_profiles != max(1, len(record.key.profiles)):
        raise TensorRTError(
            f"the engine has {engine.num_optimization_profiles} profiles, and its record {len(record.key.profiles)}"
        )
    return engine


def check_devices(inputs: Mapping[str, Tensor], device: torch.device) -> None:
    """Raise ConfigError unless all tensors are on the engine's device."""
    if others := {tensor.device for tensor in inputs.values()} - {device}:
        found = ", ".join(sorted(map(str, others)))
        raise ConfigError(f"inputs are on {found}; the engine was loaded on {device} and reads tensors there")


def refit(trt: ModuleType, engine: Any, logger: Any, graph: Path) -> None:
    """Fill an engine's weights from an ONNX file: those that a stripped plan left out, or newer ones of the same graph.

    Raises TensorRTError where the file does not have all of them.
    """
    if not engine.refittable:
        raise TensorRTError("the plan's weights are fixed; export it with --weights refit or stripped to exchange them")
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(graph)):
        errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise TensorRTError(f"weights of {graph} do not fit the plan: {errors or last_messages(logger)}")
    if missing := refitter.get_missing_weights():
        raise TensorRTError(f"{graph} lacks the weights {', '.join(missing[:5])} of the plan")
    if not refitter.refit_cuda_engine():
        raise TensorRTError(f"TensorRT did not take the weights of {graph}: {last_messages(logger)}")
