"""What a job is doing now, as `status.json`, and who follows it."""

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import psutil

from lowmem_rmu.errors import UserError, error_record
from lowmem_rmu.runs.files import write_json


def write_status(
    path: Path,
    stage: str,
    step: int,
    total: int,
    state: str,
    error: BaseException | str | None = None,
    began: float | None = None,
) -> None:
    """Write the status of this process's job.

    `state` is `waiting`, `running`, `stopped`, `failed` or `done`; `began` is when the stage did. Times are
    in seconds since 1970. `started` in the file is when this process started: its pid may be another's later.
    """
    status = {
        "stage": stage,
        "step": step,
        "total": total,
        "state": state,
        "pid": os.getpid(),
        "heartbeat": time.time(),
        "error": str(error) if error is not None else None,
        "stage_began": began,
        "started": psutil.Process().create_time(),
    }
    if isinstance(error, UserError):
        status |= error_record(error)
    write_json(path, status)


class Watcher(Protocol):
    """Who follows a run, or other work on it: told when a stage starts, how far it is, and what was
    noticed.
    """

    def started(self, stage: str, total: int) -> None: ...

    def advanced(self, done: int, figures: dict[str, float | str]) -> None: ...

    def noted(self, sentence: str) -> None: ...

    def asks_to_stop(self) -> bool: ...


class Stopped(Exception):
    """A run was asked to stop and has done so; `--resume` continues in its `folder`, or what `go_on` says in
    words.
    """

    def __init__(self, folder: Path, go_on: str | None = None) -> None:
        super().__init__(f"{folder} was stopped")
        self.folder, self.go_on = folder, go_on


HEARTBEAT_SECONDS = 1.0
"""At most one write per so many seconds while a stage advances."""


class Silent:
    """A watcher that shows nothing and never asks to stop."""

    def started(self, stage: str, total: int) -> None:
        """Ignore that a stage starts."""

    def advanced(self, done: int, figures: dict[str, float | str]) -> None:
        """Ignore how far the stage is."""

    def noted(self, sentence: str) -> None:
        """Ignore a remark."""

    def asks_to_stop(self) -> bool:
        """Return False."""
        return False


class StatusWriter:
    """Write the status of a job and pass its progress on to a watcher: the stage, how far it is, and how the
    job ended.

    The file is replaced whole: when a stage starts, at most once per `HEARTBEAT_SECONDS` while it advances,
    and at the end. As a context manager it writes the end itself: `done`, `stopped`, or `failed` with the
    error.

    Args:
        path: The file to write; None: none, only the watcher is informed.
        watcher: Shows the progress, and may ask the job to stop.
        stop: A file whose presence asks the job to stop, too.
        stage: What the job does before its first stage starts.

    """

    def __init__(
        self, path: Path | None, watcher: Watcher, stop: Path | None = None, stage: str = "prepare"
    ) -> None:
        self.path = path
        self.watcher = watcher
        self.stop = stop
        self.stage = stage
        self._step = 0
        self._total = 0
        self._stage_began: float | None = None
        self._written = 0.0

    def started(self, stage: str, total: int = 0) -> None:
        """Begin a stage of `total` steps (0: unknown)."""
        self.stage = stage
        self._step, self._total = 0, total
        self._stage_began = time.time()
        self.watcher.started(stage, total)
        self._write("running")

    def advanced(self, done: int, figures: dict[str, float | str]) -> None:
        """Report that `done` steps of the stage are done, with figures to show."""
        self._step = done
        self.watcher.advanced(done, figures)
        if time.time() - self._written > HEARTBEAT_SECONDS:
            self._write("running")

    def noted(self, sentence: str) -> None:
        """Show a remark."""
        self.watcher.noted(sentence)

    def asks_to_stop(self) -> bool:
        """Return whether the watcher, or the file `stop`, asks the job to stop."""
        return self.watcher.asks_to_stop() or (self.stop is not None and self.stop.exists())

    def end(self, state: str, error: BaseException | None = None) -> None:
        """Write how the job ended: `done`, `stopped`, or `failed` with its error."""
        self._write(state, error)

    def _write(self, state: str, error: BaseException | None = None) -> None:
        self._written = time.time()
        if self.path is not None:
            write_status(self.path, self.stage, self._step, self._total, state, error, self._stage_began)

    def __enter__(self) -> Self:
        if self.path is not None:
            self.path.parent.mkdir(exist_ok=True)
        self._write("running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end("done")
        elif isinstance(error, Stopped | KeyboardInterrupt):
            self.end("stopped")
        elif isinstance(error, Exception):
            self.end("failed", error)
