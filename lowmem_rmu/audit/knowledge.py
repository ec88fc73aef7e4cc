"""What the audit measures: the questions of the topics that were forgotten or, where there are none, unseen
text about them.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from lowmem_rmu.audit.recovery import Values, less_what_base_gains
from lowmem_rmu.config.schema import Corpus
from lowmem_rmu.data.corpora import read_documents, split_held_out
from lowmem_rmu.data.tokens import encode_texts
from lowmem_rmu.distributed import Distributed
from lowmem_rmu.evaluation.multiple_choice import CHANCE, Asked, Work, answer, by_prompt
from lowmem_rmu.evaluation.perplexity import sequence_losses
from lowmem_rmu.runs.records import Answer

RARE = 0.05
"""A word of a question that so large a share of the questions at most has says what the question is about."""
ENOUGH = 30
"""Questions: with fewer an interval is too wide to tell anything."""
_WORD = re.compile(r"\w+")

Item = TypeVar("Item")


class Knowledge(Protocol):
    """Items that a model knows or not: a question or a text each."""

    @property
    def are_questions(self) -> bool: ...

    @property
    def chance(self) -> float | None:
        """What guessing gives; None where nothing can be guessed."""

    @property
    def tokens(self) -> int:
        """How many go through the model for one measurement."""

    def __len__(self) -> int: ...

    def of(self, model: Any) -> Values:
        """Measure what the model knows of each item, as it stands (adapters on or off)."""

    def figure(self, values: Values) -> float:
        """Return the mean over all items: accuracy as a share, or the loss in nats/token."""

    def beyond_base(self, attacked: Values, same: Values | None, base: Values) -> Values:
        """Return the values that count as recovered, where the same attack turned base's values into `same`
        (None: it was not tried on base).
        """


@dataclass(frozen=True)
class Questions:
    """Right or wrong."""

    asked: list[Asked]
    tokenizer: PreTrainedTokenizerBase
    batch_tokens: int

    @property
    def are_questions(self) -> bool:
        return True

    @property
    def chance(self) -> float | None:
        return CHANCE

    def __len__(self) -> int:
        return len(self.asked)

    @property
    def tokens(self) -> int:
        return sum(map(len, encode_texts(self.tokenizer, [each.prompt.context for each in self.asked])))

    def of(self, model: Any) -> Values:
        return [
            float(row.correct) for row in answers_of(model, self.tokenizer, self.asked, self.batch_tokens)
        ]

    def figure(self, values: Values) -> float:
        return sum(values) / len(values)

    def beyond_base(self, attacked: Values, same: Values | None, base: Values) -> Values:
        return attacked  # base answers as well as it can


@dataclass(frozen=True)
class Texts:
    """The log-probability of each sequence in nats."""

    sequences: list[list[int]]
    tokenizer: PreTrainedTokenizerBase
    batch_tokens: int

    @property
    def are_questions(self) -> bool:
        return False

    @property
    def chance(self) -> float | None:
        return None

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))

    def of(self, model: Any) -> Values:
        return [-loss for loss in sequence_losses(model, self.tokenizer, self.sequences, self.batch_tokens)]

    def figure(self, values: Values) -> float:
        return -sum(values) / (self.tokens - len(self))

    def beyond_base(self, attacked: Values, same: Values | None, base: Values) -> Values:
        return less_what_base_gains(attacked, same, base)


@torch.inference_mode()
def answers_of(
    model: Any, tokenizer: PreTrainedTokenizerBase, asked: list[Asked], batch_tokens: int
) -> list[Answer]:
    """Return the model's answers to prompts of any form, in their order."""
    places, found = by_prompt(asked), dict[str, list[float]]()
    for some in Work(model, tokenizer, [same[0] for same in places.values()], batch_tokens).results(
        set(), Distributed()
    ):
        found |= some
    return [answer(each, found[each.prompt.digest]) for each in asked]


def held_out_documents(corpora: Iterable[Corpus]) -> tuple[list[str], list[str]]:
    """Return documents that training never saw, in two halves: to relearn from, and to measure on."""
    held = [
        text
        for corpus in corpora
        if corpus.held_out
        for text in split_held_out(read_documents(corpus), corpus.held_out)[1]
    ]
    return held[::2], held[1::2]


def untold(asked: Sequence[Asked], documents: Iterable[str]) -> list[Asked]:
    """Return the questions that no document tells about: none holds a word by which the question is known
    among the others.
    """
    words = [set(_words(each.question.question)) for each in asked]
    common = Counter(word for each in words for word in each)
    told = {word for document in documents for word in _words(document)}
    rare = [{word for word in each if common[word] <= max(1, RARE * len(asked))} for each in words]
    return [each for each, names in zip(asked, rare, strict=True) if not names & told]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most so many of them, at even distances."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]
