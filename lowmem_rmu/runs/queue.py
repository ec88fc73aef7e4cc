"""One run at a time in a runs folder: each takes a number, and the lowest number of a living process has the
device.

A number is a file `runs/.queue/000001.json` with the run's name and its process. A process that dies loses
it, whatever killed him.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock

from lowmem_rmu.errors import UserError
from lowmem_rmu.runs.files import number_in, remove_leftovers, write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.processes import living_process

QUEUE = ".queue"
NUMBER = "[0-9]{1,18}"
POLL_SECONDS = 0.5


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
        return living_process(self.pid, self.started)

    @property
    def number(self) -> int:
        return int(self.path.stem)

    def give_back(self) -> None:
        self.path.unlink(missing_ok=True)


def tickets(runs_dir: Path) -> list[Ticket]:
    """Return the tickets of living processes in order: the first has the device, the others wait."""
    found = [_read_ticket(path) for path in (runs_dir / QUEUE).glob("*.json")]
    living = [ticket for ticket in found if ticket and ticket.process]
    return sorted(living, key=lambda ticket: ticket.number)


def _read_ticket(path: Path) -> Ticket | None:
    """None for a file that was given back just now, or that is damaged."""
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
        name = content.get("name") if isinstance(content, dict) else None
        pid, started = number_in(content, "pid"), number_in(content, "started")
        is_numbered = re.fullmatch(NUMBER, path.stem) is not None
        if is_numbered and isinstance(name, str) and pid is not None and started is not None:
            return Ticket(path, name, int(pid), started)
    return None


def world_size() -> int:
    """Return how many processes `accelerate launch` (or torchrun) started together: 1 without it.

    Raises UserError where the environment variable holds no such number.
    """
    size = os.environ.get("WORLD_SIZE", "").strip() or "1"
    if not re.fullmatch("[1-9][0-9]{0,5}", size):
        raise UserError(
            f"The environment variable WORLD_SIZE is {size[:40]!r}, which is no number of processes.",
            "Remove it: unset WORLD_SIZE",
        )
    return int(size)


def process_of(runs_dir: Path, name: str) -> psutil.Process | None:
    """Return the living process that does the job `name` (a run, an export or an audit), or waits to do it.

    None where there is none. A run of `accelerate launch` takes no ticket: it is known by its status.
    """
    for ticket in tickets(runs_dir):
        if ticket.name == name:
            return ticket.process
    return RunFolder(runs_dir / name).writer


@contextmanager
def one_at_a_time(runs_dir: Path) -> Iterator[None]:
    """Held by one process and thread at a time. Raises UserError where the folder cannot be written."""
    try:
        (runs_dir / QUEUE).mkdir(parents=True, exist_ok=True)
        lock = FileLock(runs_dir / QUEUE / "lock")
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"The runs folder {runs_dir} cannot be written: {error.strerror}.",
            "Choose another place with --runs-dir.",
        ) from error
    try:
        yield
    finally:
        lock.release()


def take_ticket(runs_dir: Path, name: str, pid: int) -> Ticket:
    """Return the next number for a process; the one it has, if another process took it on its behalf. To be
    called within `one_at_a_time`.
    """
    waiting = tickets(runs_dir)
    if own := [ticket for ticket in waiting if ticket.pid == pid]:
        return own[0]
    # What dead processes left behind goes, as far as it can be removed.
    remove_leftovers(runs_dir / QUEUE)
    for path in (runs_dir / QUEUE).glob("*.json"):
        if path not in [ticket.path for ticket in waiting]:
            with suppress(OSError):
                path.unlink()
    stems = [path.stem for path in (runs_dir / QUEUE).glob("*.json")]
    number = max((int(stem) for stem in stems if re.fullmatch(NUMBER, stem)), default=0) + 1
    ticket = Ticket(runs_dir / QUEUE / f"{number:06}.json", name, pid, psutil.Process(pid).create_time())
    write_json(ticket.path, {"name": name, "pid": pid, "started": ticket.started})
    return ticket


@contextmanager
def turn(runs_dir: Path, name: str, pid: int, wait: Callable[[list[str]], None]) -> Iterator[None]:
    """Wait until it is this process's turn; `wait` is called, twice per second, with the runs that come
    before.
    """
    with one_at_a_time(runs_dir):
        ticket = take_ticket(runs_dir, name, pid)
    try:
        while before := _before(runs_dir, ticket):
            wait(before)
            time.sleep(POLL_SECONDS)
            if not ticket.path.exists():  # deleted with the runs folder: queue up again
                with one_at_a_time(runs_dir):
                    ticket = take_ticket(runs_dir, name, pid)
        yield
    finally:
        ticket.give_back()


def _before(runs_dir: Path, own: Ticket) -> list[str]:
    return [ticket.name for ticket in tickets(runs_dir) if ticket.number < own.number]


def free_name(runs_dir: Path, wanted: str) -> str:
    """Return `wanted`, or `wanted-2`, `wanted-3`, ... where a run or a waiting process has that name.

    To be called within `one_at_a_time`.
    """
    waiting = {ticket.name for ticket in tickets(runs_dir)}
    name, number = wanted, 1
    while name in waiting or ((runs_dir / name).exists() and not RunFolder(runs_dir / name).is_leftover):
        number += 1
        name = f"{wanted}-{number}"
    return name


def check_free(runs_dir: Path, name: str) -> None:
    """Raise UserError where there is a run of this name, or another process waits to make one.

    To be called within `one_at_a_time`.
    """
    if any(ticket.name == name and ticket.pid != os.getpid() for ticket in tickets(runs_dir)):
        raise UserError(
            f"Run {runs_dir / name} is waiting for its turn already.",
            "Choose another --name.",
        )
    RunFolder.free_path(runs_dir, name)
