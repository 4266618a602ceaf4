"""Each kernel against its eager twin, the compiled twin and a plain copy of as many bytes, interleaved.

On a CPU, where no kernel runs, the twins against the copy; every row says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adrec.environment import Environment, read_environment
from bench.kernels.gpus import gpu_of_device
from bench.kernels.records import CPU_NOTE, KernelRecord, Measuring, PathTiming, Roof
from bench.kernels.selection import dtype_name
from bench.memory import peak_memory_mib
from bench.record import Estimate
from bench.timing import (
    Call,
    Clock,
    Report,
    Series,
    TimingProtocol,
    describe_error,
    measure_interleaved,
    paired_ratio,
    quantiles_ms,
)
from kernels import _runtime
from kernels.inventory import Case, Cost

INPUTS = 4
"""Prepared inputs that calls take in turn, so that no cache holds the one of the call before."""
INPUT_BYTES = 2**30
"""Kernels that read more than a share of this are given fewer: no cache holds theirs."""

KERNEL, GRAPH, TWIN, COMPILED, COPY = "kernel", "kernel in a CUDA graph", "eager twin", "compiled twin", "copy"


def max_autotune(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` at its best, for one set of shapes."""
    return torch.compile(function, mode="max-autotune", dynamic=False)


def compile_for_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` for one set of shapes; without tuning, which takes minutes on a CPU."""
    return torch.compile(function, dynamic=False)


@dataclass
class Timer:
    """Times calls against each other on one device, and writes what rows share."""

    device: torch.device
    protocol: TimingProtocol
    clock: Clock
    command: str
    environment: Environment = field(default_factory=read_environment)

    def measure(
        self, calls: Mapping[str, Sequence[Callable[[], object]]], baseline: str, report: Report
    ) -> tuple[dict[str, PathTiming | str], dict[str, object]]:
        """Call each, then time all in turn. Returns timings or errors, and copies of the first results, by name.

        calls: by name, a call for each of several inputs, which are rotated. baseline: what ratios are to.
        """
        timings: dict[str, PathTiming | str] = {}
        results: dict[str, object] = {}
        memory: dict[str, tuple[float | None, str]] = {}
        called: dict[str, float] = {}
        for name, (call, *_) in calls.items():
            report(1e-9, len(calls) * self.protocol.seconds)
            try:
                # The first call may compile and try out variants, whose memory is not the path's.
                results[name] = _cloned(call())
                started = time.perf_counter()
                memory[name] = peak_memory_mib(call, self.device)
                called[name] = time.perf_counter() - started
            except Exception as error:
                timings[name] = describe_error(error)
        working: dict[str, Call] = {name: _rotated(each) for name, each in calls.items() if name in memory}
        series = measure_interleaved(working, self.protocol, self.clock, report, called)
        for name, each in series.items():
            timings[name] = each.error or _timing(each, series.get(baseline), memory[name])
        return timings, results

    def protocol_of(self, timing: PathTiming | None) -> Measuring:
        """How a row was measured."""
        slow = timing is not None and timing.rounds < self.protocol.rounds
        return Measuring(
            clock=self.clock.name,
            device=str(self.device),
            device_name=self.device_name,
            seconds_per_path=self.protocol.seconds,
            rounds_minimum=self.protocol.rounds_slow if slow else self.protocol.rounds,
            warmup_calls=self.protocol.warmup_calls,
            threads=self.environment.machine.threads,
        )

    @property
    def device_name(self) -> str:
        """What the device calls itself."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.environment.machine.processor

    def roof(self, cost: Cost, dtype: torch.dtype, timing: PathTiming | None) -> Roof:
        """Floor of a cost on this device, and how much of it a timing reaches."""
        gpu = gpu_of_device(self.device_name) if self.device.type == "cuda" else None
        floor = None if gpu is None else gpu.floor(cost, dtype)
        time_us = None if timing is None else timing.latency_us_p50
        return Roof(
            least_bytes=cost.bytes,
            least_flops=cost.flops,
            gpu=None if gpu is None else gpu.name,
            floor_us=None if floor is None else floor.microseconds,
            bound=None if floor is None else floor.bound,
            floor_fraction=None if floor is None or time_us is None else floor.microseconds / time_us,
            gigabytes_per_second=None if time_us is None else cost.bytes / time_us / 1e3,
        )


@dataclass
class KernelBench:
    """Measures cases; ``compile_twin`` makes the compiled twin, ``graph`` adds the kernel in a CUDA graph.

    compile_twin None: no compiled twin. twins_only: no kernel, ratios are to the copy; for a CPU, see `on_a_cpu`.
    """

    timer: Timer
    compile_twin: Callable[[Callable[..., Any]], Callable[..., Any]] | None = max_autotune
    graph: bool = False
    twins_only: bool = False

    @classmethod
    def on_a_cpu(cls, timer: Timer, *, compiled: bool = True) -> KernelBench:
        """Measures twins eager, compiled where torch's compiler takes them and it is wanted, against a copy."""
        return cls(timer, compile_for_cpu if compiled else None, twins_only=True)

    def rows(self, cases: Sequence[Case], report: Callable[[str, float, float], None]) -> Iterator[KernelRecord]:
        """Measure every case; yield a row for each path, with its error where it failed."""
        stages = [_stage(case) for case in cases]
        for stage in stages:
            report(stage, 0.0, 4 * self.timer.protocol.seconds)
        for case, stage in zip(cases, stages, strict=True):
            yield from self._case(case, partial(report, stage))
            if self.timer.device.type == "cuda":
                torch.cuda.empty_cache()

    def _case(self, case: Case, report: Report) -> Iterator[KernelRecord]:
        cost = case.entry.cost(case.shape, case.dtype)
        if self.compile_twin is not None:
            # Otherwise the twin would count as recompiled for each case, and run eagerly from the eighth on.
            torch.compiler.reset()
        try:
            calls = self._calls(case, cost)
        except Exception as error:
            first = TWIN if self.twins_only else KERNEL
            timings: dict[str, PathTiming | str] = {first: f"inputs: {describe_error(error)}"}
            results: dict[str, object] = {}
        else:
            timings, results = self.timer.measure(calls, self._baseline, report)
        for path, timing in timings.items():
            yield self._row(case, path, cost, timing, results)

    def _calls(self, case: Case, cost: Cost) -> dict[str, Sequence[Callable[[], object]]]:
        entry, device = case.entry, self.timer.device
        count = max(1, min(INPUTS, INPUT_BYTES // max(1, cost.bytes)))
        inputs = [entry.inputs(case.shape, case.dtype, device) for _ in range(count)]
        # Moves as many bytes as the kernel must: half are read, half written.
        source = torch.zeros(max(1, cost.bytes // 2), dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        calls: dict[str, Sequence[Callable[[], object]]] = {}
        if not self.twins_only:
            calls[KERNEL] = [partial(entry.run, **each) for each in inputs]
        if self.graph:
            seeded = [partial(entry.run, **_with_device_seed(each, device)) for each in inputs]
            captured = _Captured(seeded, device)
            calls[GRAPH] = [partial(captured, number) for number in range(count)]
        calls[TWIN] = [partial(entry.twin, **each) for each in inputs]
        # Noise is drawn by NumPy on a CPU, in unsigned integers that torch's compiler for CPUs does not promote.
        if self.compile_twin is not None and not (self.twins_only and draws_noise(inputs[0])):
            compiled = self.compile_twin(entry.twin)
            calls[COMPILED] = [partial(compiled, **each) for each in inputs]
        return calls | {COPY: [partial(target.copy_, source)]}

    @property
    def _baseline(self) -> str:
        return COPY if self.twins_only else KERNEL

    def _row(
        self, case: Case, path: str, cost: Cost, timing: PathTiming | str, results: Mapping[str, object]
    ) -> KernelRecord:
        measured = timing if isinstance(timing, PathTiming) else None
        error = timing if isinstance(timing, str) else None
        ratio, different = None, None
        if path != COPY and error is None:
            try:
                if TWIN not in results:
                    raise RuntimeError("not compared: the eager twin failed")
                ratio, different = compare_results(results[path], results[TWIN])
            except Exception as problem:
                error = describe_error(problem)
        return KernelRecord(
            measured_at_utc=now_utc(),
            path=path,
            baseline=self._baseline,
            timing=measured,
            roof=self.timer.roof(cost, case.dtype, measured),
            error=error,
            protocol=self.timer.protocol_of(measured),
            environment=self.timer.environment,
            command=self.timer.command,
            kernel=case.entry.name,
            shape_name=case.shape_name,
            shape=dict(case.shape),
            dtype=dtype_name(case.dtype),
            rms_ratio=ratio,
            different_integers=different,
            note=CPU_NOTE if self.twins_only else None,
        )


def draws_noise(inputs: Mapping[str, Any]) -> bool:
    """Whether a kernel with these arguments draws random numbers."""
    return "seed" in inputs and inputs.get("dropout", 1.0) > 0.0


def compare_results(found: object, expected: object) -> tuple[float | None, float | None]:
    """RMS ratio of the floating-point tensors and share of different integers; None where there are none of a kind.

    The largest over tensors, tuples and lists. Raises ValueError for results of another structure, shape or dtype, and
    for values that are finite in one of them only.
    """
    ours, theirs = list(_tensors(found)), list(_tensors(expected))
    if [each.shape for each in ours] != [each.shape for each in theirs]:
        raise ValueError(f"results are {[tuple(e.shape) for e in ours]}, the twin's {[tuple(e.shape) for e in theirs]}")
    ratios, shares = [], []
    for one, other in zip(ours, theirs, strict=True):
        if not one.numel():
            continue
        if not other.is_floating_point():
            shares.append(float((one != other).double().mean()))
            continue
        finite = other.isfinite()
        if not torch.equal(one.isfinite(), finite):
            raise ValueError("results are not finite in other places than the twin's")
        expected_values = other[finite].double()
        difference = (one[finite].double() - expected_values).square().sum().sqrt()
        size = expected_values.square().sum().sqrt()
        ratios.append(float(difference / size) if float(size) > 0.0 else float(difference))
    return max(ratios, default=None), max(shares, default=None)


def now_utc() -> str:
    """Time of a row."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class _Captured:
    """Calls captured in CUDA graphs, all at the first use of any, and replayed by their numbers."""

    def __init__(self, calls: Sequence[Callable[[], object]], device: torch.device) -> None:
        self._calls, self._device = calls, device
        self._graphs: list[tuple[Any, object]] = []

    def __call__(self, number: int) -> object:
        if not self._graphs:
            self._graphs = [capture(call, self._device) for call in self._calls]
        graph, result = self._graphs[number]
        graph.replay()
        return result


def capture(call: Callable[[], object], device: torch.device) -> tuple[torch.cuda.CUDAGraph, object]:
    """Capture a call in a CUDA graph; returns the graph and the call's result, which each replay writes anew."""
    # Kernels compile and libraries initialise before the capture, on another stream as capturing demands.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def _with_device_seed(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    # A seed from the host would be copied during the capture, which is not allowed.
    seed = inputs.get("seed")
    return {**inputs, "seed": _runtime.seed_tensor(seed, device)} if isinstance(seed, int) else dict(inputs)


def _rotated(calls: Sequence[Callable[[], object]]) -> Call:
    return lambda number: calls[number % len(calls)]()


def _cloned(value: object) -> object:
    # A CUDA graph writes its next results over these.
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [_cloned(each) for each in value] if isinstance(value, list | tuple) else value


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif value is not None:
        raise ValueError(f"a result is a {type(value).__name__}: not a tensor or a tuple of them")


def _timing(own: Series, baseline: Series | None, memory: tuple[float | None, str]) -> PathTiming:
    p50, p95, p99 = (1e3 * each for each in quantiles_ms(own.samples_ms))
    ratio = None
    if baseline is not None and baseline.error is None:
        value, low, high = paired_ratio(own.medians_ms, baseline.medians_ms)
        ratio = Estimate(value=value, low=low, high=high)
    return PathTiming(
        latency_us_p50=p50,
        latency_us_p95=p95,
        latency_us_p99=p99,
        round_medians_us=[round(1e3 * float(each), 4) for each in own.medians_ms],
        calls=len(own.samples_ms),
        rounds=len(own.rounds_ms),
        time_ratio_to_baseline=ratio,
        peak_memory_mib=memory[0],
        peak_memory_meaning=memory[1],
    )


def _stage(case: Case) -> str:
    return f"{case.entry.name}, {case.shape_name}, {dtype_name(case.dtype)}"
