"""Answers in the model's own words: whether they name what was asked for, how fluent they are, and how far
the next word is from base's.
"""

import math
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedTokenizerBase

from lowmem_rmu.audit.context import Audited
from lowmem_rmu.audit.knowledge import evenly
from lowmem_rmu.chat.conversation import messages_of
from lowmem_rmu.chat.generation import encode_prompt
from lowmem_rmu.data.corpora import pad
from lowmem_rmu.data.questions import Question
from lowmem_rmu.evaluation.scorer import Request, Scorer, plan_batches
from lowmem_rmu.model.logits import logits_at

LENGTH = 24
"""Tokens of an answer at most."""
BATCH = 32
"""Answers that are made at once: their keys and values are kept meanwhile."""
GRAM = 4
TEXTS, PLACES = 64, 4
"""Texts, and places in each, at which the next word is compared: both sides' whole vocabulary is kept of 256
places.
"""

Ids = list[int]


def as_prompts(tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> list[Ids]:
    """Return questions as a user puts them, in the chat template where there is one."""
    return [encode_prompt(tokenizer, messages_of("base", [], question))[0].tolist() for question in questions]


@torch.inference_mode()
def answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[Ids], batch_tokens: int
) -> list[Ids]:
    """Return the likeliest tokens after each prompt, without the one that ends them: what `chat.answer`
    gives, many at a time.
    """
    ends, found = _ends(model, tokenizer), list[Ids]()
    size = max(1, min(BATCH, batch_tokens // (max(map(len, prompts), default=0) + LENGTH)))
    for start in range(0, len(prompts), size):
        batch = pad(
            prompts[start : start + size], tokenizer.pad_token_id, "left", next(model.parameters()).device
        )
        output = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.is_token.long(),
            max_new_tokens=LENGTH,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        found += [_until(ends, ids) for ids in output[:, batch.input_ids.shape[1] :].tolist()]
    return found


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    own = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}


def _until(ends: set[int], ids: Ids) -> Ids:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def names_the_right_one(question: Question, answer: str) -> bool:
    """Return whether an answer holds the text of the right choice and that of no other: whole words, and of
    two that overlap the longer one.
    """
    choices = [_plain(choice) for choice in question.choices]
    longest_first = sorted(filter(None, choices), key=len, reverse=True)
    found = (
        re.findall(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", _plain(answer))
        if longest_first
        else []
    )
    return set(found) == {choices[question.gold]} and choices.count(choices[question.gold]) == 1


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def repetition(answered: list[Ids]) -> float | None:
    """Return the share of runs of four tokens that the same answer had before; None where none is that
    long.
    """
    grams = [[tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)] for ids in answered]
    total = sum(map(len, grams))
    return 1 - sum(len(set(each)) for each in grams) / total if total else None


def perplexity(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[Ids], answered: list[Ids], batch_tokens: int
) -> float | None:
    """Return the perplexity of the answers, given their prompts, under this model; None where all are
    empty.
    """
    requests = [
        Request((*prompt, *ids[:-1]), tuple((token,) for token in ids))
        for prompt, ids in zip(prompts, answered, strict=True)
        if ids
    ]
    scorer = Scorer(model, tokenizer.pad_token_id)
    batches = plan_batches(requests, [range(len(requests))] if requests else [], batch_tokens)
    logprob = sum(row[0] for batch in batches for row in scorer.score(requests, batch))
    tokens = sum(map(len, answered))
    return math.exp(min(-logprob / tokens, 700.0)) if tokens else None


@torch.inference_mode()
def divergence(audited: Audited) -> dict[str, float]:
    """KL(base || unlearned) of the next token on benign text in nats, and its standard error over texts.

    One side after the other, for they may be two models: what the first one predicts waits on the CPU.
    """
    sequences = evenly(audited.benign, TEXTS)
    with audited.side("unlearned") as model:
        after = [predicted(model, ids).cpu() for ids in sequences]
    with audited.side("base") as model:
        means = np.array(
            [_kl(predicted(model, ids), logprobs) for ids, logprobs in zip(sequences, after, strict=True)]
        )
    return {
        "kl": float(means.mean()),
        "kl_stderr": float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else 0.0,
    }


def predicted(model: Any, ids: Ids) -> Tensor:
    """Return log-probabilities `(places, vocabulary)` of the next token at places that lie evenly in a text,
    its last token aside.
    """
    input_ids = torch.tensor([ids], device=next(model.parameters()).device)
    positions = torch.zeros_like(input_ids, dtype=torch.bool)
    positions[0, evenly(range(len(ids) - 1), PLACES)] = True
    return torch.cat(list(logits_at(model, positions, input_ids=input_ids))).log_softmax(-1)


def _kl(base: Tensor, unlearned: Tensor) -> float:
    return float(kl_div(unlearned.to(base.device), base, reduction="none", log_target=True).sum(-1).mean())
