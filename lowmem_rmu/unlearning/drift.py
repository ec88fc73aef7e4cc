"""The guard against drift: how far the model has moved from base, on what is to stay and on the topic, looked at every few steps.

    every few steps   KL(base || unlearned) on text and questions that training does not see   -> a `Check`
    after each check  best so far: the topic as far as it gets while the rest stays within the limit
    too far twice     training ends, and the best weights come back; without any, a collapse ends the run

Losses at the target layer cannot show this: they look perfect on a model that answers A to every question.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import kl_div

from lowmem_rmu.data.corpora import pad
from lowmem_rmu.model.adapters import base_only
from lowmem_rmu.model.logits import POSITIONS, head_of, hidden_at

TOKENS = 64
"""Tokens of a text that a check looks at; questions are looked at whole."""
MOVED = 0.5
"""Nats per token: a topic that has moved less counts as not moved yet."""
FAR = 3.0
"""Nats per token: a topic this far from base is gone from what the model says; more distance costs the rest, for nothing."""
COLLAPSED = 10.0
"""Times the limit: a model that has moved this far on what is to stay is no longer the same model."""
PATIENCE = 2
"""Checks in a row that end training: a single one can be chance."""


@dataclass(frozen=True)
class Kind:
    """Token sequences that training does not see: running text, and questions that end where the answer would follow."""

    texts: list[list[int]]
    questions: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class GuardData:
    """What a guard looks at: what is to stay, each topic, and the tokens that stand for the answers A to D."""

    retain: Kind
    topics: dict[str, Kind]
    letters: list[int]


@dataclass(frozen=True)
class Check:
    """One look at the model after `step` steps; divergences are in nats, means over predicted tokens or over questions."""

    step: int
    retain_kl: float
    question_kl: float | None
    topic_kl: float
    topic_question_kl: float | None
    letters: str = ""
    """The answers to the questions about the retain text."""
    base_letters: str = ""

    @property
    def damage(self) -> float:
        """How far what is to stay has moved: of text and questions, whichever moved more."""
        return max(self.retain_kl, self.question_kl or 0.0)

    @property
    def distance(self) -> float:
        """How far the topic has moved: of text and questions, whichever moved less.

        A mean would call a topic gone whose text is far from base while its questions are still answered as before.
        """
        if self.topic_question_kl is None:
            return self.topic_kl
        return min(self.topic_kl, self.topic_question_kl)

    @property
    def says_one_letter(self) -> bool:
        """Whether every question gets the same answer, where base gave several."""
        return len(set(self.letters)) == 1 and len(set(self.base_letters)) > 2

    def has_collapsed(self, limit: float) -> bool:
        return self.says_one_letter or self.damage > COLLAPSED * limit

    def row(self) -> dict[str, float | str | None]:
        """What `metrics.jsonl` holds of it, beside the figures of the step."""
        return {
            "retain_kl": self.retain_kl,
            "question_kl": self.question_kl,
            "topic_kl": self.topic_kl,
            "topic_question_kl": self.topic_question_kl,
            "letters": self.letters,
        }


def best_of(checks: Sequence[Check], limit: float) -> Check | None:
    """Return the best check with the rest within `limit`, or None before the topic has moved.

    The topic should be as far away as possible; among checks where it is beyond `FAR`, the one with the least damage is the best.
    """
    good = [check for check in checks if check.damage <= limit and check.distance >= MOVED]
    return max(good, key=lambda check: (min(check.distance, FAR), -check.damage), default=None)


def is_too_far(checks: Sequence[Check], limit: float) -> bool:
    """Whether the last `PATIENCE` checks all found the rest above `limit`."""
    last = checks[-PATIENCE:]
    return len(last) == PATIENCE and all(check.damage > limit for check in last)


def has_collapsed(checks: Sequence[Check], limit: float) -> bool:
    """Whether the last `PATIENCE` checks all found a model that no longer answers as a model does."""
    last = checks[-PATIENCE:]
    return len(last) == PATIENCE and all(check.has_collapsed(limit) for check in last)


class Guard:
    """Measures a model against itself with its adapter off. What base gives is computed once."""

    def __init__(self, model: PeftModel, data: GuardData, pad_id: int) -> None:
        self.model, self.data, self.pad_id = model, data, pad_id
        self.device = next(model.parameters()).device
        self._base: dict[str, list[Tensor]] = {}

    @torch.inference_mode()
    def check(self, step: int) -> Check:
        """Look at the model as it is after `step` steps."""
        retain, letters, base_letters = self._look("retain", self.data.retain)
        topics = [self._look(f"topic {name}", kind)[0] for name, kind in self.data.topics.items()]
        # Of several topics, the one that has moved least counts.
        questions = [asked for _, asked in topics if asked is not None]
        return Check(
            step=step,
            retain_kl=retain[0],
            question_kl=retain[1],
            topic_kl=min(text for text, _ in topics),
            topic_question_kl=min(questions, default=None),
            letters=letters,
            base_letters=base_letters,
        )

    def _look(self, name: str, kind: Kind) -> tuple[tuple[float, float | None], str, str]:
        """Return the divergence on texts and on questions, and the letters that the model and base answer."""
        texts = [ids[:TOKENS] for ids in kind.texts]
        text_kl = _mean(values for values, _, _ in self._pieces(f"{name} texts", texts, whole=True))
        if not kind.questions:
            return (text_kl, None), "", ""
        asked = list(self._pieces(f"{name} questions", kind.questions, whole=False))
        question_kl = _mean(values for values, _, _ in asked)
        letters = "".join(self._letters(after) for _, after, _ in asked)
        base_letters = "".join(self._letters(before) for _, _, before in asked)
        return (text_kl, question_kl), letters, base_letters

    def _pieces(self, name: str, sequences: list[list[int]], whole: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield divergences with the log-probabilities of the model and of base, a few positions at a time.

        With `whole`, every token but a first one is predicted; else only what follows the last one.
        """
        batch = pad(sequences, self.pad_id, "right", self.device)
        positions = batch.predicting if whole else batch.last
        moved = hidden_at(self.model, positions, input_ids=batch.input_ids)
        if name not in self._base:
            with base_only(self.model):
                self._base[name] = list(hidden_at(self.model, positions, input_ids=batch.input_ids).split(POSITIONS // 4))
        for before, after in zip(self._base[name], moved.split(POSITIONS // 4), strict=True):
            with base_only(self.model):
                expected = head_of(self.model, before, input_ids=batch.input_ids).log_softmax(-1)
            found = head_of(self.model, after, input_ids=batch.input_ids).log_softmax(-1)
            yield kl_div(found, expected, reduction="none", log_target=True).sum(-1), found, expected

    def _letters(self, logprobs: Tensor) -> str:
        best = logprobs[:, self.data.letters].argmax(dim=-1).tolist()
        return "".join("ABCD"[index] for index in best)


def _mean(pieces: Iterator[Tensor]) -> float:
    return torch.cat(list(pieces)).mean().item()


def outcome(checks: Sequence[Check], limit: float) -> str:
    """Return in words which weights a guarded run has kept, and what the guard saw there."""
    best, last = best_of(checks, limit), checks[-1]
    if best is None:
        return (
            f"The guard found no point with the topic far from base and the rest within {limit:g} nats per token: after step {last.step} the "
            f"topic diverges by {last.distance:.2f} and the rest by {last.damage:.2f}. The last weights are kept."
        )
    return (
        f"The weights after step {best.step} of {last.step} are kept: the topic diverges from base by {best.distance:.2f} nats per token, "
        f"text and questions that are to stay by {best.damage:.2f} (limit {limit:g})."
    )


def collapse(check: Check) -> str:
    """Return what ends the run of a model that no longer answers as a model does."""
    if check.says_one_letter:
        found = f"it answers {check.letters[0]} to every question about text that is to stay (base: {letter_share(check.base_letters)})"
    else:
        found = f"on text that is to stay it diverges from base by {check.damage:.1f} nats per token"
    return (
        f"The model has collapsed by step {check.step}: {found}, and the guard found no better point before.\n"
        "Lower rmu.learning_rate or a topic's adaptive_scale, raise its alpha, or give more and other retain text."
    )


def letter_share(letters: str) -> str:
    """Return how often each letter was answered, the most frequent one first: `A 7, C 1`."""
    return ", ".join(f"{letter} {count}" for letter, count in Counter(letters).most_common())
