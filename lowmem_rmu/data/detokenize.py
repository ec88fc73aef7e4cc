"""Ordinary spelling for text that was taken apart into tokens, as WikiText is: `film , television` becomes
`film, television`.

A retain set of such text does not stand for ordinary English, and a model held in place on it alone may move
on everything else.
"""

import re

MARKS = re.compile(r" @([-,.])@ ")
"""WikiText's signs for a hyphen, a comma or a full stop inside a word or number: `co @-@ star`, `2 @,@
000`.
"""
HOLE = "<unk>"
"""WikiText's word for every rare word."""
SPACED = re.compile(r"[^\s] [,.](?=\s|$)")
JOINED = re.compile(r"[^\s][,.](?=\s|$)")
TITLE = re.compile(r"^\s*(?:= )+(.+?)(?: =)+\s*$")
SENTENCE = re.compile(r"(?<= [.!?]) +")
CLITIC = re.compile(r" ('(?:s|re|ve|ll|d|m|t)|n't)\b", re.IGNORECASE)
QUOTED = re.compile(r'" ([^"\n]*?) "')
BEFORE_CLOSING = re.compile(r" +([,.;:!?)\]%])")
AFTER_OPENING = re.compile(r"([(\[$£€]) +")
LOOKED_AT = 20_000
"""Characters of a document that are looked at to tell whether it is tokenized."""


def is_tokenized(text: str) -> bool:
    """Tell whether commas and full stops of a text mostly stand apart from the words before them, or
    WikiText's marks are in it.
    """
    start = text[:LOOKED_AT]
    if MARKS.search(start):
        return True
    apart, joined = len(SPACED.findall(start)), len(JOINED.findall(start))
    return apart >= 3 and apart > 4 * joined


def detokenize(text: str) -> str:
    """Return a tokenized text in ordinary spelling. Sentences with a hole in place of a word are left out."""
    lines = [_line(line) for line in text.split("\n")]
    return "\n".join(lines)


def _line(line: str) -> str:
    if title := TITLE.match(line):
        return _joined(title[1]) if HOLE not in title[1] else ""
    sentences = [sentence for sentence in SENTENCE.split(line.strip()) if HOLE not in sentence]
    return _joined(" ".join(sentences))


def _joined(text: str) -> str:
    """Put the parts of words, numbers and quotations together again."""
    text = MARKS.sub(r"\1", text)
    text = QUOTED.sub(r'"\1"', text)
    text = CLITIC.sub(r"\1", text)
    text = BEFORE_CLOSING.sub(r"\1", text)
    return AFTER_OPENING.sub(r"\1", text)
