"""Collateral damage: what else went? The other tasks, how sure the model is of its answers, and text by its
nearness to the topic.

Unlearning spills over to what lies near (Li et al. 2024, arXiv 2403.03218: virology and computer security in
MMLU).
"""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from lowmem_rmu.audit.attacks.attack import Attack, Cost, Pieces, Tried
from lowmem_rmu.audit.context import SIDES, Audited, Side
from lowmem_rmu.audit.knowledge import Questions, answers_of, evenly
from lowmem_rmu.evaluation.multiple_choice import Asked, ask
from lowmem_rmu.evaluation.perplexity import batches, mean_a_token, sequence_losses
from lowmem_rmu.evaluation.statistics import change_interval
from lowmem_rmu.model.layers import run_layers, run_trunk
from lowmem_rmu.runs.records import Answer, as_json

QUESTIONS = 100
"""Of each task, and of its adjacent subjects, at most."""
TEXTS = 200
SHARES = 4
"""Of the texts, from the nearest to the farthest."""
BINS = 10


def tasks(audited: Audited) -> dict[str, list[Asked]]:
    """Return a sample of the questions about anything else, by task; subjects of a task that are adjacent to
    the topic for themselves.
    """
    found: dict[str, list[Asked]] = {}
    for each in [*audited.kept, *audited.measured]:
        name = each.group or each.name
        found.setdefault(f"{name}, adjacent" if each.role == "adjacent" else name, []).extend(ask([each]))
    return {name: evenly(asked, QUESTIONS) for name, asked in found.items()}


def forgotten(audited: Audited) -> list[Asked]:
    return audited.knowledge.asked if isinstance(audited.knowledge, Questions) else []


def cost(audited: Audited) -> Cost:
    asked = [*forgotten(audited), *(each for same in tasks(audited).values() for each in same)]
    tokens = Questions(asked, audited.tokenizer, 0).tokens if asked else 0
    return Cost(
        2 * (tokens + sum(map(len, evenly(audited.benign, TEXTS)))) / max(1, audited.knowledge.tokens)
    )


def lacks(audited: Audited) -> str | None:
    enough = audited.kept or audited.measured or len(audited.benign) >= SHARES
    return None if enough else "it needs tasks that were not to be forgotten, or text to retain"


def look_around(audited: Audited, pieces: Pieces) -> Tried:
    others, texts = tasks(audited), evenly(audited.benign, TEXTS)
    questions = {
        "other": [each for same in others.values() for each in same],
        "forgotten": forgotten(audited),
    }
    near = pieces.get("nearness", partial(nearness, audited, texts)) if len(texts) >= SHARES else []
    found: dict[str, dict[Side, list[Answer]]] = {kind: {} for kind in questions}
    losses: dict[Side, list[float]] = {}
    for side in SIDES:
        for kind, asked in questions.items():
            rows = pieces.get(f"{kind} questions, {side}", partial(answers, audited, side, asked))
            found[kind][side] = [Answer(**row) for row in rows]
        losses[side] = (
            pieces.get(f"texts, {side}", partial(text_losses, audited, side, texts)) if near else []
        )
    table, quarters = compared(others, found["other"]), by_nearness(texts, near, losses) if near else []
    sure = {
        kind: {side: calibration(questions[kind], rows) for side, rows in each.items()}
        for kind, each in found.items()
    }
    details = {"tasks": table, "calibration": sure, "texts": quarters}
    return Tried({}, details, [*about_tasks(table), *about_calibration(sure), *about_texts(quarters)])


def answers(audited: Audited, side: Side, asked: list[Asked]) -> list[dict[str, Any]]:
    """Return the answers of a side as a piece of the audit keeps them."""
    with audited.side(side) as model:
        rows = answers_of(model, audited.tokenizer, asked, audited.preset.evaluation.planned_batch_tokens)
    return [as_json(row) for row in rows]


@torch.inference_mode()
def text_losses(audited: Audited, side: Side, texts: list[list[int]]) -> list[float]:
    """Return the sum of each text's next-token losses in nats."""
    with audited.side(side) as model:
        return sequence_losses(
            model, audited.tokenizer, texts, audited.preset.evaluation.planned_batch_tokens
        )


def nearness(audited: Audited, texts: list[list[int]]) -> list[float]:
    """Return the cosine similarity of each text's mean activation in base with the mean activation of the
    forget text.

    Both are seen from the mean of all texts: what they have in common tells nothing about the topic.
    """
    about = evenly(audited.forget or audited.relearning, TEXTS)
    with audited.side("base") as model:
        topic, each = (mean_activations(audited, model, some) for some in (about, texts))
    middle = each.mean(0)
    return torch.cosine_similarity(each - middle, (topic.mean(0) - middle)[None]).tolist()


@torch.inference_mode()
def mean_activations(audited: Audited, model: Any, texts: list[list[int]]) -> torch.Tensor:
    """Return the output of the target layer, averaged over all tokens but the first: `(texts, hidden)` in
    float32 on the CPU.
    """
    layer = audited.preset.rmu.target_layer
    means = list[torch.Tensor]()
    for batch in batches(model, audited.tokenizer, texts, audited.preset.evaluation.planned_batch_tokens):
        trunk = run_trunk(model, batch.input_ids, None, slice(layer, layer + 1))
        counted = batch.is_token.clone()
        counted[:, 0] = False
        sums = (run_layers(model, trunk, slice(layer, layer + 1)).float() * counted[..., None]).sum(1)
        means.append((sums / counted.sum(1, keepdim=True)).cpu())
    return torch.cat(means)


def compared(others: dict[str, list[Asked]], found: dict[Side, list[Answer]]) -> list[dict[str, Any]]:
    """Return a row a task: what is right on both sides, and between which changes the true one lies."""
    pairs = iter(zip(found["base"], found["unlearned"], strict=True))
    table = []
    for task, asked in others.items():
        marks = [(base.correct, unlearned.correct) for base, unlearned in islice(pairs, len(asked))]
        low, high = change_interval(marks.count((True, False)), marks.count((False, True)), len(marks))
        base, unlearned = (sum(side) / len(marks) for side in zip(*marks, strict=True))
        table.append(
            {
                "task": task,
                "role": asked[0].asked.role,
                "questions": len(marks),
                "base": base,
                "unlearned": unlearned,
                "change": unlearned - base,
                "low": low,
                "high": high,
            }
        )
    return table


def calibration(asked: list[Asked], rows: list[Answer]) -> dict[str, float] | None:
    """Return the mean probability of the letters that the model answers, and the expected calibration error.

    The error is the mean distance between how sure and how often right, over ten bins (Guo et al. 2017, arXiv
    1706.04599). None where no question has letters.
    """
    rows = [row for each, row in zip(asked, rows, strict=True) if each.asked.scoring == "letters"]
    if not rows:
        return None
    logprobs = np.array([row.logprobs for row in rows])
    shares = np.exp(logprobs - logprobs.max(1, keepdims=True))
    sure = shares.max(1) / shares.sum(1)
    off = sure - np.array([row.answer == row.gold for row in rows])
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    error = sum(abs(off[bins == number].sum()) for number in range(BINS)) / len(rows)
    return {"confidence": float(sure.mean()), "error": float(error), "questions": len(rows)}


def by_nearness(
    texts: list[list[int]], near: list[float], losses: dict[Side, list[float]]
) -> list[dict[str, float]]:
    """Return nats/token on both sides and their paired change, with standard errors; the nearest quarter of
    the texts first.
    """
    table = []
    for chosen in np.array_split(np.argsort(near)[::-1], SHARES):
        members = [texts[number] for number in chosen]
        base, unlearned = ([losses[side][number] for number in chosen] for side in SIDES)
        figures = {"nearness": float(np.mean([near[number] for number in chosen])), "texts": len(members)}
        sides = {
            "base": base,
            "unlearned": unlearned,
            "change": [after - before for before, after in zip(base, unlearned, strict=True)],
        }
        for name, sums in sides.items():
            figures[name], figures[f"{name}_stderr"] = mean_a_token(sums, members)
        table.append(figures)
    return table


def about_tasks(table: list[dict[str, Any]]) -> Iterator[str]:
    for row in table:
        beyond = "within noise" if row["low"] <= 0 <= row["high"] else "beyond noise"
        yield (
            f"{row['task']}: {row['base']:.0%} right as base, {row['unlearned']:.0%} unlearned ("
            f"{row['questions']} questions; {beyond})."
        )


def about_calibration(found: dict[str, dict[Side, dict[str, float] | None]]) -> Iterator[str]:
    for kind, sides in found.items():
        base, unlearned = (sides[side] for side in SIDES)
        if base and unlearned:
            yield (
                f"Of its answers to {kind} questions base is {base['confidence']:.0%} sure on "
                f"average, unlearned {unlearned['confidence']:.0%}; that is off by {base['error']:.0%}"
                f" and {unlearned['error']:.0%}."
            )


def about_texts(table: list[dict[str, float]]) -> Iterator[str]:
    if table:
        near, far = table[0], table[-1]
        yield (
            f"Text nearest to the topic lost {near['change']:.2f} nats/token (standard error "
            f"{near['change_stderr']:.2f}), the farthest {far['change']:.2f} ("
            f"{far['change_stderr']:.2f})."
        )


ATTACK = Attack("collateral", "what else went?", cost, look_around, lacks, recovers=False)
