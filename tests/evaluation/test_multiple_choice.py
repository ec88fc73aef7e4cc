"""A-D questions: the scores against one plain forward pass a question, and the sums over them."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inline_snapshot import snapshot
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.data.questions import LETTERS, Question, QuestionSet
from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.multiple_choice import (
    Interrupted,
    answer,
    ask,
    balanced_accuracy,
    evaluate,
    summarise,
)
from lowmem_rmu.evaluation.prompts import prompt
from lowmem_rmu.model.adapters import base_only
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.runs.records import Answer
from tests.records import answer_row
from tests.texts import plain

WORDS = ["red", "blue", "stone", "river", "the", "a", "of", "seven", "gate"]


@pytest.fixture(scope="module")
def model(small_model_folder: Path) -> PreTrainedModel:
    return load_model(
        ModelSettings(name=str(small_model_folder), quantisation="none", dtype="float32"), torch.device("cpu")
    )


def text(made: random.Random, most: int) -> str:
    return " ".join(made.choices(WORDS, k=made.randint(1, most)))


def question_set(name: str, count: int, group: str | None = None) -> QuestionSet:
    """Questions of many lengths with answers at random."""
    made = random.Random(name)
    questions = [
        Question(text(made, 25), tuple(text(made, 3) for _ in LETTERS), made.randrange(4))
        for _ in range(count)
    ]
    return QuestionSet(name, name.replace("_", " "), "measured", group, tuple(questions))


@pytest.fixture(scope="module")
def sets() -> list[QuestionSet]:
    return [
        question_set("plain", 9),
        question_set("all_small", 2, "all"),
        question_set("all_large", 7, "all"),
    ]


def plain_logprobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: QuestionSet, question: Question
) -> list[float]:
    """A forward pass of context and continuation for each choice; the sum of probabilities runs over the whole vocabulary."""
    put = prompt(asked, question)
    start = len(tokenizer(put.context)["input_ids"])
    found = []
    for continuation in put.continuations:
        ids = tokenizer(put.context + continuation)["input_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(sum(logprobs[place - 1, ids[place]].item() for place in range(start, len(ids))))
    return found


def as_cloze(sets: list[QuestionSet]) -> list[QuestionSet]:
    return [replace(each, scoring="cloze") for each in sets]


def with_examples(sets: list[QuestionSet]) -> list[QuestionSet]:
    return [replace(each, examples=question_set(f"{each.name} examples", 3).questions) for each in sets]


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
@pytest.mark.parametrize("form", [list, with_examples, as_cloze], ids=["0-shot", "3-shot", "cloze"])
def test_scores_equal_those_of_one_continuation_at_a_time(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: list[QuestionSet],
    form: Any,
    batch_tokens: int,
) -> None:
    """So neither batches nor padding nor the shared prefix matter, and answers come in the order of the questions."""
    sets = form(sets)
    answers = evaluate(model, tokenizer, sets, batch_tokens).answers
    asked = [(each, number, question) for each in sets for number, question in enumerate(each.questions)]
    assert [(answer.task, answer.index) for answer in answers] == [
        (each.name, number) for each, number, _ in asked
    ]
    for row, (each, _, question) in zip(answers, asked, strict=True):
        expected = plain_logprobs(model, tokenizer, each, question)
        assert row.logprobs == pytest.approx(expected, abs=1e-4)
        a_character = [
            value / (len(choice) if each.scoring == "cloze" else 1)
            for value, choice in zip(expected, question.choices, strict=True)
        ]
        assert row.answer == a_character.index(max(a_character))
        assert row.gold == question.gold
        assert row.correct is (row.answer == question.gold)
    assert 0 < sum(answer.correct for answer in answers) < len(answers)


def rows_of_every_pass(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: list[QuestionSet], **options: Any
) -> list[int]:
    """The rows of every forward pass while the sets are evaluated."""
    shapes: list[int] = []
    hook = (
        model.get_decoder().layers[0].register_forward_pre_hook(lambda _, given: shapes.append(len(given[0])))
    )
    try:
        evaluate(model, tokenizer, sets, **{"batch_tokens": 300} | options)
    finally:
        hook.remove()
    return shapes


def test_identical_prompts_are_asked_once(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    one = question_set("plain", 5)
    twice = replace(one, questions=one.questions * 2)
    assert rows_of_every_pass(model, tokenizer, [twice]) == rows_of_every_pass(model, tokenizer, [one])
    answers = evaluate(model, tokenizer, [twice], 300).answers
    assert [answer.logprobs for answer in answers[:5]] == [answer.logprobs for answer in answers[5:]]


def test_a_question_longer_than_a_batch_is_asked_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert (
        evaluate(model, tokenizer, [question_set("plain", 3)], batch_tokens=1).scores["tasks"]["plain"][
            "questions"
        ]
        == 3
    )


def test_what_is_known_is_not_asked_again_and_changes_nothing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: list[QuestionSet]
) -> None:
    kept: list[dict[str, Any]] = []
    whole = evaluate(model, tokenizer, sets, 300, keep=kept.extend)
    assert sorted(map(str, kept)) == sorted(map(str, whole.answers))
    known = {row.prompt: row.logprobs for row in kept}
    assert rows_of_every_pass(model, tokenizer, sets, known=known) == []
    again = evaluate(model, tokenizer, sets, 300, known=known)
    assert again.answers == whole.answers
    assert (whole.scores["known_before"], again.scores["known_before"]) == (0, 18)
    assert again.scores["tasks"] == whole.scores["tasks"]


@pytest.mark.parametrize("batches", [1, 2, 4])
def test_an_interrupted_evaluation_goes_on_to_the_same_result_to_the_bit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: list[QuestionSet], batches: int
) -> None:
    sets, kept, heard = with_examples(sets), list[dict[str, Any]](), list[int]()

    def stop(done: int, _: float) -> bool:
        heard.append(done)
        return len(heard) == batches

    with pytest.raises(Interrupted):
        evaluate(model, tokenizer, sets, 300, keep=kept.extend, progress=stop)
    assert 0 < len(kept) == heard[-1] < 18
    known = {row.prompt: row.logprobs for row in kept[:-1]}  # the last line was torn
    assert (
        evaluate(model, tokenizer, sets, 300, known).answers == evaluate(model, tokenizer, sets, 300).answers
    )


@pytest.mark.parametrize(
    ("correct", "total", "accuracy", "stderr"),
    [(3, 4, 0.75, 0.25), (1, 5, 0.2, math.sqrt(0.04)), (0, 3, 0.0, 0.0), (1, 1, 1.0, 0.0)],
)
def test_stderr_is_in_the_n_minus_1_form(correct: int, total: int, accuracy: float, stderr: float) -> None:
    rows = [
        answer_row(correct=number < correct, answer=number % 2, gold=0, logprobs=[-1.0] * 4)
        for number in range(total)
    ]
    summary = summarise(rows)
    assert (summary["accuracy"], summary["stderr"]) == (pytest.approx(accuracy), pytest.approx(stderr))
    assert (summary["questions"], summary["correct"]) == (total, correct)
    assert summary["answers"] == [(total + 1) // 2, total // 2, 0, 0]
    assert summary["confidence"] == pytest.approx(0.25)


def test_confidence_is_the_probability_of_the_answer_among_the_four() -> None:
    likely = [math.log(each) for each in (0.01, 0.07, 0.01, 0.01)]
    even = [math.log(each) for each in (0.3, 0.3, 0.2, 0.2)]
    sure = answer_row(correct=True, answer=1, gold=1, logprobs=likely)
    torn = answer_row(correct=False, answer=0, gold=2, logprobs=even)
    assert summarise([sure, torn])["confidence"] == pytest.approx((0.7 + 0.3) / 2)
    assert summarise([sure, replace(torn, logprobs=None)])["confidence"] == pytest.approx(0.7)
    assert summarise([replace(torn, logprobs=None)])["confidence"] is None


def answered(golds: str, answers: str) -> list[Answer]:
    return [
        answer_row(gold=LETTERS.index(gold), correct=gold == answer)
        for gold, answer in zip(golds, answers, strict=True)
    ]


def test_balanced_accuracy_weights_every_right_letter_the_same() -> None:
    assert balanced_accuracy(answered("ABCDDDDD", "DDDDDDDD")) == 0.25, "its accuracy would be 5/8"
    assert balanced_accuracy(answered("ABCD", "ABCD")) == 1.0
    assert balanced_accuracy(answered("AAAB", "AABB")) == pytest.approx((2 / 3 + 1) / 2), (
        "letters that are never right are left out"
    )


def test_a_group_is_weighed_by_its_questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: list[QuestionSet]
) -> None:
    evaluated = evaluate(model, tokenizer, sets, 1000)
    tasks, group = evaluated.scores["tasks"], evaluated.scores["groups"]["all"]
    assert list(tasks) == ["plain", "all_small", "all_large"]
    assert list(evaluated.scores["groups"]) == ["all"]
    assert (group["questions"], group["correct"]) == (
        9,
        tasks["all_small"]["correct"] + tasks["all_large"]["correct"],
    )
    assert group["accuracy"] == pytest.approx(group["correct"] / 9)
    assert tasks["plain"].items() >= summarise(evaluated.answers[:9]).items()
    pooled = (1 * 2 * tasks["all_small"]["stderr"] ** 2 + 6 * 7 * tasks["all_large"]["stderr"] ** 2) / (9 - 2)
    assert group["stderr"] == pytest.approx(math.sqrt(pooled / 9))
    assert evaluated.scores["questions_per_second"] == pytest.approx(18 / evaluated.scores["seconds"])


def test_the_model_is_asked_as_it_stands(
    small_settings: ModelSettings, tokenizer: PreTrainedTokenizerBase
) -> None:
    questions = [question_set("plain", 3)]
    adapted = get_peft_model(
        load_model(small_settings, torch.device("cpu")),
        LoraConfig(target_modules=["down_proj"], init_lora_weights=False),
    )
    base = load_model(small_settings, torch.device("cpu"))
    expected = [answer.logprobs for answer in evaluate(base, tokenizer, questions, 1000).answers]
    on = [answer.logprobs for answer in evaluate(adapted, tokenizer, questions, 1000).answers]
    with base_only(adapted):
        off = [answer.logprobs for answer in evaluate(adapted, tokenizer, questions, 1000).answers]
    assert off == expected
    assert on != expected


def test_progress_reaches_the_total(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: list[QuestionSet]
) -> None:
    heard: list[tuple[int, float]] = []

    def hear(done: int, accuracy: float) -> bool:
        heard.append((done, accuracy))
        return False

    evaluated = evaluate(model, tokenizer, sets, 300, progress=hear)
    assert len(heard) > 1
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert heard[-1] == (18, pytest.approx(sum(answer.correct for answer in evaluated.answers) / 18))


@pytest.mark.parametrize("form", [list, as_cloze], ids=["letters", "cloze"])
def test_a_prompt_longer_than_the_model_reads_loses_tokens_on_the_left_and_is_counted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: Any
) -> None:
    long = Question("stone " * 300, ("a", "b", "c", "d"), 0)
    [asked] = form([QuestionSet("gates", "gates", "kept", None, (long, *question_set("plain", 3).questions))])
    evaluated = evaluate(model, tokenizer, [asked], 1000)
    assert evaluated.scores["cut_prompts"] == 1
    ids = tokenizer(prompt(asked, long).context + prompt(asked, long).continuations[1])["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids[-257:-1]])).logits[0, -1]
    assert evaluated.answers[0].logprobs[1] == pytest.approx(logits.log_softmax(-1)[ids[-1]].item(), abs=1e-4)


def test_a_tokenizer_that_splits_the_letters_is_refused(model: PreTrainedModel) -> None:
    characters = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    with pytest.raises(UserError) as caught:
        evaluate(
            model,
            PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="?"),
            [question_set("plain", 1)],
            1000,
        )
    assert plain(caught.value) == snapshot(
        'This tokenizer splits " A" into several tokens, so the letters cannot be compared by one forward '
        "pass.\n"
        "Ask for the choices' texts instead: scoring: cloze."
    )


def test_a_model_whose_numbers_overflow_gets_no_answer(sets: list[QuestionSet]) -> None:
    asked = ask(sets)[3]
    with pytest.raises(UserError) as caught:
        answer(asked, [-1.0, math.nan, -2.0, -3.0])
    assert plain(caught.value) == snapshot(
        "The model gives no finite log-probabilities for question 3 of plain.\n"
        "Its numbers overflow, or it is damaged. In float16 try model.dtype=bfloat16 or float32; else check "
        "the checkpoint and the adapter."
    )
    assert answer(asked, [-math.inf, -1.0, -2.0, -3.0]).answer == 1
