"""The special tokens that a tokenizer adds around every text, such as <s> in front."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LETTER = "a"


@dataclass(frozen=True)
class SpecialTokens:
    """What a tokenizer adds around every text, such as <s> in front; a few also append </s>."""

    prefix: list[int]
    suffix: list[int]


def special_tokens(tokenizer: Callable[..., Any]) -> SpecialTokens:
    """Encode one letter and look on both sides of it: `tokenizer("")` does not say what is prefix and what is
    suffix.
    """
    alone = tokenizer(LETTER, add_special_tokens=False)["input_ids"]
    whole = tokenizer(LETTER)["input_ids"]
    for start in range(len(whole) - len(alone) + 1):
        end = start + len(alone)
        if whole[start:end] == alone:
            return SpecialTokens(whole[:start], whole[end:])
    return SpecialTokens([], [])
