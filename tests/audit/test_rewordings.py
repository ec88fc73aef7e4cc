"""Questions in other words: what is asked stays the same, and so does what is right."""

from dataclasses import replace

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lowmem_rmu.audit.rewordings import SHOTS, after_examples, in_chat, in_chat_begun, templated, ways_of
from lowmem_rmu.data.questions import Question, QuestionSet
from lowmem_rmu.evaluation.multiple_choice import Asked, ask, encode

TREES = ("ash", "birch", "cedar", "date", "elder", "fir", "gorse", "hazel")
QUESTIONS = tuple(
    Question(f"What is {name}?", (f"{name} one", f"{name} two", f"{name} three", f"{name} four"), place % 4)
    for place, name in enumerate(TREES)
)
SETS = QuestionSet("trees", "trees", "forgotten", None, QUESTIONS)
BRACKETS = "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}" \
           "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"  # fmt: skip


@pytest.fixture(scope="module")
def ways(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Asked]]:
    return ways_of(ask([SETS]), tokenizer, seed=0)


@pytest.fixture
def bracketed(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """With a template that writes the start token itself, and a space in front of the answer."""
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.chat_template = BRACKETS
    return other


def test_every_way_asks_every_question_and_keeps_what_is_right(ways: dict[str, list[Asked]]) -> None:
    for name, asked in ways.items():
        for each, question in zip(asked, QUESTIONS, strict=True):
            assert question.question in each.prompt.context, name
            right = question.choices[question.gold]
            shown = each.prompt.context.split(question.question)[-1]
            letter = each.prompt.continuations[each.question.gold].strip()
            assert letter == right or f"\n{letter}. {right}" in shown, name


def test_every_way_is_another_prompt(ways: dict[str, list[Asked]]) -> None:
    prompts = [asked[0].prompt for asked in [ask([SETS]), *ways.values()]]
    assert len(set(prompts)) == len(prompts) == 14


def test_no_option_keeps_its_letter(ways: dict[str, list[Asked]]) -> None:
    for name in ("options reversed", "options rotated"):
        for each, question in zip(ways[name], QUESTIONS, strict=True):
            assert sorted(each.question.choices) == sorted(question.choices)
            assert all(new != old for new, old in zip(each.question.choices, question.choices, strict=True))
    assert ways["options reversed"][0].question.choices != ways["options rotated"][0].question.choices


def test_a_frame_in_another_language_translates_the_examples_too(tokenizer: PreTrainedTokenizerBase) -> None:
    shown = replace(SETS, examples=QUESTIONS[:2])
    context = ways_of(ask([shown])[2:3], tokenizer, 0)["in a Spanish frame"][0].prompt.context
    assert context.startswith("Las siguientes son preguntas (con respuestas) sobre trees.\n\nWhat is ash?\n")
    assert context.count("\nRespuesta:") == 3
    assert "Answer:" not in context


def test_without_a_header_there_are_no_examples_either(tokenizer: PreTrainedTokenizerBase) -> None:
    shown = replace(SETS, examples=QUESTIONS[:2])
    context = ways_of(ask([shown])[2:3], tokenizer, 0)["without a header"][0].prompt.context
    assert context.startswith("What is cedar?\nA. cedar one\n")
    assert context.endswith("\nAnswer:")


def test_questions_without_letters_are_not_asked_with_them(tokenizer: PreTrainedTokenizerBase) -> None:
    ways = ways_of(ask([replace(SETS, scoring="cloze")]), tokenizer, 0)
    assert not {"options reversed", "options rotated", "texts instead of letters"} & ways.keys()
    assert ways["in chat"][1].prompt.continuations == ("birch one", "birch two", "birch three", "birch four")


def test_without_a_chat_template_nothing_is_asked_in_chat(bracketed: PreTrainedTokenizerBase) -> None:
    bracketed.chat_template = None
    assert not [name for name in ways_of(ask([SETS]), bracketed, 0) if "chat" in name]


def test_the_letter_follows_the_template_as_the_template_writes_it(
    tokenizer: PreTrainedTokenizerBase, bracketed: PreTrainedTokenizerBase
) -> None:
    each = ask([SETS])[0]
    assert in_chat(each, tokenizer).prompt.continuations == ("A", "B", "C", "D")
    assert in_chat(each, bracketed).prompt.continuations == (" A", " B", " C", " D")
    assert in_chat_begun(each, tokenizer).prompt.context.endswith("<|assistant|>\nAnswer:")


def test_a_template_that_writes_the_start_token_gets_no_second_one(
    bracketed: PreTrainedTokenizerBase,
) -> None:
    [requests] = encode(bracketed, [in_chat(ask([SETS])[0], bracketed)])
    assert requests[0].ids[0] == bracketed.bos_token_id
    assert requests[0].ids.count(bracketed.bos_token_id) == 1
    assert templated(bracketed, "Why?") == "[INST] Why? [/INST]"


def test_examples_are_questions_that_are_not_asked() -> None:
    asked = after_examples(ask([SETS])[:3], seed=0)
    assert {example for each in asked for example in each.asked.examples} == set(QUESTIONS[3:])
    assert all(len(each.asked.examples) == SHOTS for each in asked)
    assert asked[0].prompt.context.count("\nAnswer:") == SHOTS + 1


def test_where_all_are_asked_the_examples_are_of_the_other_half() -> None:
    asked = after_examples(ask([SETS]), seed=0)
    for number, each in enumerate(asked):
        assert each.asked.examples
        assert set(each.asked.examples) <= set(QUESTIONS[1 - number % 2 :: 2])


def test_long_questions_are_no_examples() -> None:
    long = tuple(replace(question, question=question.question + " again" * 500) for question in QUESTIONS)
    several = replace(SETS, questions=(*QUESTIONS[:2], *long[:6], *QUESTIONS[2:]))
    examples = after_examples(ask([several])[:2], seed=0)[0].asked.examples
    assert len(examples) == SHOTS
    assert max(len(example.question) for example in examples) < 100
