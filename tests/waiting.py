"""Waiting for what another process or thread does."""

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 180
"""Seconds that a test waits at most: a busy machine may take long, and no test that waits measures time."""


def wait_until(
    condition: Callable[[], Any],
    what: str | Callable[[], Any] = "it did not come to that",
    seconds: float = PATIENCE,
    pause: float = 0.02,
) -> None:
    """Look every `pause` seconds whether the condition holds. Fail after `seconds` with `what`, or with what it returns then."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what() if callable(what) else what
        time.sleep(pause)
