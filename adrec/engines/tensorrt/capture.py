"""Requests of fixed shapes as CUDA graphs: one launch from the host instead of one for every kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adrec.engines.tensorrt.library import TensorRTError
from adrec.engines.tensorrt.session import allocate_like
from adrec.errors import ConfigError

if TYPE_CHECKING:
    from adrec.engines.tensorrt.runner import PlanRunner

MOST_CAPTURED = 16


class CapturedPlan:
    """A request of fixed shapes as a CUDA graph, with an execution context and memory of its own.

    A call copies the inputs in, from the GPU or the CPU, replays, and returns the outputs, which the next call
    overwrites. Raises TensorRTError where TensorRT cannot be captured.
    """

    def __init__(self, runner: PlanRunner, inputs: Mapping[str, Tensor]) -> None:
        self.inputs = {name: tensor.to(runner.device, copy=True) for name, tensor in inputs.items()}
        self._session = runner.session()
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.outputs = self._session.bind(self.inputs, allocate_like(self.inputs), stream.cuda_stream)
            # TensorRT sets itself up for new shapes in the first launch, which no graph may hold.
            self._session.enqueue(stream.cuda_stream)
        stream.synchronize()
        try:
            with torch.cuda.graph(self._graph, stream=stream):
                self._session.enqueue(stream.cuda_stream)
        except (RuntimeError, TensorRTError) as error:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.inputs.items())
            raise TensorRTError(
                f"a request of {shapes} cannot be captured as a CUDA graph: {error}; make the engine with"
                " cuda_graphs=False"
            ) from error
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Replay on new values. Raises ConfigError for other shapes or dtypes than those captured."""
        for name, held in self.inputs.items():
            given = inputs.get(name)
            if given is None or given.shape != held.shape or given.dtype != held.dtype:
                found = "missing" if given is None else f"{given.dtype} {list(given.shape)}"
                raise ConfigError(f"input '{name}' is {found}; the graph was captured for {held.dtype} {[*held.shape]}")
            held.copy_(given)
        self._graph.replay()
        return self.outputs


class Captures:
    """The CUDA graphs of one plan, by the shapes of a request.

    Shapes that come once are not worth a graph: the second request of a shape captures it, until ``most`` are held.
    Each holds an execution context, so none is dropped for another: shapes in turn would be captured over and over.
    """

    def __init__(self, capture: Callable[[Mapping[str, Tensor]], CapturedPlan], most: int = MOST_CAPTURED) -> None:
        self._capture, self.most = capture, most
        self._seen: set[tuple[tuple[str, tuple[int, ...]], ...]] = set()
        self._held: dict[tuple[tuple[str, tuple[int, ...]], ...], CapturedPlan] = {}

    def __len__(self) -> int:
        return len(self._held)

    def find(self, inputs: Mapping[str, Tensor]) -> CapturedPlan | None:
        """The graph of these shapes; None where they come for the first time, or ``most`` others are held."""
        shapes = tuple(sorted((name, tuple(tensor.shape)) for name, tensor in inputs.items()))
        if shapes in self._seen and shapes not in self._held and len(self._held) < self.most:
            self._held[shapes] = self._capture(inputs)
        self._seen.add(shapes)
        return self._held.get(shapes)

    def clear(self) -> None:
        """Forget all graphs: what they launch may no longer be what the engine holds."""
        self._seen.clear()
        self._held.clear()
