"""Report the progress of a job in a `status.json`: the one file by which the page, and other programs, follow it."""

import time

from lowmem_rmu.runs import RunFolder, Watcher

HEARTBEAT_SECONDS = 1.0
"""At most one write per so many seconds while a stage advances."""


class StatusWriter:
    """Write the status of a job and tell its watcher: the stage, how far it is, and how the job ended.

    The file is replaced whole, when a stage starts, at most once per `HEARTBEAT_SECONDS` while it advances, and at the end.
    """

    def __init__(self, folder: RunFolder, watcher: Watcher) -> None:
        self.folder = folder
        self.watcher = watcher
        self.stage = "prepare"
        self._step = 0
        self._total = 0
        self._stage_began: float | None = None
        self._written = 0.0

    def start(self, stage: str, total: int = 0) -> None:
        """Begin a stage of `total` steps (0: unknown)."""
        self.stage = stage
        self._step, self._total = 0, total
        self._stage_began = time.time()
        self.watcher.started(stage, total)
        self._write("running")

    def advance(self, step: int, figures: dict[str, float | str]) -> None:
        """Report that `step` steps of the stage are done, with figures to show."""
        self._step = step
        self.watcher.advanced(step, figures)
        if time.time() - self._written > HEARTBEAT_SECONDS:
            self._write("running")

    def note(self, sentence: str) -> None:
        """Show a remark."""
        self.watcher.noted(sentence)

    def end(self, state: str, error: str | None = None) -> None:
        """Write how the job ended: `done`, `stopped` or `failed` with its error."""
        self._write(state, error)

    def stop_requested(self) -> bool:
        """Return whether the watcher, or a file named `stop` in the folder, asks the job to stop."""
        return self.watcher.asks_to_stop() or self.folder.stop_asked

    def _write(self, state: str, error: str | None = None) -> None:
        self._written = time.time()
        self.folder.write_status(self.stage, self._step, self._total, state, error, self._stage_began)
