"""Times of the stages of a request, from the calls that an engine makes anyway."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

from adrec.data.jagged import Jagged
from adrec.engines import Engine, TopK
from adrec.respacing import Steps

COPY_IN, PREPARE, ENCODE, UPDATE, SCORE, TOP_K, COPY_OUT = (
    "copy in",
    "checks and row keys",
    "encode",
    "noise and update",
    "score",
    "top-k",
    "copy out",
)
FUSED = "denoise, all steps"
REPRESENT, SAMPLE, SELECT = "represent", "sample", "score and top-k"


class StageClock:
    """Milliseconds spent in named stages of one request; nested stages count for themselves and for what holds them.

    Each stage waits for the device at its ends, and is a range of that name in a torch.profiler trace.
    """

    def __init__(self, device: torch.device, now_ms: Callable[[], float] | None = None) -> None:
        self._device = device
        self._now_ms = now_ms or (lambda: time.perf_counter_ns() / 1e6)
        self.spent_ms: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        with record_function(name):
            self._wait()
            start = self._now_ms()
            yield
            self._wait()
        self.spent_ms[name] += self._now_ms() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@contextmanager
def probed(engine: Engine, clock: StageClock) -> Iterator[None]:
    """Time ``encode``, ``sample`` and every call of the denoiser of this engine; it is as before afterwards.

    An engine whose denoiser cannot be called alone, since its steps are fused, is timed as a whole.
    """
    names = [name for name in ("encode", "sample", "_denoiser") if hasattr(engine, name)]
    wrapped: dict[str, Callable[..., Any]] = {name: getattr(engine, name) for name in names}

    def encode(*arguments: Any, **options: Any) -> Any:
        with clock.stage(ENCODE):
            return wrapped["encode"](*arguments, **options)

    def sample(*arguments: Any, **options: Any) -> Any:
        with clock.stage(SAMPLE):
            return wrapped["sample"](*arguments, **options)

    def make_denoiser(*arguments: Any, **options: Any) -> Any:
        denoise = wrapped["_denoiser"](*arguments, **options)

        def timed(x_t: torch.Tensor, row: int) -> torch.Tensor:
            with clock.stage(step_name(row)):
                found: torch.Tensor = denoise(x_t, row)
            return found

        return timed

    replacing: dict[str, Callable[..., Any]] = {"encode": encode, "sample": sample, "_denoiser": make_denoiser}
    try:
        for name in names:
            setattr(engine, name, replacing[name])
        yield
    finally:
        for name in names:
            engine.__dict__.pop(name, None)


def step_name(row: int) -> str:
    """Name of the reverse step with row ``row`` of the coefficient table; the last step of sampling is row 0."""
    return f"denoise step {row + 1}"


@torch.inference_mode()
def timed_request(engine: Engine, clock: StageClock, histories: Jagged, k: int, steps: Steps, seed: int) -> TopK:
    """Answer one batch stage by stage; the same result as `Engine.recommend`."""
    with probed(engine, clock):
        with clock.stage(COPY_IN):
            histories = histories.to(engine.device)
        with clock.stage(REPRESENT):
            rows = engine.represent(histories, steps, seed)
        with clock.stage(SELECT):
            best = engine.top_k(rows, k)
        # Once more, alone: `top_k` computes the scores inside.
        with clock.stage(SCORE):
            engine.score(rows)
        with clock.stage(COPY_OUT):
            return TopK(best.items.cpu(), best.scores.cpu())


def stage_times(spent_ms: dict[str, float], steps: int | None) -> dict[str, float]:
    """Disjoint stages in the order of the request, from the nested ones of a `StageClock`; at least 0 ms each.

    What `represent` does outside of ``encode`` and ``sample`` is checks and row keys; what ``sample`` does outside of
    the denoiser is noise and update; top-k is what ``top_k`` takes beyond the scores.
    """
    denoise = {step_name(row): spent_ms.get(step_name(row), 0.0) for row in reversed(range(steps or 0))}
    inside = sum(denoise.values())
    sampled = {**denoise, UPDATE: spent_ms[SAMPLE] - inside} if inside > 0.0 else {FUSED: spent_ms[SAMPLE]}
    found = {
        COPY_IN: spent_ms[COPY_IN],
        PREPARE: spent_ms[REPRESENT] - spent_ms[ENCODE] - spent_ms[SAMPLE],
        ENCODE: spent_ms[ENCODE],
        **sampled,
        SCORE: min(spent_ms[SCORE], spent_ms[SELECT]),
        TOP_K: spent_ms[SELECT] - spent_ms[SCORE],
        COPY_OUT: spent_ms[COPY_OUT],
    }
    return {name: max(0.0, value) for name, value in found.items()}
