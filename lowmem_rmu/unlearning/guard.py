"""The guard against drift: how far the model has moved from base, on what is to stay and on the topic, looked
at every few steps.

    every few steps   KL(base || unlearned) on text and questions that training does not see   -> a `Check`
    after each check  best so far: the topic as far as it gets while the rest stays within the limit
    far enough        training ends: the topic is gone from what the model says
    too far twice     training ends, and the best weights come back; without any, a collapse (one letter,
                      one token over and over, a divergence that runs away) ends the run

Losses at the target layer cannot show this: they look perfect on a model that answers A to every question.

Where only the layers up to the target layer are loaded, `LayerGuard` measures how far their output has moved
instead.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import kl_div

from lowmem_rmu.data.corpora import pad
from lowmem_rmu.model.adapters import base_only
from lowmem_rmu.model.layers import run_layers, run_trunk
from lowmem_rmu.model.logits import POSITIONS, head_of, hidden_at
from lowmem_rmu.unlearning.losses import sink_scale

TOKENS = 64
"""Tokens of a text that a check looks at; questions are looked at whole."""
LOOPING = 0.5
"""Share of the positions of ordinary text: a model that predicts one and the same token at more of them
writes in a loop.
"""
PATIENCE = 2
"""Checks in a row that end training: a single one can be chance."""
Unit = Literal["nats", "shift"]
"""Nats per token, from the logits; or the relative shift of the target layer's output, `||h - h0|| /
||h0||`.
"""


@dataclass(frozen=True)
class Bounds:
    """What counts as near and far from base, in one unit of distance."""

    moved: float
    """A topic that has moved less counts as not moved yet."""
    far: float
    """A topic this far from base is gone from what the model says: training ends, as more distance would only
    cost the rest.
    """
    collapsed: float
    """Times the limit: a model that has moved this far on what is to stay is no longer the same model."""


BOUNDS: dict[Unit, Bounds] = {
    "nats": Bounds(moved=0.5, far=2.0, collapsed=10.0),
    "shift": Bounds(moved=0.5, far=1.1, collapsed=4.0),
}
"""Of shifts: where they meet those of nats on a model of 1.5 billion parameters (docs/selectivity.md)."""
WORDS: dict[Unit, str] = {"nats": "nats per token", "shift": "of the activations' own size"}


@dataclass(frozen=True)
class Kind:
    """Token sequences that training does not see: running text, and questions that end where the answer would
    follow.
    """

    texts: list[list[int]]
    questions: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class GuardData:
    """What a guard looks at: what is to stay, each topic, and the tokens that stand for the answers A to
    D.
    """

    retain: Kind
    topics: dict[str, Kind]
    letters: list[int]


@dataclass(frozen=True)
class Check:
    """One look at the model after `step` steps: how far it has moved from base, as means over positions or
    over questions.

    In nats, the distances are divergences KL(base || unlearned). As a shift, they are relative to the
    activations of base.
    """

    step: int
    retain_kl: float
    question_kl: float | None
    topic_kl: float
    topic_question_kl: float | None
    letters: str = ""
    """The answers to the questions about the retain text."""
    base_letters: str = ""
    top_share: float = 0.0
    """The share of positions of the retain text at which the most common prediction is the model's most
    likely token.
    """
    base_top_share: float = 0.0
    unit: Unit = "nats"

    @property
    def bounds(self) -> Bounds:
        """What counts as far in the unit of this check."""
        return BOUNDS[self.unit]

    @property
    def damage(self) -> float:
        """How far what is to stay has moved: of text and questions, whichever moved more."""
        return max(self.retain_kl, self.question_kl or 0.0)

    @property
    def distance(self) -> float:
        """How far the topic has moved: of text and questions, whichever moved less.

        A mean would call a topic gone whose text is far from base while its questions are still answered as
        before.
        """
        if self.topic_question_kl is None:
            return self.topic_kl
        return min(self.topic_kl, self.topic_question_kl)

    @property
    def says_one_letter(self) -> bool:
        """Whether every question gets the same answer, where base gave several."""
        return len(set(self.letters)) == 1 and len(set(self.base_letters)) > 2

    @property
    def writes_one_token(self) -> bool:
        """Whether one token is predicted at most positions, where base predicts many: generated text would
        loop.
        """
        return self.top_share > LOOPING and self.base_top_share < LOOPING / 2

    def has_collapsed(self, limit: float) -> bool:
        return self.says_one_letter or self.writes_one_token or self.damage > self.bounds.collapsed * limit

    def row(self) -> dict[str, float | str | None]:
        """Return the fields that the check adds to its step in `metrics.jsonl`."""
        distances = {
            "retain": self.retain_kl,
            "question": self.question_kl,
            "topic": self.topic_kl,
            "topic_question": self.topic_question_kl,
        }
        if self.unit == "shift":
            return {f"{name}_shift": distance for name, distance in distances.items()}
        return {**{f"{name}_kl": distance for name, distance in distances.items()}, "letters": self.letters}


def best_of(checks: Sequence[Check], limit: float) -> Check | None:
    """Return the best check with the rest within `limit`, or None before the topic has moved.

    The topic should be as far away as possible; among checks where it is beyond `Bounds.far`, the one with
    the least damage is the best.
    """
    good = [check for check in checks if check.damage <= limit and check.distance >= check.bounds.moved]
    return max(good, key=lambda check: (min(check.distance, check.bounds.far), -check.damage), default=None)


def is_gone(best: Check | None) -> bool:
    """Return whether the topic is so far from base that more training would gain nothing."""
    return best is not None and best.distance >= best.bounds.far


def is_too_far(checks: Sequence[Check], limit: float) -> bool:
    """Return whether the last `PATIENCE` checks all found the rest above `limit`."""
    last = checks[-PATIENCE:]
    return len(last) == PATIENCE and all(check.damage > limit for check in last)


def has_collapsed(checks: Sequence[Check], limit: float) -> bool:
    """Return whether the last `PATIENCE` checks all found a model that no longer answers as a model does."""
    last = checks[-PATIENCE:]
    return len(last) == PATIENCE and all(check.has_collapsed(limit) for check in last)


@dataclass(frozen=True)
class Piece:
    """Predictions at `n` positions: divergence from base in nats and the most likely tokens, `(n,)`; answers
    A to D, `n` letters.
    """

    kl: Tensor
    predicted: Tensor
    base_predicted: Tensor
    letters: str
    base_letters: str


@dataclass(frozen=True)
class Look:
    """The model compared with base on the texts and questions of one kind; fields as those of `Check`."""

    text_kl: float
    top_share: float
    base_top_share: float
    question_kl: float | None = None
    letters: str = ""
    base_letters: str = ""


class Guard:
    """Measures a model against itself with its adapter off. What base gives is computed once."""

    def __init__(self, model: PeftModel, data: GuardData, pad_id: int) -> None:
        self.model, self.data, self.pad_id = model, data, pad_id
        self.device = next(model.parameters()).device
        self._base: dict[str, list[Tensor]] = {}

    @torch.inference_mode()
    def check(self, step: int) -> Check:
        """Look at the model as it is after `step` steps."""
        retain = self._look("retain", self.data.retain)
        topics = [self._look(f"topic {name}", kind) for name, kind in self.data.topics.items()]
        # Of several topics, the one that has moved least counts.
        questions = [topic.question_kl for topic in topics if topic.question_kl is not None]
        return Check(
            step=step,
            retain_kl=retain.text_kl,
            question_kl=retain.question_kl,
            topic_kl=min(topic.text_kl for topic in topics),
            topic_question_kl=min(questions, default=None),
            letters=retain.letters,
            base_letters=retain.base_letters,
            top_share=retain.top_share,
            base_top_share=retain.base_top_share,
        )

    def _look(self, name: str, kind: Kind) -> Look:
        """Compare the model with base on the texts and questions of one kind."""
        texts = [ids[:TOKENS] for ids in kind.texts]
        read = list(self._pieces(f"{name} texts", texts, whole=True))
        found = Look(
            text_kl=torch.cat([piece.kl for piece in read]).mean().item(),
            top_share=_top_share([piece.predicted for piece in read]),
            base_top_share=_top_share([piece.base_predicted for piece in read]),
        )
        if not kind.questions:
            return found
        asked = list(self._pieces(f"{name} questions", kind.questions, whole=False))
        return replace(
            found,
            question_kl=torch.cat([piece.kl for piece in asked]).mean().item(),
            letters="".join(piece.letters for piece in asked),
            base_letters="".join(piece.base_letters for piece in asked),
        )

    def _pieces(self, name: str, sequences: list[list[int]], whole: bool) -> Iterator[Piece]:
        """Yield what the model and base predict, a few positions at a time.

        With `whole`, every token but a first one is predicted; else only what follows the last one.
        """
        batch = pad(sequences, self.pad_id, "right", self.device)
        positions = batch.predicting if whole else batch.last
        moved = hidden_at(self.model, positions, input_ids=batch.input_ids)
        if name not in self._base:
            with base_only(self.model):
                self._base[name] = list(
                    hidden_at(self.model, positions, input_ids=batch.input_ids).split(POSITIONS // 4)
                )
        for before, after in zip(self._base[name], moved.split(POSITIONS // 4), strict=True):
            with base_only(self.model):
                expected = head_of(self.model, before, input_ids=batch.input_ids).log_softmax(-1)
            found = head_of(self.model, after, input_ids=batch.input_ids).log_softmax(-1)
            yield Piece(
                kl=kl_div(found, expected, reduction="none", log_target=True).sum(-1),
                predicted=found.argmax(dim=-1),
                base_predicted=expected.argmax(dim=-1),
                letters=self._letters(found),
                base_letters=self._letters(expected),
            )

    def _letters(self, logprobs: Tensor) -> str:
        best = logprobs[:, self.data.letters].argmax(dim=-1).tolist()
        return "".join("ABCD"[index] for index in best)


class LayerGuard:
    """Measures how far the target layer's output has moved, where no layer above it is loaded.

    A shift is `||h - h0|| / ||h0||`, the mean over positions without attention sinks: `h0` is what base
    gives. It says less than the divergence of predictions, as it cannot know what later layers make of it.
    """

    def __init__(self, model: PeftModel, data: GuardData, pad_id: int, updated: slice) -> None:
        self.model, self.data, self.pad_id, self.updated = model, data, pad_id, updated
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def check(self, step: int) -> Check:
        """Look at the loaded layers as they are after `step` steps."""
        text, question = self._look(self.data.retain)
        topics = [self._look(kind) for kind in self.data.topics.values()]
        return Check(
            step=step,
            retain_kl=text,
            question_kl=question,
            # Of several topics, the one that has moved least counts.
            topic_kl=min(moved for moved, _ in topics),
            topic_question_kl=min((moved for _, moved in topics if moved is not None), default=None),
            unit="shift",
        )

    def _look(self, kind: Kind) -> tuple[float, float | None]:
        """Return the shift on texts and on questions; None without questions."""
        texts = [ids[:TOKENS] for ids in kind.texts]
        return self._shift(texts), self._shift(kind.questions) if kind.questions else None

    def _shift(self, sequences: list[list[int]]) -> float:
        batch = pad(sequences, self.pad_id, "right", self.device)
        trunk = run_trunk(self.model, batch.input_ids, batch.attention_mask, self.updated)
        moved = run_layers(self.model, trunk, self.updated).float()
        with base_only(self.model):
            frozen = run_layers(self.model, trunk, self.updated).float()
        ordinary = batch.is_token & (sink_scale(frozen, batch.is_token) == 1)
        shifts = (moved - frozen).norm(dim=-1) / frozen.norm(dim=-1)
        return shifts[ordinary].mean().item()


def _top_share(predicted: list[Tensor]) -> float:
    """Return how often the most common of the predicted tokens occurs, as a share."""
    tokens = torch.cat(predicted)
    return int(tokens.bincount().max()) / len(tokens)


def outcome(checks: Sequence[Check], limit: float, steps: int) -> str:
    """Return in words which weights a guarded run of up to `steps` steps has kept, and what the guard saw
    there.
    """
    best, last = best_of(checks, limit), checks[-1]
    ended = ""
    if last.step < steps:
        reason = (
            "the topic is far from base"
            if is_gone(best)
            else "text and questions that are to stay are too far from base"
        )
        ended = f"Training ended {steps - last.step} steps early: {reason}. "
    if best is None:
        return (
            f"The guard found no point with the topic far from base and the rest within {limit:g} "
            f"{WORDS[last.unit]}: after step {last.step} the topic diverges by {last.distance:.2f} "
            f"and the rest by {last.damage:.2f}. The last weights are kept."
        )
    return (
        f"{ended}The weights after step {best.step} of {last.step} are kept: the topic diverges from "
        f"base by {best.distance:.2f} {WORDS[best.unit]}, text and questions that are to stay by "
        f"{best.damage:.2f} (limit {limit:g})."
    )


def collapse(check: Check) -> str:
    """Return what ends the run of a model that no longer answers as a model does."""
    if check.says_one_letter:
        found = (
            f"it answers {check.letters[0]} to every question about text that is to stay (base: "
            f"{letter_share(check.base_letters)})"
        )
    elif check.writes_one_token:
        found = (
            f"at {check.top_share:.0%} of the positions of text that is to stay it predicts the same "
            f"token (base: {check.base_top_share:.0%})"
        )
    else:
        found = f"on text that is to stay it diverges from base by {check.damage:.1f} {WORDS[check.unit]}"
    return (
        f"The model has collapsed by step {check.step}: {found}, and the guard found no better point "
        "before.\n"
        "Lower rmu.learning_rate or a topic's adaptive_scale, raise its alpha, or give more and other "
        "retain text."
    )


def letter_share(letters: str) -> str:
    """Return how often each letter was answered, the most frequent one first: `A 7, C 1`."""
    return ", ".join(f"{letter} {count}" for letter, count in Counter(letters).most_common())
