"""Representation: is what the answer needs still in the hidden states, although the model does not say it?

Three ways to read what leaves each layer at the last token, none of which changes the model: a linear probe
learns to tell the right answer (Alain and Bengio 2016, arXiv 1610.01644; of unlearned models: Patil et al.
2023, arXiv 2309.17410), another to tell the topic, and the logit lens (nostalgebraist 2020) puts the model's
own head on it. The answer is probed for twice: by its letter after the whole question, and choice by choice,
whether a choice's text after the question is the right one.

Everything that is learned or chosen (weights, regularisation, layer) is learned and chosen from other
questions than those that are counted.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lowmem_rmu.audit.attacks.attack import Attack, Cost, Pieces, Tried, seed_of
from lowmem_rmu.audit.context import SIDES, Audited, Side
from lowmem_rmu.audit.knowledge import ENOUGH, RARE, Questions
from lowmem_rmu.audit.recovery import Values
from lowmem_rmu.audit.residual import layer_count, leaving
from lowmem_rmu.data.questions import LETTERS, QuestionSet
from lowmem_rmu.evaluation.multiple_choice import Asked, encode
from lowmem_rmu.evaluation.perplexity import batches
from lowmem_rmu.evaluation.prompts import prompt
from lowmem_rmu.model.layers import LayerOutput, decoder_layers, lent_forward
from lowmem_rmu.model.logits import POSITIONS, hidden_at

FOLDS = 4
RIDGES = (0.01, 0.1, 1.0, 10.0)
"""Strengths of regularisation to choose from, in mean eigenvalues of the features' covariance (those that are
not 0).
"""
KEPT = 4
"""Topics that were kept, at most, among which the forgotten ones are to be told."""
TOPIC_QUESTIONS = 50
"""Of each topic."""

Probed = dict[str, Any]
"""`values`: right or wrong by question, where the layer is chosen as well; `layers`: accuracy by layer;
`shuffled`: of the values, learned and measured with the right answers shuffled, which is what a probe
reads out of nothing.
"""


def cost(audited: Audited) -> Cost:
    topics = sum(len(questions) for _, questions in topics_of(audited)) / max(1, len(audited.knowledge))
    hidden, items = audited.sides.base.hidden_size, len(LETTERS) * len(audited.knowledge)
    # As they come, and in their places.
    held = 2 * items * layer_count(audited) * hidden * torch.float32.itemsize
    return Cost(2 * (2 + len(LETTERS) + topics), extra_bytes=held if audited.device.type == "cpu" else 0)


def lacks(audited: Audited) -> str | None:
    if not audited.knowledge.are_questions:
        return "it needs questions"
    few = len(audited.knowledge) < ENOUGH
    return (
        f"a probe learns from questions, and there are {len(audited.knowledge)}: it needs {ENOUGH}"
        if few
        else None
    )


def represent(audited: Audited, pieces: Pieces) -> Tried:
    found: dict[str, dict[str, Any]] = {}
    for name, probe in probes_of(audited).items():
        found[name] = {side: pieces.get(f"{name}, {side}", partial(probe, audited, side)) for side in SIDES}
    lens = found.pop("lens", {})
    conditions = {
        f"linear probe for the right {name}": probed["unlearned"]["values"]
        for name, probed in found.items()
        if name != "topic"
    }
    conditions |= {
        f"logit lens, layer {layer}": values for layer, values in enumerate(lens.get("unlearned", []))
    }
    details: dict[str, Any] = {
        "probes": {name: {side: summary(probed[side]) for side in SIDES} for name, probed in found.items()}
    }
    if lens:
        details["lens"] = {side: [mean(values) for values in lens[side]] for side in SIDES}
    return Tried(conditions, details, sentences(details["probes"]))


def probes_of(audited: Audited) -> dict[str, Any]:
    """Return the probes that can be trained here, by name: a model that is asked in the cloze form need not
    know letters.
    """
    letters = (
        {"letter": probe_letters, "lens": read_lens}
        if all(each.asked.scoring == "letters" for each in asked_of(audited))
        else {}
    )
    return (
        letters | {"choice": probe_choices} | ({"topic": probe_topics} if len(topics_of(audited)) > 1 else {})
    )


def summary(probed: Probed) -> dict[str, Any]:
    return {"held_out": mean(probed["values"]), "shuffled": probed["shuffled"], "layers": probed["layers"]}


def mean(values: Values) -> float:
    return sum(values) / len(values)


def asked_of(audited: Audited) -> list[Asked]:
    assert isinstance(audited.knowledge, Questions)
    return audited.knowledge.asked


def probe_letters(audited: Audited, side: Side) -> Probed:
    asked = asked_of(audited)
    states = states_of(
        audited, side, [request.ids for each in encode(audited.tokenizer, asked) for request in each]
    )
    return probe(audited, states[:, :, None], [each.question.gold for each in asked], asked, len(LETTERS))


def probe_choices(audited: Audited, side: Side) -> Probed:
    """Return the four states of a question are taken from their mean: what they share says nothing about
    which one is right.
    """
    asked = [put(each, scoring="cloze") for each in asked_of(audited)]
    requests = [request for each in encode(audited.tokenizer, asked) for request in each]
    states = states_of(audited, side, [(*request.ids, request.wanted[-1][0]) for request in requests])
    states = states.unflatten(1, (len(asked), len(LETTERS)))
    return probe(
        audited, states - states.mean(2, keepdim=True), [each.question.gold for each in asked], asked, 1
    )


def probe_topics(audited: Audited, side: Side) -> Probed:
    """Without the line above the question, which names the topic."""
    topics = [
        (topic, [put(each, about="anything", examples=()) for each in questions])
        for topic, questions in topics_of(audited)
    ]
    asked, gold = (
        [each for _, some in topics for each in some],
        [number for number, (_, some) in enumerate(topics) for _ in some],
    )
    states = states_of(audited, side, [request[0].ids for request in encode(audited.tokenizer, asked)])
    return probe(audited, states[:, :, None], gold, asked, len(topics))


def put(each: Asked, **changes: Any) -> Asked:
    """Return the same question, put by its set with other settings."""
    changed: QuestionSet = replace(each.asked, **changes)
    return Asked(changed, each.index, each.question, prompt(changed, each.question))


def topics_of(audited: Audited) -> list[tuple[str, list[Asked]]]:
    """Return topics and some questions about each: those that were forgotten, and some that were kept."""
    forgotten: dict[str, list[Asked]] = {}
    for each in asked_of(audited):
        forgotten.setdefault(each.asked.group or each.asked.name, []).append(each)
    about = {each.about: each for each in audited.kept if len(each.questions) >= FOLDS}
    kept = [
        (name, about[name])
        for name in random.Random(seed_of(audited, "topics")).sample(sorted(about), min(KEPT, len(about)))
    ]
    asked = {
        name: [
            Asked(each, index, question, prompt(each, question))
            for index, question in enumerate(each.questions)
        ]
        for name, each in kept
    }
    some = {
        name: random.Random(seed_of(audited, name)).sample(each, min(TOPIC_QUESTIONS, len(each)))
        for name, each in (forgotten | asked).items()
    }
    return list(some.items())


def states_of(audited: Audited, side: Side, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Return the output of each layer at the last token of each sequence: `(layers, sequences, hidden)` in
    float32, in main memory.
    """
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    found: list[list[Tensor]] = [[] for _ in range(layer_count(audited))]
    last = torch.empty(0)

    def see(layer: int, hidden: Tensor) -> None:
        found[layer].append(hidden[last.to(hidden.device)].float().cpu())

    with audited.side(side) as model, leaving(model, range(len(found)), see), torch.inference_mode():
        room = getattr(model.config, "max_position_embeddings", None) or 0  # -0 keeps all
        rows = [list(sequences[number][-room:]) for number in order]
        for batch in batches(model, audited.tokenizer, rows, audited.preset.evaluation.planned_batch_tokens):
            last = batch.is_token & (batch.is_token.cumsum(1) == batch.is_token.sum(1, keepdim=True))
            hidden_at(model, last, input_ids=batch.input_ids)
    places = torch.tensor(order).argsort()
    return torch.stack([torch.cat(parts)[places] for parts in found])


def read_lens(audited: Audited, side: Side) -> list[Values]:
    """By layer, whether the right letter is the most likely of the four by the model's own norm and head."""
    asked = asked_of(audited)
    requests = [request for each in encode(audited.tokenizer, asked) for request in each]
    states, gold = (
        states_of(audited, side, [request.ids for request in requests]),
        torch.tensor([each.question.gold for each in asked]),
    )
    letters = list(requests[0].wanted[0])
    with audited.side(side) as model:
        return [(lens(model, layer, letters).argmax(-1) == gold).float().tolist() for layer in states]


@torch.inference_mode()
def lens(model: Any, hidden: Tensor, tokens: list[int]) -> Tensor:
    """Return logits `(count, tokens)` that the model gives these tokens where `hidden` `(count, hidden)`
    leaves its last layer.

    The layers pass the states on, so that whatever the model does after them is done.
    """
    layers, weight = list(decoder_layers(model)), model.get_input_embeddings().weight
    found = []
    for part in hidden.split(POSITIONS):
        given = part.to(weight.device, weight.dtype)[None]
        with lent_forward(layers, partial(_instead, given)):
            logits = model(
                input_ids=torch.zeros(given.shape[:2], dtype=torch.long, device=weight.device),
                use_cache=False,
            ).logits
        found.append(logits[0, :, tokens].float().cpu())
    return torch.cat(found)


def _instead(given: Tensor, *_: Any, **__: Any) -> Tensor:
    return given.as_subclass(LayerOutput)


def probe(audited: Audited, states: Tensor, gold: list[int], asked: list[Asked], columns: int) -> Probed:
    """Train a probe per layer on `states` `(layers, items, rows, hidden)`; an item's class is the `gold`th of
    its rows times `columns`.
    """
    folds = folds_of([each.question.question for each in asked], seed_of(audited, "folds"))
    device = audited.device if audited.device.type == "cuda" else torch.device("cpu")
    values, layers = cross_fitted(states, torch.tensor(gold), columns, folds, device)
    dealt = random.Random(seed_of(audited, "shuffled")).sample(gold, len(gold))
    shuffled, _ = cross_fitted(states, torch.tensor(dealt), columns, folds, device)
    return {"values": values, "layers": layers, "shuffled": mean(shuffled)}


def folds_of(questions: list[str], seed: int) -> Tensor:
    """Return the number of the fold of each question. Those that share their rarest word, most likely what
    they are about, share a fold.
    """
    words = [set(re.findall(r"\w+", question.lower())) for question in questions]
    common = Counter(word for each in words for word in each)
    groups: dict[str, list[int]] = {}
    for number, each in enumerate(words):
        rare = [word for word in each if 1 < common[word] <= RARE * len(questions)]
        groups.setdefault(
            min(rare, key=lambda word: (common[word], word), default=questions[number]), []
        ).append(number)
    folds: list[list[int]] = [[] for _ in range(FOLDS)]
    for name in random.Random(seed).sample(sorted(groups), len(groups)):
        min(folds, key=len).extend(groups[name])
    return torch.tensor(
        [next(fold for fold in range(FOLDS) if number in folds[fold]) for number in range(len(questions))]
    )


def cross_fitted(
    states: Tensor, gold: Tensor, columns: int, folds: Tensor, device: torch.device
) -> tuple[Values, list[float]]:
    """Return whether each item is classified correctly by a probe of other folds, and the accuracy by layer;
    layer (of the former) and regularisation are those that do best within the folds that the probe learns
    from.
    """
    tried = [try_layer(layer.to(device), gold.to(device), columns, folds.to(device)) for layer in states]
    counted, choosing = torch.stack([each[0] for each in tried]), torch.stack([each[1] for each in tried])
    best = choosing.flatten(0, 1).argmax(0)[folds]
    values = counted.flatten(0, 1)[best, torch.arange(len(gold))]
    ridge = choosing.argmax(1)[:, folds]
    return values.tolist(), counted.gather(1, ridge[:, None])[:, 0].double().mean(1).tolist()


def try_layer(states: Tensor, gold: Tensor, columns: int, folds: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-validate the probe of one layer for each ridge: whether each item is classified correctly by the
    other folds `(ridges, items)`, and for each fold the correct items among the other folds `(ridges,
    folds)`.
    """
    counted, choosing = torch.zeros(len(RIDGES), len(gold)), torch.zeros(len(RIDGES), FOLDS)
    for fold in range(FOLDS):
        learn = folds != fold
        spread, middle = torch.std_mean(states[learn].flatten(0, 1), 0)
        features = (states - middle) / spread.clamp_min(1e-6)
        counted[:, ~learn] = told(features, gold, columns, learn, ~learn)
        for other in {*range(FOLDS)} - {fold}:
            ask = folds == other
            choosing[:, fold] += told(features, gold, columns, learn & ~ask, ask).sum(1)
    return counted, choosing


def told(features: Tensor, gold: Tensor, columns: int, learn: Tensor, ask: Tensor) -> Tensor:
    """Return whether each item of `ask` is classified correctly by what is learned from those of `learn`:
    `(ridges, asked)` of 1 and 0, in main memory.
    """
    rows = features.shape[1]
    wanted = one_hot(gold[learn], rows * columns).float().reshape(-1, columns)
    weights = ridge(features[learn].flatten(0, 1), wanted - wanted.mean(0))
    scores = (features[ask].flatten(0, 1) @ weights + wanted.mean(0)).reshape(len(RIDGES), -1, rows * columns)
    return (scores.argmax(-1) == gold[ask]).float().cpu()


def ridge(features: Tensor, wanted: Tensor) -> Tensor:
    """Ridge regression of `wanted` `(count, columns)` on `features` `(count, hidden)`: weights `(ridges,
    hidden, columns)`, in closed form, by whichever of the two equal ones has the smaller matrix.
    """
    count, hidden = features.shape
    few = count < hidden
    gram = features @ features.T if few else features.T @ features
    strengths = torch.tensor(RIDGES, device=gram.device)[:, None, None] * gram.trace() / len(gram)
    shifted = gram + strengths * torch.eye(len(gram), device=gram.device)
    return (
        features.T @ torch.linalg.solve(shifted, wanted)
        if few
        else torch.linalg.solve(shifted, features.T @ wanted)
    )


def sentences(probes: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    said = []
    for name, sides in probes.items():
        base, unlearned = (f"{100 * sides[side]['held_out']:.1f}%" for side in SIDES)
        nothing = f"{100 * sides['unlearned']['shuffled']:.1f}%"
        said.append(
            f"A linear probe tells the {name} of {unlearned} of unseen questions ({base} in base, "
            f"{nothing} where answers are shuffled)."
        )
    return said


ATTACK = Attack("representation", "is it still in the hidden states?", cost, represent, lacks)
