"""A process of another interpreter that answers requests: JSON lines to it and from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from adrec.errors import AdrecError, ConfigError

PATIENCE_SECONDS = 5.0
TAIL_LINES = 20


class ChildError(AdrecError):
    """The other process failed: it ended, or answered with an error."""

    exit_code = 1


class Child:
    """A script that reads requests ``{"do": ..., ...}`` from standard input and writes an answer to each.

    It runs in a folder of its own, ``folder``, which ends with it: some libraries write where they are run. name: what
    messages call it. Raises ConfigError for an interpreter that cannot be run.
    """

    def __init__(self, interpreter: str, script: Path, name: str) -> None:
        found = shutil.which(interpreter)
        if found is None and Path(interpreter).exists():
            raise ConfigError(f"--python {interpreter}: is no program; give the python of an environment with {name}")
        if found is None:
            raise ConfigError(f"--python {interpreter}: no such program; give the python of an environment with {name}")
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="adrec-rival-")
        self.folder = Path(self._folder.name)
        self._errors = self.folder / "stderr.txt"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                # Absolute, as it runs elsewhere; not resolved, as an environment is told by the place of its link.
                [os.path.abspath(found), str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=self.folder,
                encoding="utf-8",
                errors="replace",
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, do: str, progress: Callable[[dict[str, Any]], None] | None = None, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer; ``progress`` is handed what comes before it.

        Raises ChildError with what it wrote to standard error when it ends, and for an answer that is an error.
        """
        return self._answer(do, progress, request)

    def greet(self, do: str, seconds: float) -> dict[str, Any]:
        """`ask` a first question; raises ChildError where no answer comes within ``seconds``."""
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds, give_up)
        timer.start()
        try:
            return self._answer(do, None, {})
        except ChildError:
            if late.is_set():
                raise ChildError(
                    f"{self.name}'s process did not answer within {seconds:g} s; is it the right program?"
                ) from None
            raise
        finally:
            timer.cancel()

    def _answer(
        self, do: str, progress: Callable[[dict[str, Any]], None] | None, request: dict[str, Any]
    ) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None
        for line in self._process.stdout:
            try:
                answer = json.loads(line)
            except ValueError:
                raise ChildError(f"{self.name}'s process answered {line[:200]!r}, which is not JSON") from None
            if "progress" not in answer:
                if "error" in answer:
                    raise ChildError(f"{self.name}: {answer['error']}")
                return answer
            if progress is not None:
                progress(answer["progress"])
        raise self._ended()

    def close(self) -> None:
        """End the process and remove its folder; again does nothing."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                # What it no longer reads is lost, and need not be told.
                try:
                    stream.close()
                except OSError:
                    continue
        self._wait()
        self._folder.cleanup()

    def _wait(self) -> int:
        """Wait for the end that follows the end of its input; what does not end is killed."""
        try:
            return self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _ended(self) -> ChildError:
        status = self._wait()
        text = self._errors.read_text(encoding="utf-8", errors="replace") if self._errors.exists() else ""
        tail = [line for line in text.splitlines() if line.strip()][-TAIL_LINES:]
        last = tail[-1] if tail else "it wrote nothing to standard error"
        how = f"ended with status {status}" if status >= 0 else f"was killed by signal {-status}"
        return ChildError("\n".join([f"{self.name}'s process {how}: {last}", *tail[:-1]]))
