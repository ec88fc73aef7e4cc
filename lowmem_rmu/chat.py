"""The same prompt to base and unlearned, from one model: the adapter off, then on."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lowmem_rmu.model.adapters import base_only

SIDES: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {"base": base_only, "unlearned": lambda model: nullcontext()}


class _ToFunction(TextStreamer):
    """Hands every finished piece of the answer to a function."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> torch.Tensor:
    """Token ids `(1, sequence)` in the model's chat template; the last message as plain text where the model has none."""
    if tokenizer.chat_template is None:
        return torch.tensor([tokenizer(messages[-1]["content"])["input_ids"]])
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    # A template that writes the start token itself must not get a second one.
    starts = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return torch.tensor([tokenizer(text, add_special_tokens=not starts)["input_ids"]])


@torch.inference_mode()
def answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    max_new_tokens: int,
    write: Callable[[str], None] = lambda text: None,
) -> str:
    """The model's greedy answer as it stands; `write` gets it piece by piece."""
    input_ids = encode_prompt(tokenizer, messages).to(next(model.parameters()).device)
    generate: Any = model.generate
    output = generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
        streamer=_ToFunction(tokenizer, write),
    )
    return str(tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)).strip()


def both_sides(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int, write: Callable[[str, str], None]
) -> Iterator[tuple[str, str]]:
    """`(side, answer)` of base, then of unlearned; `write` gets the side and a piece of its answer."""
    for side, switched in SIDES.items():
        with switched(model):
            yield side, answer(model, tokenizer, [{"role": "user", "content": prompt}], max_new_tokens, partial(write, side))
