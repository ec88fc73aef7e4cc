"""What a preset's local corpora and tasks read, and what of their folders they leave out."""

from typing import Any

from lowmem_rmu.config.paths import is_local
from lowmem_rmu.config.schema import Corpus, Evaluation, Preset
from lowmem_rmu.data.corpora import find_documents
from lowmem_rmu.data.documents import SourceFiles
from lowmem_rmu.data.questions import find_questions

Sources = dict[str, list[SourceFiles]]
"""Files by the dotted path of a corpus or a task in the preset; a task has those of its examples too."""


def corpora_of(preset: Preset) -> dict[str, Corpus]:
    """Return every corpus of a preset by its dotted path."""
    corpora = {f"topics.{name}.corpus": topic.corpus for name, topic in preset.topics.items()}
    return corpora | {f"retain.corpora.{index}": corpus for index, corpus in enumerate(preset.retain.corpora)}


def find_sources(preset: Preset, with_texts: bool) -> Sources:
    """Find the local files of a run; those of its corpora only `with_texts`. Raises UserError."""
    corpora = corpora_of(preset) if with_texts else {}
    texts = {place: [find_documents(corpus)] for place, corpus in corpora.items() if is_local(corpus.source)}
    return texts | find_task_sources(preset.evaluation)


def find_task_sources(evaluation: Evaluation) -> Sources:
    """Return the local files of all tasks. Raises UserError for what cannot be read."""
    sources: Sources = {}
    for name, task in evaluation.tasks.items():
        if is_local(task.source):
            splits = [task.split]
            if task.num_fewshot and task.examples_split:
                splits.append(task.examples_split)
            sources[f"evaluation.tasks.{name}"] = [find_questions(task, split)[0] for split in splits]
    return sources


def sources_record(sources: Sources) -> dict[str, list[dict[str, Any]]]:
    """Return the same for `config.json`."""
    return {place: [found.record() for found in several] for place, several in sources.items()}


def sentences(sources: Sources, only_partly_read: bool) -> list[str]:
    """Return a line per source for people: of all, or only of those that leave something out."""
    return [
        f"{place}: {found.sentence()}"
        for place, several in sources.items()
        for found in several
        if found.left_out or not only_partly_read
    ]
