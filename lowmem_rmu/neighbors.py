"""Passages about subjects next to a topic, written by the base model itself, for the retain set.

A model that forgets economics loses some of marketing too, because nothing in an ordinary retain set
resembles a question about marketing. Text about marketing in the retain set prevents it
(docs/selectivity.md), and the base model can write that text: what it knows about the subject is what is to
stay.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_rmu.chat.generation import encode_prompt
from lowmem_rmu.data.corpora import pad
from lowmem_rmu.errors import UserError

BATCH = 64
"""Passages that are written in one batch: a step costs hardly more for many than for one."""
REQUESTS = (
    "Write a passage of a textbook on {}. Choose one particular concept, and explain it in plain sentences.",
    "Write a paragraph about a method that is used in {}, without headings or lists.",
    "Describe an example from practice that shows an idea of {}, in plain sentences.",
    "Explain to a student a term of {} that is often misunderstood.",
)


@dataclass(frozen=True)
class NeighborPassage:
    """A line of the file: what the base model wrote when asked about a subject."""

    subject: str
    text: str


def write_passages(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    subjects: Sequence[str],
    count: int,
    max_new_tokens: int = 100,
    seed: int = 0,
    on_batch: Callable[[int, int], None] = lambda written, total: None,
) -> list[NeighborPassage]:
    """Have the model write `count` passages about each subject, sampled at temperature 1.

    The same seed gives the same passages on the same machine. `on_batch` gets the number of passages so far,
    and of all, after each batch. Empty answers are left out. Raises UserError where the model writes nothing
    about a subject.
    """
    asked = [
        (subject, REQUESTS[number % len(REQUESTS)].format(subject))
        for subject in subjects
        for number in range(count)
    ]
    passages: list[NeighborPassage] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(asked), BATCH):
            batch = asked[start : start + BATCH]
            texts = _answers(model, tokenizer, [request for _, request in batch], max_new_tokens)
            passages += [
                NeighborPassage(subject, text)
                for (subject, _), text in zip(batch, texts, strict=True)
                if text
            ]
            on_batch(start + len(batch), len(asked))
    written = {passage.subject for passage in passages}
    for subject in subjects:
        if subject not in written:
            raise UserError(
                f"The model wrote nothing about {subject}.",
                "Is it a chat model? Give text of your own instead.",
            )
    return passages


@torch.inference_mode()
def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: list[str], max_new_tokens: int
) -> list[str]:
    """Return a sampled answer to each request of a batch."""
    prompts = [
        encode_prompt(tokenizer, [{"role": "user", "content": request}])[0].tolist() for request in requests
    ]
    # Left padding, so that every answer begins right after its request.
    batch = pad(prompts, tokenizer.pad_token_id, "left", model.device)
    generate: Any = model.generate
    output = generate(
        input_ids=batch.input_ids,
        attention_mask=batch.is_token.long(),
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_p=0.95,
        top_k=0,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = output[:, batch.input_ids.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def save_passages(passages: Sequence[NeighborPassage], file: Path) -> None:
    """Write passages as JSON lines. The file appears only once it is whole."""
    lines = [json.dumps(asdict(passage), ensure_ascii=False) for passage in passages]
    part = file.with_name(f"{file.name}.part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(file)
