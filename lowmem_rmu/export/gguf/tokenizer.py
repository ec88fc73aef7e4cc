"""A tokenizer as a GGUF file holds it: llama.cpp must make the same tokens of a text as the model was trained
on, or it is refused.
"""

import json
import re
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lowmem_rmu.errors import UserError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TINY = r"\n[A-D]\.| ?\w+|[^\s\w]|\s"
DIGIT = r"\p{N}"
BYTE_LEVEL = {
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((TEKKEN,), True): "tekken",  # llama.cpp parts a letter from an accent that is a separate character
    # Parts text more coarsely than the tiny model's tokenizer, which learned no merge that would notice.
    ((TINY,), False): "bloom",
}
"""llama.cpp's name by the rules that part a text, and whether a whole part that is a token is taken without
merging.
"""
WHOLE = {"bloom": re.compile(r"\n[A-D]\.")}
"""Tokens that such a rule alone keeps together: llama.cpp looks for what is named to it before it parts a
text.
"""
SENTENCEPIECE = {
    ("Prepend", "Replace"): True,
    ("Replace",): False,
    ("Metaspace always",): True,
    ("Metaspace first",): True,
    ("Metaspace never",): False,
}
"""Whether a text begins with a space that was not there, by what is done to its spaces.

llama.cpp does as SentencePiece itself and "Prepend" do. It adds that space also where there is one already,
and after special tokens: there "Metaspace" (Llama 2 in transformers 5) gives one token less.
"""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
Merges = list[tuple[str, str]]


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, ends: list[int], size: int) -> None:
    """Write a vocabulary of `size` tokens, special ones and the chat template; `ends` are the tokens that end
    an answer.

    Raises UserError for a tokenizer of a kind or with rules that llama.cpp does not know.
    """
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        raise _unknown(tokenizer, "it has no tokenizer.json")
    settings = json.loads(backend.to_str())
    if settings["model"]["type"] != "BPE":
        raise _unknown(tokenizer, f"it is of type {settings['model']['type']}")
    add = _add_sentencepiece if settings["model"]["byte_fallback"] else _add_byte_level
    add(writer, tokenizer, settings, *_vocabulary(tokenizer, size))
    _add_special(writer, tokenizer, ends, size)
    if template := default_template(tokenizer):
        writer.add_chat_template(template)


def _unknown(tokenizer: PreTrainedTokenizerBase, reason: str) -> UserError:
    return UserError(
        f"llama.cpp has no equal of the tokenizer of {tokenizer.name_or_path}: {reason}.",
        "Export the model merged instead.",
    )


def _vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[list[str], list[TokenType]]:
    """Return texts and types by id. Embeddings that no token has are named, too; tokens beyond the embeddings
    are none to the model.
    """
    texts, types = [f"[PAD{number}]" for number in range(size)], [TokenType.UNUSED] * size
    for text, number in tokenizer.get_vocab().items():
        if number < size:
            texts[number], types[number] = text, TokenType.BYTE if BYTE.fullmatch(text) else TokenType.NORMAL
    for number, token in tokenizer.added_tokens_decoder.items():
        if number < size:
            types[number] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    return texts, types


def _add_byte_level(
    writer: GGUFWriter,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    texts: list[str],
    types: list[TokenType],
) -> None:
    steps = _steps(settings["normalizer"]) + _steps(settings["pre_tokenizer"])
    name = BYTE_LEVEL.get((steps, settings["model"]["ignore_merges"]))
    if name is None:
        raise _unknown(tokenizer, f"it parts text by {' and '.join(steps) or 'no rule'}")
    for number, type_ in enumerate(types):
        text = str(tokenizer.decode([number])) if type_ == TokenType.NORMAL and name in WHOLE else ""
        if text and WHOLE[name].fullmatch(text):
            texts[number], types[number] = text, TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in settings["model"]["merges"]])


def _steps(settings: dict[str, Any] | None) -> tuple[str, ...]:
    """Return the steps of the pre-tokenizer in order: regular expressions, and names in SENTENCEPIECE.
    Unknown steps are spelled out.
    """
    match settings:
        case None | {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return ()
        case {"type": "Sequence", "normalizers": steps} | {"type": "Sequence", "pretokenizers": steps}:
            return tuple(rule for step in steps for rule in _steps(step))
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return (GPT2,)
        case {"type": "Digits", "individual_digits": True}:
            return (DIGIT,)
        case {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}:
            return (str(rule),)
        case {"type": "Prepend", "prepend": "▁"}:
            return ("Prepend",)
        case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
            return ("Replace",)
        case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}:
            return (f"Metaspace {scheme}",)
    return (json.dumps(settings, ensure_ascii=False),)


def _add_sentencepiece(
    writer: GGUFWriter,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    texts: list[str],
    types: list[TokenType],
) -> None:
    steps, merges = (
        _steps(settings["normalizer"]) + _steps(settings["pre_tokenizer"]),
        [tuple(pair) for pair in settings["model"]["merges"]],
    )
    if steps not in SENTENCEPIECE:
        raise _unknown(tokenizer, f"it treats text by {' and '.join(steps) or 'no rule'}")
    normal = {text for text, type_ in zip(texts, types, strict=True) if type_ == TokenType.NORMAL}
    if not _follow_from(normal, merges):
        raise _unknown(tokenizer, "its merges are not those of SentencePiece")
    if (unknown := tokenizer.unk_token_id) is not None:
        types[unknown] = TokenType.UNKNOWN
    ranks = {token: rank for rank, (token, _) in enumerate(groupby(merges, "".join))}
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores([-float(ranks.get(text, len(ranks))) for text in texts])
    writer.add_token_types(types)
    writer.add_add_space_prefix(SENTENCEPIECE[steps])


def _follow_from(vocabulary: set[str], merges: Merges) -> bool:
    """Return whether merging by pairs comes to the same as SentencePiece's and llama.cpp's: two neighbours
    that make a token, the best token first.
    """
    merged = [token for token, _ in groupby(merges, "".join)]
    pairs = set(merges)
    makeable = ((token[:cut], token[cut:]) for token in vocabulary for cut in range(1, len(token)))
    return len(merged) == len(set(merged)) and all(
        pair in pairs for pair in makeable if vocabulary.issuperset(pair)
    )


def _add_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, ends: list[int], size: int) -> None:
    ids = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: next(iter(ends), None),
        writer.add_eot_token_id: next(iter(ends[1:]), None),
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
    }
    for add, number in ids.items():
        if number is not None and number < size:
            add(number)
    encoded = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(adds_start(tokenizer))
    writer.add_add_eos_token(encoded[-1] == tokenizer.eos_token_id)


def adds_start(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer puts the start token before a text by itself."""
    return bool(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


def default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template; the one for conversations where there are several."""
    templates = tokenizer.chat_template
    return templates.get("default") if isinstance(templates, dict) else templates


def end_tokens(checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer, the tokenizer's own first."""
    ends: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    with suppress(OSError):  # not every checkpoint has generation settings
        more = GenerationConfig.from_pretrained(checkpoint).eos_token_id
        ends += [more] if isinstance(more, int) else more or []
    return list(dict.fromkeys(ends))
