"""Questions and chat turns made from running text, so that a retain set holds the forms in which a model is
used.

A model that was only ever held in place on prose may treat every question as part of the topic. What these
samples say matters little; that they have the form of a multiple-choice question or of a conversation does.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowmem_rmu.data.questions import LETTERS
from lowmem_rmu.data.tokens import encode_texts

SENTENCE_END = re.compile(r"(?<=[.!?])[\"”’)]?\s+(?=[\"“A-Z])")
WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")
FEWEST_WORDS = 8
MOST_CHARACTERS = 300
SHORTEST_KEYWORD = 5
"""Letters of a word that is asked about: shorter words tend to be articles and prepositions."""
DRAWN = 16
"""Passages from which the wrong choices of a question are taken."""
HEADER = "The following are multiple choice questions (with answers) about {}.\n\n"
REQUESTS = (
    "Continue this text: {}",
    "What comes next? {}",
    "{}\n\nWhat follows from this?",
    "Please go on from here: {}",
)


@dataclass(frozen=True)
class Passage:
    """Two sentences that follow each other in a document."""

    first: str
    second: str


Kind = Callable[[Passage, Sequence[Passage], int, random.Random], str | None]
"""Writes a question about a passage, with choices from other passages and the right one in a given place."""


def find_passages(documents: Sequence[str]) -> list[Passage]:
    """Return the pairs of neighboring sentences of all documents, in their order.

    Headings, tables, formulas and lists are left out: both sentences need at least `FEWEST_WORDS` words, most
    of them in lower case, and an end such as a full stop.
    """
    passages = []
    for document in documents:
        for paragraph in document.split("\n"):
            sentences = SENTENCE_END.split(paragraph.strip())
            pairs = zip(sentences, sentences[1:], strict=False)
            passages += [
                Passage(first, second)
                for first, second in pairs
                if _is_ordinary(first) and _is_ordinary(second)
            ]
    return passages


def _is_ordinary(sentence: str) -> bool:
    if len(sentence) > MOST_CHARACTERS or not sentence.rstrip('"”’)').endswith((".", "!", "?")):
        return False
    words = WORD.findall(sentence)
    in_lower_case = sum(word.islower() for word in words)
    return len(words) >= FEWEST_WORDS and in_lower_case > len(sentence.split()) / 2


def question_samples(
    passages: Sequence[Passage], count: int, tokenizer: PreTrainedTokenizerBase, max_tokens: int, seed: str
) -> list[list[int]]:
    """Return up to `count` multiple-choice questions with their answers, as token ids, in the form of
    `evaluation.prompts`.

    Half ask which sentence follows another, half which word is missing. The other choices come from other
    passages, and every letter is the right one equally often. A question that is longer than `max_tokens`
    gives way to one of the other kind, or is left out: cut short it would lack its answer. Fewer than four
    passages make none.
    """
    if len(passages) < len(LETTERS):
        return []
    drawn = random.Random(seed)
    kinds: list[Kind] = [_which_follows, _which_is_missing]
    candidates: list[tuple[int, str]] = []
    for number, passage in enumerate(_endless(passages, count, drawn)):
        gold = number // len(kinds) % len(LETTERS)
        # The kind whose turn it is, then the others.
        turn = number % len(kinds)
        texts = [kind(passage, passages, gold, drawn) for kind in kinds[turn:] + kinds[:turn]]
        candidates += [(number, text) for text in texts if text]
    # All are encoded together, which is many times faster than one by one.
    encoded = encode_texts(tokenizer, [text for _, text in candidates])
    fitting: dict[int, list[int]] = {}
    for (number, _), ids in zip(candidates, encoded, strict=True):
        if len(ids) <= max_tokens:
            fitting.setdefault(number, ids)
    return list(fitting.values())


def question_prompts(
    passages: Sequence[Passage], count: int, tokenizer: PreTrainedTokenizerBase, seed: str
) -> list[list[int]]:
    """Return up to `count` questions about a missing word as token ids that end where the answer's letter
    would follow.
    """
    if len(passages) < len(LETTERS):
        return []
    drawn = random.Random(seed)
    texts = [
        _which_is_missing(passage, passages, number % len(LETTERS), drawn)
        for number, passage in enumerate(_endless(passages, count, drawn))
    ]
    return encode_texts(tokenizer, [text.rpartition(" ")[0] for text in texts if text])


def _which_follows(
    passage: Passage, passages: Sequence[Passage], gold: int, drawn: random.Random
) -> str | None:
    others = [other.second for other in drawn.sample(passages, min(len(passages), DRAWN))]
    question = f"Which sentence follows this one? {passage.first}"
    return _question(_keyword(passage.first, drawn), question, passage.second, others, gold)


def _which_is_missing(
    passage: Passage, passages: Sequence[Passage], gold: int, drawn: random.Random
) -> str | None:
    missing = _keyword(passage.second, drawn)
    with_gap = re.sub(rf"\b{re.escape(missing)}\b", "____", passage.second, count=1)
    others = [_keyword(other.first, drawn) for other in drawn.sample(passages, min(len(passages), DRAWN))]
    question = f"Which word is missing? {passage.first} {with_gap}"
    return _question(_keyword(passage.first, drawn), question, missing, others, gold)


def _question(about: str, question: str, right: str, others: Sequence[str], gold: int) -> str | None:
    """Write a question with the right choice in the place `gold`; None where there are too few other
    choices.
    """
    choices = [choice for choice in dict.fromkeys(others) if choice != right][: len(LETTERS) - 1]
    if len(choices) < len(LETTERS) - 1:
        return None
    choices.insert(gold, right)
    written = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    return HEADER.format(about) + "\n".join([question, *written, f"Answer: {LETTERS[gold]}"])


def _keyword(sentence: str, drawn: random.Random) -> str:
    """Draw one of a sentence's longer words."""
    words = [word for word in WORD.findall(sentence) if len(word) >= SHORTEST_KEYWORD]
    return drawn.choice(words or WORD.findall(sentence))


def chat_samples(
    passages: Sequence[Passage], count: int, tokenizer: PreTrainedTokenizerBase, max_tokens: int, seed: str
) -> list[list[int]]:
    """Return up to `count` conversations of one request and one answer as token ids, in the model's own chat
    template.

    Those longer than `max_tokens` are cut there. A model without a template, or with one that cannot write
    such a conversation, has none.
    """
    if not passages or not tokenizer.chat_template:
        return []
    order = _endless(passages, count, random.Random(seed))
    conversations = [
        _conversation(passage, REQUESTS[number % len(REQUESTS)]) for number, passage in enumerate(order)
    ]
    try:
        texts = [str(tokenizer.apply_chat_template(messages, tokenize=False)) for messages in conversations]
    except Exception:  # templates are programs of their own: they raise whatever they like
        return []
    # The template writes special tokens itself.
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [ids[:max_tokens] for ids in encoded]


def _conversation(passage: Passage, request: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": request.format(passage.first)},
        {"role": "assistant", "content": passage.second},
    ]


def _endless(items: Sequence[Passage], count: int, drawn: random.Random) -> list[Passage]:
    """Return `count` items: all of them in a new order, then again, until there are enough."""
    order: list[Passage] = []
    while len(order) < count:
        order += drawn.sample(items, len(items))
    return order[:count]
