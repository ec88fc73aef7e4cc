"""Answers of the base and the unlearned model, generated one after the other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, TextStreamer

from lowmem_rmu.chat.conversation import SIDES, Sampling, Turn, check_prompt, check_sampling, messages_of
from lowmem_rmu.data.tokens import encode_texts
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.special_tokens import special_tokens

NO_SYSTEM_PROMPT = (
    "The chat template of this model takes no system prompt.\n"
    "Leave the system prompt empty; say it in the prompt instead."
)


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
