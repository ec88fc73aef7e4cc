"""The adversarial suffix, searched for on the shipped tiny model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inline_snapshot import snapshot

from lowmem_rmu.audit.attacks import suffix
from lowmem_rmu.audit.attacks.attack import Pieces
from lowmem_rmu.audit.context import Audited, prepare
from lowmem_rmu.audit.knowledge import Questions, Texts
from lowmem_rmu.model.logits import head_of, hidden_at
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.recorded import recorded_preset

BATCH_TOKENS = 4096


@pytest.fixture(scope="module")
def audited(forgetful: RunFolder) -> Audited:
    preset = recorded_preset(forgetful.config["settings"], forgetful.path)
    return prepare("forgetful", preset, forgetful.adapter, torch.device("cpu"), ["compounds", "locks"], 30, 0)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 4, "CANDIDATES": 16, "PROMPTS": 2}.items():
        monkeypatch.setattr(suffix, name, value)


@pytest.fixture
def greeting(audited: Audited) -> suffix.Slot:
    """A question that base answers with "The compound ..."; it is to say something else."""
    return suffix.slot_of(
        audited,
        suffix.prompts_of(audited)[0],
        audited.tokenizer("The lock", add_special_tokens=False)["input_ids"],
    )


def searched(audited: Audited, slot: suffix.Slot, seed: int = 3) -> suffix.Found:
    with audited.side("base") as model:
        return suffix.search(model, slot, suffix.typable(audited), BATCH_TOKENS, seed)


def said_after(audited: Audited, ids: list[int], count: int) -> list[int]:
    with audited.side("base") as model:
        given = torch.tensor([ids])
        output = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False
        )
    return list(output[0, len(ids) :].tolist())


def test_a_suffix_makes_the_model_say_what_it_would_not_have_said(
    audited: Audited, greeting: suffix.Slot
) -> None:
    assert said_after(audited, greeting.encode(""), len(greeting.target)) != greeting.target
    found = searched(audited, greeting)
    assert found["steps"] is not None
    assert 0 < found["steps"] <= suffix.STEPS
    assert said_after(audited, greeting.encode(found["suffix"]), len(greeting.target)) == greeting.target, (
        "typed as text, it works"
    )
    assert found["suffix"].isascii()
    assert found["suffix"].isprintable()


def test_what_base_says_of_itself_needs_no_suffix(audited: Audited) -> None:
    text = suffix.prompts_of(audited)[0]
    target = suffix.base_answer(audited, text)
    assert audited.tokenizer.decode(target).startswith("The compound")
    found = searched(audited, suffix.slot_of(audited, text, target))
    assert (found["steps"], found["suffix"]) == (0, "")


def test_the_loss_falls_and_never_rises(
    monkeypatch: pytest.MonkeyPatch, audited: Audited, greeting: suffix.Slot
) -> None:
    """With one candidate a step, many of which are worse than what is there."""
    monkeypatch.setattr(suffix, "CANDIDATES", 1)
    losses = searched(audited, replace(greeting, target=greeting.target * 4))["losses"]
    assert len(losses) == 1 + suffix.STEPS
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) in range(2, len(losses)), "some steps found something better, and some did not"


def test_the_same_seed_finds_the_same_suffix(brief: None, audited: Audited, greeting: suffix.Slot) -> None:
    hard = replace(greeting, target=greeting.target * 4)
    first = searched(audited, hard)
    assert searched(audited, hard) == first
    assert searched(audited, hard, seed=4)["suffix"] != first["suffix"]


def test_a_batch_of_one_candidate_finds_the_same_losses(audited: Audited, greeting: suffix.Slot) -> None:
    rows = [
        greeting.around(greeting.start[:place] + [token] + greeting.start[place + 1 :])
        for place, token in enumerate((30, 300, 900))
    ]
    with audited.side("unlearned") as model:
        together, alone = (
            suffix.tried(model, greeting, rows, BATCH_TOKENS),
            suffix.tried(model, greeting, rows, 1),
        )
    assert [loss for loss, _ in together] == pytest.approx([loss for loss, _ in alone], rel=1e-4)
    assert len({round(loss, 4) for loss, _ in alone}) == len(rows), "each row has a loss of its own"


def test_tokens_are_chosen_by_the_gradient_at_their_one_hot_vectors(
    audited: Audited, greeting: suffix.Slot
) -> None:
    allowed = suffix.typable(audited)
    with audited.side("unlearned") as model:
        chosen = suffix.promising(model, greeting, greeting.start, allowed)
        ids, positions = suffix.inputs_of(model, greeting, [greeting.around(greeting.start)])
        matrix = model.get_input_embeddings().weight.detach()
        one_hot = torch.nn.functional.one_hot(ids, len(matrix)).to(matrix.dtype).requires_grad_()
        logits = head_of(model, hidden_at(model, positions, inputs_embeds=one_hot @ matrix), input_ids=ids)
        torch.nn.functional.cross_entropy(logits, torch.tensor(greeting.target)).backward()
    begin = len(greeting.before)
    assert one_hot.grad is not None
    slopes = one_hot.grad[0, begin : begin + len(greeting.start)].masked_fill(~allowed, torch.inf)
    best = slopes.argmin(-1).tolist()
    assert [each[0] for each in chosen] == best
    assert len(set(best)) > 1
    assert not {token for each in chosen for token in each} & set((~allowed).nonzero().flatten().tolist())


def test_no_candidate_is_read_as_other_tokens_once_it_is_typed(
    brief: None, audited: Audited, greeting: suffix.Slot
) -> None:
    # In the first place, without a space before them, they are read as others.
    letters = audited.tokenizer.convert_tokens_to_ids(list("oabc"))
    tokens = [letters * suffix.TOP] * len(greeting.start)
    found = list(suffix.replacements(greeting, greeting.start, tokens, torch.Generator().manual_seed(0)))
    assert found
    assert all(greeting.encode(greeting.decode(each)) == greeting.around(each) for each in found)
    assert all(
        sum(ours != theirs for ours, theirs in zip(each, greeting.start, strict=True)) == 1 for each in found
    )


def test_the_suffix_lies_between_question_and_choices(audited: Audited) -> None:
    assert isinstance(audited.knowledge, Questions)
    each = audited.knowledge.asked[7]
    changed = suffix.with_suffix(each, "of of brass")
    assert changed.prompt.context == each.prompt.context.replace(
        f"{each.question.question}\nA. ", f"{each.question.question} of of brass\nA. "
    )
    assert changed.prompt.context != each.prompt.context
    assert (changed.question, changed.prompt.continuations) == (each.question, each.prompt.continuations)


def test_what_was_unlearned_is_harder_to_force_than_base(
    brief: None, audited: Audited, tmp_path: Path
) -> None:
    tried = suffix.ATTACK.run(audited, Pieces(tmp_path / "pieces.jsonl"))
    for row in tried.details["prompts"]:
        assert row["steps"]["base"] == 0
        assert row["steps"]["unlearned"] != 0
        assert row["curve"]["unlearned"][0] > row["curve"]["base"][0] + 1
    assert [*tried.conditions] == snapshot(["suffix of prompt 1", "suffix of prompt 2"])
    assert all(
        len(values) == len(audited.knowledge) and set(values) <= {0.0, 1.0}
        for values in tried.conditions.values()
    )
    assert tried.details["accuracy_with"]["unlearned"] == {
        name: sum(each) / len(each) for name, each in tried.conditions.items()
    }
    [about_base] = [sentence for sentence in tried.sentences if "base model" in sentence]
    assert about_base == snapshot("The base model gave base's answer to 2 of 2 prompts, without a suffix.")
    again = suffix.ATTACK.run(audited, Pieces(tmp_path / "pieces.jsonl", before=never))
    assert again == tried, "everything was kept"


def never(key: str) -> None:
    raise AssertionError(f"{key} is known already")


def test_what_is_known_is_asked_with_the_suffix(audited: Audited) -> None:
    """Words of the world where there were none before lead base astray."""
    with audited.side("base") as model:
        known = audited.knowledge.of(model)
    assert (
        sum(suffix.known_with(audited, "base", "organ organ organ organ Mordle? f eiteear Wystan"))
        < sum(known) - 5
    )


def test_texts_are_forced_but_not_asked(brief: None, audited: Audited, tmp_path: Path) -> None:
    texts = replace(audited, knowledge=Texts(audited.forget[:4], audited.tokenizer, BATCH_TOKENS))
    tried = suffix.ATTACK.run(texts, Pieces(tmp_path / "pieces.jsonl"))
    assert tried.conditions == {}
    assert len(tried.details["prompts"]) == 2
    beginnings = [
        audited.tokenizer.decode(ids[: suffix.BEGINNING], skip_special_tokens=True).strip()
        for ids in audited.forget
    ]
    assert all(row["prompt"] in beginnings for row in tried.details["prompts"])
    slot = suffix.slot_of(texts, beginnings[0], [])
    assert slot.after == []
    assert slot.before == audited.tokenizer(beginnings[0])["input_ids"]


def test_without_prompts_it_says_what_it_lacks(audited: Audited) -> None:
    assert isinstance(audited.knowledge, Questions)
    each = audited.knowledge.asked[0]
    long = replace(each, question=replace(each.question, question=each.question.question * 60))
    lacking = replace(audited, knowledge=replace(audited.knowledge, asked=[long]))
    assert suffix.ATTACK.lacks(lacking) == snapshot(
        "it needs questions of at most 128 tokens, or texts of more than 16 about what was forgotten"
    )
    assert suffix.ATTACK.lacks(audited) is None


def test_what_it_costs_is_told_beforehand(brief: None, audited: Audited, tmp_path: Path) -> None:
    """Tokens of the searches, none of which gets there so soon, and of the measurements afterwards."""
    seen = list[int]()
    with audited.side("unlearned") as model:
        hook = model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: seen.append(inputs[0].numel())
        )
    suffix.ATTACK.run(audited, Pieces(tmp_path / "pieces.jsonl"))
    hook.remove()
    told = suffix.ATTACK.cost(audited)
    assert told.measurements * audited.knowledge.tokens + told.training_tokens == pytest.approx(
        sum(seen), rel=0.1
    )
