"""Whether the process that wrote a file is still there."""

import time
from contextlib import suppress

import psutil

CLOCK_SECONDS = 5.0
"""Tolerance when start times are compared: they shift when the system's clock is set."""
STALE_SECONDS = 3600.0
"""Age of a heartbeat beyond which a status without a start time belongs to a process that has ended."""


def living_process(pid: int, started: float | None, heartbeat: float = 0.0) -> psutil.Process | None:
    """Return the process that wrote a ticket or status; None where it has ended, even if another has its pid.

    `started` is when that process started, `heartbeat` when it wrote last (both in seconds since 1970).
    Status files of earlier versions hold no start time: their process must have started before the
    heartbeat, and the heartbeat must be younger than STALE_SECONDS.
    """
    with suppress(psutil.Error, ValueError, OverflowError):
        process = psutil.Process(pid)
        began = process.create_time()
        if started is None:
            is_same = began <= heartbeat + CLOCK_SECONDS and time.time() - heartbeat < STALE_SECONDS
        else:
            is_same = abs(began - started) < CLOCK_SECONDS
        return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
    return None
