"""Progress of a sweep with the time left, from the seconds that its stages are expected to take."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class StageProgress(Protocol):
    """What a sweep reports to."""

    def update(self, stage: str, done_seconds: float, expected_seconds: float) -> None:
        """Set a stage's seconds done and expected."""


class SweepProgress:
    """A bar over stages; each stage reports seconds done and expected, and may correct the latter."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console or Console(stderr=True),
            disable=quiet,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, left="")
        self._stages: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, stage: str, done_seconds: float, expected_seconds: float) -> None:
        """Set a stage's seconds done and expected; the first call for a stage adds it to the total."""
        self._stages[stage] = (min(done_seconds, expected_seconds), expected_seconds)
        done = sum(each for each, _ in self._stages.values())
        total = sum(each for _, each in self._stages.values())
        left = f"{total - done:.0f} s left"
        description = stage if done_seconds > 0 else "waiting"
        self._bar.update(self._task, description=description, completed=done, total=total, left=left)

    def say(self, message: str) -> None:
        """Print a line above the bar; square brackets in it are not markup."""
        self._bar.console.print(message, markup=False, highlight=False)
