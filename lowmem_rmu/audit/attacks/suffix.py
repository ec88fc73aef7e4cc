"""An adversarial suffix: can a few tokens after a question force the base model's answer, and do they open
other questions?

GCG (Zou et al. 2023, arXiv 2307.15043), the attack that RMU's own paper tries. Here the best suffix so far is
kept, so that the loss never rises.

    prompt | suffix, optimized | end of the turn | target: what base answered -> mean loss of the target

Enough search makes an ignorant model say anything: a forced answer is no proof. What counts as recovery is
that a suffix found on one question helps with the others. (Own code: nanogcg 0.3.0 wants transformers<=4.47.1
and scipy, and sets up logging when it is imported.)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lowmem_rmu.audit.attacks.attack import Attack, Cost, Pieces, Tried, seed_of
from lowmem_rmu.audit.context import SIDES, Audited, Side
from lowmem_rmu.audit.knowledge import Questions, evenly
from lowmem_rmu.audit.recovery import Values
from lowmem_rmu.chat.generation import encode_prompt
from lowmem_rmu.data.tokens import encode_texts
from lowmem_rmu.evaluation.multiple_choice import Asked
from lowmem_rmu.evaluation.prompts import prompt
from lowmem_rmu.model.logits import head_of, hidden_at, logits_at

PROMPTS = 4
STEPS = 40
CANDIDATES = 64
"""Suffixes that are tried a step, each with one other token."""
TOP = 64
"""Tokens a position from which those are drawn: by the gradient the most promising ones."""
BUDGET_OF_ITS_AUTHORS = "500 of 512"
SUFFIX = 12
"""Tokens."""
START = "of"
"""The suffix is that word so often, to begin with: one token in every tokenizer that knows English."""
TARGET = 12
"""Tokens at most."""
BEGINNING = 16
"""Tokens of a text that are its prompt."""
LONGEST = 128
"""Tokens of a question that is a prompt: a row of tokens goes through the model for every candidate."""

Found = dict[str, Any]
"""What a search came to: `steps` (0: none was needed; None: not within the budget), `suffix` as text, and
`losses`, the first before any step.
"""


@dataclass(frozen=True)
class Slot:
    """Where a suffix goes: token ids before and after it, and what the model is to say then. `encode` gives
    the ids for a suffix's text.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    before: list[int]
    start: list[int]
    after: list[int]
    target: list[int]

    def around(self, suffix: list[int]) -> list[int]:
        return [*self.before, *suffix, *self.after]

    def survives(self, suffix: list[int]) -> bool:
        """Return whether the suffix, typed as text, is read as the same tokens."""
        return self.encode(self.decode(suffix)) == self.around(suffix)


def prompts_of(audited: Audited) -> list[str]:
    """Return questions from different places of the list; where knowledge is text, beginnings of texts about
    what was forgotten.
    """
    tokenizer = audited.tokenizer
    if isinstance(audited.knowledge, Questions):
        asked = [each.question.question.strip() for each in audited.knowledge.asked]
        texts = [text for text in asked if len(tokenizer(text)["input_ids"]) <= LONGEST]
    else:
        texts = [
            str(tokenizer.decode(ids[:BEGINNING], skip_special_tokens=True)).strip()
            for ids in audited.forget
            if len(ids) > BEGINNING
        ]
    return evenly(list(dict.fromkeys(filter(None, texts))), PROMPTS)


def slot_of(audited: Audited, text: str, target: list[int]) -> Slot:
    """Put a question in the chat template, continue a text as it is; the suffix follows after a
    space.
    """

    def encode(suffix: str) -> list[int]:
        written = f"{text} {suffix}" if suffix else text
        if audited.knowledge.are_questions:
            return list(encode_prompt(audited.tokenizer, [{"role": "user", "content": written}])[0].tolist())
        return encode_texts(audited.tokenizer, [written])[0]

    def decode(ids: list[int]) -> str:
        return str(audited.tokenizer.decode(ids, clean_up_tokenization_spaces=False)).removeprefix(" ")

    plain, filled = encode(""), encode(" ".join([START] * SUFFIX))
    before = len(commonprefix([plain, filled]))
    after = len(commonprefix([plain[before:][::-1], filled[before:][::-1]]))
    end = len(filled) - after
    return Slot(encode, decode, filled[:before], filled[before:end], filled[end:], target)


def cost(audited: Audited) -> Cost:
    """Estimate the cost as if every search took all of its steps on the unlearned model, and none on base. A
    candidate is a row of prompt, suffix and target.
    """
    rows = [len(slot_of(audited, text, []).encode("")) + SUFFIX + TARGET for text in prompts_of(audited)]
    transfer = 2 * len(rows) if audited.knowledge.are_questions else 0
    return Cost(
        transfer + sum(rows) * STEPS * CANDIDATES / max(1, audited.knowledge.tokens),
        sum(rows) * STEPS,
        max(rows, default=0),
    )


def lacks(audited: Audited) -> str | None:
    if prompts_of(audited):
        return None
    return (
        f"it needs questions of at most {LONGEST} tokens, or texts of more than {BEGINNING} about what "
        "was forgotten"
    )


def attack(audited: Audited, pieces: Pieces) -> Tried:
    texts, allowed = prompts_of(audited), typable(audited)
    targets = pieces.get("targets", lambda: [base_answer(audited, text) for text in texts])
    slots = [slot_of(audited, text, target) for text, target in zip(texts, targets, strict=True)]
    found: dict[Side, list[Found]] = {
        side: [
            pieces.get(
                f"{side}, prompt {number}",
                partial(search_on, audited, side, slot, allowed, f"suffix {number}"),
            )
            for number, slot in enumerate(slots, 1)
        ]
        for side in SIDES
    }
    suffixes = {
        f"suffix of prompt {number}": each["suffix"]
        for number, each in enumerate(found["unlearned"], 1)
        if each["suffix"]
    }
    known: dict[Side, dict[str, Values]] = {side: {} for side in SIDES}
    if audited.knowledge.are_questions:
        known = {
            side: {
                name: pieces.get(f"{side}, {name}", partial(known_with, audited, side, suffix))
                for name, suffix in suffixes.items()
            }
            for side in SIDES
        }
    details = {
        "prompts": [
            row(audited, *each) for each in zip(texts, slots, found["base"], found["unlearned"], strict=True)
        ],
        "accuracy_with": {
            side: {name: sum(values) / len(values) for name, values in each.items()}
            for side, each in known.items()
        },
        "budget": {"steps": STEPS, "candidates": CANDIDATES, "suffix_tokens": SUFFIX},
    }
    return Tried(known["unlearned"], details, list(sentences(found, bool(known["unlearned"]))))


def base_answer(audited: Audited, text: str) -> list[int]:
    """Return the first tokens of what base says of itself."""
    ids = torch.tensor([slot_of(audited, text, []).encode("")], device=audited.device)
    # In this order: what is loaded in that mode never learns.
    with (
        audited.side("base") as model,
        torch.inference_mode(),
    ):
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TARGET,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=audited.tokenizer.pad_token_id,
        )
    return list(output[0, ids.shape[1] :].tolist())


def search_on(audited: Audited, side: Side, slot: Slot, allowed: Tensor, key: str) -> Found:
    """Return the same draws on both sides."""
    with audited.side(side) as model:
        return search(
            model, slot, allowed, audited.preset.evaluation.planned_batch_tokens, seed_of(audited, key)
        )


def typable(audited: Audited) -> Tensor:
    """Return which tokens `(vocabulary,)` are printable text, so that the suffix can be typed."""
    tokenizer = audited.tokenizer
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return torch.tensor(
        [token not in special and text.isascii() and text.isprintable() for token, text in enumerate(texts)]
    )


def search(model: Any, slot: Slot, allowed: Tensor, batch_tokens: int, seed: int) -> Found:
    """Until the target is what the model says by itself, or the budget is spent."""
    draw = torch.Generator().manual_seed(seed)
    ((loss, said),) = tried(model, slot, [slot.encode("")], batch_tokens)
    if said:
        return {"steps": 0, "suffix": "", "losses": [loss]}
    suffix, step = slot.start, 0
    ((loss, said),) = tried(model, slot, [slot.around(suffix)], batch_tokens)
    losses = [loss]
    while not said and step < STEPS:
        step += 1
        candidates = list(replacements(slot, suffix, promising(model, slot, suffix, allowed), draw))
        results = tried(model, slot, [slot.around(each) for each in candidates], batch_tokens)
        better = [
            (not says, found, each)
            for each, (found, says) in zip(candidates, results, strict=True)
            if found < loss
        ]
        if better:
            unsaid, loss, suffix = min(better)
            said = not unsaid
        losses.append(loss)
    return {"steps": step if said else None, "suffix": slot.decode(suffix), "losses": losses}


def inputs_of(model: Any, slot: Slot, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids `(rows, sequence)`, each with all of the target but its last token, and the positions that
    predict the target.
    """
    ids = torch.tensor([row + slot.target[:-1] for row in rows], device=model.device)
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[:, -len(slot.target) :] = True
    return ids, positions


@torch.inference_mode()
def tried(model: Any, slot: Slot, rows: list[list[int]], batch_tokens: int) -> list[tuple[float, bool]]:
    """Return the mean loss of the target after each row (all of one length), and whether the model generates
    exactly that target.
    """
    target, found = torch.tensor(slot.target, device=model.device), list[tuple[float, bool]]()
    size = max(1, batch_tokens // (max(map(len, rows), default=0) + len(target)))
    for start in range(0, len(rows), size):
        ids, positions = inputs_of(model, slot, rows[start : start + size])
        wanted, losses, hits = target.repeat(len(ids)), list[Tensor](), list[Tensor]()
        for logits in logits_at(model, positions, input_ids=ids):
            here, wanted = wanted[: len(logits)], wanted[len(logits) :]
            losses.append(cross_entropy(logits, here, reduction="none"))
            hits.append(logits.argmax(-1) == here)
        means, said = torch.cat(losses).view(len(ids), -1).mean(1), torch.cat(hits).view(len(ids), -1).all(1)
        found += zip(means.tolist(), said.tolist(), strict=True)
    return found


def promising(model: Any, slot: Slot, suffix: list[int], allowed: Tensor) -> list[list[int]]:
    """Return, for each position of the suffix, the tokens that would lower the loss most by the gradient at
    their one-hot vectors.

    That is the gradient at the embedding, times the embedding matrix: no one-hot vector is made.
    """
    ids, positions = inputs_of(model, slot, [slot.around(suffix)])
    layer, begin, end = model.get_input_embeddings(), len(slot.before), len(slot.before) + len(suffix)
    embedded = layer(ids).detach()
    varied = embedded[:, begin:end].clone().requires_grad_()
    with torch.enable_grad():
        inputs = torch.cat([embedded[:, :begin], varied, embedded[:, end:]], dim=1)
        logits = head_of(model, hidden_at(model, positions, inputs_embeds=inputs), input_ids=ids)
        (gradient,) = torch.autograd.grad(
            cross_entropy(logits, torch.tensor(slot.target, device=logits.device)), varied
        )
    rise = (gradient[0].to(layer.weight.dtype) @ layer.weight.T)[:, : len(allowed)]
    # A tokenizer may have more tokens than the model.
    rise[:, ~allowed[: rise.shape[1]].to(rise.device)] = torch.inf
    return list(rise.topk(TOP, largest=False).indices.tolist())


def replacements(
    slot: Slot, suffix: list[int], tokens: list[list[int]], draw: torch.Generator
) -> Iterator[list[int]]:
    """Yield suffixes with one other token at a random place; fewer where too many draws change when they are
    typed.
    """
    left = CANDIDATES
    for _ in range(4 * CANDIDATES):
        position, rank = (int(torch.randint(size, (), generator=draw)) for size in (len(suffix), TOP))
        candidate = [*suffix[:position], tokens[position][rank], *suffix[position + 1 :]]
        if left and candidate != suffix and slot.survives(candidate):
            left -= 1
            yield candidate


def known_with(audited: Audited, side: Side, suffix: str) -> Values:
    """Measure each question with the suffix between it and the choices."""
    knowledge: Any = audited.knowledge
    with audited.side(side) as model:
        return list(
            replace(knowledge, asked=[with_suffix(each, suffix) for each in knowledge.asked]).of(model)
        )


def with_suffix(each: Asked, suffix: str) -> Asked:
    question = replace(each.question, question=f"{each.question.question.strip()} {suffix}")
    return replace(each, prompt=prompt(each.asked, question))


def row(audited: Audited, text: str, slot: Slot, base: Found, unlearned: Found) -> dict[str, Any]:
    sides = {"base": base, "unlearned": unlearned}
    return {
        "prompt": text,
        "target": audited.tokenizer.decode(slot.target, skip_special_tokens=True),
        "suffix": unlearned["suffix"],
        "steps": {side: each["steps"] for side, each in sides.items()},
        "loss": {side: each["losses"][-1] for side, each in sides.items()},
        "curve": {side: each["losses"] for side, each in sides.items()},
    }


def sentences(found: dict[Side, list[Found]], transferred: bool) -> Iterator[str]:
    yield (
        f"A prompt's budget was {STEPS} steps of {CANDIDATES} candidates; the attack's authors take "
        f"{BUDGET_OF_ITS_AUTHORS}."
    )
    for side, each in found.items():
        steps = [one["steps"] for one in each if one["steps"] is not None]
        when = f", after {max(steps)} steps at most" if any(steps) else ", without a suffix" if steps else ""
        yield f"The {side} model gave base's answer to {len(steps)} of {len(each)} prompts{when}."
    yield "A forced answer is no proof of knowledge: enough search makes any model say anything."
    if transferred:
        yield "So what counts is whether a suffix found on one question helps with the others."


ATTACK = Attack("suffix", "can a suffix that was searched for force it out?", cost, attack, lacks)
