"""Answers in words: many at a time as one by one, what counts as right, and figures against plain forward passes."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from lowmem_rmu.audit.answering import (
    LENGTH,
    answers,
    as_prompts,
    divergence,
    names_the_right_one,
    perplexity,
    repetition,
)
from lowmem_rmu.audit.context import Audited, Sides, prepare
from lowmem_rmu.audit.knowledge import evenly
from lowmem_rmu.chat.conversation import Sampling
from lowmem_rmu.chat.generation import answer
from lowmem_rmu.data.questions import Question
from lowmem_rmu.evaluation.perplexity import divergence as divergence_everywhere
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.recorded import recorded_preset

ASKED = [
    "What colour is the compound Yarinoxol?",
    "Who forged the lock Tasotch?",
    "Where does the bird Jinidove nest?",
    "What?",
]


@pytest.fixture(scope="module")
def answering(forgetful: RunFolder) -> Audited:
    preset = recorded_preset(forgetful.config["settings"], forgetful.path)
    return prepare("forgetful", preset, forgetful.adapter, torch.device("cpu"), ["compounds", "locks"], 5, 0)


@pytest.mark.parametrize("side", ["base", "unlearned"])
def test_many_answers_at_once_are_those_of_the_chat(answering: Audited, side: str) -> None:
    prompts = as_prompts(answering.tokenizer, ASKED)
    assert len({len(each) for each in prompts}) > 1, "the shorter ones are padded"
    with answering.side(side) as model:
        together = answers(model, answering.tokenizer, prompts, 4096)
        sampling = Sampling(LENGTH)
        alone = [
            answer(model, answering.tokenizer, [{"role": "user", "content": question}], sampling)
            for question in ASKED
        ]
        assert answers(model, answering.tokenizer, prompts, 1) == together, "one at a time where no more fit"
    # An unlearned model may write a token that the chat does not show, such as the one that begins a user's turn.
    decoded = answering.tokenizer.batch_decode(together, skip_special_tokens=True)
    assert [text.strip() for text in decoded] == alone
    assert all(alone)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("It is Nucleic  acid.", True),
        ("It is an acid", False),
        ("Nucleic acid or acid, who knows", False),
        ("nucleic acids", False),
        ("salt", False),
        ("", False),
    ],
)
def test_an_answer_is_right_that_names_the_right_choice_alone(text: str, right: bool) -> None:
    assert (
        names_the_right_one(Question("What?", ("acid", "nucleic acid.", "salt (rock)", ""), 1), text) is right
    )


def test_of_two_choices_that_overlap_the_longer_one_was_meant() -> None:
    question = Question("What?", ("acid", "nucleic acid", "salt", "tin"), 0)
    assert names_the_right_one(question, "an acid")
    assert not names_the_right_one(question, "a nucleic acid")


def test_choices_without_words_are_named_by_no_answer() -> None:
    assert not names_the_right_one(Question("What?", ("", "", "", ""), 0), "")
    assert not names_the_right_one(Question("What?", ("tin", "tin", "lead", "zinc"), 0), "tin")


def test_repetition_is_the_share_of_runs_that_were_there_before() -> None:
    assert repetition([[1, 1, 1, 1, 1, 1]]) == pytest.approx(2 / 3), "three runs of four tokens, all the same"
    assert repetition([[1, 2, 3, 4, 5], [1, 2, 3, 4]]) == 0, "another answer's tokens are no repetition"
    assert repetition([[1, 2, 3]]) is None


def test_perplexity_is_that_of_the_answer_after_its_prompt(answering: Audited) -> None:
    prompts, answered = [[1, 20, 30], [1, 40]], [[50, 60], [70, 80, 90]]
    with answering.side("base") as model:
        found = perplexity(model, answering.tokenizer, [*prompts, [1, 2]], [*answered, []], 4096)
        losses = []
        for prompt, ids in zip(prompts, answered, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
            losses += cross_entropy(logits, torch.tensor(ids), reduction="none").tolist()
        assert perplexity(model, answering.tokenizer, prompts, [[], []], 4096) is None
    assert found == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=0.01)


def test_divergence_is_none_from_itself(answering: Audited) -> None:
    twin = replace(
        answering, sides=Sides(answering.sides.base, answering.sides.base), _loaded=None, _loaded_from=None
    )
    assert divergence(twin)["kl"] == pytest.approx(0, abs=1e-6)


def test_divergence_is_that_of_one_model_with_its_adapter_on_and_off(answering: Audited) -> None:
    short = [ids[:5] for ids in answering.forget[:6]]  # four places each: all of them
    with answering.side("unlearned") as model:
        expected = divergence_everywhere(model, answering.tokenizer, short, 4096)
    found = divergence(replace(answering, benign=short))
    assert found["kl"] == pytest.approx(expected["kl"], rel=0.02)
    assert found["kl_stderr"] == pytest.approx(expected["kl_stderr"], rel=0.05)
    assert found["kl"] > 0.1


def test_a_sample_lies_evenly() -> None:
    assert evenly(range(10), 4) == [0, 2, 5, 7]
    assert evenly([1, 2], 5) == [1, 2]
    assert evenly([], 5) == []
