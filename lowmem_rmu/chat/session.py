"""A run's model held in memory for a conversation."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lowmem_rmu.chat.conversation import SIDES, Sampling, Turn
from lowmem_rmu.chat.generation import both_sides, check_conversation
from lowmem_rmu.config.paths import short_name
from lowmem_rmu.errors import Fix, ResumeRun, UserError
from lowmem_rmu.memory.advice import is_out_of_memory
from lowmem_rmu.model.adapters import load_adapter
from lowmem_rmu.model.saved import read_adapter_settings
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.recorded import read_preset

UNLOADED_MEANWHILE = "The chat model was unloaded meanwhile.\nSend the prompt again: that loads it again."


def load_run(folder: RunFolder, device: torch.device) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Return a run's model with its adapter, and its tokenizer. Raises UserError where it has no adapter
    yet.
    """
    check_adapter(folder)
    read_adapter_settings(folder.adapter)
    spec = ModelSpec.of_preset(read_preset(folder))
    tokenizer = spec.tokenizer
    return load_adapter(spec.load(device), folder.adapter), tokenizer


class ChatModel:
    """A run's model with its adapter: it answers one prompt at a time for all users."""

    def __init__(
        self, run: str, model_name: str, model: PeftModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.run, self.model_name = run, model_name
        self._parts: tuple[PeftModel, PreTrainedTokenizerBase] | None = (model, tokenizer)
        self._lock, self._closed = Lock(), Event()

    @classmethod
    def of_run(cls, folder: RunFolder, device: torch.device) -> "ChatModel":
        model, tokenizer = load_run(folder, device)
        return cls(folder.path.name, short_name(str(model.config.name_or_path)), model, tokenizer)

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """Stop the answer that is being made, then let go of the model."""
        self._closed.set()
        with self._lock:
            self._parts = None

    def check(self, prompt: str, sampling: Sampling, turns: Sequence[Turn] = ()) -> None:
        """Raise UserError where the prompt cannot be answered: see `check_conversation`."""
        check_conversation(*self._opened(), prompt, sampling, turns)

    def stream(
        self, prompt: str, sampling: Sampling, stop: Event, turns: Sequence[Turn] = ()
    ) -> Generator[tuple[str, str]]:
        """`(side, its answer so far)`, base first, while it is being made. `stop` ends it, and so does
        closing this generator.
        """
        self.check(prompt, sampling, turns)
        pieces: SimpleQueue[tuple[str, str] | BaseException | None] = SimpleQueue()
        left = Event()  # nobody listens any more

        def is_stopped() -> bool:
            return stop.is_set() or left.is_set() or self._closed.is_set()

        worker = Thread(
            target=self._answer_into, args=(pieces, prompt, sampling, turns, is_stopped), daemon=True
        )
        worker.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            left.set()
            worker.join()

    def answers(self, prompt: str, sampling: Sampling, turns: Sequence[Turn] = ()) -> dict[str, str]:
        """Both sides' answers, in full."""
        answers = dict.fromkeys(SIDES, "") | dict(self.stream(prompt, sampling, Event(), turns))
        if self.is_closed:
            raise UserError(UNLOADED_MEANWHILE)
        return answers

    def _answer_into(
        self,
        pieces: SimpleQueue[Any],
        prompt: str,
        sampling: Sampling,
        turns: Sequence[Turn],
        is_stopped: Callable[[], bool],
    ) -> None:
        """Answer in the worker thread. The lock is held for both sides, as the adapter is switched for all
        users of the model.
        """
        so_far = dict.fromkeys(SIDES, "")

        def write(side: str, piece: str) -> None:
            so_far[side] += piece
            pieces.put((side, so_far[side].lstrip()))

        try:
            with _unless_stopped(self._lock, is_stopped), memory_told():
                for side_and_answer in both_sides(
                    *self._opened(), prompt, sampling, write, turns, is_stopped
                ):
                    pieces.put(side_and_answer)
        except _NotAnswered:
            pass
        except BaseException as error:  # handed to the thread that waits for the answer
            pieces.put(error)
        finally:
            pieces.put(None)

    def _opened(self) -> tuple[PeftModel, PreTrainedTokenizerBase]:
        if self._parts is None:
            raise UserError(UNLOADED_MEANWHILE)
        return self._parts


class _NotAnswered(Exception):
    """Stopped while it waited for its turn."""


@contextmanager
def _unless_stopped(lock: Lock, is_stopped: Callable[[], bool]) -> Iterator[None]:
    """Wait for the lock until it is there, or until nobody wants it any more."""
    while not lock.acquire(timeout=0.1):
        if is_stopped():
            raise _NotAnswered
    try:
        yield
    finally:
        lock.release()


@contextmanager
def memory_told() -> Iterator[None]:
    """Translate running out of memory into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "Memory ran out.",
            "Stop a run or another program, ask for a shorter answer, or start a new conversation.",
        ) from None


def check_adapter(folder: RunFolder) -> None:
    if not folder.adapter.exists():
        raise UserError(
            f"Run {folder.path} has no adapter yet.",
            Fix("Go on with it: {action}", ResumeRun(folder.path.name, "python -m lowmem_rmu.run ...")),
        )
