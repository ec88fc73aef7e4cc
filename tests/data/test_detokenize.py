"""Tokenized text gets its ordinary spelling back, and ordinary text is left alone."""

import pytest

from lowmem_rmu.data.detokenize import detokenize, is_tokenized

WIKITEXT = (
    " = Ada Smith = \n \n Ada Smith is an English film , television and theatre actor . She had a guest @-@ starring role in 2000 .\n"
    " = = Career = = \n She was cast in the play Herons , written by <unk> Stephens . In 2006 she was seen by 12 @,@ 500 people .\n"
)
ORDINARY = [
    "Ada Smith is an English film, television and theatre actor. She had a guest-starring role in 2000.",
    "It costs $5.50 (or £4) , which is odd. Nobody knows why. Nobody asked, either. It isn't ours.",
    "def f(a, b):\n    return a . b\n",
    "- one\n- two\n\nsee e.g. https://example.com/a,b.c or mail me @home . Thanks, all. Bye, now.",
    "",
    "one two three",
]


@pytest.mark.parametrize(
    ("tokenised", "ordinary"),
    [
        ("film , television and theatre actor .", "film, television and theatre actor."),
        ("a guest @-@ starring role", "a guest-starring role"),
        ("2 @,@ 000 people and 3 @.@ 5 miles", "2,000 people and 3.5 miles"),
        ('his role as " Craig " in " Teddy \'s Story " .', 'his role as "Craig" in "Teddy\'s Story".'),
        (
            "it was n't his ; they 're not ours and we 'll see",
            "it wasn't his; they're not ours and we'll see",
        ),
        ("a town ( 1990 ) with $ 5 and 20 % [ sic ]", "a town (1990) with $5 and 20% [sic]"),
        ("Who ? Me ! Yes : me .", "Who? Me! Yes: me."),
        (" = Ada Smith = ", "Ada Smith"),
        (" = = = Early life , and after = = = ", "Early life, and after"),
        ("He saw <unk> there . She left . Nobody <unk> .", "She left."),
        (" = <unk> = ", ""),
        ("a = b = c", "a = b = c"),
        ("", ""),
    ],
)
def test_ordinary_spelling_comes_back(tokenised: str, ordinary: str) -> None:
    assert detokenize(tokenised) == ordinary


def test_an_article() -> None:
    assert is_tokenized(WIKITEXT)
    assert detokenize(WIKITEXT).split("\n") == [
        "Ada Smith",
        "",
        "Ada Smith is an English film, television and theatre actor. She had a guest-starring role in 2000.",
        "Career",
        "In 2006 she was seen by 12,500 people.",
        "",
    ]


def test_what_has_been_restored_is_ordinary() -> None:
    assert not is_tokenized(detokenize(WIKITEXT))


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_not_taken_for_tokenised(text: str) -> None:
    assert not is_tokenized(text)


def test_spaces_before_commas_and_stops_alone_are_evidence_enough() -> None:
    assert is_tokenized("The river runs south , past three mills , to the sea . Nobody knows why .")
    assert not is_tokenized("One , two.")
