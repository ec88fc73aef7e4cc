"""Prompts, answers and their settings, checked and written as JSON or Markdown."""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import takewhile

from torch import nn

from lowmem_rmu.errors import UserError
from lowmem_rmu.model.adapters import base_only

SIDES: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {
    "base": base_only,
    "unlearned": lambda model: nullcontext(),
}
MOST_SEED = 2**63 - 1


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


def messages_of(
    side: str, turns: Sequence[Turn], prompt: str, system_prompt: str = ""
) -> list[dict[str, str]]:
    """Return the conversation as one side knows it: with its own answers."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt.strip() else []
    before = [message for turn in turns for message in _exchange(turn.prompt, turn.of(side))]
    return [*system, *before, {"role": "user", "content": prompt}]


def _exchange(prompt: str, answered: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answered}]


def check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise UserError(
            "The prompt is empty.",
            "Type a question, or choose one of the suggested prompts.",
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
