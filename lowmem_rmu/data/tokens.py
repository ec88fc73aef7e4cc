"""Texts as token ids: with what a tokenizer puts in front of a text, without what it appends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lowmem_rmu.model.special_tokens import special_tokens


@dataclass(frozen=True)
class Piece:
    """A sequence of a text's tokens, and the bytes of the text that are predicted in it (a first token is
    not).
    """

    ids: list[int]
    written: int


def encode_texts(tokenizer: Callable[..., Any], texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text with the tokenizer's prefix; more text can follow."""
    if not texts:
        return []
    appended = len(special_tokens(tokenizer).suffix)
    return [ids[: len(ids) - appended] for ids in tokenizer(list(texts), verbose=False)["input_ids"]]


def split_text(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int, split: bool) -> list[Piece]:
    """Return a text's pieces of 2 to `max_tokens` tokens (without `split` only the first), each with the
    tokenizer's prefix.

    Where tokens part inside a character of several bytes, all of it counts for the later piece, so that the
    pieces' bytes add up.
    """
    prefix = special_tokens(tokenizer).prefix
    room = max_tokens - len(prefix)
    ids, character_of = _with_places(text, tokenizer)
    pieces = []
    for start in range(0, len(ids) if split else min(1, len(ids)), room):
        end = min(start + room, len(ids))
        # Without a prefix nothing predicts the first token.
        first = start if prefix else start + 1
        written = len(text[character_of(first) : character_of(end)].encode())
        pieces.append(Piece([*prefix, *ids[start:end]], written))
    return [piece for piece in pieces if len(piece.ids) >= 2]


def _with_places(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], Callable[[int], int]]:
    """Return a text's token ids, and a function from a token's number to the character of the text where it
    begins.
    """
    encoded = tokenizer(
        text, add_special_tokens=False, verbose=False, return_offsets_mapping=tokenizer.is_fast
    )
    ids: list[int] = list(encoded["input_ids"])

    def character_of(number: int) -> int:
        if number == 0 or number >= len(ids):
            return 0 if number == 0 else len(text)
        if tokenizer.is_fast:
            return int(encoded["offset_mapping"][number][0])
        # A tokenizer written in Python knows no places: what its tokens decode to, without half a character
        # at the end.
        return min(len(str(tokenizer.decode(ids[:number])).rstrip("\ufffd")), len(text))

    return ids, character_of
