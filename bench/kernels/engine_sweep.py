"""Engines against each other, and SASRec+ in them, on random models of the paper's size.

A row is a catalogue x batch x steps x path. The models learned nothing and have no accuracy: what stands beside a time
is the overlap with the exact engine's lists.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from adrec.config import ModelConfig, TrainConfig
from adrec.data.jagged import Jagged
from adrec.engines import ENGINES, Engine
from adrec.evaluation import top_overlap
from adrec.models import build_model
from adrec.models.base import WEIGHT_STD, SequenceModel
from bench.kernels.engine_paths import BASELINE, GRAPH, Request, engine_name, path_calls, path_engine
from bench.kernels.measure import INPUTS, Timer, now_utc
from bench.kernels.records import EngineRecord, PathTiming
from bench.kernels.selection import dtype_name
from bench.timing import describe_error
from kernels.inventory import Cost

RESULTS = 20
MEAN_LENGTH = 8
GIBIBYTE = 2**30
# Scores of a chunk, their sorted copies, and a batch of 4096 padded histories through one layer at a time.
WORKSPACE_BYTES = 3 * GIBIBYTE // 2

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Axes:
    """What a sweep covers. ``paths``: the first is what the others' times are related to."""

    paths: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    steps: tuple[int, ...]
    items: tuple[int, ...]
    width: int = 128


@dataclass(frozen=True)
class EngineSweep:
    """Measures engines; models a catalogue size, `INPUTS` batches in turn a batch size, noise of seed 0."""

    timer: Timer
    axes: Axes

    def rows(self, report: Progress) -> Iterator[EngineRecord]:
        """Measure every cell; yield a row for each path, with its error where it failed."""
        axes = self.axes
        cells = [(items, batch, steps) for items in axes.items for batch in axes.batch_sizes for steps in axes.steps]
        for cell in cells:
            report(_stage(*cell), 0.0, len(axes.paths) * self.timer.protocol.seconds)
        for items in axes.items:
            engines = self._engines(items)
            for batch in axes.batch_sizes:
                batches = [random_histories(batch, items, variant) for variant in range(INPUTS)]
                for steps in axes.steps:
                    cell_report = partial(report, _stage(items, batch, steps))
                    requests = [Request(histories, steps, min(RESULTS, items)) for histories in batches]
                    yield from self._cell(engines, requests, items, cell_report)
            del engines
            if self.timer.device.type == "cuda":
                torch.cuda.empty_cache()

    def _engines(self, items: int) -> dict[str, Engine | str]:
        """Engine of each path, made once a catalogue, or the error that making it ended with."""
        axes, device = self.axes, self.timer.device
        try:
            check_memory(items, axes.width, axes.paths, device)
            model = random_model(items, axes.width, max(axes.steps), device)
            baseline = random_baseline(model) if any(path.startswith(BASELINE) for path in axes.paths) else model
        except Exception as error:
            return dict.fromkeys(axes.paths, describe_error(error))
        made: dict[str, Engine | str] = {}
        for path in axes.paths:
            name = path.removesuffix(GRAPH)
            if name not in made:
                try:
                    made[name] = path_engine(path, baseline if path.startswith(BASELINE) else model)
                except Exception as error:
                    made[name] = describe_error(error)
        return {path: made[path.removesuffix(GRAPH)] for path in axes.paths}

    def _cell(
        self,
        engines: dict[str, Engine | str],
        requests: Sequence[Request],
        items: int,
        report: Callable[[float, float], None],
    ) -> Iterator[EngineRecord]:
        # Otherwise shapes of earlier cells would count as recompilations, and the ninth would run uncompiled.
        torch.compiler.reset()
        calls: dict[str, Sequence[Callable[[], object]]] = {}
        noises: dict[str, str] = {}
        errors: dict[str, PathTiming | str] = {}
        for path, engine in engines.items():
            if isinstance(engine, str):
                errors[path] = engine
                continue
            try:
                # SASRec+ has no reverse steps.
                own = [replace(each, steps=None) for each in requests] if path.startswith(BASELINE) else requests
                calls[path], noises[path] = path_calls(path, engine, own)
            except Exception as error:
                errors[path] = describe_error(error)
        timings, results = self.timer.measure(calls, self.axes.paths[0], report)
        for path in engines:
            timing = errors.get(path, timings.get(path, "not measured"))
            yield self._row(path, requests[0], items, timing, noises.get(path, ""), results)

    def _row(
        self,
        path: str,
        request: Request,
        items: int,
        timing: PathTiming | str,
        noise: str,
        results: dict[str, object],
    ) -> EngineRecord:
        timer, axes = self.timer, self.axes
        measured = timing if isinstance(timing, PathTiming) else None
        baseline = path.startswith(BASELINE)
        prefix = BASELINE if baseline else ""
        able = [each for each in results if each.startswith(BASELINE) == baseline]
        reference = next((each for each in (f"{prefix}reference", f"{prefix}cached", *able) if each in results), None)
        found, expected = results.get(path), results.get(reference or "")
        overlap = None
        if isinstance(found, Tensor) and isinstance(expected, Tensor):
            overlap = float(top_overlap(found.cpu(), expected.cpu()).mean())
        dtype = ENGINES[engine_name(path)].dtype
        tokens = request.histories.values.numel()
        steps = request.steps or 0
        cost = request_cost(tokens, len(request.histories), None if baseline else steps, items, axes.width, dtype)
        return EngineRecord(
            measured_at_utc=now_utc(),
            path=path,
            baseline=axes.paths[0],
            timing=measured,
            roof=timer.roof(cost, dtype, measured),
            error=timing if isinstance(timing, str) else None,
            protocol=timer.protocol_of(measured),
            environment=timer.environment,
            command=timer.command,
            precision=dtype_name(dtype),
            batch_size_users=len(request.histories),
            history_tokens=tokens,
            steps=steps,
            items=items,
            width=axes.width,
            top20_overlap_fraction=overlap,
            overlap_with=reference or "",
            noise=noise,
        )


def request_cost(tokens: int, users: int, steps: int | None, items: int, width: int, dtype: torch.dtype) -> Cost:
    """The least that answering a batch takes with two encoder and two denoiser blocks (`12 D^2` weights each).

    steps: None without the denoiser, as in SASRec+.

    Operations: the encoder on every token; one denoiser block and the keys and values (`2 D^2`) of the other on the
    history; both on each user's last token at each step; scores of the whole catalogue. Attention itself, some percent
    of it, is left out. Bytes: item rows read, weights and the item table once.
    """
    square = width * width
    rows = 12 * square * 2 * tokens
    if steps is not None:
        rows += 12 * square * ((tokens - users) + 2 * steps * users) + 2 * square * (tokens - users)
    flops = 2 * rows + 2 * users * items * width
    read = ((2 if steps is None else 4) * 12 * square + (tokens + items) * width) * dtype.itemsize
    return Cost(bytes=read, flops=flops)


def random_model(items: int, width: int, timesteps: int, device: torch.device) -> SequenceModel:
    """ADRec of the paper's size with random weights; its table is made on the device, whatever its size."""
    config = ModelConfig(items=items, width=width, timesteps=max(32, timesteps))
    torch.manual_seed(0)
    model = build_model(config.model_copy(update={"items": 1})).to(device)
    model.config = config
    table = torch.empty(items + 1, width, device=device).normal_(0.0, WEIGHT_STD)
    table[0] = 0.0
    model.item_embedding = nn.Embedding.from_pretrained(table, freeze=False, padding_idx=0)
    return model.eval().requires_grad_(False)


def random_baseline(model: SequenceModel) -> SequenceModel:
    """SASRec+ of the same size with random weights and the same item table."""
    config = model.config.baseline(TrainConfig())
    torch.manual_seed(0)
    baseline = build_model(config.model_copy(update={"items": 1})).to(model.device)
    baseline.config, baseline.item_embedding = config, model.item_embedding
    return baseline.eval().requires_grad_(False)


def random_histories(users: int, items: int, variant: int = 0) -> Jagged:
    """Histories with the mean length of the Amazon sets and a long tail, up to 50 items; the same for each call.

    variant: other items, and the same lengths, for which a graph or a compiled engine is made.
    """
    generator = np.random.default_rng(users)
    lengths = np.clip(generator.geometric(1 / MEAN_LENGTH, users), 1, 50)
    generator = np.random.default_rng([users, variant]) if variant else generator
    return Jagged.from_lists(generator.integers(1, items + 1, length).tolist() for length in lengths)


def check_memory(items: int, width: int, paths: Sequence[str], device: torch.device) -> None:
    """Raise MemoryError where the item table and its copies in the engines' precisions would not fit."""
    rows = (items + 1) * width
    precisions = {ENGINES[engine_name(path)].dtype for path in paths}
    needed = sum(rows * dtype.itemsize for dtype in precisions | {torch.float32}) + WORKSPACE_BYTES
    free = free_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"{items} items of {width} need about {needed / GIBIBYTE:.1f} GiB on {device}, and {free / GIBIBYTE:.1f}"
            " GiB are free; measure fewer --items or a smaller --width"
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that a device can still give; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _stage(items: int, batch: int, steps: int) -> str:
    return f"{items} items, batch {batch}, {steps} steps"
