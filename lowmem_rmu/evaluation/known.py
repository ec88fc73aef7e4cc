"""What is noticed before training: whether base knows the topic at all, and whether the retain set is
ordinary text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lowmem_rmu.data.questions import QuestionSet
from lowmem_rmu.evaluation.multiple_choice import CHANCE
from lowmem_rmu.evaluation.perplexity import text_loss
from lowmem_rmu.evaluation.statistics import share_bounds

UNLIKE = 3.0
"""Times: a perplexity that differs by more between two texts says that they are of different kinds."""


def unknown_topic(scores: Mapping[str, Mapping[str, Any]], sets: Sequence[QuestionSet]) -> str | None:
    """Say that base knows too little of the questions about what is to be forgotten; None where it knows
    some, or none are asked.

    `scores` are those of `evaluation/base.json` by task (`questions`, `correct`). Base knows some where the
    95% interval of its share of right answers lies above chance.
    """
    asked = [each for each in sets if each.role == "forgotten" and each.name in scores]
    questions = sum(scores[each.name]["questions"] for each in asked)
    if not questions:
        return None
    right = sum(scores[each.name]["correct"] for each in asked)
    if share_bounds(right, questions)[0] > CHANCE:
        return None
    return (
        f"The base model answers {right / questions:.1%} of the {questions:,} questions about what is "
        f"to be forgotten, which is no better than guessing ({CHANCE:.0%}): they cannot show that it "
        "forgets. Choose a model that knows the topic, or other questions."
    )


def unlike_texts(perplexities: Mapping[str, float], retain: float) -> list[str]:
    """Say which topics' text base finds far less or far more likely than the retain text. `perplexities` are
    by topic.
    """
    return [
        sentence
        for name, perplexity in perplexities.items()
        if (sentence := _unlike(name, perplexity, retain))
    ]


def _unlike(name: str, perplexity: float, retain: float) -> str | None:
    figures = f"(perplexity {perplexity:.1f}, the retain text {retain:.1f})"
    if perplexity > UNLIKE * retain:
        return (
            f"To the base model the text of {name} is much less likely than the retain text {figures}: "
            "it may not know this topic, or not in this form. What it does not know it cannot forget."
        )
    if retain > UNLIKE * perplexity:
        return (
            f"To the base model the retain text is much less likely than the text of {name} {figures}"
            ": it does not look like ordinary text, and what does may then be forgotten with the "
            "topic. Give running text such as articles or books."
        )
    return None


def perplexity_of(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sequences: list[list[int]], batch_tokens: int
) -> float:
    """Return the perplexity of a few token sequences under a model as it stands (adapter on or off)."""
    return float(text_loss(model, tokenizer, sequences, batch_tokens)["perplexity"])
