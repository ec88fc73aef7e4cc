"""Tokenizers in GGUF files: their kind, their rules, their tokens; what llama.cpp would read otherwise is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter, TokenType
from inline_snapshot import snapshot
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from lowmem_rmu.errors import UserError
from lowmem_rmu.export.gguf.tokenizer import GPT2, LLAMA3, TEKKEN, add_tokenizer, end_tokens
from tests.texts import plain

TINY = Path(__file__).parents[3] / "lowmem_rmu/tiny/model"
PIECES = ("▁", "a", "b", "c", "ab", "▁ab", "abc", "▁abc")
"""Of a SentencePiece vocabulary after the bytes: single letters, then what is merged, the likeliest first."""


def written(
    tokenizer: PreTrainedTokenizerBase, folder: Path, size: int | None = None, ends: tuple[int, ...] = (2,)
) -> dict[str, Any]:
    """The tokenizer's settings in a GGUF file that holds nothing else."""
    writer = GGUFWriter(folder / "vocabulary.gguf", "llama")
    add_tokenizer(writer, tokenizer, list(ends), size or len(tokenizer))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    fields = GGUFReader(folder / "vocabulary.gguf").fields
    return {
        name.removeprefix("tokenizer."): field.contents()
        for name, field in fields.items()
        if name.startswith("tokenizer.")
    }


def with_settings(folder: Path, **changes: Any) -> PreTrainedTokenizerBase:
    """The tiny model's tokenizer with other settings in its tokenizer.json; those of its model where they are known there."""
    shutil.copytree(TINY, folder)
    settings = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for name, value in changes.items():
        (settings if name in settings else settings["model"])[name] = value
    (folder / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def merges_of(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """As SentencePiece's are written for tokenizers: all pairs that make a token, by the token's number."""
    pairs = [
        (token[:cut], token[cut:])
        for token in vocabulary
        if not token.startswith("<")
        for cut in range(1, len(token))
    ]
    return sorted(
        (pair for pair in pairs if set(pair) <= vocabulary.keys()), key=lambda pair: vocabulary["".join(pair)]
    )


def sentencepiece(
    folder: Path, spaces: str = "Prepend", merges: list[tuple[str, str]] | None = None
) -> PreTrainedTokenizerBase:
    vocabulary = {
        token: number
        for number, token in enumerate(
            ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
        )
    }
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, merges or merges_of(vocabulary), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    if spaces == "Prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def test_the_tiny_models_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    told = written(tokenizer, tmp_path)
    assert (told["ggml.model"], told["ggml.pre"], told["chat_template"]) == (
        "gpt2",
        "bloom",
        tokenizer.chat_template,
    )
    assert (
        told["ggml.bos_token_id"],
        told["ggml.eos_token_id"],
        told["ggml.padding_token_id"],
        told["ggml.unknown_token_id"],
    ) == (1, 2, 2, 0)
    assert (told["ggml.add_bos_token"], told["ggml.add_eos_token"]) == (True, False)
    types, texts = [TokenType(type_) for type_ in told["ggml.token_type"]], told["ggml.tokens"]
    assert {text for text, type_ in zip(texts, types, strict=True) if type_ == TokenType.USER_DEFINED} == {
        "\nA.",
        "\nB.",
        "\nC.",
        "\nD.",
    }
    assert [text for text, type_ in zip(texts, types, strict=True) if type_ == TokenType.CONTROL] == texts[:6]
    assert texts[6:] == [
        text if type_ == TokenType.USER_DEFINED else token
        for text, type_, token in zip(
            texts[6:], types[6:], tokenizer.convert_ids_to_tokens(list(range(6, 1536))), strict=True
        )
    ]
    assert len(told["ggml.merges"]) == 1274


RULES = {
    "gpt-2": (
        [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True}],
        False,
    ),
    "smollm": (
        [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True},
        ],
        False,
    ),
    "llama-bpe": (
        [
            {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True},
        ],
        True,
    ),
    "tekken": (
        [
            {"type": "Split", "pattern": {"Regex": TEKKEN}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True},
        ],
        True,
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_that_part_text_have_a_name_in_llama_cpp(name: str, tmp_path: Path) -> None:
    steps, whole = RULES[name]
    tokenizer = with_settings(
        tmp_path / "other", pre_tokenizer={"type": "Sequence", "pretokenizers": steps}, ignore_merges=whole
    )
    assert written(tokenizer, tmp_path)["ggml.pre"] == name


def test_gpt2s_rule_is_the_one_that_the_tokenizers_package_uses() -> None:
    text = "We'll  meet\n\n at 10:45 (or 3.14) — naïve 日本 \t²x!  "
    one = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True).pre_tokenize_str(text)
    rule = pre_tokenizers.Split(Regex(GPT2), "isolated")
    assert (
        pre_tokenizers.Sequence(
            [rule, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        ).pre_tokenize_str(text)
        == one
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pre_tokenizer": {"type": "Whitespace"}},
            snapshot(
                'llama.cpp has no equal of the tokenizer of <folder>/other: it parts text by {"type": '
                '"Whitespace"}.\n'
                "Export the model merged instead."
            ),
        ),
        (
            {"ignore_merges": True},
            snapshot(
                "llama.cpp has no equal of the tokenizer of <folder>/other: it parts text by \\n[A-D]\\.| "
                "?\\w+|[^\\s\\w]|\\s.\n"
                "Export the model merged instead."
            ),
        ),
        (
            {"normalizer": {"type": "NFC"}},
            snapshot(
                'llama.cpp has no equal of the tokenizer of <folder>/other: it parts text by {"type": "NFC"} and '
                "\\n[A-D]\\.| ?\\w+|[^\\s\\w]|\\s.\n"
                "Export the model merged instead."
            ),
        ),
        (
            {"byte_fallback": True},
            snapshot(
                "llama.cpp has no equal of the tokenizer of <folder>/other: it treats text by \\n[A-D]\\.| "
                "?\\w+|[^\\s\\w]|\\s.\n"
                "Export the model merged instead."
            ),
        ),
    ],
)
def test_unknown_rules_are_refused_and_spelled_out(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        written(with_settings(tmp_path / "other", **changes), tmp_path)
    assert plain(caught.value, folder=tmp_path) == message


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False}
    shutil.copytree(TINY, tmp_path / "unigram")
    settings = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8")) | {
        "model": model,
        "added_tokens": [],
        "post_processor": None,
    }
    (tmp_path / "unigram/tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        written(AutoTokenizer.from_pretrained(tmp_path / "unigram"), tmp_path)
    assert plain(caught.value, folder=tmp_path) == snapshot(
        "llama.cpp has no equal of the tokenizer of <folder>/unigram: it is of type Unigram.\n"
        "Export the model merged instead."
    )


def test_a_tokenizer_without_tokenizer_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        written(ByT5Tokenizer(name_or_path="some/model"), tmp_path)
    assert plain(caught.value) == snapshot(
        "llama.cpp has no equal of the tokenizer of some/model: it has no tokenizer.json.\n"
        "Export the model merged instead."
    )


def test_sentencepieces_tokens_have_scores_by_the_order_of_their_merges(tmp_path: Path) -> None:
    told = written(sentencepiece(tmp_path), tmp_path)
    assert (told["ggml.model"], told["ggml.add_space_prefix"], told["ggml.add_bos_token"]) == (
        "llama",
        True,
        True,
    )
    types = dict(zip(told["ggml.tokens"], told["ggml.token_type"], strict=True))
    assert [types[text] for text in ("<unk>", "<s>", "<0x0A>", "▁ab")] == [
        TokenType.UNKNOWN,
        TokenType.CONTROL,
        TokenType.BYTE,
        TokenType.NORMAL,
    ]
    scores = dict(zip(told["ggml.tokens"], told["ggml.scores"], strict=True))
    assert [scores[text] for text in ("ab", "▁ab", "abc", "▁abc")] == [0.0, -1.0, -2.0, -3.0]
    assert scores["a"] < -3.0


@pytest.mark.parametrize(("spaces", "begins"), [("always", True), ("first", True), ("never", False)])
def test_whether_a_text_begins_with_a_space(spaces: str, begins: bool, tmp_path: Path) -> None:
    assert written(sentencepiece(tmp_path, spaces), tmp_path)["ggml.add_space_prefix"] is begins


@pytest.mark.parametrize(
    "merges",
    [
        [("a", "b"), ("▁", "ab"), ("ab", "c"), ("▁", "abc")],  # not ▁ab + c, which SentencePiece would merge
        # One token's merges are not together.
        [
            ("a", "b"),
            ("▁", "ab"),
            ("ab", "c"),
            ("▁ab", "c"),
            ("a", "b"),
            ("▁", "abc"),
        ],
    ],
)
def test_merges_that_do_not_follow_from_the_vocabulary_are_refused(
    merges: list[tuple[str, str]], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        written(sentencepiece(tmp_path, merges=merges), tmp_path)
    assert plain(caught.value, folder=tmp_path) == snapshot(
        "llama.cpp has no equal of the tokenizer of <folder>: its merges are not those of SentencePiece.\n"
        "Export the model merged instead."
    )


def test_embeddings_beyond_the_tokens_and_tokens_beyond_the_embeddings(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    padded = written(tokenizer, tmp_path, size=1540)
    assert padded["ggml.tokens"][1535:] == [
        tokenizer.convert_ids_to_tokens(1535),
        *(f"[PAD{number}]" for number in range(1536, 1540)),
    ]
    assert padded["ggml.token_type"][1536:] == [TokenType.UNUSED] * 4
    cut = written(with_token(tmp_path / "more", "<more>"), tmp_path, size=1536)
    assert len(cut["ggml.tokens"]) == 1536
    assert "ggml.padding_token_id" not in cut


def with_token(folder: Path, token: str) -> PreTrainedTokenizerBase:
    """The tiny model's tokenizer with a token for padding that the model has no embedding of."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"pad_token": token})
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_what_ends_an_answer_besides_is_told(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [4, 2]}', encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ends = end_tokens(tmp_path / "model", tokenizer)
    assert ends == [2, 4]
    told = written(tokenizer, tmp_path, ends=tuple(ends))
    assert (told["ggml.eos_token_id"], told["ggml.eot_token_id"]) == (2, 4)
    (tmp_path / "model/generation_config.json").unlink()
    assert end_tokens(tmp_path / "model", tokenizer) == [2]
