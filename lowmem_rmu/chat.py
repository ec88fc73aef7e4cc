"""The same prompt to base and unlearned, from one model: the adapter off, then on; in conversations, each
side with its own answers.
"""

import json
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, TextStreamer

from lowmem_rmu.data.tokens import encode_texts
from lowmem_rmu.errors import Fix, ResumeRun, UserError
from lowmem_rmu.model.adapters import base_only, load_adapter
from lowmem_rmu.model.fit import is_out_of_memory
from lowmem_rmu.model.saved import read_adapter_settings
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.model.special_tokens import special_tokens
from lowmem_rmu.presets import read_preset, short_name
from lowmem_rmu.runs import RunFolder

SIDES: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {
    "base": base_only,
    "unlearned": lambda model: nullcontext(),
}
MOST_SEED = 2**63 - 1
UNLOADED_MEANWHILE = "The chat model was unloaded meanwhile.\nSend the prompt again: that loads it again."
NO_SYSTEM_PROMPT = (
    "The chat template of this model takes no system prompt.\n"
    "Leave the system prompt empty; say it in the prompt instead."
)


@dataclass(frozen=True)
class Sampling:
    """How an answer is made."""

    max_new_tokens: int = 256
    """Its length at most."""
    temperature: float = 0.0
    """0: always the likeliest token. Above: drawn by their probabilities, the more evenly the higher it
    is.
    """
    seed: int = 0
    """Of the draw: the same one gives the same answer."""
    system_prompt: str = ""
    """The system prompt; none where it is empty."""


@dataclass(frozen=True)
class Turn:
    """A prompt and what either side answered."""

    prompt: str
    base: str
    unlearned: str
    sampling: Sampling
    stopped: bool = False
    """Whether it was stopped before both had answered in full."""

    def of(self, side: str) -> str:
        return self.base if side == "base" else self.unlearned


class _ToFunction(TextStreamer):
    """Hands every finished piece of the answer to a function."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


class _WhenAsked(StoppingCriteria):
    """Ends an answer after the token at which somebody asked for it."""

    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self.is_stopped = is_stopped

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.is_stopped(), device=input_ids.device)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> torch.Tensor:
    """Token ids `(1, sequence)` in the model's chat template; the last message as plain text where the model
    has none.

    Raises UserError where the template would leave out or refuses the system prompt.
    """
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if tokenizer.chat_template is None:
        if system:
            raise UserError(NO_SYSTEM_PROMPT)
        return torch.tensor(encode_texts(tokenizer, [messages[-1]["content"]]))
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program: it can fail in any way
        raise UserError(
            NO_SYSTEM_PROMPT
            if system
            else f"The chat template of this model refuses the conversation: {error}."
        ) from error
    if system.strip() not in text:
        raise UserError(NO_SYSTEM_PROMPT)
    # A template that writes the tokenizer's prefix itself must not get a second one.
    ids, prefix = tokenizer(text, add_special_tokens=False)["input_ids"], special_tokens(tokenizer).prefix
    return torch.tensor([ids if ids[: len(prefix)] == prefix else [*prefix, *ids]])


def messages_of(
    side: str, turns: Sequence[Turn], prompt: str, system_prompt: str = ""
) -> list[dict[str, str]]:
    """Return the conversation as one side knows it: with its own answers."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt.strip() else []
    before = [message for turn in turns for message in _exchange(turn.prompt, turn.of(side))]
    return [*system, *before, {"role": "user", "content": prompt}]


def _exchange(prompt: str, answered: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answered}]


@torch.inference_mode()
def answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    sampling: Sampling,
    write: Callable[[str], None] = lambda text: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> str:
    """Return the model's answer as it stands; `write` gets it piece by piece, and `is_stopped` is asked after
    every token.
    """
    input_ids = encode_prompt(tokenizer, messages).to(next(model.parameters()).device)
    generate: Any = model.generate
    # Of the distribution nothing is cut off, whatever the checkpoint's own settings are: the temperature
    # alone decides.
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": 1.0, "top_k": 0}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    with _seeded(sampling.seed):
        output = generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=sampling.max_new_tokens,
            **(drawn if sampling.temperature else greedy),
            pad_token_id=tokenizer.pad_token_id,
            streamer=_ToFunction(tokenizer, write),
            stopping_criteria=[_WhenAsked(is_stopped)],
        )
    return str(tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)).strip()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw inside follow from the seed, and those outside are as they would have been."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def both_sides(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
    write: Callable[[str, str], None],
    turns: Sequence[Turn] = (),
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[str, str]]:
    """`(side, answer)` of base, then of unlearned; `write` gets the side and a piece of its answer. Ends
    early where it is stopped.
    """
    for side, switched in SIDES.items():
        if is_stopped():
            return
        with switched(model):
            messages = messages_of(side, turns, prompt, sampling.system_prompt)
            yield side, answer(model, tokenizer, messages, sampling, partial(write, side), is_stopped)


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


def check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise UserError(
            "The prompt is empty.",
            "Type a question, or choose one of the suggested prompts.",
        )


def check_conversation(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
    turns: Sequence[Turn] = (),
) -> None:
    """Raise UserError where the prompt is empty, or too long for the model with what came before."""
    check_prompt(prompt)
    check_sampling(sampling, most := getattr(model.config, "max_position_embeddings", None))
    lengths = []
    for side in SIDES:
        messages = messages_of(side, turns, prompt, sampling.system_prompt)
        lengths.append(encode_prompt(tokenizer, messages).shape[1])
    if most is not None and max(lengths) + sampling.max_new_tokens > most:
        raise UserError(
            f"The conversation is {max(lengths)} tokens long with this prompt, and the answer may take "
            f"{sampling.max_new_tokens} more: the model reads at most {most}.",
            "Shorten the prompt, ask for a shorter answer, or start a new conversation.",
        )


def check_sampling(sampling: Sampling, most: int | None = None) -> None:
    """Raise UserError for settings that no answer can be made with; `most` is what the model reads at
    most.
    """
    if not 0 <= sampling.temperature < float("inf"):
        raise UserError(
            f"The temperature is {sampling.temperature:g}: give 0 (always the likeliest word) or a number "
            "above it, for example 0.7."
        )
    if sampling.max_new_tokens < 1:
        raise UserError(f"The length is {sampling.max_new_tokens}: give at least 1 token.")
    if most is not None and sampling.max_new_tokens >= most:
        raise UserError(
            f"The length is {sampling.max_new_tokens}, but the model reads at most {most} tokens, prompt "
            "and answer together."
        )
    if not 0 <= sampling.seed <= MOST_SEED:
        raise UserError(f"The seed is {sampling.seed}: give a whole number from 0 to {MOST_SEED}.")


def parting(base: str, unlearned: str) -> int:
    """Return characters of the common beginning, in whole words: there the two answers part."""
    words = zip(re.findall(r"\s*\S+", base), re.findall(r"\s*\S+", unlearned), strict=False)
    return sum(len(one) for one, _ in takewhile(lambda pair: pair[0] == pair[1], words))


def as_json(turns: Sequence[Turn], run: str, model_name: str) -> str:
    """Return the conversation with all that is needed to have it again."""
    return (
        json.dumps(
            {"run": run, "model": model_name, "turns": [asdict(turn) for turn in turns]},
            indent=2,
            ensure_ascii=False,
        )
        + "\n"
    )


def as_markdown(turns: Sequence[Turn], run: str, model_name: str) -> str:
    """Return the same to read. What was said stands in fences: it is shown to the letter and nothing in it is
    markup.
    """
    heading = f"# Conversation with base and unlearned\n\n- Run: `{run}`\n- Model: `{model_name}`\n"
    return heading + "".join(_turn_as_markdown(number, turn) for number, turn in enumerate(turns, start=1))


def _turn_as_markdown(number: int, turn: Turn) -> str:
    sampling = turn.sampling
    settings = (
        f"temperature {sampling.temperature:g}, at most {sampling.max_new_tokens} tokens, seed "
        f"{sampling.seed}"
    )
    parts = [("Prompt", turn.prompt), ("Base (before)", turn.base), ("Unlearned (after)", turn.unlearned)]
    if sampling.system_prompt.strip():
        parts.insert(0, ("System prompt", sampling.system_prompt))
    stopped = " (stopped early)" if turn.stopped else ""
    return f"\n## {number}{stopped}\n\nSettings: {settings}\n" + "".join(
        f"\n**{title}**\n\n{_fenced(text)}\n" for title, text in parts
    )


def _fenced(text: str) -> str:
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
