"""The trade-off sweep: engine x steps x batch size (x seed), each row with its speed and its accuracy."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from adrec.devices import check_device
from adrec.engines import ENGINES
from adrec.errors import ConfigError, NotSupportedError
from adrec.files import check_output
from bench.plan import make_plan
from bench.progress import SweepProgress
from bench.record import RecordWriter, TradeoffRecord
from bench.subject import Split, load_subject
from bench.sweep import Sweep
from bench.timing import TimingProtocol


@dataclass(frozen=True)
class TradeoffResult:
    """Records of a sweep, the file that holds them (if any), and what the user should know about them."""

    records: list[TradeoffRecord]
    path: Path | None
    notices: list[str]

    @property
    def failed(self) -> list[TradeoffRecord]:
        """The rows that hold an error."""
        return [record for record in self.records if record.error is not None]


def run_tradeoff(
    run: Path,
    *,
    data: Path | None = None,
    engines: Sequence[str] = ("reference", "cached"),
    steps: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = (1, 32, 512),
    seeds: Sequence[int] = (0,),
    protocol: TimingProtocol | None = None,
    split: Split = "test",
    users: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    out: Path | None = None,
    append: bool = False,
    command: str = "bench.tradeoff.run_tradeoff",
    console: Console | None = None,
    quiet: bool = False,
) -> TradeoffResult:
    """Measure a run and return one record a row; a failing cell keeps its error and the sweep goes on.

    ``steps`` `None` means 1, 2, 4, ... up to the trained count; ``users`` limits the users whose accuracy
    is measured; ``threads`` `None` keeps torch's setting. ``out`` is a file of JSON lines: rows are flushed
    to ``<out>.partial`` as they are measured and renamed at the end, or with ``append`` flushed to ``out``
    itself. Raises AdrecError for bad input, before anything is measured.
    """
    where = check_device(device)
    protocol = protocol or TimingProtocol()
    if not 0 < protocol.seconds < math.inf:
        raise ConfigError(f"--seconds-per-cell {protocol.seconds}: must be above 0 and finite, such as 2")
    if out is not None:
        check_output(out, "--out", make_folder=True)
    subject = load_subject(run, data, split, users)
    config = subject.run.config
    if config.model != "adrec":
        raise NotSupportedError(
            f"{run}: a run of {config.model!r} has no steps to trade; give the folder of an 'adrec' run, "
            "whose stage-1 baseline is then measured as well"
        )
    plan = make_plan(engines, steps, batch_sizes, seeds, exact_steps=config.timesteps, known_engines=ENGINES.keys())
    notices = [*subject.notices, *plan.notices]
    with pinned_threads(threads), SweepProgress(console, quiet=quiet) as progress:
        for notice in notices:
            progress.say(f"note: {notice}")
        sweep = Sweep(subject, plan, protocol, where, command, progress)
        if out is None:
            return TradeoffResult(list(sweep.rows()), None, notices)
        records = []
        target = out if append else out.with_name(f"{out.name}.partial")
        if not append:
            target.unlink(missing_ok=True)
        with RecordWriter(target) as writer:
            for record in sweep.rows():
                writer.write(record)
                records.append(record)
        if not append:
            target.replace(out)
    return TradeoffResult(records, out, notices)


@contextmanager
def pinned_threads(threads: int | None) -> Iterator[None]:
    """Let torch use so many CPU threads inside the block; None keeps its setting."""
    """Let torch use so many CPU threads inside the block; `None` keeps its setting."""
    most = 4 * (os.cpu_count() or 1)
    if threads is not None and not 1 <= threads <= most:
        raise ConfigError(
            f"--threads {threads}; allowed: 1 to {most}, four for each processor here; leave it out to keep torch's"
            " setting"
        )
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
