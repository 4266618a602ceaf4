"""All suites. A suite makes its units from the user's choices; what cannot run here says why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel

from adrec.environment import read_environment
from bench.running.unit import Context, Report, Unit

if TYPE_CHECKING:
    from kernels.inventory import Case


@dataclass(frozen=True)
class Suite:
    """obstacle: why the suite cannot run in a context, or None. notice: what of it is left out there, or None."""

    name: str
    summary: str
    units: Callable[[Context], list[Unit]]
    obstacle: Callable[[Context], str | None] = lambda context: None
    notice: Callable[[Context], str | None] = lambda context: None


class _StageReport:
    """Hands the seconds of any stage to a unit's own progress."""

    def __init__(self) -> None:
        self.report: Report = lambda done, expected: None

    def update(self, stage: str, done_seconds: float, expected_seconds: float) -> None:
        self.report(done_seconds, expected_seconds)


def _needs_triton(context: Context) -> str | None:
    """On a GPU, where kernels run; on a CPU their twins do."""
    from kernels import _runtime

    if context.device.type != "cuda" or (_runtime.AVAILABLE and not _runtime.INTERPRETED):
        return None
    return "needs Triton, not interpreted"


def _kernels(context: Context) -> list[Unit]:
    from bench.kernels.measure import KernelBench, Timer
    from bench.kernels.selection import choose_cases, choose_twins, dtype_name
    from bench.timing import clock_for

    timer = Timer(context.device, context.protocol, clock_for(context.device), context.command)
    if context.device.type == "cpu":
        # Compiling takes longer than a smoke run may.
        bench, cases = KernelBench.on_a_cpu(timer, compiled=not context.smoke), choose_twins(small=context.smoke)
    else:
        bench, cases = KernelBench(timer, graph=True), choose_cases(shape="paper" if context.smoke else None)

    def measure(case: Case, report: Report) -> Iterable[BaseModel]:
        return bench.rows([case], lambda stage, done, expected: report(done, expected))

    return [
        Unit(
            f"kernels/{case.entry.name}/{case.shape_name}/{dtype_name(case.dtype)}",
            4 * context.protocol.seconds,
            partial(measure, case),
        )
        for case in cases
    ]


def _engines(context: Context) -> list[Unit]:
    from bench.kernels.catalogues import Catalogue, RandomCatalogue, TrainedCatalogue
    from bench.kernels.engine_sweep import Axes, EngineSweep
    from bench.kernels.measure import Timer
    from bench.timing import clock_for

    timer = Timer(context.device, context.protocol, clock_for(context.device), context.command)
    paths = engine_paths_of(context)
    steps: tuple[int, ...]
    sizes, batches, steps = (
        ((2000,), (1, 16), (1, 4)) if context.smoke else ((12_000, 100_000), (1, 32, 512), (1, 4, 32))
    )
    catalogues: list[Catalogue] = [RandomCatalogue(size) for size in sizes]
    if context.run is not None:
        # In place of the smallest: accuracy stands beside the times of a run.
        catalogues[0] = TrainedCatalogue(context.subject)
        steps = tuple(sorted({min(count, context.subject.run.config.timesteps) for count in steps}))
    sweep = EngineSweep(timer, Axes(paths, batches, steps, tuple(catalogues)))
    return [
        Unit(
            f"engines/{'run' if catalogue.trained else catalogue.name}/batch {batch}/{count} steps",
            len(paths) * context.protocol.seconds,
            partial(sweep.cell, catalogue, batch, count),
        )
        for catalogue in catalogues
        for batch in batches
        for count in steps
    ]


def engine_paths_of(context: Context) -> tuple[str, ...]:
    """What suite engines measures: the engines named, or all that run here with their rivals."""
    from bench.kernels.engine_paths import paths_here
    from bench.kernels.records import BASELINE

    if context.engines_named:
        return context.engines
    # Compiling and exporting take longer than a smoke run may.
    smoke = (*context.engines, f"{BASELINE}cached")
    return smoke if context.smoke else paths_here(engines_here(context.device), context.device)


def engines_here(device: torch.device) -> tuple[str, ...]:
    """Engines of every precision that a device runs at its own speed; AOTInductor's takes minutes to compile."""
    from adrec.engines import ENGINES, AotInductorEngine
    from kernels import _runtime

    able = [name for name, kind in ENGINES.items() if kind.runs_on(device) and name != AotInductorEngine.name]
    return tuple(name for name in able if not (_runtime.INTERPRETED and name.startswith("triton")))


def _tradeoff(context: Context) -> list[Unit]:
    from adrec.engines import ENGINES
    from bench.plan import make_plan
    from bench.sweep import Sweep

    sizes = (1, 16) if context.smoke else (1, 32, 512)
    progress = _StageReport()

    @cache
    def sweep() -> Sweep:
        subject = context.subject
        exact = subject.run.config.timesteps
        steps = [count for count in (1, 4) if count <= exact] if context.smoke else None
        plan = make_plan(context.engines, steps, sizes, (0,), exact_steps=exact, known_engines=ENGINES.keys())
        return Sweep(subject, plan, context.protocol, context.device, context.command, progress)

    def popularity(report: Report) -> Iterable[BaseModel]:
        progress.report = report
        yield sweep().popularity_row()

    def group(size: int, report: Report) -> Iterable[BaseModel]:
        progress.report = report
        yield from sweep().group(size)

    cells = len(context.engines) * (3 if context.smoke else 7)
    return [
        Unit("tradeoff/popularity", context.protocol.seconds, popularity),
        *(Unit(f"tradeoff/batch {size}", cells * context.protocol.seconds, partial(group, size)) for size in sizes),
    ]


def _serving(context: Context) -> list[Unit]:
    from adrec.respacing import step_count
    from bench.serving.measure import SCENARIOS, Policy, ServingBench
    from bench.serving.records import Scenario
    from bench.serving.scenarios import Extent

    extent = Extent(0.5, 20, 10.0) if context.smoke else Extent(60.0, 1024, 600.0)
    engines = [name for name in context.engines if name != "reference"] or list(context.engines)

    @cache
    def bench() -> ServingBench:
        policy = Policy(extent, batch_most=8 if context.smoke else 32)
        return ServingBench(context.subject, policy, context.device, context.command)

    def measure(scenario: Scenario, engine: str, steps: int, report: Report) -> Iterable[BaseModel]:
        trained = step_count(None, context.subject.run.config)
        yield bench().record(scenario, engine, None if trained is None else min(steps, trained), report)

    return [
        Unit(
            f"serving/{scenario}/{engine}/{steps} steps",
            extent.seconds_least,
            partial(measure, scenario, engine, steps),
        )
        for engine in engines
        for steps in ((1,) if context.smoke else (1, 4, 32))
        for scenario in SCENARIOS
    ]


def _training(context: Context) -> list[Unit]:
    from adrec.config import TrainConfig
    from bench.training_speed.measure import TrainingBench

    precisions = ("32-true",) if context.smoke or _without_bf16(context) else ("32-true", "bf16-mixed")

    @cache
    def bench() -> TrainingBench:
        steps = 4 if context.smoke else 60
        return TrainingBench(context.subject.dataset, context.device, context.command, steps)

    def measure(model: str, batch: int, precision: str, report: Report) -> Iterable[BaseModel]:
        settings = context.subject.run.settings
        config = settings.model if model == "adrec" else settings.model.baseline(settings.train or TrainConfig())
        yield bench().record(config, batch, precision, report)

    return [
        Unit(f"training/{model}/batch {batch}/{precision}", 2.0 if context.smoke else 30.0, partial(measure, *cell))
        for cell in [
            (model, batch, precision)
            for model in ("sasrec", "adrec")
            for batch in ((32,) if context.smoke else (128, 512))
            for precision in precisions
        ]
        for model, batch, precision in [cell]
    ]


def _without_bf16(context: Context) -> str | None:
    """Why bfloat16 is not trained in: on a CPU without instructions for it a step takes minutes."""
    if context.smoke or context.device.type != "cpu" or _computes_bf16():
        return None
    return "suite training leaves bf16-mixed out: this CPU computes it without instructions for it"


def _computes_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set((read_environment().machine.instructions or "").split()))


def _scaling(context: Context) -> list[Unit]:
    from bench.kernels.measure import Timer
    from bench.scaling.measure import Fixed, ScalingBench
    from bench.scaling.record import Axis
    from bench.timing import clock_for

    timer = Timer(context.device, context.protocol, clock_for(context.device), context.command)
    fixed = Fixed(items=2000, batch=4, steps=1, width=32) if context.smoke else Fixed()
    bench = ScalingBench(timer, context.engines, fixed)
    axes: dict[Axis, list[int]] = {
        "items": [10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000],
        "history": [1, 2, 5, 10, 20, 50, 100, 200],
        "batch": [1, 4, 16, 64, 256, 1024, 4096],
    }
    if context.smoke:
        axes = {"items": [1000, 4000, 16_000], "history": [1, 10, 50], "batch": [1, 8, 64]}

    axes["items"] = _that_fit(axes["items"], fixed.width, context)

    def measure(axis: Axis, report: Report) -> Iterable[BaseModel]:
        return bench.records(axis, axes[axis], report)

    seconds = len(context.engines) * context.protocol.seconds
    return [Unit(f"scaling/{axis}", seconds * len(values), partial(measure, axis)) for axis, values in axes.items()]


def _that_fit(catalogues: list[int], width: int, context: Context) -> list[int]:
    """Catalogues that this machine's memory holds; the user is told of the others."""
    from bench.kernels.engine_sweep import check_memory

    for place, items in enumerate(catalogues):
        try:
            check_memory(items, width, context.engines, context.device)
        except MemoryError as error:
            context.notices.append(f"suite scaling leaves out catalogues of {items} items and more: {error}")
            return catalogues[:place]
    return catalogues


def _on_a_cpu(context: Context) -> str | None:
    return None if context.device.type == "cpu" else f"measures on a CPU; leave --device {context.device} out"


def _compress(context: Context) -> list[Unit]:
    from bench.compression.held_against import REFERENCE, HeldAgainst

    sizes = (1, 16) if context.smoke else (1, 512)
    precisions = _precisions(context)

    @cache
    def held() -> HeldAgainst:
        subject = context.subject
        return HeldAgainst(
            subject.run, context.networks, subject.dataset, "test", [1], precisions,
            [name for name in context.engines if name != REFERENCE] or ["cached"],
            sizes, context.protocol, context.command, examples=subject.examples,
        )  # fmt: skip

    def measure(size: int, report: Report) -> Iterable[BaseModel]:
        held().report = report
        return held().records([size])

    rows = 3 + len(precisions) * (1 + len(context.compressed))
    return [Unit(f"compress/batch {size}", rows * context.protocol.seconds, partial(measure, size)) for size in sizes]


def _precisions(context: Context) -> list[str]:
    """What networks are rounded to; without torchao only the item table, which the user is told.

    Left out: bf16 table and int8 weights, which are parts of bf16 and int8, and int4, which saves no time on a CPU, the
    only device of this suite: it is unpacked to float32 when it is loaded.
    """
    from adrec.errors import NotSupportedError
    from compress.rounding import torchao_quantization

    try:
        torchao_quantization()
    except NotSupportedError as error:
        context.notices.append(f"suite compress leaves int8 layers out: {error}")
        return ["float32", "bf16", "int8 table"]
    return ["float32", "bf16", "int8 table", "int8", "int8 bf16", "int8 dynamic"]


def _has_recbole(context: Context) -> str | None:
    from bench.rivals import PYTHON_VARIABLE
    from bench.rivals.recbole_sasrec import interpreter

    needs = f"needs RecBole: pip install 'adrec[recbole]', or name a python that has it in {PYTHON_VARIABLE}"
    return _on_a_cpu(context) or (None if interpreter() else needs)


def _rivals(context: Context) -> list[Unit]:
    from bench.rivals.recbole_sasrec import interpreter
    from bench.rivals.sweep import recbole_sweep

    sizes, epochs = ((1, 16), 1) if context.smoke else ((1, 32, 512), None)

    def measure(report: Report) -> Iterable[BaseModel]:
        progress = _StageReport()
        progress.report = report
        settings = (context.subject, interpreter() or "", sizes, context.protocol, context.command, progress, epochs)
        with recbole_sweep(*settings) as sweep:
            yield from sweep.rows()

    # One unit: RecBole's model is trained anew in each.
    return [Unit("rivals/recbole", 20.0 if context.smoke else 1800.0, measure)]


SUITES: tuple[Suite, ...] = (
    Suite(
        "kernels",
        "each Triton kernel against its eager twin, torch.compile and a copy; on a CPU no kernel runs, the twins do",
        _kernels,
        _needs_triton,
    ),
    Suite(
        "engines",
        "engines, compiled and exported rivals, SASRec+: catalogue x batch x steps, with the accuracy of --run; random"
        " models have none, but the overlap with the exact lists",
        _engines,
    ),
    Suite("tradeoff", "a run's speed and accuracy: engine x steps x batch", _tradeoff),
    Suite("serving", "single stream, server with Poisson arrivals, offline, as in MLPerf", _serving),
    Suite("training", "optimiser steps: tokens a second, time of an epoch, memory", _training, notice=_without_bf16),
    Suite("scaling", "growth with catalogue, history and batch: points and fitted exponent", _scaling),
    Suite("compress", "compressed models beside their run, reference and SASRec+", _compress, _on_a_cpu),
    Suite("rivals", "RecBole's SASRec, trained on the run's data, beside the run", _rivals, _has_recbole),
)
