"""Serving scenarios of a run: real histories, an engine, and a record with latency and accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch

from adrec.config import ServingConfig
from adrec.engines import ENGINES, Engine, make_engine
from adrec.environment import Environment, read_environment
from adrec.errors import ConfigError
from adrec.respacing import Steps, sampler_name, step_count
from bench.accuracy import RESULTS, AccuracyBook
from bench.kernels.measure import now_utc
from bench.kernels.selection import dtype_name
from bench.latency_blocks import LatencyBlocks
from bench.record import Accuracy
from bench.serving.records import Scenario, ServingDemand, ServingRecord, ServingSummary
from bench.serving.scenarios import (
    Extent,
    Progress,
    Served,
    Timeline,
    WallTimeline,
    complaints,
    offline,
    poisson_arrivals,
    server,
    single_stream,
)
from bench.subject import Subject
from bench.timing import describe_error

SCENARIOS: tuple[Scenario, ...] = ("single stream", "server", "offline")
WINDOWS = 20
QUERY_HISTORIES = 4096
RATE_BATCHES = 5


@dataclass(frozen=True)
class Policy:
    """What the server does and what is asked of it.

    rate: arrivals a second; None: ``load`` of the throughput. latency_bound_ms: what the server scenario must keep at
    its 99th percentile, as in MLPerf, or its figures do not count; None for no bound.
    """

    extent: Extent
    batch_most: int = 32
    wait_most_ms: float = 0.0
    latency_bound_ms: float | None = None
    rate: float | None = None
    load: float = 0.5
    seed: int = 0


@dataclass
class ServingBench:
    """Measures engines of one subject; ``with_accuracy`` measures each setting's accuracy once."""

    subject: Subject
    policy: Policy
    device: torch.device
    command: str
    timeline: Timeline = field(default_factory=WallTimeline)
    with_accuracy: bool = True
    clock: str = "wall clock"
    environment: Environment = field(default_factory=read_environment)
    _books: dict[str, AccuracyBook] = field(default_factory=dict)
    _engines: dict[str, Engine] = field(default_factory=dict)

    def record(self, scenario: Scenario, engine_name: str, steps: Steps, report: Progress) -> ServingRecord:
        """Measure one scenario; an exception is the record's error. steps: a plan of the run's model, None for all."""
        summary: ServingSummary | None = None
        accuracy: Accuracy | None = None
        error, rate = None, self.policy.rate
        try:
            engine = self._engine(engine_name)
            serve = partial(self.serve, engine, steps)
            # Warm up, at both ends of the batch sizes that will occur.
            for size in (1, self.policy.batch_most):
                serve(range(size))
            if scenario == "server" and rate is None:
                rate = self.policy.load * self._throughput(serve)
            summary = self._summary(scenario, serve, rate, report)
            if self.with_accuracy:
                accuracy = self._accuracy(engine, steps)
        except Exception as problem:
            error = describe_error(problem)
        return self.row(scenario, engine_name, steps, summary, accuracy, error=error, rate=rate)

    def row(
        self,
        scenario: Scenario,
        engine_name: str,
        steps: Steps,
        summary: ServingSummary | None,
        accuracy: Accuracy | None,
        *,
        error: str | None = None,
        rate: float | None = None,
    ) -> ServingRecord:
        """The record of what was measured here. rate: arrivals a second of the scenario with a server."""
        policy, subject, kind = self.policy, self.subject, ENGINES.get(engine_name)
        lengths = subject.examples.histories.lengths.clamp(max=subject.run.config.max_length)
        return ServingRecord(
            measured_at_utc=now_utc(),
            scenario=scenario,
            model=subject.run.config.model,
            engine=engine_name,
            steps=step_count(steps, subject.run.config),
            sampler=sampler_name(steps) if isinstance(steps, ServingConfig) else None,
            precision="unknown" if kind is None else dtype_name(kind.dtype),
            demand=ServingDemand(
                seconds_least=policy.extent.seconds_least,
                queries_least=policy.extent.queries_least,
                batch_most=1 if scenario == "single stream" else policy.batch_most,
                wait_most_ms=policy.wait_most_ms if scenario == "server" else 0.0,
                latency_bound_ms=policy.latency_bound_ms if scenario == "server" else None,
                arrivals_per_second=rate if scenario == "server" else None,
                load=policy.load if scenario == "server" and policy.rate is None else None,
                seed=policy.seed,
            ),
            summary=summary,
            accuracy=accuracy,
            error=error,
            dataset_name=subject.dataset.name,
            dataset_fingerprint=subject.dataset.fingerprint,
            dataset_items=subject.dataset.item_count,
            history_length_mean=float(lengths.double().mean()),
            split=subject.split,
            model_fingerprint=subject.run.fingerprint,
            device=str(self.device),
            threads=self.environment.machine.threads,
            clock=self.clock,
            results_per_user=self._results,
            environment=self.environment,
            command=self.command,
        )

    @property
    def _results(self) -> int:
        return min(RESULTS, self.subject.run.config.items)

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            self._engines[name] = make_engine(name, self.subject.run.model.eval().to(self.device))
        return self._engines[name]

    def serve(self, engine: Engine, steps: Steps, numbers: range) -> object:
        """Answer the queries of these numbers in one batch; the policy's seed draws their users from the data."""
        users = self._users[torch.arange(numbers.start, numbers.stop) % QUERY_HISTORIES]
        histories = self.subject.examples.histories.select(users)
        # To the host: a query is answered when its caller can read it.
        return engine.recommend(histories, self._results, steps=steps, seed=self.policy.seed).items.cpu()

    @cached_property
    def _users(self) -> torch.Tensor:
        # With replacement: the distribution of lengths is that of the data, however many queries there are.
        generator = torch.Generator().manual_seed(self.policy.seed)
        return torch.randint(len(self.subject.examples.histories), (QUERY_HISTORIES,), generator=generator)

    def _throughput(self, serve: Callable[[range], object]) -> float:
        extent = Extent(0.0, RATE_BATCHES * self.policy.batch_most)
        found = offline(serve, self.timeline, extent, self.policy.batch_most, lambda done, expected: None)
        return 1e3 * self.policy.batch_most / float(np.median(found.times_ms))

    def _summary(
        self, scenario: Scenario, serve: Callable[[range], object], rate: float | None, report: Progress
    ) -> ServingSummary:
        policy, extent = self.policy, self.policy.extent
        if scenario == "single stream":
            served = single_stream(serve, self.timeline, extent, report)
        elif scenario == "offline":
            served = offline(serve, self.timeline, extent, policy.batch_most, report)
        else:
            assert rate is not None
            arrivals = poisson_arrivals(rate, extent, policy.seed)
            served = server(
                serve,
                self.timeline,
                arrivals,
                policy.batch_most,
                policy.wait_most_ms / 1e3,
                report,
                extent.seconds_most,
            )
        if not served.queries:
            raise ConfigError(
                f"no query was answered in the {extent.seconds_most:g} seconds of --seconds-most: give a higher --rate"
                " or --load, or more --seconds-most"
            )
        arrive = scenario == "server"
        bound = policy.latency_bound_ms if arrive else None
        return summarise(served, complaints(served, extent, arrivals=arrive, bound_ms=bound), bound)

    def _accuracy(self, engine: Engine, steps: Steps) -> Accuracy:
        timesteps = step_count(None, self.subject.run.config)
        if engine.name not in self._books:
            self._books[engine.name] = AccuracyBook(engine, self.subject.examples, timesteps)
        book = self._books[engine.name]
        return book.accuracy(steps, self.policy.seed, engine, book)


def summarise(served: Served, problems: list[str], bound_ms: float | None) -> ServingSummary:
    """Quantiles over queries (offline: over batches), and what a later comparison needs of consecutive windows."""
    times = np.asarray(served.times_ms)
    p50, p90, p95, p99 = (float(each) for each in np.quantile(times, [0.5, 0.9, 0.95, 0.99]))
    windows = [part for part in np.array_split(times, min(WINDOWS, times.size)) if part.size]
    return ServingSummary(
        queries=served.queries,
        seconds=served.seconds,
        latency_ms_p50=p50,
        latency_ms_p90=p90,
        latency_ms_p95=p95,
        latency_ms_p99=p99,
        latency_ms_most=float(times.max()),
        window_medians_ms=[round(float(np.median(part)), 6) for part in windows],
        latencies=LatencyBlocks.of(windows),
        throughput_users_per_second=served.queries / served.seconds,
        bound_met_fraction=None if bound_ms is None else float((times <= bound_ms).mean()),
        busy_fraction=served.busy_seconds / served.seconds,
        batch_mean=served.queries / len(served.batch_sizes),
        queue_most=served.queue_most,
        valid=not problems,
        invalid_because="; ".join(problems),
    )
