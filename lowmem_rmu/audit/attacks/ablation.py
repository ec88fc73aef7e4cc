"""Direction ablation: is it hidden behind a direction of the residual stream, and there again once that is
taken out?

RMU adds much the same vector to all text about a topic. For a layer, the direction is the mean of
unlearned minus base activations over forget text; while the model answers, every layer from the target layer
on leaves `x - d (d . x)` instead of `x` (Arditi et al. 2024, arXiv 2406.11717; done to RMU by Lucki et al.
2024, arXiv 2409.18025). Several topics have a vector each: the second way takes out the principal directions
of the differences of single tokens.
"""

import random
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from lowmem_rmu.audit.attacks.attack import Attack, Cost, Pieces, Tried, in_words, seed_of
from lowmem_rmu.audit.context import Audited, Side
from lowmem_rmu.audit.recovery import Values
from lowmem_rmu.audit.residual import layer_count, leaving, spread
from lowmem_rmu.evaluation.perplexity import batches
from lowmem_rmu.model.logits import hidden_at

LAYERS = 8
"""Whose directions are tried, at most."""
TWINS = 3
"""Of these, so many are taken out of the base model too: what is lost there is what the ablation itself
costs.
"""
SAMPLES = 64
"""Sequences of forget text."""
TOKENS = 2048
"""Whose single activations are kept for the principal directions."""
PRINCIPAL = 4

Directions = dict[str, list[list[float]]]
"""By name, orthonormal rows `(count, hidden)`."""


def layers_of(audited: Audited) -> list[int]:
    return spread(audited.preset.rmu.target_layer, layer_count(audited) - 1, LAYERS)


def cost(audited: Audited) -> Cost:
    sequences = forget_text(audited)
    passes = 2 * sum(map(len, sequences)) / max(1, audited.knowledge.tokens)
    return Cost(len(layers_of(audited)) + 1 + TWINS + passes)


def lacks(audited: Audited) -> str | None:
    return None if audited.forget else "it needs text about what was forgotten, and there is none"


def ablate(audited: Audited, pieces: Pieces) -> Tried:
    directions: Directions = pieces.get("directions", lambda: find_directions(audited))
    twins = [list(directions)[number] for number in spread(0, len(directions) - 1, TWINS)]
    conditions = {
        name: pieces.get(f"{name}, unlearned", partial(measure, audited, "unlearned", rows))
        for name, rows in directions.items()
    }
    base = {
        name: pieces.get(f"{name}, base", partial(measure, audited, "base", directions[name]))
        for name in twins
    }
    sides = {name: {"unlearned": values, "base": base.get(name)} for name, values in conditions.items()}
    table = {
        name: {side: audited.knowledge.figure(values) if values else None for side, values in row.items()}
        for name, row in sides.items()
    }
    return Tried(conditions, {"ablated": table}, list(sentences(audited, conditions, base)))


def find_directions(audited: Audited) -> Directions:
    """Return one direction per layer, and the principal ones at the target layer."""
    layers = layers_of(audited)
    (base, before), (unlearned, after) = (
        activations(audited, side, layers) for side in ("base", "unlearned")
    )
    found = {f"the direction of layer {layer}": (unlearned[layer] - base[layer])[None] for layer in layers}
    _, _, principal = torch.linalg.svd(after - before, full_matrices=False)
    found[f"the {PRINCIPAL} main directions of layer {layers[0]}"] = principal[:PRINCIPAL]
    return {name: torch.nn.functional.normalize(rows, dim=-1).tolist() for name, rows in found.items()}


def forget_text(audited: Audited) -> list[list[int]]:
    return random.Random(seed_of(audited, "ablation")).sample(
        audited.forget, min(SAMPLES, len(audited.forget))
    )


def activations(audited: Audited, side: Side, layers: list[int]) -> tuple[dict[int, Tensor], Tensor]:
    """Over the tokens of forget text: by layer the mean of what leaves it `(hidden,)`, and of the first layer
    what leaves it at evenly spread tokens `(count, hidden)`, the same ones on either side; all in float32 in
    main memory.
    """
    sequences = forget_text(audited)
    tokens = sum(map(len, sequences))
    means, kept = dict[int, Tensor](), list[Tensor]()
    every, passed = max(1, tokens // TOKENS), 0

    def see(layer: int, hidden: Tensor) -> None:
        at_tokens = hidden[batch.is_token.to(hidden.device)].float()
        means[layer] = means.get(layer, 0.0) + (at_tokens.sum(0) / tokens).cpu()
        if layer == layers[0]:
            kept.append(at_tokens[-passed % every :: every].cpu())

    with audited.side(side) as model, leaving(model, layers, see), torch.inference_mode():
        for batch in batches(
            model, audited.tokenizer, sequences, audited.preset.evaluation.planned_batch_tokens
        ):
            hidden_at(model, batch.is_token, input_ids=batch.input_ids)
            passed += int(batch.is_token.sum())
    return means, torch.cat(kept)


def measure(audited: Audited, side: Side, directions: list[list[float]]) -> Values:
    """Measure each item with these directions projected out of the residual stream."""
    layers, rows = range(audited.preset.rmu.target_layer, layer_count(audited)), torch.tensor(directions)
    with audited.side(side) as model, leaving(model, layers, lambda layer, hidden: without(hidden, rows)):
        return audited.knowledge.of(model)


def without(hidden: Tensor, directions: Tensor) -> Tensor:
    """Hidden states `(..., hidden)` without what lies along the orthonormal `directions` `(count,
    hidden)`.
    """
    along = directions.to(hidden.device)
    exact = hidden.float()  # in 16 bits much of a long steering vector would stay
    return (exact - exact @ along.T @ along).to(hidden.dtype)


def sentences(audited: Audited, conditions: dict[str, Values], base: dict[str, Values]) -> Iterator[str]:
    name = max(conditions, key=lambda name: sum(conditions[name]))
    yield f"With {name} taken out, the unlearned model gives {in_words(audited, conditions[name])}."
    name = min(base, key=lambda name: sum(base[name]))
    yield f"The base model loses most with {name} taken out: it then gives {in_words(audited, base[name])}."


ATTACK = Attack("ablation", "is it hidden behind a direction of the residual stream?", cost, ablate, lacks)
