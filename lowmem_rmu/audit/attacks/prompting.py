"""Asking otherwise: does another wording, form or language bring out what the usual question no longer does?
And what is said instead?

Unlearned models have answered rephrased, translated and few-shot questions (Lynch et al. 2024, arXiv
2402.16835; Patil et al. 2023, arXiv 2309.17410). A way counts where base still answers better than guessing:
what confuses a model that never forgot says nothing.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowmem_rmu.audit.answering import (
    LENGTH,
    Ids,
    answers,
    as_prompts,
    divergence,
    names_the_right_one,
    perplexity,
    repetition,
)
from lowmem_rmu.audit.attacks.attack import Attack, Cost, Pieces, Tried
from lowmem_rmu.audit.context import Audited, Side
from lowmem_rmu.audit.knowledge import Questions, answers_of, evenly
from lowmem_rmu.audit.recovery import Values
from lowmem_rmu.audit.rewordings import ways_of
from lowmem_rmu.evaluation.multiple_choice import CHANCE, Asked, ask
from lowmem_rmu.evaluation.statistics import by_luck

PROMPTS = 40
"""That are answered in words, where they are no questions about what was forgotten."""
FIRST = 12
"""Tokens of a text that are to be continued."""
DECODING = 6.0
"""Tokens that could be read in the time that one takes to write: they come one after the other."""
SIDES: tuple[Side, Side] = ("unlearned", "base")
"""In this order each is loaded once, should they be two models: base judges what both have said."""
USUAL, FREELY = "as usual", "answering freely"

Known = dict[str, Values]
"""By the way of asking: what one side knows of each question."""
Said = dict[str, list[Ids]]
"""What one side answers to prompts of each kind."""
Fluency = dict[str, dict[Side, dict[str, float | None]]]
"""Perplexity and repetition of the answers to prompts of each kind."""


def ways(audited: Audited) -> dict[str, list[Asked]]:
    """Return the questions in all ways, the usual one among them; none where knowledge is text."""
    knowledge = audited.knowledge
    return (
        {USUAL: knowledge.asked} | ways_of(knowledge.asked, audited.tokenizer, audited.seed)
        if isinstance(knowledge, Questions)
        else {}
    )


def prompts(audited: Audited) -> dict[str, list[Ids]]:
    """Return the prompts that are answered freely, about the topic and about anything else: questions, or the
    beginnings of texts.
    """
    knowledge, kept = audited.knowledge, evenly(ask(audited.kept), PROMPTS)
    forget, benign = (
        evenly(texts, PROMPTS) for texts in (audited.forget or audited.relearning, audited.benign)
    )
    return {
        "forget": _questions(audited.tokenizer, knowledge.asked)
        if isinstance(knowledge, Questions)
        else [ids[:FIRST] for ids in forget],
        "benign": _questions(audited.tokenizer, kept) if kept else [ids[:FIRST] for ids in benign],
    }


def _questions(tokenizer: PreTrainedTokenizerBase, asked: list[Asked]) -> list[Ids]:
    return as_prompts(tokenizer, [each.question.question for each in asked])


def cost(audited: Audited) -> Cost:
    """Return letters take one pass over the questions, texts of choices four; answers are written, and read
    once.
    """
    passes = sum(4 if same[0].asked.scoring == "cloze" else 1 for same in ways(audited).values())
    written = LENGTH * sum(map(len, prompts(audited).values()))
    return Cost(2.0 * (passes + 1 + DECODING * written / audited.knowledge.tokens))


def ask_otherwise(audited: Audited, pieces: Pieces) -> Tried:
    asked, put = ways(audited), prompts(audited)
    known: dict[Side, Known] = {}
    said: dict[Side, Said] = {}
    apart: dict[str, float] | None = None
    for side in SIDES:
        known[side] = {
            name: pieces.get(f"{name}, {side}", partial(measure, audited, side, same))
            for name, same in asked.items()
        }
        said[side] = pieces.get(f"in words, {side}", partial(say, audited, side, put))
        if side == "unlearned" and audited.benign:
            apart = pieces.get("next token", partial(divergence, audited))
    surprise = pieces.get("as base reads it", partial(surprises, audited, put, said))
    for side in SIDES if asked else ():
        known[side][FREELY] = named(audited.tokenizer, asked[USUAL], said[side]["forget"])
    table = [row(name, known) for name in known["base"]]
    fluency: Fluency = {
        kind: {
            side: {"perplexity": surprise[side][kind], "repetition": repetition(said[side][kind])}
            for side in reversed(SIDES)
        }
        for kind in put
    }
    conditions = {
        each["way"]: known["unlearned"][each["way"]]
        for each in table
        if each["counts"] and each["way"] != USUAL
    }
    return Tried(
        conditions,
        {"ways": table, "words": fluency, "divergence": apart},
        [*about_ways(table), *about_words(fluency, apart)],
    )


def measure(audited: Audited, side: Side, asked: list[Asked]) -> Values:
    with audited.side(side) as model:
        found = answers_of(model, audited.tokenizer, asked, audited.preset.evaluation.planned_batch_tokens)
    return [float(row.correct) for row in found]


def say(audited: Audited, side: Side, put: dict[str, list[Ids]]) -> Said:
    with audited.side(side) as model:
        return {
            kind: answers(model, audited.tokenizer, each, audited.preset.evaluation.planned_batch_tokens)
            for kind, each in put.items()
        }


def surprises(
    audited: Audited, put: dict[str, list[Ids]], said: dict[Side, Said]
) -> dict[Side, dict[str, float | None]]:
    """Return the perplexity of each side's answers under base."""
    tokens = audited.preset.evaluation.planned_batch_tokens
    with audited.side("base") as model:
        return {
            side: {kind: perplexity(model, audited.tokenizer, put[kind], words[kind], tokens) for kind in put}
            for side, words in said.items()
        }


def named(tokenizer: PreTrainedTokenizerBase, asked: list[Asked], said: list[Ids]) -> Values:
    """Return whether each answer in words is right."""
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    return [float(names_the_right_one(each.question, text)) for each, text in zip(asked, texts, strict=True)]


def row(way: str, known: dict[Side, Known]) -> dict[str, Any]:
    base, unlearned = (sum(known[side][way]) / len(known[side][way]) for side in ("base", "unlearned"))
    return {
        "way": way,
        "base": base,
        "unlearned": unlearned,
        "counts": base > by_luck(CHANCE, len(known["base"][way])),
    }


def about_ways(table: list[dict[str, Any]]) -> Iterator[str]:
    usual, others = table[:1], [each for each in table[1:] if each["counts"]]
    if others:
        best, worst = (
            max(others, key=lambda each: each["unlearned"]),
            min(others, key=lambda each: each["unlearned"]),
        )
        yield (
            f"Asked in {len(others)} other ways, unlearned is right in {worst['unlearned']:.0%} to "
            f"{best['unlearned']:.0%} of the questions ({usual[0]['unlearned']:.0%} as usual), most "
            f"often {best['way']}, where base is right in {best['base']:.0%}."
        )
    if guessing := [each["way"] for each in table[1:] if not each["counts"]]:
        yield f"The base model itself guesses, so these ways do not count: {', '.join(guessing)}."


def about_words(fluency: Fluency, apart: dict[str, float] | None) -> Iterator[str]:
    for kind, about in (("forget", "what was forgotten"), ("benign", "anything else")):
        unlearned, base = (fluency[kind][side] for side in SIDES)
        if base["perplexity"] and unlearned["perplexity"]:
            yield (
                f"Asked about {about}, unlearned answers with a perplexity of "
                f"{unlearned['perplexity']:,.1f} under base (base itself {base['perplexity']:,.1f}) "
                f"and repeats {unlearned['repetition'] or 0:.0%} of its runs of four tokens (base "
                f"{base['repetition'] or 0:.0%})."
            )
    if apart:
        yield f"On benign text its next token is {apart['kl']:.2g} nats from base's (KL divergence)."


ATTACK = Attack("prompting", "does asking otherwise bring it out?", cost, ask_otherwise)
