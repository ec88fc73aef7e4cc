"""What a tokenizer puts around a text, and pieces of texts with their bytes."""

from copy import deepcopy

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from lowmem_rmu.chat.generation import encode_prompt
from lowmem_rmu.data.corpora import tokenise
from lowmem_rmu.data.questions import Question, QuestionSet
from lowmem_rmu.data.tokens import encode_texts, split_text
from lowmem_rmu.evaluation.multiple_choice import ask, encode
from lowmem_rmu.model.special_tokens import SpecialTokens, special_tokens

START, END = 1, 2
ASKED = [{"role": "user", "content": "What color is the gate?"}]
TEXT = "The gate \u2013 of course \u2013 \u4e16\u754c \U0001f642\U0001f642 opens. "


def around(tokenizer: PreTrainedTokenizerBase, written: str) -> PreTrainedTokenizerBase:
    """The tiny tokenizer with other tokens around a text."""
    other = deepcopy(tokenizer)
    special = [("<s>", START), ("</s>", END)]
    other.backend_tokenizer.post_processor = TemplateProcessing(single=written, special_tokens=special)
    return other


@pytest.fixture(params=["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def any_tokenizer(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    return around(tokenizer, request.param)


def test_prefix_and_suffix_are_found_on_both_sides(tokenizer: PreTrainedTokenizerBase) -> None:
    assert special_tokens(around(tokenizer, "$A")) == SpecialTokens([], [])
    assert special_tokens(around(tokenizer, "<s> $A")) == SpecialTokens([START], [])
    assert special_tokens(around(tokenizer, "$A </s>")) == SpecialTokens([], [END])
    assert special_tokens(around(tokenizer, "<s> $A </s>")) == SpecialTokens([START], [END])


def test_no_text_ends_with_what_the_tokenizer_appends(any_tokenizer: PreTrainedTokenizerBase) -> None:
    [ids] = encode_texts(any_tokenizer, ["the gate"])
    assert (
        ids
        == special_tokens(any_tokenizer).prefix
        + any_tokenizer("the gate", add_special_tokens=False)["input_ids"]
    )
    assert encode_texts(any_tokenizer, []) == []


def test_samples_begin_with_the_prefix_alone(any_tokenizer: PreTrainedTokenizerBase) -> None:
    prefix = special_tokens(any_tokenizer).prefix
    for sequence in tokenise(["the red stone " * 20], any_tokenizer, 8, True):
        assert sequence[: len(prefix)] == prefix
        assert END not in sequence


@pytest.mark.parametrize(
    "template", [None, "{{ messages[0]['content'] }}", "<s>{{ messages[0]['content'] }}"]
)
def test_a_chat_prompt_ends_where_the_answer_begins(
    any_tokenizer: PreTrainedTokenizerBase, template: str | None
) -> None:
    any_tokenizer.chat_template = template
    ids = encode_prompt(any_tokenizer, ASKED)[0].tolist()
    plain = any_tokenizer(ASKED[0]["content"], add_special_tokens=False)["input_ids"]
    begins = [START] if special_tokens(any_tokenizer).prefix or (template or "").startswith("<s>") else []
    assert ids == begins + plain


def test_questions_are_asked_whatever_is_appended(any_tokenizer: PreTrainedTokenizerBase) -> None:
    question = Question("What opens the gate?", ("a stone", "a song", "a key", "a coin"), 0)
    for scoring in ("letters", "cloze"):
        sets = [QuestionSet("gates", "gates", "kept", None, (question,), scoring=scoring)]
        for request in next(encode(any_tokenizer, ask(sets))):
            assert END not in request.ids
            assert all(END not in wanted for wanted in request.wanted)


@pytest.mark.parametrize("max_tokens", [3, 4, 5, 8, 100])
def test_the_bytes_of_all_pieces_are_those_of_the_text(
    tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> None:
    pieces = split_text(TEXT, tokenizer, max_tokens, True)
    assert sum(piece.written for piece in pieces) == len(TEXT.encode())
    assert [piece.ids for piece in pieces] == tokenise([TEXT], tokenizer, max_tokens, True)


def test_without_a_prefix_the_first_token_is_not_predicted(tokenizer: PreTrainedTokenizerBase) -> None:
    bare = around(tokenizer, "$A")
    [piece] = split_text("gate opens", bare, 100, True)
    first = bare.decode(piece.ids[:1])
    assert piece.written == len("gate opens") - len(first)


def test_a_truncated_text_counts_what_is_left(tokenizer: PreTrainedTokenizerBase) -> None:
    [piece] = split_text("the red stone opens the gate " * 9, tokenizer, 6, False)
    assert piece.written == len(tokenizer.decode(piece.ids, skip_special_tokens=True).encode())
    assert split_text("", tokenizer, 6, True) == []
