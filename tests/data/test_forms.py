"""Questions and chat turns made from running text: their form, their letters, and what they are never made of."""

import re
from collections import Counter

import pytest
from transformers import PreTrainedTokenizerBase

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import ModelSettings
from lowmem_rmu.data.forms import (
    REQUESTS,
    Passage,
    chat_samples,
    find_passages,
    question_prompts,
    question_samples,
)
from lowmem_rmu.model.loading import load_tokenizer

PARAGRAPH = (
    "The river rises in the hills above the old town and runs south. It passes three mills before it reaches the wide plain. "
    "In spring the water carries sand and small stones down to the sea. Farmers along both banks have built low walls of clay. "
    "Most of those walls are mended every autumn by the people who live there. Nobody knows when the first of them was built."
)
DOCUMENTS = [PARAGRAPH, PARAGRAPH.replace("river", "stream").replace("mills", "bridges")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSettings(name=load_preset("tiny").model.name))


@pytest.fixture(scope="module")
def passages() -> list[Passage]:
    return find_passages(DOCUMENTS)


def decoded(tokenizer: PreTrainedTokenizerBase, samples: list[list[int]]) -> list[str]:
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in samples]


def test_passages_are_neighbors(passages: list[Passage]) -> None:
    assert len(passages) == 2 * 5
    assert passages[0].first == "The river rises in the hills above the old town and runs south."
    assert passages[0].second == "It passes three mills before it reaches the wide plain."
    assert passages[1].first == passages[0].second


@pytest.mark.parametrize(
    "text",
    [
        "Chapter One\nThe Hills And Their Rivers",
        "A short one. Another short one. And one more.",
        "| a | b | c | d | e | f | g | h |\n| 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |",
        "x = 1; y = 2; z = x + y; w = z * z; v = w - x; u = v / y; print(u, v, w)",
        "THE RIVER RISES IN THE HILLS ABOVE THE OLD TOWN. IT PASSES THREE MILLS BEFORE IT REACHES THE PLAIN.",
        "This sentence has quite a few words in it but it does not end, This one has quite a few words in it and does not end",
        " ".join(["word"] * 90) + ". " + " ".join(["other"] * 90) + ".",
        "",
    ],
)
def test_what_is_no_running_text_gives_no_passage(text: str) -> None:
    assert find_passages([text]) == []


def test_sentences_of_two_paragraphs_do_not_follow_each_other() -> None:
    first, second = PARAGRAPH.split(". ")[:2]
    assert find_passages([f"{first}.\n{second}."]) == []


def test_questions_have_the_form_of_a_benchmark(
    tokenizer: PreTrainedTokenizerBase, passages: list[Passage]
) -> None:
    texts = decoded(tokenizer, question_samples(passages, 40, tokenizer, 1000, "0"))
    assert len(texts) == 40
    form = re.compile(
        r"^ ?The following are multiple choice questions \(with answers\) about [\w'’-]+\.\n\n"
        r"(Which sentence follows this one\?|Which word is missing\?) .+\nA\. .+\nB\. .+\nC\. .+\nD\. .+\nAnswer: [ABCD]$"
    )
    assert all(form.match(text) for text in texts)
    asked = Counter("follows" if "Which sentence" in text else "missing" for text in texts)
    assert asked == {"follows": 20, "missing": 20}
    assert all("____" in text for text in texts if "Which word" in text)


def test_every_letter_is_right_equally_often(
    tokenizer: PreTrainedTokenizerBase, passages: list[Passage]
) -> None:
    texts = decoded(tokenizer, question_samples(passages, 80, tokenizer, 1000, "0"))
    assert Counter(text[-1] for text in texts) == dict.fromkeys("ABCD", 20)


def test_the_right_answer_is_right(tokenizer: PreTrainedTokenizerBase, passages: list[Passage]) -> None:
    follows = {
        passage.first: {other.second for other in passages if other.first == passage.first}
        for passage in passages
    }
    for text in decoded(tokenizer, question_samples(passages, 40, tokenizer, 1000, "3")):
        right = re.search(rf"\n{text[-1]}\. (.+)\n", text)
        assert right is not None
        if "Which sentence" in text:
            asked = re.search(r"follows this one\? (.+)\nA\. ", text)
            assert asked is not None
            assert right[1] in follows[asked[1]]
        else:
            restored = text.replace("____", right[1])
            assert any(f"{passage.first} {passage.second}" in restored for passage in passages)


def test_no_question_is_cut_short(tokenizer: PreTrainedTokenizerBase, passages: list[Passage]) -> None:
    whole = question_samples(passages, 40, tokenizer, 1000, "0")
    most = sorted(map(len, whole))[len(whole) // 2]
    shorter = question_samples(passages, 40, tokenizer, most, "0")
    assert 0 < len(shorter) <= 40
    assert all(len(ids) <= most for ids in shorter)
    assert all(re.search(r"Answer: [ABCD]$", text) for text in decoded(tokenizer, shorter))
    assert question_samples(passages, 40, tokenizer, 20, "0") == []


def test_the_same_seed_gives_the_same_questions(
    tokenizer: PreTrainedTokenizerBase, passages: list[Passage]
) -> None:
    first = question_samples(passages, 12, tokenizer, 1000, "0")
    assert first == question_samples(passages, 12, tokenizer, 1000, "0")
    assert first != question_samples(passages, 12, tokenizer, 1000, "1")


def test_too_few_passages_make_no_question(
    tokenizer: PreTrainedTokenizerBase, passages: list[Passage]
) -> None:
    assert question_samples(passages[:3], 12, tokenizer, 1000, "0") == []
    assert question_prompts(passages[:3], 12, tokenizer, "0") == []
    assert question_samples(passages, 0, tokenizer, 1000, "0") == []


def test_a_prompt_ends_where_the_letter_would_follow(
    tokenizer: PreTrainedTokenizerBase, passages: list[Passage]
) -> None:
    texts = decoded(tokenizer, question_prompts(passages, 8, tokenizer, "0"))
    assert len(texts) == 8
    assert all(text.endswith("\nAnswer:") for text in texts)


def test_conversations_are_written_by_the_models_own_template(
    tokenizer: PreTrainedTokenizerBase, passages: list[Passage]
) -> None:
    samples = chat_samples(passages, 8, tokenizer, 1000, "0")
    assert len(samples) == 8
    text = str(tokenizer.decode(samples[0]))
    assert any(passage.first in text and passage.second in text for passage in passages)
    told = [
        [
            {"role": "user", "content": request.format(each.first)},
            {"role": "assistant", "content": each.second},
        ]
        for each in passages
        for request in REQUESTS
    ]
    assert text in {tokenizer.apply_chat_template(messages, tokenize=False) for messages in told}
    assert all(len(ids) <= 12 for ids in chat_samples(passages, 8, tokenizer, 12, "0"))


@pytest.mark.parametrize("template", [None, "", "{{ raise_exception('no assistant, please') }}", "{% broken"])
def test_a_model_without_a_usable_template_has_no_conversations(
    passages: list[Passage], template: str | None
) -> None:
    tokenizer = load_tokenizer(ModelSettings(name=load_preset("tiny").model.name))
    tokenizer.chat_template = template
    assert chat_samples(passages, 8, tokenizer, 1000, "0") == []
