"""Engines against each other, and SASRec+ in them: on random models of the paper's size, or on a trained run.

A row is a catalogue x batch x steps x path. Random models learned nothing and have no accuracy: what stands beside a
time is the overlap with the exact engine's lists. A run's rows have the accuracy of its test users too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from adrec.engines import ENGINES, Engine
from adrec.evaluation import top_overlap
from bench.kernels.catalogues import Catalogue
from bench.kernels.engine_paths import GRAPH, Request, engine_name, path_calls, path_engine
from bench.kernels.measure import INPUTS, Timer, now_utc
from bench.kernels.records import BASELINE, COMPILED, EngineRecord, PathTiming
from bench.kernels.selection import dtype_name
from bench.record import Accuracy
from bench.timing import describe_error
from kernels.inventory import Cost

RESULTS = 20
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
    catalogues: tuple[Catalogue, ...]


@dataclass
class EngineSweep:
    """Measures engines; models a catalogue, `INPUTS` batches in turn a batch size, noise of seed 0."""

    timer: Timer
    axes: Axes
    _made: tuple[Catalogue, dict[str, Engine | str]] | None = field(default=None, repr=False)

    def rows(self, report: Progress) -> Iterator[EngineRecord]:
        """Measure every cell; yield a row for each path, with its error where it failed."""
        axes = self.axes
        cells = [(each, batch, steps) for each in axes.catalogues for batch in axes.batch_sizes for steps in axes.steps]
        for catalogue, batch, steps in cells:
            report(cell_name(catalogue, batch, steps), 0.0, len(axes.paths) * self.timer.protocol.seconds)
        for catalogue, batch, steps in cells:
            yield from self.cell(catalogue, batch, steps, partial(report, cell_name(catalogue, batch, steps)))

    def cell(
        self, catalogue: Catalogue, batch: int, steps: int, report: Callable[[float, float], None]
    ) -> Iterator[EngineRecord]:
        """Measure all paths against each other, with the engines of the cell before if the catalogue is the same."""
        engines = self._engines(catalogue)
        accuracies = self._accuracies(engines, catalogue, steps)
        # Otherwise shapes of earlier cells would count as recompilations, and the ninth would run uncompiled.
        torch.compiler.reset()
        calls: dict[str, Sequence[Callable[[], object]]] = {}
        noises: dict[str, str] = {}
        errors: dict[str, PathTiming | str] = {}
        k = min(RESULTS, catalogue.items)
        requests = [Request(catalogue.histories(batch, variant), steps, k) for variant in range(INPUTS)]
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
            yield self._row(path, requests[0], catalogue, timing, accuracies.get(path), noises.get(path, ""), results)

    def _engines(self, catalogue: Catalogue) -> dict[str, Engine | str]:
        """Engine of each path, made once a catalogue, or the error that making it ended with."""
        if self._made is None or self._made[0] is not catalogue:
            self._made = None
            if self.timer.device.type == "cuda":
                torch.cuda.empty_cache()
            self._made = (catalogue, self._make(catalogue))
        return self._made[1]

    def _make(self, catalogue: Catalogue) -> dict[str, Engine | str]:
        axes, device = self.axes, self.timer.device
        try:
            check_memory(catalogue.items, catalogue.width, axes.paths, device)
            model = catalogue.model(device)
        except Exception as error:
            return dict.fromkeys(axes.paths, describe_error(error))
        made: dict[str, Engine | str] = {}
        for path in axes.paths:
            name = path.removesuffix(GRAPH)
            if name not in made:
                try:
                    served = catalogue.baseline(model) if path.startswith(BASELINE) else model
                    made[name] = path_engine(path, served)
                except Exception as error:
                    made[name] = describe_error(error)
        return {path: made[path.removesuffix(GRAPH)] for path in axes.paths}

    def _accuracies(
        self, engines: Mapping[str, Engine | str], catalogue: Catalogue, steps: int
    ) -> dict[str, Accuracy | str | None]:
        """Accuracy of each path's engine, or the error that measuring it ended with."""
        found: dict[str, Accuracy | str | None] = {}
        for path, engine in engines.items():
            if not isinstance(engine, str):
                try:
                    found[path] = catalogue.accuracy(path, engine, None if path.startswith(BASELINE) else steps)
                except Exception as error:
                    found[path] = f"accuracy: {describe_error(error)}"
        return found

    def _row(
        self,
        path: str,
        request: Request,
        catalogue: Catalogue,
        timing: PathTiming | str,
        accuracy: Accuracy | str | None,
        noise: str,
        results: dict[str, object],
    ) -> EngineRecord:
        timer, items, width = self.timer, catalogue.items, catalogue.width
        found = results.get(path)
        if isinstance(accuracy, Accuracy) and COMPILED in path:
            accuracy = self._compared(accuracy, path, request, catalogue, found)
        problems = [each for each in (timing, accuracy) if isinstance(each, str)]
        measured = timing if isinstance(timing, PathTiming) else None
        baseline = path.startswith(BASELINE)
        prefix = BASELINE if baseline else ""
        able = [each for each in results if each.startswith(BASELINE) == baseline]
        reference = next((each for each in (f"{prefix}reference", f"{prefix}cached", *able) if each in results), None)
        overlap = _overlap(found, results.get(reference or ""))
        dtype = ENGINES[engine_name(path)].dtype
        tokens = request.histories.values.numel()
        steps = request.steps or 0
        cost = request_cost(tokens, len(request.histories), None if baseline else steps, items, width, dtype)
        return EngineRecord(
            measured_at_utc=now_utc(),
            path=path,
            baseline=self.axes.paths[0],
            timing=measured,
            roof=timer.roof(cost, dtype, measured),
            error="; ".join(problems) or None,
            protocol=timer.protocol_of(measured),
            environment=timer.environment,
            command=timer.command,
            precision=dtype_name(dtype),
            batch_size_users=len(request.histories),
            history_tokens=tokens,
            steps=steps,
            items=items,
            width=width,
            top20_overlap_fraction=overlap,
            overlap_with=reference or "",
            noise=noise,
            trained=catalogue.trained,
            accuracy=accuracy if isinstance(accuracy, Accuracy) else None,
        )

    def _compared(
        self, accuracy: Accuracy, path: str, request: Request, catalogue: Catalogue, found: object
    ) -> Accuracy | str | None:
        """The accuracy of a compiled path with its agreement on the batch that it was compiled for.

        None where the path has no lists of it, or the error that making those to compare with ended with.
        """
        if not isinstance(found, Tensor):
            return None
        steps = None if path.startswith(BASELINE) else request.steps
        try:
            expected = catalogue.lists(request.histories, steps, request.k, self.timer.device)
        except Exception as error:
            return f"accuracy: {describe_error(error)}"
        agreed = {"engine_agreement_fraction": _overlap(found, expected), "engine_agreement_users": len(found)}
        return accuracy.model_copy(
            update=agreed | {"engine_top20_overlap_fraction": None, "engine_top20_overlap_users": 0}
        )


def _overlap(found: object, expected: object) -> float | None:
    """Mean share of items in both lists, `[B, k]` each; None where one of them is missing."""
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return None
    return float(top_overlap(found.cpu(), expected.cpu()).mean())


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


def cell_name(catalogue: Catalogue, batch: int, steps: int) -> str:
    """A cell in words, unique within a sweep."""
    return f"{catalogue.name}, batch {batch}, {steps} steps"
