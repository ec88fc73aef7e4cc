"""One run at a time in a runs folder: each takes a number, and the lowest number of a living process has the device.

A number is a file `runs/.queue/000001.json` with the run's name and its process. Whoever dies loses it, whatever killed him.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock

from lowmem_rmu.errors import UserError
from lowmem_rmu.runs import write_json

QUEUE = ".queue"
POLL_SECONDS = 0.5
CLOCK_SECONDS = 5.0  # by which a process may seem to have started at another time, once the clock has been set


@dataclass(frozen=True)
class Ticket:
    """The number of a run, and the process that goes through it."""

    path: Path
    name: str
    pid: int
    started: float
    """When the process started: its pid alone may be another's by now."""

    @property
    def process(self) -> psutil.Process | None:
        """None where it is no more."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.started) < CLOCK_SECONDS and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def give_back(self) -> None:
        self.path.unlink(missing_ok=True)


def tickets(runs_dir: Path) -> list[Ticket]:
    """Those of living processes, in order: the first has the device, the others wait."""
    found = []
    for path in sorted((runs_dir / QUEUE).glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):  # given back just now
            content = json.loads(path.read_text(encoding="utf-8"))
            found.append(Ticket(path, content["name"], content["pid"], content["started"]))
    return [ticket for ticket in found if ticket.process]


@contextmanager
def one_at_a_time(runs_dir: Path) -> Iterator[None]:
    """Held by one process and thread at a time. Raises UserError where the folder cannot be written."""
    try:
        (runs_dir / QUEUE).mkdir(parents=True, exist_ok=True)
        lock = FileLock(runs_dir / QUEUE / "lock")
        lock.acquire()
    except OSError as error:
        raise UserError(f"The runs folder {runs_dir} cannot be written: {error.strerror}.\nChoose another place with --runs-dir.") from error
    try:
        yield
    finally:
        lock.release()


def take_ticket(runs_dir: Path, name: str, pid: int) -> Ticket:
    """The next number for a process; the one it has, if another process took it on its behalf. To be called within `one_at_a_time`."""
    waiting = tickets(runs_dir)
    if own := [ticket for ticket in waiting if ticket.pid == pid]:
        return own[0]
    for path in (runs_dir / QUEUE).glob("*.json"):
        if path not in [ticket.path for ticket in waiting]:
            path.unlink(missing_ok=True)  # left behind by a dead process
    number = int(waiting[-1].path.stem) + 1 if waiting else 1
    ticket = Ticket(runs_dir / QUEUE / f"{number:06}.json", name, pid, psutil.Process(pid).create_time())
    write_json(ticket.path, {"name": name, "pid": pid, "started": ticket.started})
    return ticket


@contextmanager
def turn(runs_dir: Path, name: str, pid: int, wait: Callable[[list[str]], None]) -> Iterator[None]:
    """Waits until it is this process's turn; `wait` is told, twice a second, which runs come before."""
    with one_at_a_time(runs_dir):
        ticket = take_ticket(runs_dir, name, pid)
    try:
        while before := _before(runs_dir, ticket):
            wait(before)
            time.sleep(POLL_SECONDS)
        yield
    finally:
        ticket.give_back()


def _before(runs_dir: Path, own: Ticket) -> list[str]:
    return [ticket.name for ticket in tickets(runs_dir) if ticket.path.name < own.path.name]
