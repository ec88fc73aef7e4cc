"""Text that somebody drops on the page as forget or retain set: read and shown at once, and kept in the run's
own folder.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory

from markupsafe import Markup
from transformers import PreTrainedTokenizerBase

from lowmem_rmu.config.schema import Corpus, Preset, Retain, Topic
from lowmem_rmu.data.corpora import TEXT_FILES, read_documents, tokenise
from lowmem_rmu.data.documents import what_it_is, what_to_do, why_left_out
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.spec import ModelSpec
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.ui.markup import joined, paragraph

HELD_OUT = 0.1
SHOWN = 3
"""Samples of a text that are shown, and characters of each."""
CHARACTERS = 240


@dataclass(frozen=True)
class Own:
    """Paths of uploaded files; where a list is empty, the preset's own set stays."""

    forget: Sequence[str]
    retain: Sequence[str]
    topic: str
    """What the forget set is about, in a word or two."""


def with_own_text(preset: Preset, own: Own, folder: RunFolder) -> Preset:
    """Return the preset with own text in place of its sets, copied into the run's folder. Raises UserError
    for what is no text.

    Questions about the preset's own topics then only are measured: nobody means them to be forgotten.
    """
    changes: dict[str, object] = {}
    if own.forget:
        corpus = _kept(own.forget, folder, "forget")
        first = next(iter(preset.topics.values()))
        changes["topics"] = {
            topic_name(own.topic): Topic(
                **first.model_dump() | {"corpus": corpus, "about": own.topic.strip() or None}
            )
        }
        tasks = {
            name: task.model_copy(update={"role": _role(task.role), "adjacent": []})
            for name, task in preset.evaluation.tasks.items()
        }
        changes["evaluation"] = preset.evaluation.model_copy(update={"tasks": tasks})
    if own.retain:
        changes["retain"] = Retain(
            corpora=[_kept(own.retain, folder, "retain")], max_tokens=preset.retain.max_tokens
        )
    return Preset.model_validate(preset.model_copy(update=changes).model_dump()) if changes else preset


def _role(role: str) -> str:
    return "kept" if role == "kept" else "measured"


def topic_name(words: str) -> str:
    """Return a valid topic name made of typed words, different from the name of the retain set."""
    name = re.sub(r"[^\w-]+", "_", words.strip().lower()).strip("_")[:40]
    return name if name not in ("", "retain") else "own_text"


def _kept(files: Sequence[str], folder: RunFolder, kind: str) -> Corpus:
    """Return a corpus of copies of the files in the run's folder; a share is held out where there are several
    documents.
    """
    corpus, documents = read(files, folder.path / "texts" / kind, f"the {kind} set")
    return corpus.model_copy(update={"held_out": HELD_OUT if len(documents) > 1 else 0.0})


def read(files: Sequence[str], to: Path, what: str) -> tuple[Corpus, list[str]]:
    """Return a corpus of copies of the files, and its documents. Raises UserError for what is no text, by the
    names that the files came with.
    """
    copies = _copied(files, to)
    corpus = Corpus(source=str(to.resolve()))
    try:
        documents = read_documents(corpus)
    except UserError as error:
        told = str(error)
        for copy, name in copies.items():
            told = told.replace(str(copy), name)
        raise UserError(told) from error
    if not documents:
        raise UserError(
            f"There is no text in what you gave as {what}.",
            "Give files that are not empty.",
        )
    return corpus, documents


def _copied(files: Sequence[str], to: Path) -> dict[Path, str]:
    """Return the copies, with the names that the files came with: those may hold anything. Raises UserError
    for other kinds of file.
    """
    to.mkdir(parents=True, exist_ok=True)
    copies = {}
    for number, path in enumerate(map(Path, sorted(files)), start=1):
        if path.suffix.lower() not in TEXT_FILES:
            raise UserError(
                f"{path.name} is {what_it_is(path)}, which is not read here.",
                f"{what_to_do(path, TEXT_FILES)}",
            )
        copy = to.resolve() / f"{number:04}{path.suffix.lower()}"
        shutil.copyfile(path, copy)
        copies[copy] = path.name
    return copies


def texts_among(files: Sequence[str]) -> list[str]:
    """Return the files of a folder that are read, by the command line's rules. Raises UserError where there
    are none.
    """
    left_out = left_out_of(files)
    found = [file for file in files if Path(file).name not in left_out]
    if not found:
        held = f" It holds {', '.join(list(left_out)[:SHOWN])}." if left_out else ""
        raise UserError(
            f"There is no text in this folder.{held}",
            f"Give one with {', '.join(TEXT_FILES)} files.",
        )
    return found


def left_out_of(files: Sequence[str]) -> dict[str, str]:
    """By name, why a file of a folder is not read: hidden, about the data, or of another kind."""
    reasons = {name: why_left_out(PurePath(name), TEXT_FILES) for name in (Path(file).name for file in files)}
    return {name: reason for name, reason in reasons.items() if reason}


def describe(files: Sequence[str] | None, preset: Preset, what: str) -> str:
    """Describe what was read as HTML: files, documents, tokens, and the beginnings of some. Raises UserError
    for what cannot be read.
    """
    if not files:
        return ""
    with TemporaryDirectory() as folder:
        _, documents = read(files, Path(folder), what)
    tokenizer = _tokenizer(preset)
    amount = f"{sum(map(len, documents)):,} characters"
    if tokenizer:
        sequences = tokenise(documents, tokenizer, preset.retain.max_tokens, split=True)
        amount = f"{sum(map(len, sequences)):,} tokens in {len(sequences):,} samples"
    counts = f"{len(files)} file{_s(files)}, {len(documents):,} document{_s(documents)}, {amount}."
    samples = [
        Markup("<blockquote>{} …</blockquote>").format(text.strip()[:CHARACTERS])
        for text in documents[:SHOWN]
    ]
    return joined([paragraph(counts, f" {_advice(documents)}"), *samples])


def _advice(documents: list[str]) -> str:
    if len(documents) == 1:
        return (
            "All of it is trained on, so its loss on unseen text cannot be told: give several files, or a "
            ".jsonl file with a text a line."
        )
    return (
        f"{HELD_OUT:.0%} of the documents are kept aside, to see afterwards whether unseen text is "
        "forgotten too."
    )


def _s(items: Sequence[object]) -> str:
    return "" if len(items) == 1 else "s"


def _tokenizer(preset: Preset) -> PreTrainedTokenizerBase | None:
    """None where the model is not on this machine and cannot be had now."""
    try:
        return ModelSpec.of_preset(preset).tokenizer
    except UserError:
        return None
