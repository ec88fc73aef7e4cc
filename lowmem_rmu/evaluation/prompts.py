r"""Prompts of lm-evaluation-harness 0.4.13, byte for byte: those of `wmdp_*` and `mmlu_*`, and of
`mmlu_*_continuation` for the cloze form.

    The following are multiple choice questions (with answers) about biology.\n\n
    <question>\nA. ...\nD. ...\nAnswer: B\n\n                 (so for every few-shot example)
    <question>\nA. ...\nD. ...\nAnswer:                         (the context ends here)
"""

import hashlib
import json
from dataclasses import dataclass

from lowmem_rmu.data.questions import LETTERS, Question, QuestionSet


@dataclass(frozen=True)
class Prompt:
    """A question as the model sees it: what is scored is how likely each of the continuations follows the
    context.
    """

    context: str
    continuations: tuple[str, ...]

    @property
    def digest(self) -> str:
        """What names this prompt among all others."""
        return hashlib.sha256(json.dumps([self.context, self.continuations]).encode()).hexdigest()[:24]


def prompt(asked: QuestionSet, question: Question) -> Prompt:
    """Return examples and question in the form that the set asks for."""
    kind, write, continuations = _FORMS[asked.scoring]
    examples = [f"{write(example)}{continuations(example)[example.gold]}\n\n" for example in asked.examples]
    return Prompt(
        (
            f"The following are {kind} (with answers) about {asked.about}.\n"
            "\n"
            f"{''.join(examples)}{write(question)}"
        ),
        continuations(question),
    )


def _with_letters(question: Question) -> str:
    choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True)]
    return "\n".join([question.question.strip(), *choices, "Answer:"])


def _cloze(question: Question) -> str:
    return f"Question: {question.question.strip()}\nAnswer:"


_FORMS = {
    "letters": (
        "multiple choice questions",
        _with_letters,
        lambda question: tuple(f" {letter}" for letter in LETTERS),
    ),
    "cloze": ("questions", _cloze, lambda question: tuple(f" {choice}" for choice in question.choices)),
}
