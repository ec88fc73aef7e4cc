"""What is said before training about a topic that base does not know, and about a retain set that is no ordinary text."""

from typing import Any

import pytest
import torch
from inline_snapshot import snapshot
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_rmu.config.schema import ModelSettings, Role
from lowmem_rmu.data.questions import Question, QuestionSet
from lowmem_rmu.evaluation.known import perplexity_of, unknown_topic, unlike_texts
from lowmem_rmu.evaluation.perplexity import text_loss
from lowmem_rmu.model.loading import load_model, load_tokenizer


def score(correct: int, questions: int) -> dict[str, Any]:
    return {"questions": questions, "correct": correct, "accuracy": correct / questions}


def asked(name: str, role: Role = "forgotten", questions: int = 50) -> QuestionSet:
    question = Question("What?", tuple("abcd"), 0)
    return QuestionSet(name, name, role, None, (question,) * questions)


@pytest.mark.parametrize(
    ("correct", "told"),
    [
        (
            100,
            snapshot(
                "The base model answers 25.0% of the 400 questions about what is to be forgotten, which is no "
                "better than guessing (25%): they cannot show that it forgets. Choose a model that knows the "
                "topic, or other questions."
            ),
        ),
        (
            110,
            snapshot(
                "The base model answers 27.5% of the 400 questions about what is to be forgotten, which is no "
                "better than guessing (25%): they cannot show that it forgets. Choose a model that knows the "
                "topic, or other questions."
            ),
        ),
        (125, None),
        (400, None),
        (
            60,
            snapshot(
                "The base model answers 15.0% of the 400 questions about what is to be forgotten, which is no "
                "better than guessing (25%): they cannot show that it forgets. Choose a model that knows the "
                "topic, or other questions."
            ),
        ),
    ],
)
def test_a_topic_that_base_guesses_about_is_told(correct: int, told: str | None) -> None:
    """Of 400 questions with four choices; 110 right ones (27.5%) are within chance, 125 (31%) are not."""
    assert unknown_topic({"bio": score(correct, 400)}, [asked("bio", questions=400)]) == told


def test_tasks_of_a_topic_count_together_and_others_do_not() -> None:
    sets = [asked("a"), asked("b"), asked("rest", "kept")]
    assert unknown_topic({"a": score(30, 50), "b": score(10, 50), "rest": score(1, 50)}, sets) is None
    told = unknown_topic({"a": score(13, 50), "b": score(12, 50), "rest": score(50, 50)}, sets)
    assert told is not None
    assert " 25.0% " in told
    assert " 100 " in told


def test_without_questions_about_the_topic_nothing_is_told() -> None:
    assert unknown_topic({}, []) is None
    assert unknown_topic({"rest": score(10, 50)}, [asked("rest", "kept")]) is None


def test_texts_of_like_kinds_are_not_told() -> None:
    assert unlike_texts({"bio": 12.0, "cyber": 30.0}, 14.0) == []


def test_a_topic_that_is_much_less_likely_is_told() -> None:
    assert unlike_texts({"bio": 12.0, "runes": 90.0}, 14.0) == snapshot(
        [
            (
                "To the base model the text of runes is much less likely than the retain text (perplexity 90.0, "
                "the retain text 14.0): it may not know this topic, or not in this form. What it does not know "
                "it cannot forget."
            ),
        ]
    )


def test_a_retain_set_that_is_no_ordinary_text_is_told() -> None:
    assert unlike_texts({"bio": 12.0}, 300.0) == snapshot(
        [
            (
                "To the base model the retain text is much less likely than the text of bio (perplexity 12.0, "
                "the retain text 300.0): it does not look like ordinary text, and what does may then be "
                "forgotten with the topic. Give running text such as articles or books."
            ),
        ]
    )


@pytest.fixture(scope="module")
def model(small_model_folder: Any) -> PreTrainedModel:
    return load_model(
        ModelSettings(name=str(small_model_folder), quantisation="none", dtype="float32"), torch.device("cpu")
    )


def test_the_perplexity_is_that_of_the_evaluation(model: PreTrainedModel, small_model_folder: Any) -> None:
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(ModelSettings(name=str(small_model_folder)))
    sequences = [[1, *range(5, 25)], [1, *range(30, 40)]]
    assert perplexity_of(model, tokenizer, sequences, 64) == pytest.approx(
        text_loss(model, tokenizer, sequences, 64)["perplexity"]
    )
