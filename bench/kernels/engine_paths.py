"""Ways to serve batches of one shape: engines as they are, compiled, exported, and replayed from a CUDA graph.

The compiled and captured forms of `cached` get their noise as a tensor drawn beforehand, for free: drawing it checks
its keys on the host, which no graph may.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adrec.data.jagged import Jagged
from adrec.engines import ENGINES, CachedEngine, Engine, ReferenceEngine, make_engine
from adrec.engines.base import TopK, history_keys
from adrec.engines.cached import CachedState, PrefixCache
from adrec.engines.graphs import CapturedRequest
from adrec.engines.triton import TritonEngine
from adrec.errors import ConfigError
from adrec.models.base import SequenceModel
from adrec.noise import ExplicitNoise, PhiloxNoise
from bench.kernels.measure import capture
from bench.kernels.records import BASELINE, COMPILED
from bench.kernels.reference_paths import CompiledReferenceEngine, OnnxReferenceEngine
from bench.kernels.selection import pick_all

GRAPH, ONNX = "-graph", "-onnx"
PATHS = (
    *("triton", "triton-graph", "triton-bf16", "triton-bf16-graph"),
    *("reference", "cached", "cached-compiled", "cached-graph", "cached-compiled-graph"),
    *("reference-compiled", "sasrec-reference", "sasrec-cached"),
)
KNOWN = tuple(dict.fromkeys((*PATHS, *ENGINES, "reference-onnx", *(f"{BASELINE}{name}" for name in ENGINES))))
"""Every path that can be named."""
GIVEN, DRAWN = "given", "drawn"
# No graphs of the compiler's own: it makes none of a step that writes to its cache, and `-graph` captures all steps.
# On a CPU tuning chooses the library's products after minutes of trying: one set of shapes for every group of lengths.
COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    "cuda": {"mode": "max-autotune-no-cudagraphs", "dynamic": False},
    "cpu": {"dynamic": False},
}


@dataclass(frozen=True)
class Request:
    """One batch on the host, to be answered with the best k items after ``steps`` reverse steps (None: SASRec+)."""

    histories: Jagged
    steps: int | None
    k: int
    seed: int = 0


class CompiledCachedEngine(CachedEngine):
    """`CachedEngine` whose encoder, reverse step and scoring run under `torch.compile`."""

    def __init__(self, model: SequenceModel) -> None:
        # Compiling changes a module in place; the item table, by far the largest part, stays shared.
        table = model.table
        super().__init__(copy.deepcopy(model, {id(table): table}))
        options = COMPILE_OPTIONS[self.device.type]
        self.model.encoder.compile(**options)
        self._step = torch.compile(PrefixCache.step, **options)
        # Unwrapped, because the compiler cannot slice a parameter in inference mode.
        score = partial(inspect.unwrap(CachedEngine.top_k), self)
        self.top_k = torch.no_grad()(torch.compile(score, **options))  # type: ignore[method-assign]

    def encode(self, histories: Jagged) -> CachedState:
        state = super().encode(histories)
        for cache in state.caches:
            cache.step = partial(self._step, cache)  # type: ignore[method-assign]
        return state


class GraphedSampling:
    """`cached` for requests of one shape: encoding as it is, then reverse steps and scoring replayed from a CUDA graph.

    request: the first one, which is captured.
    """

    @torch.no_grad()
    def __init__(self, engine: CachedEngine, request: Request) -> None:
        self.engine, self._noise = engine, drawn_noise(engine, request)
        self._state = engine.encode(request.histories)
        self._graph, self._found = capture(
            lambda: sample_and_score(engine, self._state, request, self._noise), engine.device
        )

    @torch.no_grad()
    def __call__(self, request: Request, noise: ExplicitNoise) -> TopK:
        fresh = self.engine.encode(request.histories)
        for kept, new in zip(state_tensors(self._state), state_tensors(fresh), strict=True):
            kept.copy_(new)
        self._noise.values.copy_(noise.values)
        self._graph.replay()
        assert isinstance(self._found, TopK)
        return self._found


def state_tensors(value: object) -> Iterator[Tensor]:
    """Every tensor of an encoded state, in a fixed order; modules and layouts are not part of it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from state_tensors(each)
    elif isinstance(value, PrefixCache):
        yield from state_tensors(value.caches)
    elif is_dataclass(value):
        for field in fields(value):
            yield from state_tensors(getattr(value, field.name))


def sample_and_score(engine: CachedEngine, state: CachedState, request: Request, noise: ExplicitNoise) -> TopK:
    """Everything after encoding, with given noise."""
    return engine.top_k(engine.sample(state, engine.table(request.steps), noise), request.k)


@torch.no_grad()
def drawn_noise(engine: Engine, request: Request) -> ExplicitNoise:
    """The noise that the engine would draw for a request, drawn once."""
    table = engine.table(request.steps)
    assert table is not None
    keys = history_keys(request.histories).to(engine.device)
    source = PhiloxNoise(request.seed, keys, engine.model.config.width)
    return ExplicitNoise(torch.stack([source(draw) for draw in range(table.steps + 1)]))


def check_paths(text: str, option: str = "--paths") -> list[str]:
    """Parse comma-separated paths; raises ConfigError for an unknown one, naming the nearest and all."""
    return pick_all(text, KNOWN, option)


def default_paths(device: torch.device) -> tuple[str, ...]:
    """`PATHS`; elsewhere than on a CUDA device, without kernels and graphs, which need one."""
    if device.type == "cuda":
        return PATHS
    return tuple(path for path in PATHS if not path.startswith(TritonEngine.name) and not path.endswith(GRAPH))


def paths_here(engines: Sequence[str], device: torch.device) -> tuple[str, ...]:
    """Engines with what they are measured against on a device: compiled, exported, as CUDA graphs, and SASRec+."""
    rivals = [f"{ReferenceEngine.name}{COMPILED}", f"{CachedEngine.name}{COMPILED}"]
    rivals += [f"{ReferenceEngine.name}{ONNX}"] if OnnxReferenceEngine.runs_on(device) else []
    rivals += [path for path in PATHS if path.endswith(GRAPH)] if device.type == "cuda" else []
    return *engines, *rivals, *(f"{BASELINE}{name}" for name in engines)


def engine_name(path: str) -> str:
    """The engine whose arithmetic and precision a path has."""
    name = path.removeprefix(BASELINE).removesuffix(GRAPH)
    return name.removesuffix(COMPILED).removesuffix(ONNX)


def path_engine(path: str, model: SequenceModel) -> Engine:
    """The engine that a path runs, without its graph; ``model``: the baseline's for a path of it."""
    name = path.removeprefix(BASELINE).removesuffix(GRAPH)
    if name == f"{CachedEngine.name}{COMPILED}":
        return CompiledCachedEngine(model)
    if name == f"{ReferenceEngine.name}{COMPILED}":
        return CompiledReferenceEngine(model, COMPILE_OPTIONS[model.device.type])
    return OnnxReferenceEngine(model) if name == f"{ReferenceEngine.name}{ONNX}" else make_engine(name, model)


def path_calls(path: str, engine: Engine, requests: Sequence[Request]) -> tuple[list[Callable[[], Tensor]], str]:
    """A call a request (all of one shape) that returns its items `[B, k]`, and where their noise comes from."""
    if path.endswith(GRAPH):
        if engine.device.type != "cuda":
            raise ConfigError(f"path {path} needs a CUDA device; the model is on {engine.device}")
        if isinstance(engine, TritonEngine):
            captured = _captured_request(engine, requests[0])
            return [partial(_captured, captured, each) for each in requests], DRAWN
        assert isinstance(engine, CachedEngine)
        graphed = GraphedSampling(engine, requests[0])
        noises = [drawn_noise(engine, each) for each in requests]
        return [partial(_graphed, graphed, each, noise) for each, noise in zip(requests, noises, strict=True)], GIVEN
    if isinstance(engine, CompiledCachedEngine):
        noises = [drawn_noise(engine, each) for each in requests]
        return [partial(_given, engine, each, noise) for each, noise in zip(requests, noises, strict=True)], GIVEN
    return [partial(_drawn, engine, each) for each in requests], DRAWN


def _captured_request(engine: TritonEngine, request: Request) -> CapturedRequest:
    tokens = request.histories.values.numel()
    return CapturedRequest(engine, len(request.histories), tokens, request.k, request.steps)


def _captured(captured: CapturedRequest, request: Request) -> Tensor:
    return captured(request.histories, seed=request.seed).items


def _graphed(graphed: GraphedSampling, request: Request, noise: ExplicitNoise) -> Tensor:
    return graphed(request, noise).items


def _drawn(engine: Engine, request: Request) -> Tensor:
    return engine.recommend(request.histories, request.k, steps=request.steps, seed=request.seed).items


@torch.no_grad()
def _given(engine: CachedEngine, request: Request, noise: ExplicitNoise) -> Tensor:
    return sample_and_score(engine, engine.encode(request.histories), request, noise).items
