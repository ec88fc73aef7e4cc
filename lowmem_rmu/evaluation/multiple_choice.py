"""A-D questions scored as lm-evaluation-harness does: the choice whose letter, or whose text, is the most
likely continuation.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lowmem_rmu.data.questions import LETTERS, Question, QuestionSet
from lowmem_rmu.data.tokens import encode_texts
from lowmem_rmu.distributed import Distributed
from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.prompts import Prompt, prompt
from lowmem_rmu.evaluation.scorer import Request, Scorer, plan_batches
from lowmem_rmu.model.layers import can_share_prefix
from lowmem_rmu.model.logits import NOT_FINITE
from lowmem_rmu.runs.records import Answer

CHANCE = 1 / len(LETTERS)
ROUND = 4  # batches that each process takes before they tell each other

Progress = Callable[[int, float], bool]
"""Hears questions done and accuracy so far, and says whether to stop."""


class Interrupted(Exception):
    """An evaluation was asked to stop and has done so, in all processes."""


@dataclass(frozen=True)
class Evaluated:
    """What one side of a run scored: `scores` as in `evaluation/base.json`, `answers` a row a question."""

    scores: dict[str, Any]
    answers: list[Answer]


@dataclass(frozen=True)
class Asked:
    """A question in its place, and the prompt that puts it."""

    asked: QuestionSet
    index: int
    question: Question
    prompt: Prompt


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sets: list[QuestionSet],
    batch_tokens: int,
    known: Mapping[str, list[float]] | None = None,
    keep: Callable[[list[Answer]], None] = lambda answers: None,
    progress: Progress = lambda done, accuracy: False,
    distributed: Distributed | None = None,
) -> Evaluated:
    """Ask the model every question as it stands (adapter on or off); of `processes`, each asks its share of
    them.

    `known` are log-probabilities by the digest of their prompt, which are not asked again; `keep` gets new
    answers as they come; `progress` hears questions done and accuracy so far, and may ask to stop: then
    Interrupted is raised. Of several processes, those of the first one count.
    """
    distributed = distributed or Distributed()
    known = distributed.broadcast(known)
    started, everything = time.monotonic(), ask(sets)
    places = by_prompt(everything)
    fitting = {digest: len(same[0].question.choices) for digest, same in places.items()}
    logprobs = {
        digest: values for digest, values in (known or {}).items() if len(values) == fitting.get(digest)
    }
    done = [answer(each, values) for digest, values in logprobs.items() for each in places[digest]]
    known_before, work = (
        len(done),
        Work(model, tokenizer, [same[0] for same in places.values()], batch_tokens),
    )
    for found in work.results(set(logprobs), distributed):
        new = [answer(each, values) for digest, values in found.items() for each in places[digest]]
        logprobs |= found
        done += new
        keep(new)
        if distributed.broadcast(progress(len(done), sum(each.correct for each in done) / max(1, len(done)))):
            raise Interrupted
    answers = [answer(each, logprobs[each.prompt.digest]) for each in everything]
    scores = score(sets, answers, time.monotonic() - started)
    return Evaluated(scores | {"known_before": known_before, "cut_prompts": work.cut}, answers)


def ask(sets: list[QuestionSet]) -> list[Asked]:
    """Return every question in its place, with its prompt."""
    return [
        Asked(each, index, question, prompt(each, question))
        for each in sets
        for index, question in enumerate(each.questions)
    ]


def by_prompt(everything: list[Asked]) -> dict[str, list[Asked]]:
    """By its digest, every place that the same prompt has."""
    places: dict[str, list[Asked]] = {}
    for each in everything:
        places.setdefault(each.prompt.digest, []).append(each)
    return places


def answer(each: Asked, logprobs: list[float]) -> Answer:
    """Return the choice with the highest log-probability; in the cloze form a character of its text, as the
    harness's `acc_norm` has it: an empty text is never chosen. Raises UserError where a log-probability is
    not a number.
    """
    if any(math.isnan(value) for value in logprobs):
        raise UserError(
            f"The model gives no finite log-probabilities for question {each.index} of {each.asked.name}.",
            f"{NOT_FINITE}",
        )
    lengths = (
        [len(choice) for choice in each.question.choices]
        if each.asked.scoring == "cloze"
        else [1] * len(logprobs)
    )
    chosen = max(
        range(len(logprobs)),
        key=lambda choice: logprobs[choice] / lengths[choice] if lengths[choice] else -math.inf,
    )
    return as_row(each, logprobs, chosen)


def as_row(each: Asked, logprobs: list[float] | None, chosen: int | None) -> Answer:
    """Make the record of an answer. `chosen` is None where a model named no choice: a wrong answer."""
    return Answer(
        task=each.asked.name,
        index=each.index,
        prompt=each.prompt.digest,
        logprobs=logprobs,
        answer=chosen,
        gold=each.question.gold,
        correct=chosen == each.question.gold,
    )


class Work:
    """Distinct prompts as batches of requests to a model."""

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, distinct: list[Asked], batch_tokens: int
    ) -> None:
        self.scorer = Scorer(model, tokenizer.pad_token_id)
        self.requests: list[Request] = []
        self.numbers: dict[str, range] = {}
        """The requests that each prompt takes: one for letters, one a choice for the cloze form."""
        self.cut = 0
        """Prompts that are longer than the model reads, and so lose tokens on the left as in the harness."""
        room = getattr(model.config, "max_position_embeddings", None)
        groups: dict[str, list[int]] = {}
        for each, requests in zip(distinct, encode(tokenizer, distinct), strict=True):
            kept = (
                [Request(request.ids[-room:], request.wanted) for request in requests] if room else requests
            )
            numbers = range(len(self.requests), len(self.requests) + len(kept))
            self.numbers[each.prompt.digest] = numbers
            self.cut += kept != requests
            # A cut prompt begins like no other.
            groups.setdefault(each.asked.name if kept == requests else "", []).extend(numbers)
            self.requests += kept
        self.batches = plan_batches(self.requests, groups.values(), batch_tokens, can_share_prefix(model))

    def results(self, known: set[str], distributed: Distributed) -> Iterator[dict[str, list[float]]]:
        """Yield log-probabilities by prompt, as they come."""
        have = {number for digest in known for number in self.numbers[digest]}
        batches = [batch for batch in self.batches if not have.issuperset(batch.numbers)]
        missing = [digest for digest in self.numbers if digest not in known]
        found: dict[int, list[float]] = {}
        size = 1 if distributed.num_processes == 1 else distributed.num_processes * ROUND
        for start in range(0, len(batches), size):
            mine = distributed.split(batches[start : start + size])
            for part in distributed.gather(
                [
                    dict(zip(batch.numbers, self.scorer.score(self.requests, batch), strict=True))
                    for batch in mine
                ]
            ):
                found |= part
            complete = [
                digest for digest in missing if all(number in found for number in self.numbers[digest])
            ]
            missing = [digest for digest in missing if digest not in set(complete)]
            yield {
                digest: [value for number in self.numbers[digest] for value in found[number]]
                for digest in complete
            }


def encode(tokenizer: Callable[..., Any], distinct: list[Asked]) -> Iterator[list[Request]]:
    """Yield the requests of each prompt. Context and continuation are tokenized together and then separated,
    as the harness does.
    """
    contexts = encode_texts(tokenizer, [each.prompt.context for each in distinct])
    letters: tuple[int, ...] | None = None
    for each, context in zip(distinct, contexts, strict=True):
        if each.asked.scoring == "letters":
            letters = letters or _letters(tokenizer, each.prompt.context, context)
            yield [Request(tuple(context), (letters,))]
        else:
            whole = encode_texts(
                tokenizer, [each.prompt.context + continuation for continuation in each.prompt.continuations]
            )
            yield [
                Request((*context, *ids[len(context) : -1]), tuple((token,) for token in ids[len(context) :]))
                for ids in whole
            ]


def _letters(tokenizer: Callable[..., Any], context: str, ids: list[int]) -> tuple[int, ...]:
    whole = encode_texts(tokenizer, [f"{context} {letter}" for letter in LETTERS])
    if any(each[:-1] != ids for each in whole):
        raise UserError(
            'This tokenizer splits " A" into several tokens, so the letters cannot be compared by one '
            "forward pass.",
            "Ask for the choices' texts instead: scoring: cloze.",
        )
    return tuple(each[-1] for each in whole)


def score(sets: list[QuestionSet], answers: list[Answer], seconds: float) -> dict[str, Any]:
    """Return the sums over all answers, as `evaluation/base.json` holds them."""
    by_task = {each.name: [row for row in answers if row.task == each.name] for each in sets}
    tasks = {each.name: summarise(by_task[each.name]) | _origin(each) for each in sets}
    groups: dict[str, list[str]] = {}
    for each in sets:
        for group in filter(None, (each.group, *each.averages)):
            groups.setdefault(group, []).append(each.name)
    return {
        "tasks": tasks,
        "groups": {
            group: _pooled([by_task[name] for name in members]) for group, members in sorted(groups.items())
        },
        "seconds": seconds,
        "questions_per_second": len(answers) / seconds,
    }


def _origin(each: QuestionSet) -> dict[str, Any]:
    """Return the settings that a score must not be read without."""
    return {"num_fewshot": len(each.examples), "scoring": each.scoring, "sampled_from": each.sampled_from}


def summarise(answers: list[Answer]) -> dict[str, Any]:
    """Accuracy with its standard error in the n-1 form: sqrt(p (1 - p) / (n - 1)), as the harness computes
    it; how often each choice was answered; the balanced accuracy; and the mean probability of the answer
    among the four.
    """
    total, correct = len(answers), sum(row.correct for row in answers)
    accuracy = correct / total
    stderr = math.sqrt(accuracy * (1 - accuracy) / (total - 1)) if total > 1 else 0.0
    letters = [sum(row.answer == choice for row in answers) for choice in range(len(LETTERS))]
    return {
        "accuracy": accuracy,
        "stderr": stderr,
        "questions": total,
        "correct": correct,
        "answers": letters,
        "balanced": balanced_accuracy(answers),
        "confidence": _confidence(answers),
    }


def balanced_accuracy(answers: list[Answer]) -> float:
    """Return the share of right answers with every right choice weighted the same (balanced accuracy).

    It is the mean, over the choices A to D, of the accuracy on the questions for which that choice is right.
    A model that gives the same letter to every question reaches 0.25, whereas its accuracy is that letter's
    share of the right answers. Choices that are right for no question are left out.
    """
    recalls = []
    for choice in range(len(LETTERS)):
        marks = [row.correct for row in answers if row.gold == choice]
        if marks:
            recalls.append(sum(marks) / len(marks))
    return sum(recalls) / len(recalls)


def _confidence(answers: list[Answer]) -> float | None:
    """Return the mean probability of the answer among the choices; None where a model gives none."""
    shares = []
    for row in answers:
        if row.logprobs is not None and row.answer is not None:
            answered = row.logprobs[row.answer]
            # Beyond exp(700) a float overflows: such an answer has no probability worth counting.
            shares.append(1 / sum(math.exp(min(value - answered, 700.0)) for value in row.logprobs))
    return sum(shares) / len(shares) if shares else None


def _pooled(members: list[list[Answer]]) -> dict[str, Any]:
    """Return the average weighted by questions, with the harness's standard error: of the variance within the
    members.
    """
    together = [row for rows in members for row in rows]
    within = sum((len(rows) - 1) * len(rows) * summarise(rows)["stderr"] ** 2 for rows in members)
    freedom = len(together) - len(members)
    return summarise(together) | {"stderr": math.sqrt(within / freedom / len(together)) if freedom else 0.0}
