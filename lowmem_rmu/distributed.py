"""The processes that `accelerate launch` started together, under Accelerate's own names. Without a launcher
there is one process.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from lowmem_rmu.runs.queue import world_size

T = TypeVar("T")
TIMEOUT = timedelta(days=7)
"""The other processes wait while the main process trains; PyTorch's default is ten minutes."""


class Distributed:
    """This process among those of the launch."""

    def __init__(self) -> None:
        self._state = PartialState(timeout=TIMEOUT) if world_size() > 1 else None
        self.process_index: int = self._state.process_index if self._state else 0
        self.num_processes: int = self._state.num_processes if self._state else 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which alone reads and writes the run folder."""
        return self.process_index == 0

    def device(self, requested: str) -> str:
        """Return the requested device; with `auto`, each process gets its own GPU."""
        return str(self._state.device) if self._state and requested == "auto" else requested

    def split(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's share: every `num_processes`-th item."""
        return items[self.process_index :: self.num_processes]

    def gather(self, items: list[T]) -> list[T]:
        """Return the items of all processes, in each of them. All processes must call it."""
        return gather_object(items) if self._state else items

    def broadcast(self, value: T) -> T:
        """Return the main process's value in each process. All processes must call it."""
        if self._state is None:
            return value
        values = [value]
        broadcast_object_list(values)
        return values[0]
