"""Forget and retain sets: text from the Hub or from local files, as token sequences and as batches."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowmem_rmu.config.paths import is_local
from lowmem_rmu.config.schema import Corpus
from lowmem_rmu.data.detokenize import detokenize, is_tokenized
from lowmem_rmu.data.documents import SourceFiles, find_files, is_text, nothing_to_read, read_utf8
from lowmem_rmu.data.forms import Passage, chat_samples, find_passages, question_prompts, question_samples
from lowmem_rmu.data.hub import load_rows
from lowmem_rmu.data.tokens import split_text
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.special_tokens import special_tokens
from lowmem_rmu.parsing import ParseError, parse_json

TEXT_FILES = (".txt", ".md", ".jsonl")
GUARDED = 8
"""Texts, and questions, of a corpus that the guard looks at."""
PUT_ASIDE = 10
"""Of so many samples, one at most is put aside for the guard."""
POOL = 50  # batches that are sorted by length together: larger pools save little padding more
_WIKITEXT_TITLE = re.compile(r"(?:^|\n)[ \t]*\n = ([^=\n].*?) = \n[ \t]*\n")


@dataclass(frozen=True)
class Samples:
    """Token sequences of one corpus or several: those to train on, and those that training never sees."""

    train: list[list[int]]
    held_out: list[list[int]]
    held_out_bytes: list[int] = field(default_factory=list)
    """Of each held-out sequence, the bytes of the text that are predicted in it."""
    prompts: list[list[int]] = field(default_factory=list)
    """Questions made of documents that training does not see, where there are any: for the guard."""
    guarded: list[list[int]] = field(default_factory=list)
    """Sequences that training does not see either way: a few of those held out, or a few put aside for the
    guard.
    """


@dataclass(frozen=True)
class FormShares:
    """How many samples in another form than prose a corpus gives, per sample of prose."""

    questions: float = 0.0
    chat: float = 0.0

    @property
    def has_any(self) -> bool:
        return self.questions > 0 or self.chat > 0


PROSE = FormShares()
"""Prose alone."""


@dataclass(frozen=True)
class Batch:
    """`input_ids` and `is_token` (False at padding) are `(batch, sequence)`; `attention_mask` is None where
    causality hides the padding.
    """

    input_ids: Tensor
    is_token: Tensor
    attention_mask: Tensor | None

    @property
    def predicting(self) -> Tensor:
        """The positions `(batch, sequence)` whose next token is one of the text."""
        positions = torch.zeros_like(self.is_token)
        positions[:, :-1] = self.is_token[:, 1:]
        return positions

    @property
    def last(self) -> Tensor:
        """The position `(batch, sequence)` of each sequence's last token, for batches padded on the right."""
        return self.is_token & ~self.predicting


def load_samples(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    shares: FormShares = PROSE,
    is_guarded: bool = False,
) -> Samples:
    """Read, split and tokenise a corpus, and add the samples in other forms that `shares` asks for.

    With `is_guarded`, a corpus that holds nothing out gives a few of its samples to the guard.

    Raises UserError where there is nothing to read or nothing left to train on.
    """
    documents = read_documents(corpus)
    train, held_out = split_held_out(documents, corpus.held_out)
    split = corpus.long_documents == "split"
    pieces = [piece for text in held_out for piece in split_text(text, tokenizer, max_tokens, split)]
    prose = tokenise(train, tokenizer, max_tokens, split)
    guarded = spread([piece.ids for piece in pieces], GUARDED)
    if is_guarded and not held_out:
        prose, guarded = put_aside(prose, GUARDED)
    passages = find_passages(train) if is_guarded or shares.has_any else []
    samples = Samples(
        train=prose + in_other_forms(passages, tokenizer, max_tokens, len(prose), shares),
        held_out=[piece.ids for piece in pieces],
        held_out_bytes=[piece.written for piece in pieces],
        prompts=question_prompts(
            find_passages(held_out) if held_out else passages, GUARDED, tokenizer, "prompts"
        )
        if is_guarded
        else [],
        guarded=guarded,
    )
    if not samples.train:
        raise UserError(_why_nothing_is_trained_on(corpus, documents, train))
    return samples


def spread(sequences: list[list[int]], count: int) -> list[list[int]]:
    """Return up to `count` of the sequences at equal distances: neighbors often come from the same
    document.
    """
    return [sequences[index] for index in _places(len(sequences), count)]


def put_aside(sequences: list[list[int]], count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return what is left to train on, and up to `count` sequences that are not: at most one in
    `PUT_ASIDE`.
    """
    chosen = set(_places(len(sequences), min(count, len(sequences) // PUT_ASIDE)))
    left = [ids for index, ids in enumerate(sequences) if index not in chosen]
    return left, [sequences[index] for index in sorted(chosen)]


def mix(corpora: Sequence[list[list[int]]], shares: Sequence[float | None]) -> list[list[int]]:
    """Return the samples of several corpora together, one corpus after the other, with some in given shares
    of the whole.

    A corpus without a share keeps all of its samples, once. A corpus with one has its samples repeated or
    thinned out until they make up that share; at least one corpus must have none.
    """
    free = sum(len(samples) for samples, share in zip(corpora, shares, strict=True) if share is None)
    total = free / (1 - sum(share for share in shares if share is not None))
    mixed: list[list[int]] = []
    for samples, share in zip(corpora, shares, strict=True):
        if share is None or not samples:
            mixed += samples
            continue
        rounds, rest = divmod(round(share * total), len(samples))
        mixed += samples * rounds + spread(samples, rest)
    return mixed


def _places(length: int, count: int) -> list[int]:
    """Return up to `count` indices below `length` at equal distances."""
    return sorted({number * length // count for number in range(count)}) if length and count else []


def in_other_forms(
    passages: list[Passage],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    prose: int,
    shares: FormShares,
) -> list[list[int]]:
    """Return questions and chat turns made of the passages of documents that give `prose` samples of
    prose.
    """
    return [
        *question_samples(passages, round(shares.questions * prose), tokenizer, max_tokens, "questions"),
        *chat_samples(passages, round(shares.chat * prose), tokenizer, max_tokens, "chat"),
    ]


def _why_nothing_is_trained_on(corpus: Corpus, documents: list[str], train: list[str]) -> str:
    source, count = corpus.source, len(documents)
    if documents and not train:
        return (
            f"The corpus {source} has {count} document{'' if count == 1 else 's'}, and held_out ("
            f"{corpus.held_out:g}) takes whole documents: none is left to train on.\n"
            "Set held_out to 0, or give several documents: several files, or a .jsonl file with a "
            "text per line."
        )
    if not documents and corpus.min_characters:
        least = corpus.min_characters
        return f"The corpus {source} has no document of {least} characters or more.\nLower min_characters."
    return f"The corpus {source} is empty: {count} documents, none of them with text to train on."


def read_documents(corpus: Corpus) -> list[str]:
    """Return the documents of a corpus that hold any text, in their order."""
    texts = list(_local_texts(corpus) if is_local(corpus.source) else _hub_texts(corpus))
    if corpus.title_matches is not None or corpus.title_excludes is not None:
        articles = wikitext_articles("\n".join(text.rstrip("\n") for text in texts))
        texts = [
            text
            for title, text in articles
            if (corpus.title_matches is None or re.search(corpus.title_matches, title))
            and (corpus.title_excludes is None or not re.search(corpus.title_excludes, title))
        ]
        if not texts:
            raise UserError(
                f"The corpus {corpus.source} has {len(articles)} articles, but no title that was asked for."
            )
    if corpus.detokenize:
        texts = [detokenize(text) if is_tokenized(text) else text for text in texts]
    return [text for text in texts if text.strip() and len(text) >= corpus.min_characters]


def find_documents(corpus: Corpus) -> SourceFiles:
    """Return the files of a local corpus. Raises UserError where there are none that can be read."""
    path = Path(corpus.source)
    try:
        found = find_files(path, TEXT_FILES)
    except UserError as error:
        raise UserError(f"The corpus {error}") from error
    if not found.read:
        raise nothing_to_read(found, "corpus", TEXT_FILES)
    return found


def wikitext_articles(text: str) -> list[tuple[str, str]]:
    """Split WikiText into `(title, article)`: a title stands as ` = Title = ` between empty lines."""
    # So that a title in the first line has an empty one above it too.
    parts = _WIKITEXT_TITLE.split("\n" + text)
    return [
        (title, f" = {title} = \n{article}") for title, article in zip(parts[1::2], parts[2::2], strict=True)
    ]


def split_held_out(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    """`(train, held out)`: at least one document is held out where a share is asked for, the same ones every
    time.
    """
    if share == 0:
        return documents, []
    count = max(1, round(share * len(documents)))
    chosen = set(random.Random(0).sample(range(len(documents)), min(count, len(documents))))
    return (
        [text for index, text in enumerate(documents) if index not in chosen],
        [text for index, text in enumerate(documents) if index in chosen],
    )


def tokenise(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int, split: bool
) -> list[list[int]]:
    """Return sequences of 2 to `max_tokens` tokens; each starts with what the tokenizer puts in front of a
    text.
    """
    front = special_tokens(tokenizer).prefix
    room = max_tokens - len(front)
    sequences = []
    for ids in (
        tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"] if documents else []
    ):
        pieces = [ids[start : start + room] for start in range(0, len(ids), room)]
        sequences += [front + piece for piece in (pieces if split else pieces[:1])]
    return [sequence for sequence in sequences if len(sequence) >= 2]


class Batches:
    """The distinct batches of a corpus, and which of them comes at each position of an endless pass over it.

    Both are functions of the arguments alone, so that a run can resume anywhere and what a batch gives can be
    cached. With a `seed`, samples of like length share a batch (less padding) and every epoch has its own
    order; None keeps the corpus's order. The last batch is filled up with the samples before it.
    """

    def __init__(self, sequences: list[list[int]], batch_size: int, seed: str | None) -> None:
        self.sequences, self.seed = sequences, seed
        order = list(range(len(sequences))) if seed is None else by_length(sequences, POOL * batch_size, seed)
        self.members = [
            order[min(start, len(order) - batch_size) :][:batch_size]
            for start in range(0, len(order), batch_size)
        ]

    def at(self, position: int) -> int:
        """Return the number of the batch at a position."""
        epoch, place = divmod(position, len(self.members))
        return place if self.seed is None else _order(len(self.members), f"{self.seed} {epoch}")[place]

    def __getitem__(self, number: int) -> list[list[int]]:
        return [self.sequences[index] for index in self.members[number]]


def by_length(sequences: list[list[int]], pool: int, seed: str) -> list[int]:
    """Return indices of all sequences, shuffled; within every `pool` of them sorted by length, so that
    neighbours are of like length.
    """
    shuffled = _order(len(sequences), seed)
    pools = [shuffled[start : start + pool] for start in range(0, len(shuffled), pool)]
    return [index for each in pools for index in sorted(each, key=lambda index: len(sequences[index]))]


def pad(sequences: list[list[int]], pad_id: int, side: str, device: torch.device) -> Batch:
    """Make one batch. Padding on the right is hidden by causal attention and needs no mask; on the left it
    takes one.
    """
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


def _local_texts(corpus: Corpus) -> Iterator[str]:
    for file in find_documents(corpus).read:
        for text in _file_texts(file, corpus.text_field):
            if not is_text(text):
                raise UserError(
                    f"{file} is not UTF-8 text (it holds NUL characters or half of a pair).",
                    "Save it as UTF-8.",
                )
            yield text


def _file_texts(path: Path, text_field: str) -> Iterator[str]:
    """Yield the documents of a file: all of it or, of a .jsonl file, one per line."""
    content = read_utf8(path).replace("\r\n", "\n").replace("\r", "\n")
    if path.suffix.lower() != ".jsonl":
        yield content
        return
    for line, text in enumerate(content.split("\n"), start=1):
        if text.strip():
            try:
                value = parse_json(text)[text_field]
            except ParseError as error:
                problem = f" It is {error.problem}." if error.is_valid else ""
                raise UserError(
                    f'{path}, line {line}: expected a JSON object with the key "{text_field}".{problem}'
                ) from error
            except (LookupError, TypeError) as error:
                raise UserError(
                    f'{path}, line {line}: expected a JSON object with the key "{text_field}".'
                ) from error
            if not isinstance(value, str):
                raise UserError(f'{path}, line {line}: "{text_field}" is no text.')
            yield value


def _hub_texts(corpus: Corpus) -> list[str]:
    rows = load_rows(corpus.source, corpus.subset, corpus.split, [corpus.text_field], corpus.without_access)
    texts = list(rows[corpus.text_field])
    for number, text in enumerate(texts):
        if text is not None and not (isinstance(text, str) and is_text(text)):
            raise UserError(
                f'The data set {corpus.source}, row {number}: "{corpus.text_field}" is no text.',
                "Choose another column: text_field.",
            )
    return [text for text in texts if text is not None]
