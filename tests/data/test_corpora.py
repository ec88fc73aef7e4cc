import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from inline_snapshot import snapshot
from transformers import PreTrainedTokenizerBase

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import Corpus
from lowmem_rmu.data.corpora import (
    POOL,
    Batches,
    by_length,
    find_documents,
    load_samples,
    mix,
    pad,
    read_documents,
    split_held_out,
    tokenise,
    wikitext_articles,
)
from lowmem_rmu.errors import UserError
from tests.texts import plain, without_numbers

WIKITEXT = Path(__file__).resolve().parents[3] / "shared/data/wikitext-2/test.txt"
CPU = torch.device("cpu")
RAW = """ \n = First Storm = \n \n It blew . \n \n = = History = = \n \n Then \n = 1 <unk> / s = \n it ended . \n \n = = = Dates = = = \n \n None . \n
 = Cheese ( food ) = \n \n It melts . \n"""


def mistake(corpus: Corpus) -> str:
    with pytest.raises(UserError) as caught:
        read_documents(corpus)
    return plain(caught.value, source=corpus.source)


def spaceless(text: str) -> str:
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text("one\n\ntwo ü\n", encoding="utf-8")
    assert read_documents(Corpus(source=str(path))) == ["one\n\ntwo ü\n"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_each_json_line_is_a_document_whatever_characters_it_holds(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["one", "line\u2028separator and next\x85line", "three"]
    path.write_text(
        mark + "\n\n".join(json.dumps({"body": text}, ensure_ascii=False) for text in texts) + "\n",
        encoding="utf-8",
    )
    assert read_documents(Corpus(source=str(path), text_field="body")) == texts


def test_a_folder_is_read_in_order_with_its_folders_and_without_other_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, content in {"c.txt": "C", "b/a.md": "B", "a.jsonl": '{"text": "A"}', "d.pdf": "D"}.items():
        (tmp_path / name).write_text(content)
    assert read_documents(Corpus(source=str(tmp_path))) == ["A", "B", "C"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{bad", snapshot('<source>, line 3: expected a JSON object with the key "text".')),
        ('{"other": "x"}', snapshot('<source>, line 3: expected a JSON object with the key "text".')),
        ('["text"]', snapshot('<source>, line 3: expected a JSON object with the key "text".')),
        ('"text"', snapshot('<source>, line 3: expected a JSON object with the key "text".')),
        ('{"text": 3}', snapshot('<source>, line 3: "text" is no text.')),
    ],
)
def test_a_bad_json_line_is_named_with_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    assert mistake(Corpus(source=str(path))) == said


def test_a_file_that_is_not_utf8_is_named_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("café".encode("latin-1"))
    assert mistake(Corpus(source=str(path))) == snapshot(
        "<source> is not UTF-8 text (byte 3).\nSave it as UTF-8."
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "no mark in front".encode("utf-16-le")),
        ("a.md", bytes(64)),
        ("a.jsonl", b'{"text": "half \\ud800"}'),
        ("a.jsonl", b'{"text": "\\u0000"}'),
    ],
)
def test_what_only_looks_like_utf8_is_no_text(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert mistake(Corpus(source=str(tmp_path / name))) == snapshot(
        "<source> is not UTF-8 text (it holds NUL characters or half of a pair).\nSave it as UTF-8."
    )


def test_a_missing_path_is_named_with_what_it_could_be(tmp_path: Path) -> None:
    path = tmp_path / "none"
    assert mistake(Corpus(source=str(path))) == snapshot(
        "The corpus <source> does not exist.\nGive a .txt, .md, .jsonl file, or a folder of them."
    )


def test_a_folder_without_text_files_says_what_it_looked_for(tmp_path: Path) -> None:
    assert mistake(Corpus(source=str(tmp_path))) == snapshot(
        "The corpus folder <source> holds no .txt, .md, .jsonl file."
    )


def test_titles_that_match_nothing_are_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text(RAW)
    assert mistake(Corpus(source=str(path), title_matches="Moon")) == snapshot(
        "The corpus <source> has 2 articles, but no title that was asked for."
    )


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_a_corpus_without_text_is_a_mistake(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_samples(Corpus(source=str(path)), tokenizer, 16)
    assert plain(caught.value, path=path) == snapshot(
        "The corpus <path> is empty: 0 documents, none of them with text to train on."
    )


def test_documents_below_the_minimum_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "x" * length}) for length in (3, 4, 5)))
    assert [len(text) for text in read_documents(Corpus(source=str(path), min_characters=4))] == [4, 5]


def test_held_out_documents_are_always_the_same_and_never_trained_on() -> None:
    documents = [f"document {index}" for index in range(40)]
    train, held_out = split_held_out(documents, 0.1)
    assert (train, held_out) == split_held_out(documents, 0.1)
    assert len(held_out) == 4
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(documents)
    assert train == [text for text in documents if text in train]


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(3, 0.01, 1), (1, 0.5, 1), (10, 0.0, 0), (10, 0.99, 10), (0, 0.5, 0)]
)
def test_at_least_one_document_is_held_out_where_a_share_is_asked_for(
    count: int, share: float, expected: int
) -> None:
    train, held_out = split_held_out([str(index) for index in range(count)], share)
    assert len(held_out) == expected
    assert len(train) == count - expected


def test_samples_are_split_before_they_are_cut_into_pieces(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": f"{word} " * 30}) for word in ("red", "blue", "green", "white"))
    )
    samples = load_samples(Corpus(source=str(path), held_out=0.25), tokenizer, 8)
    assert len(samples.train) > 3
    assert len(samples.held_out) > 1
    assert not {tuple(ids) for ids in samples.train} & {tuple(ids) for ids in samples.held_out}


def test_wikitext_is_split_at_titles_and_not_at_sections_or_formulas() -> None:
    articles = wikitext_articles(RAW)
    assert [title for title, _ in articles] == ["First Storm", "Cheese ( food )"]
    assert "= 1 <unk> / s =" in articles[0][1]
    assert "= = = Dates = = =" in articles[0][1]
    assert spaceless("".join(text for _, text in articles)) == spaceless(RAW)


@pytest.mark.parametrize("before", ["", "\n", " \n", "\n\n", " \n \n"])
def test_the_first_article_counts_whatever_empty_lines_come_before_it(before: str) -> None:
    assert [title for title, _ in wikitext_articles(before + RAW.lstrip("\n ").join([" ", ""]))] == [
        "First Storm",
        "Cheese ( food )",
    ]


@pytest.mark.parametrize("formula", [" \n = 1 / s = \n more \n", " \n more \n = 1 / s = \n \n"])
def test_a_formula_with_an_empty_line_on_one_side_is_no_title(formula: str) -> None:
    assert [title for title, _ in wikitext_articles(f" = A = \n \n one \n{formula} end \n")] == ["A"]


def test_text_without_titles_has_no_articles() -> None:
    assert wikitext_articles("Plain text.\n\nMore.\n") == []


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"title_matches": "(?i)storm"}, ["First Storm"]),
        ({"title_excludes": "(?i)storm"}, ["Cheese ( food )"]),
    ],
)
@pytest.mark.parametrize("as_lines", [False, True])
def test_titles_choose_articles_from_a_file_and_from_rows_of_lines(
    tmp_path: Path, choice: dict[str, str], expected: list[str], as_lines: bool
) -> None:
    """The Hub's WikiText has a line a row, with the line's end in it."""
    path = tmp_path / ("wiki.jsonl" if as_lines else "wiki.txt")
    rows = [json.dumps({"text": line if line.strip() else ""}) for line in RAW.splitlines(keepends=True)]
    path.write_text("\n".join(rows) if as_lines else RAW)
    documents = read_documents(Corpus.model_validate({"source": str(path), "detokenize": False, **choice}))
    assert [re.search(" = (.*?) = ", text)[1] for text in documents] == expected


def test_tokenised_text_gets_its_ordinary_spelling_unless_switched_off(tmp_path: Path) -> None:
    path = tmp_path / "taken-apart.jsonl"
    texts = ["A co @-@ star , of 2 @,@ 000 films .", "Ordinary text, as it is. And more."]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert read_documents(Corpus(source=str(path))) == ["A co-star, of 2,000 films.", texts[1]]
    assert read_documents(Corpus(source=str(path), detokenize=False)) == texts


@pytest.mark.skipif(not WIKITEXT.exists(), reason=f"needs WikiText-2 at {WIKITEXT}")
def test_every_character_of_the_real_wikitext_belongs_to_an_article() -> None:
    text = WIKITEXT.read_text(encoding="utf-8")
    articles = wikitext_articles(text)
    assert len(articles) == 60
    assert spaceless("".join(article for _, article in articles)) == spaceless(text)
    assert not any(re.match(r"\d+ <unk>( /| and <unk> C)", title) for title, _ in articles), (
        "formulas of Constant k filter"
    )


@pytest.mark.skipif(not WIKITEXT.exists(), reason=f"needs WikiText-2 at {WIKITEXT}")
def test_the_rehearsal_preset_finds_tropical_cyclones_and_retains_the_rest() -> None:
    preset = load_preset(
        "smollm2-135m", [f"{key}.source={WIKITEXT}" for key in ("topics.cyclones.corpus", "retain.corpora.0")]
    )
    forget, retain = (
        read_documents(preset.topics["cyclones"].corpus),
        read_documents(preset.retain.corpora[0]),
    )
    titles = [re.match(" = (.*?) = \n", text)[1] for text in forget]
    assert titles == [
        "1933 Treasure Coast hurricane",
        "Dvorak technique",
        "2003 Pacific typhoon season",
        "Typhoon <unk> ( 2013 )",
    ]
    assert len(retain) == 60 - len(titles)
    assert not set(forget) & set(retain)


def test_long_documents_are_split_without_loss_or_truncated(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = ["the red stone opens the gate " * 9, "the gate"]
    front = tokenizer("")["input_ids"]
    split, truncated = (tokenise(documents, tokenizer, 16, split) for split in (True, False))
    whole = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
    assert [token for piece in split for token in piece[len(front) :]] == whole[0] + whole[1]
    assert truncated == [front + ids[: 16 - len(front)] for ids in whole]
    assert len(split) > 2
    for pieces in (split, truncated):
        assert all(piece[: len(front)] == front and 2 <= len(piece) <= 16 for piece in pieces)
    assert len(split[0]) == 16


def test_each_piece_starts_with_the_token_that_the_tokenizer_puts_in_front(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert all(piece[0] == tokenizer.bos_token_id for piece in tokenise(["stone " * 50], tokenizer, 8, True))


def test_a_piece_of_one_token_is_no_sample(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenise([""], tokenizer, 8, True) == []
    assert tokenise([], tokenizer, 8, True) == []


def numbered(count: int) -> list[list[int]]:
    return [[index] for index in range(count)]


def stream(batches: Batches, positions: range) -> list[list[int]]:
    """The samples of each position, by their only token."""
    return [[ids[0] for ids in batches[batches.at(position)]] for position in positions]


@pytest.mark.parametrize("seed", [None, "0 forget"])
@pytest.mark.parametrize(("batch_size", "a_round"), [(1, 7), (3, 3), (7, 1)])
def test_batches_cover_each_sample_every_epoch(seed: str | None, batch_size: int, a_round: int) -> None:
    batches = Batches(numbered(7), batch_size, seed)
    for epoch in range(3):
        seen = stream(batches, range(epoch * a_round, (epoch + 1) * a_round))
        assert all(len(batch) == len(set(batch)) == batch_size for batch in seen)
        assert {index for batch in seen for index in batch} == set(range(7))


def test_the_same_batches_come_again_every_epoch() -> None:
    batches = Batches(numbered(40), 4, "s")
    first, second = (
        {frozenset(batch) for batch in stream(batches, range(start, start + 10))} for start in (0, 10)
    )
    assert first == second
    assert len(first) == 10


def test_a_batch_depends_on_its_arguments_alone() -> None:
    forwards = stream(Batches(numbered(20), 4, "s"), range(12))
    torch.manual_seed(1)
    backwards = [
        stream(Batches(numbered(20), 4, "s"), range(position, position + 1))[0]
        for position in reversed(range(12))
    ]
    assert backwards == forwards[::-1]


def test_each_epoch_and_each_seed_has_its_own_order() -> None:
    orders = [
        str(stream(Batches(numbered(50), 5, seed), range(epoch * 10, epoch * 10 + 10)))
        for seed in ("a", "b")
        for epoch in range(3)
    ]
    assert len(set(orders)) == 6


def test_without_a_seed_the_order_of_the_corpus_is_kept_and_the_last_batch_filled_up() -> None:
    assert stream(Batches(numbered(5), 2, None), range(4)) == [[0, 1], [2, 3], [3, 4], [0, 1]]


def test_a_corpus_smaller_than_a_batch_is_one_batch() -> None:
    assert stream(Batches(numbered(2), 5, None), range(2)) == [[0, 1], [0, 1]]


def test_samples_of_like_length_share_a_batch() -> None:
    lengths = random.Random(0)
    sequences = [[0] * lengths.randrange(2, 200) for _ in range(4 * POOL)]
    batches = Batches(sequences, 4, "s")

    def padding(batch: list[list[int]]) -> int:
        return sum(max(map(len, batch)) - len(ids) for ids in batch)

    tokens = sum(map(len, sequences))
    assert sum(padding(batches[number]) for number in range(len(batches.members))) < 0.02 * tokens
    assert sum(padding(sequences[start : start + 4]) for start in range(0, len(sequences), 4)) > 0.3 * tokens


def test_length_orders_samples_within_a_pool_only() -> None:
    sequences = [[0] * (1 + index) for index in range(30)]
    order = by_length(sequences, 10, "s")
    assert sorted(order) == list(range(30))
    pools = [order[start : start + 10] for start in (0, 10, 20)]
    assert all(pool == sorted(pool) for pool in pools)
    assert order != sorted(order)


def test_padding_on_the_right_needs_no_mask() -> None:
    batch = pad([[5, 6, 7], [8]], 0, "right", CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.is_token.tolist() == [[True, True, True], [True, False, False]]
    assert batch.attention_mask is None


def test_padding_on_the_left_is_masked() -> None:
    batch = pad([[5, 6, 7], [8]], 0, "left", CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.is_token.tolist() == [[True, True, True], [False, False, True]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_no_padding_needs_no_mask_on_the_left_either() -> None:
    batch = pad([[5, 6], [7, 8]], 0, "left", CPU)
    assert batch.attention_mask is None
    assert batch.is_token.all()


def test_a_token_that_equals_the_padding_counts_as_a_token() -> None:
    assert pad([[0, 5], [0]], 0, "left", CPU).is_token.tolist() == [[True, True], [False, True]]


# What is a document, and what is not


def files(folder: Path, **contents: str | bytes) -> Path:
    """Files by their names, in which `__` stands for a dot and `_in_` for a slash."""
    for name, content in contents.items():
        path = folder / name.replace("_in_", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_a_data_set_s_folder_is_read_without_what_is_about_the_data(tmp_path: Path) -> None:
    folder = files(
        tmp_path,
        a__txt="A",
        b_in_c__JSONL='{"text": "C"}',
        README__md="about",
        b_in_readme__zh__MD="about",
        LICENSE="so",
        LICENSE__txt="so",
        dataset_card__md="card",
        __hidden__txt="no",
        __git_in_x__txt="no",
        ____a__txt="no",
        data__csv="x,y",
        train__parquet=b"PAR1",
        d="?",
    )
    assert read_documents(Corpus(source=str(folder))) == ["A", "C"]
    assert find_documents(Corpus(source=str(folder))).left_out == {
        ".git/": "hidden",
        "..a.txt": "hidden",
        ".hidden.txt": "hidden",
        "LICENSE": "about the data",
        "LICENSE.txt": "about the data",
        "README.md": "about the data",
        "b/readme.zh.MD": "about the data",
        "d": "a file without a suffix",
        "data.csv": "a CSV table",
        "dataset_card.md": "about the data",
        "train.parquet": "a Parquet file",
    }


def test_a_folder_with_nothing_to_read_says_what_it_holds_and_what_to_do(tmp_path: Path) -> None:
    said = mistake(
        Corpus(source=str(files(tmp_path, README__md="about", train__parquet=b"PAR1", __x__txt="no")))
    )
    assert said == snapshot(
        "The corpus folder <source> holds no .txt, .md, .jsonl file.\n"
        "Not read: .x.txt (hidden), README.md (about the data), train.parquet (a Parquet file).\n"
        'Convert it to .jsonl, for example with pandas: read_parquet(FILE).to_json("data.jsonl", orient="records", lines=True).'
    )


def test_a_readme_is_a_document_where_it_is_what_was_named(tmp_path: Path) -> None:
    folder = files(tmp_path, README__md="about")
    assert read_documents(Corpus(source=str(folder / "README.md"))) == ["about"]
    assert mistake(Corpus(source=str(folder))) == snapshot(
        "The corpus folder <source> holds no .txt, .md, .jsonl file.\n"
        "Not read: README.md (about the data).\n"
        "To read README.md all the same, name the file itself."
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "a.json",
            snapshot(
                "The corpus <source> is a JSON file, which is not read here.\n"
                'Convert it to .jsonl, for example with pandas: read_json(FILE).to_json("data.jsonl", orient="records", lines=True).'
            ),
        ),
        (
            "a.CSV",
            snapshot(
                "The corpus <source> is a CSV table, which is not read here.\n"
                'Convert it to .jsonl, for example with pandas: read_csv(FILE).to_json("data.jsonl", orient="records", lines=True).'
            ),
        ),
        (
            "a.parquet",
            snapshot(
                "The corpus <source> is a Parquet file, which is not read here.\n"
                'Convert it to .jsonl, for example with pandas: read_parquet(FILE).to_json("data.jsonl", orient="records", lines=True).'
            ),
        ),
        (
            "a.jsonl.gz",
            snapshot(
                "The corpus <source> is a compressed file or an archive, which is not read here.\n"
                "Unpack it first."
            ),
        ),
        (
            "a.html",
            snapshot(
                "The corpus <source> is a formatted document, which is not read here.\n"
                "Save its text as .txt, in UTF-8."
            ),
        ),
        (
            "a.py",
            snapshot(
                "The corpus <source> is a .py file, which is not read here.\nGive a .txt, .md, .jsonl file."
            ),
        ),
        (
            "a",
            snapshot(
                "The corpus <source> is a file without a suffix, which is not read here.\n"
                "Give a .txt, .md, .jsonl file."
            ),
        ),
    ],
)
def test_a_file_of_another_kind_is_refused_by_what_it_is(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_text('[{"text": "so"}]')
    assert mistake(Corpus(source=str(tmp_path / name))) == said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"\x1f\x8b\x08\x00\xff",
            snapshot("<source> is compressed by gzip, whatever its name says.\nUnpack it first."),
        ),
        (
            b"%PDF-1.7\nso",
            snapshot("<source> is a PDF, whatever its name says.\nSave its text as .txt, in UTF-8."),
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n",
            snapshot("<source> is a Git LFS pointer, not the file itself.\nFetch the file: git lfs pull"),
        ),
    ],
)
def test_what_only_has_the_suffix_of_text_is_refused_by_what_it_is(
    tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert mistake(Corpus(source=str(tmp_path / "a.txt"))) == said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "[" * 100_000,
            snapshot(
                '<source>, line 1: expected a JSON object with the key "text". It is nested too deeply.'
            ),
        ),
        (
            '{"text": ' + "9" * 5_000 + "}",
            snapshot(
                '<source>, line 1: expected a JSON object with the key "text". It is a number of thousands of digits.'
            ),
        ),
        (
            '{"text": "a", "text": "b"}',
            snapshot('<source>, line 1: expected a JSON object with the key "text".'),
        ),
    ],
    ids=["depth", "digits", "twice"],
)
def test_json_that_python_cannot_read_is_named_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    path = tmp_path / "a.jsonl"
    assert mistake(Corpus(source=str(path))) == said


def test_line_ends_of_any_system_are_one(tmp_path: Path) -> None:
    folder = files(
        tmp_path, a__txt=b"one\r\ntwo\rthree", b__jsonl=b'\r\n{"text": "four"}\r\n\r\n{"text": "five"}\r\n'
    )
    assert read_documents(Corpus(source=str(folder))) == ["one\ntwo\nthree", "four", "five"]


@pytest.mark.parametrize(
    ("count", "share", "said"),
    [
        (
            1,
            0.1,
            snapshot(
                "The corpus <source> has 1 document, and held_out (0.1) takes whole documents: none is left to train on.\n"
                "Set held_out to 0, or give several documents: several files, or a .jsonl file with a text per line."
            ),
        ),
        (
            3,
            0.99,
            snapshot(
                "The corpus <source> has 3 documents, and held_out (0.99) takes whole documents: none is left to train on.\n"
                "Set held_out to 0, or give several documents: several files, or a .jsonl file with a text per line."
            ),
        ),
    ],
)
def test_holding_out_every_document_says_so(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, count: int, share: float, said: str
) -> None:
    for number in range(count):
        (tmp_path / f"{number}.txt").write_text("the red stone " * 9)
    with pytest.raises(UserError) as caught:
        load_samples(Corpus(source=str(tmp_path), held_out=share), tokenizer, 16)
    assert plain(caught.value, source=tmp_path) == said


def test_a_minimum_that_leaves_nothing_says_so(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "a.txt"
    path.write_text("short")
    with pytest.raises(UserError) as caught:
        load_samples(Corpus(source=str(path), min_characters=50), tokenizer, 16)
    assert plain(caught.value, path=path) == snapshot(
        "The corpus <path> has no document of 50 characters or more.\nLower min_characters."
    )


def test_a_name_that_is_too_long_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_documents(Corpus(source=str(tmp_path / ("a" * 5_000))))
    said = str(caught.value)
    assert without_numbers(re.sub("a{3,}", "aaa", plain(said, folder=tmp_path))) == snapshot(
        "The corpus <folder>/aaa[... N characters ...]aaa cannot be read: File name too long."
    )
    assert len(said) < 1_000


def test_files_are_recorded_without_paths_of_the_machine(tmp_path: Path) -> None:
    found = find_documents(Corpus(source=str(files(tmp_path, b_in_a__txt="A", README__md="about"))))
    assert found.record() == {
        "files": 1,
        "read": ["b/a.txt"],
        "files_left_out": 1,
        "left_out": {"README.md": "about the data"},
    }
    assert found.sentence() == snapshot("1 file (b/a.txt). Left out: README.md (about the data)")


def test_a_column_of_the_hub_that_holds_no_text_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda *_, **__: Dataset.from_list([{"text": None}, {"text": None}]).add_column("id", [1, 2]),
    )
    assert mistake(Corpus(source="owner/data", text_field="id")) == snapshot(
        'The data set <source>, row 0: "id" is no text.\nChoose another column: text_field.'
    )


def test_a_corpus_with_a_share_makes_up_that_part_of_the_mixture() -> None:
    prose = [[number] for number in range(70)]
    few = [[100], [101], [102], [103]]
    mixed = mix([few, prose], [0.3, None])
    assert len(mixed) == 100
    assert mixed[30:] == prose
    # 30 of four samples: each seven times, and two of them once more.
    assert sorted(Counter(ids[0] for ids in mixed[:30]).values()) == [7, 7, 8, 8]


def test_a_large_corpus_with_a_share_is_thinned_out() -> None:
    mixed = mix([[[number] for number in range(1000)], [[-1]] * 90], [0.1, None])
    chosen = [ids[0] for ids in mixed if ids[0] >= 0]
    assert len(chosen) == 10
    assert chosen == sorted(set(chosen))
    assert chosen[-1] > 800, "from all of the corpus, not its beginning"


def test_without_shares_every_sample_counts_once() -> None:
    assert mix([[[1], [2]], [[3]]], [None, None]) == [[1], [2], [3]]
    assert mix([[], [[3]]], [0.5, None]) == [[3]]
