"""Ways to serve one batch again and again: engines as they are, compiled, and replayed from a CUDA graph.

The compiled and captured forms of `cached` get their noise as a tensor drawn beforehand, for free: drawing it checks
its keys on the host, which no graph may.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adrec.data.jagged import Jagged
from adrec.engines import ENGINES, CachedEngine, Engine, make_engine
from adrec.engines.base import TopK, history_keys
from adrec.engines.cached import CachedState, PrefixCache
from adrec.engines.graphs import CapturedRequest
from adrec.engines.triton import TritonEngine
from adrec.errors import ConfigError
from adrec.models.base import SequenceModel
from adrec.noise import ExplicitNoise, PhiloxNoise
from bench.kernels.measure import capture
from bench.kernels.selection import pick_all

COMPILED, GRAPH = "-compiled", "-graph"
PATHS = (
    *("triton", "triton-graph", "triton-bf16", "triton-bf16-graph"),
    *("reference", "cached", "cached-compiled", "cached-graph", "cached-compiled-graph"),
)
GIVEN, DRAWN = "given", "drawn"
# No graphs of the compiler's own: it makes none of a step that writes to its cache, and `-graph` captures all steps.
# On a CPU tuning chooses the library's products after minutes of trying: one set of shapes for every group of lengths.
COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    "cuda": {"mode": "max-autotune-no-cudagraphs", "dynamic": False},
    "cpu": {"dynamic": False},
}


@dataclass(frozen=True)
class Request:
    """One batch on the host, to be answered with the best k items after ``steps`` reverse steps."""

    histories: Jagged
    steps: int
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
        self.top_k = torch.compile(score, **options)  # type: ignore[method-assign]

    def encode(self, histories: Jagged) -> CachedState:
        state = super().encode(histories)
        for cache in state.caches:
            cache.step = partial(self._step, cache)  # type: ignore[method-assign]
        return state


class GraphedSampling:
    """`cached` for one request: encoding as it is, then reverse steps and scoring replayed from a CUDA graph."""

    @torch.no_grad()
    def __init__(self, engine: CachedEngine, request: Request) -> None:
        self.engine, self.request = engine, request
        noise = drawn_noise(engine, request)
        self._state = engine.encode(request.histories)
        self._graph, self._found = capture(lambda: sample_and_score(engine, self._state, request, noise), engine.device)

    @torch.no_grad()
    def __call__(self) -> TopK:
        fresh = self.engine.encode(self.request.histories)
        for kept, new in zip(state_tensors(self._state), state_tensors(fresh), strict=True):
            kept.copy_(new)
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


def check_paths(text: str) -> list[str]:
    """Parse comma-separated paths; raises ConfigError for an unknown one, naming the nearest and all."""
    return pick_all(text, list(dict.fromkeys([*PATHS, *ENGINES])), "--paths")


def path_engine(path: str, model: SequenceModel) -> Engine:
    """The engine that a path runs, without its graph."""
    name = path.removesuffix(GRAPH)
    return CompiledCachedEngine(model) if name == f"cached{COMPILED}" else make_engine(name, model)


def path_call(path: str, engine: Engine, request: Request) -> tuple[Callable[[], Tensor], str]:
    """A call that answers the request on a path and returns the items `[B, k]`, and where its noise comes from."""
    if path.endswith(GRAPH):
        if engine.device.type != "cuda":
            raise ConfigError(f"path {path} needs a CUDA device; the model is on {engine.device}")
        if isinstance(engine, TritonEngine):
            captured = _captured_request(engine, request)
            return lambda: captured(request.histories, seed=request.seed).items, DRAWN
        assert isinstance(engine, CachedEngine)
        graphed = GraphedSampling(engine, request)
        return lambda: graphed().items, GIVEN
    if isinstance(engine, CompiledCachedEngine):
        noise = drawn_noise(engine, request)
        return lambda: _given(engine, request, noise).items, GIVEN
    return lambda: engine.recommend(request.histories, request.k, steps=request.steps, seed=request.seed).items, DRAWN


def _captured_request(engine: TritonEngine, request: Request) -> CapturedRequest:
    tokens = request.histories.values.numel()
    return CapturedRequest(engine, len(request.histories), tokens, request.k, request.steps)


@torch.no_grad()
def _given(engine: CachedEngine, request: Request, noise: ExplicitNoise) -> TopK:
    return sample_and_score(engine, engine.encode(request.histories), request, noise)
