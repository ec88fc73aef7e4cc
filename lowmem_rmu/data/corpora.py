"""Forget and retain sets: text from the Hub or from local files, as token sequences and as batches."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowmem_rmu.data.hub import load_rows
from lowmem_rmu.errors import UserError
from lowmem_rmu.presets import Corpus, is_local

TEXT_FILES = (".txt", ".md", ".jsonl")
POOL = 50  # batches that are sorted by length together: larger pools save little padding more
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what UTF-16 and binary files may hold although they decode; no tokenizer takes half a pair
_WIKITEXT_TITLE = re.compile(r"(?:^|\n)[ \t]*\n = ([^=\n].*?) = \n[ \t]*\n")


@dataclass(frozen=True)
class Samples:
    """Token sequences of one corpus or several: those to train on, and those that training never sees."""

    train: list[list[int]]
    held_out: list[list[int]]


@dataclass(frozen=True)
class Batch:
    """`input_ids` and `is_token` (False at padding) are `(batch, sequence)`; `attention_mask` is None where causality hides the padding."""

    input_ids: Tensor
    is_token: Tensor
    attention_mask: Tensor | None


def load_samples(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Samples:
    """Reads, splits and tokenises a corpus. Raises UserError where there is nothing to read or nothing left to train on."""
    documents = read_documents(corpus)
    train, held_out = split_held_out(documents, corpus.held_out)
    samples = Samples(*(tokenise(part, tokenizer, max_tokens, corpus.long_documents == "split") for part in (train, held_out)))
    if not samples.train:
        raise UserError(f"The corpus {corpus.source} is empty: {len(documents)} documents, none of them with text to train on.")
    return samples


def read_documents(corpus: Corpus) -> list[str]:
    """The documents of a corpus that hold any text, in their order."""
    texts = list(_local_texts(Path(corpus.source), corpus.text_field) if is_local(corpus.source) else _hub_texts(corpus))
    if corpus.title_matches is not None or corpus.title_excludes is not None:
        articles = wikitext_articles("\n".join(text.rstrip("\n") for text in texts))
        texts = [
            text
            for title, text in articles
            if (corpus.title_matches is None or re.search(corpus.title_matches, title))
            and (corpus.title_excludes is None or not re.search(corpus.title_excludes, title))
        ]
        if not texts:
            raise UserError(f"The corpus {corpus.source} has {len(articles)} articles, but no title that was asked for.")
    return [text for text in texts if text.strip() and len(text) >= corpus.min_characters]


def wikitext_articles(text: str) -> list[tuple[str, str]]:
    """Splits WikiText into `(title, article)`: a title stands as ` = Title = ` between empty lines."""
    parts = _WIKITEXT_TITLE.split("\n" + text)  # so that a title in the first line has an empty one above it too
    return [(title, f" = {title} = \n{article}") for title, article in zip(parts[1::2], parts[2::2], strict=True)]


def split_held_out(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    """`(train, held out)`: at least one document is held out where a share is asked for, the same ones every time."""
    if share == 0:
        return documents, []
    count = max(1, round(share * len(documents)))
    chosen = set(random.Random(0).sample(range(len(documents)), min(count, len(documents))))
    return (
        [text for index, text in enumerate(documents) if index not in chosen],
        [text for index, text in enumerate(documents) if index in chosen],
    )


def tokenise(documents: list[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int, split: bool) -> list[list[int]]:
    """Sequences of 2 to `max_tokens` tokens; each starts with what the tokenizer puts in front of a text."""
    front = tokenizer("")["input_ids"]
    room = max_tokens - len(front)
    sequences = []
    for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"] if documents else []:
        pieces = [ids[start : start + room] for start in range(0, len(ids), room)]
        sequences += [front + piece for piece in (pieces if split else pieces[:1])]
    return [sequence for sequence in sequences if len(sequence) >= 2]


class Batches:
    """The distinct batches of a corpus, and which of them comes at each position of an endless pass over it.

    Both are functions of the arguments alone, so that a run can resume anywhere and what a batch gives can be cached. With a
    `seed`, samples of like length share a batch (less padding) and every epoch has its own order; None keeps the corpus's order.
    The last batch is filled up with the samples before it.
    """

    def __init__(self, sequences: list[list[int]], batch_size: int, seed: str | None) -> None:
        self.sequences, self.seed = sequences, seed
        order = list(range(len(sequences))) if seed is None else by_length(sequences, POOL * batch_size, seed)
        self.members = [order[min(start, len(order) - batch_size) :][:batch_size] for start in range(0, len(order), batch_size)]

    def at(self, position: int) -> int:
        """The number of the batch at a position."""
        epoch, place = divmod(position, len(self.members))
        return place if self.seed is None else _order(len(self.members), f"{self.seed} {epoch}")[place]

    def __getitem__(self, number: int) -> list[list[int]]:
        return [self.sequences[index] for index in self.members[number]]


def by_length(sequences: list[list[int]], pool: int, seed: str) -> list[int]:
    """Indices of all sequences, shuffled; within every `pool` of them sorted by length, so that neighbours are of like length."""
    shuffled = _order(len(sequences), seed)
    pools = [shuffled[start : start + pool] for start in range(0, len(shuffled), pool)]
    return [index for each in pools for index in sorted(each, key=lambda index: len(sequences[index]))]


def pad(sequences: list[list[int]], pad_id: int, side: str, device: torch.device) -> Batch:
    """One batch: padded on the right, causal attention already hides the padding and needs no mask; on the left it takes one."""
    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), pad_id)
    is_token = torch.zeros((len(sequences), longest), dtype=torch.bool)
    for row, ids in enumerate(sequences):
        columns = slice(longest - len(ids), longest) if side == "left" else slice(0, len(ids))
        input_ids[row, columns] = torch.tensor(ids)
        is_token[row, columns] = True
    input_ids, is_token = input_ids.to(device), is_token.to(device)
    needs_mask = side == "left" and not bool(is_token.all())
    return Batch(input_ids, is_token, is_token.long() if needs_mask else None)


@lru_cache(maxsize=16)  # a batch asks for the same epoch's order once a sample
def _order(length: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(length), length)


def _local_texts(path: Path, text_field: str) -> Iterator[str]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_FILES and file.is_file())
        if not files:
            raise UserError(f"The corpus folder {path} holds no {', '.join(TEXT_FILES)} file.")
    elif path.is_file():
        files = [path]
    else:
        raise UserError(f"The corpus {path} does not exist.\nGive a {', '.join(TEXT_FILES)} file, or a folder of them.")
    for file in files:
        for text in _file_texts(file, text_field):
            if _NO_TEXT.search(text):
                raise UserError(f"{file} is not UTF-8 text (it holds NUL characters or half of a pair).\nSave it as UTF-8.")
            yield text


def _file_texts(path: Path, text_field: str) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}).\nSave it as UTF-8.") from error
    if path.suffix != ".jsonl":
        yield content
        return
    for line, text in enumerate(content.split("\n"), start=1):
        if text.strip():
            try:
                value = json.loads(text)[text_field]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(f'{path}, line {line}: expected a JSON object with the key "{text_field}".') from error
            if not isinstance(value, str):
                raise UserError(f'{path}, line {line}: "{text_field}" is no text.')
            yield value


def _hub_texts(corpus: Corpus) -> list[str]:
    rows = load_rows(corpus.source, corpus.subset, corpus.split, [corpus.text_field], corpus.without_access)
    return [text for text in rows[corpus.text_field] if text is not None]
