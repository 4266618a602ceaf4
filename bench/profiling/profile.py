"""Profile one engine at one step count and batch size: stages, floors, trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from adrec.config import ServingConfig
from adrec.data.jagged import Jagged
from adrec.engines import Engine, TopK, make_engine
from adrec.environment import read_environment
from adrec.errors import ConfigError
from adrec.respacing import Steps, sampler_name, step_count
from bench.kernels.measure import now_utc
from bench.profiling.floors import Rates, measure_rates, stage_costs
from bench.profiling.record import ProfileRecord, Stage
from bench.profiling.stages import ENCODE, FUSED, SCORE, StageClock, stage_times, step_name, timed_request
from bench.profiling.trace import record_trace
from bench.subject import Subject, draw_batches
from bench.timing import Clock, clock_for
from kernels.inventory import Cost

RESULTS = 20
STEPS = "denoise, all steps"


@dataclass(frozen=True)
class Profiler:
    """Profiles batches of a subject's real histories; ``seconds`` is the budget of the rounds, 5 of them at least.

    steps: None for how the run is served, and where it does not say, as trained.
    """

    subject: Subject
    engine: str
    steps: int | None
    batch_size: int
    device: torch.device
    seconds: float
    command: str
    seed: int = 0

    def measure(
        self, report: Callable[[float, float], None] = lambda done, expected: None, rates: Rates | None = None
    ) -> tuple[ProfileRecord, Callable[[], object]]:
        """Return the record, and the probed call that a trace is taken of."""
        run = self.subject.run
        model = run.model.eval().to(self.device)
        engine = make_engine(self.engine, model)
        config = model.config
        trained = step_count(None, config)
        plan: Steps = None if trained is None else self.steps or run.settings.serving
        steps = step_count(plan, config)
        if trained is not None and not 1 <= (steps or 0) <= trained:
            raise ConfigError(
                f"--steps {self.steps}: allowed are 1 to {trained}, the steps that the run was trained with"
            )
        clock = clock_for(self.device)
        rates = rates or measure_rates(self.device, engine.dtype, clock)
        batches = draw_batches(self.subject.examples.histories, self.batch_size)
        k = min(RESULTS, config.items)
        rounds, plain = self._rounds(engine, batches, plan, k, clock, report)
        histories = batches[0].tail(config.max_length)
        tokens = int(sum(int(batch.lengths.clamp(max=config.max_length).sum()) for batch in batches) / len(batches))
        costs = stage_costs(config, tokens, self.batch_size, engine.dtype.itemsize)
        environment = read_environment()
        names = [] if steps is None else [step_name(row) for row in reversed(range(steps))]
        has_steps = bool(names) and names[0] in rounds[0]
        record = ProfileRecord(
            measured_at_utc=now_utc(),
            model=config.model,
            engine=self.engine,
            steps=steps,
            sampler=sampler_name(plan) if isinstance(plan, ServingConfig) else None,
            batch_size_users=self.batch_size,
            precision=str(engine.dtype).removeprefix("torch."),
            stages=summarise(rounds, steps, costs, rates),
            step_ms_p50=[float(np.median([each[name] for each in rounds])) for name in names] if has_steps else [],
            step_ms_p95=[float(np.quantile([each[name] for each in rounds], 0.95)) for name in names]
            if has_steps
            else [],
            request_ms_p50=float(np.median(plain)),
            probed_ms_p50=float(np.median([sum(each.values()) for each in rounds])),
            rounds=len(rounds),
            history_tokens=tokens,
            items=config.items,
            width=config.width,
            rates=rates,
            clock=clock.name,
            device=str(self.device),
            threads=environment.machine.threads,
            dataset_name=self.subject.dataset.name,
            dataset_fingerprint=self.subject.dataset.fingerprint,
            model_fingerprint=run.fingerprint,
            environment=environment,
            command=self.command,
        )
        return record, lambda: timed_request(engine, StageClock(self.device), histories, k, plan, self.seed)

    def _rounds(
        self,
        engine: Engine,
        batches: Sequence[Jagged],
        plan: Steps,
        k: int,
        clock: Clock,
        report: Callable[[float, float], None],
    ) -> tuple[list[dict[str, float]], list[float]]:
        """Stage times of each round, and the time of the unprobed request beside it."""
        rounds: list[dict[str, float]] = []
        plain: list[float] = []
        spent = 0.0
        number = -1
        while len(rounds) < 5 or spent < self.seconds:
            batch = batches[(number + 1) % len(batches)]
            whole = clock.time_ms(partial(self._recommend, engine, batch, plan, k), number)
            stages = StageClock(self.device)
            timed_request(engine, stages, batch, k, plan, self.seed)
            if number >= 0:
                # The first round warms up.
                plain.append(whole)
                rounds.append(stage_times(stages.spent_ms, step_count(plan, engine.model.config)))
                spent += (whole + sum(rounds[-1].values())) / 1e3
                report(min(spent, self.seconds), self.seconds)
            number += 1
        return rounds, plain

    def _recommend(self, engine: Engine, batch: Jagged, plan: Steps, k: int, _: int) -> TopK:
        return engine.recommend(batch, k, steps=plan, seed=self.seed)


def summarise(
    rounds: Sequence[Mapping[str, float]], steps: int | None, costs: Mapping[str, Cost], rates: Rates
) -> list[Stage]:
    """Medians of the stages over rounds; the denoise steps, which are alike, are one stage of many calls."""
    step_names = {step_name(row) for row in range(steps or 0)}
    merged = []
    for each in rounds:
        stages: dict[str, float] = {}
        for name, value in each.items():
            group = STEPS if name in step_names or name == FUSED else name
            stages[group] = stages.get(group, 0.0) + value
        merged.append(stages)
    medians = {name: float(np.median([each[name] for each in merged])) for name in merged[0]}
    total = sum(medians.values()) or 1.0
    found = []
    for name, median in medians.items():
        calls = (steps or 1) if name == STEPS else 1
        cost = costs.get({ENCODE: "encode", SCORE: "score", STEPS: "denoise step"}.get(name, ""))
        floor, bound = (None, None) if cost is None else rates.floor_ms(cost)
        floor = None if floor is None else floor * calls
        found.append(
            Stage(
                name=name,
                calls=calls,
                milliseconds_p50=median,
                milliseconds_p95=float(np.quantile([each[name] for each in merged], 0.95)),
                share=min(1.0, median / total),
                floor_ms=floor,
                floor_bound=bound,
                floor_fraction=None if floor is None or median == 0.0 else floor / median,
                least_flops=None if cost is None else cost.flops * calls,
                least_bytes=None if cost is None else cost.bytes * calls,
            )
        )
    return found


def write_profile(
    profiler: Profiler, out: Path, report: Callable[[float, float], None] = lambda done, expected: None
) -> tuple[ProfileRecord, list[Path]]:
    """Measure, and write ``profile.html``, ``profile.jsonl`` and ``trace.json`` into a folder; returns their paths.

    ``profile.md`` lies beside them, and where matplotlib is installed ``profile-charts`` with a PNG of each chart.
    """
    from adrec.errors import NotSupportedError
    from adrec.files import write_text
    from bench.json_lines import json_line
    from bench.picture_files import write_charts
    from bench.profiling.page import charts_of, markdown_of, page_of, subtitle

    record, call = profiler.measure(report)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / name for name in ("profile.html", "profile.jsonl", "trace.json")]
    record_trace(call, paths[2], profiler.device)
    write_text(paths[1], json_line(record))
    write_text(paths[0], page_of(record))
    try:
        (pictures,) = write_charts(paths[0], [(subtitle(record), {chart.key: chart for chart in charts_of(record)})])
    except NotSupportedError:
        pictures = []
    names = [path.relative_to(out).as_posix() for path in pictures]
    write_text(paths[0].with_suffix(".md"), markdown_of(record, names))
    return record, paths
