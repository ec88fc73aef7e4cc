"""The processes that `accelerate launch` started together: who this one is, and how they tell each other what they found."""

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from lowmem_rmu.turns import world_size

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # the others wait while the first one trains; the default is ten minutes


class Processes:
    """One process by itself, as long as no launcher has started several."""

    def __init__(self) -> None:
        self._state = PartialState(timeout=PATIENCE) if world_size() > 1 else None
        self.index: int = self._state.process_index if self._state else 0
        self.count: int = self._state.num_processes if self._state else 1

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def device(self, asked: str) -> str:
        """With `auto`, every process has a GPU of its own."""
        return str(self._state.device) if self._state and asked == "auto" else asked

    def mine(self, shared: Sequence[T]) -> Sequence[T]:
        """Every count-th of what all of them share out."""
        return shared[self.index :: self.count]

    def gathered(self, mine: list[T]) -> list[T]:
        """What all processes have, in all of them. Every process must come here."""
        return gather_object(mine) if self._state else mine

    def from_first(self, value: T) -> T:
        """What the first process has, in all of them. Every process must come here."""
        if self._state is None:
            return value
        values = [value]
        broadcast_object_list(values)
        return values[0]
