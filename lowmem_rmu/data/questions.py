"""A-D questions: from the Hub, from a local JSONL or CSV file, or from a folder with a file per subject."""

import csv
import io
import math
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_rmu.config.paths import is_local
from lowmem_rmu.config.schema import Evaluation, Role, Task
from lowmem_rmu.data.documents import SourceFiles, find_files, is_text, nothing_to_read, read_utf8
from lowmem_rmu.data.hub import load_rows
from lowmem_rmu.errors import UserError, shown
from lowmem_rmu.parsing import ParseError, parse_json

LETTERS = "ABCD"
QUESTION_FILES = (".jsonl", ".csv")
_SPLIT = re.compile(r"(?:(.+)_)?(auxiliary_train|train|dev|validation|valid|val|test)", re.IGNORECASE)
"""The name of a file that belongs to one split of a data set: the subject, if any, and the split."""
_FIELDS = ("question", "choice0", "choice1", "choice2", "choice3", "answer")
"""The columns of a CSV file, in MMLU's order; the choices may also be called A, B, C and D."""


@dataclass(frozen=True)
class Question:
    """`choices` are four; `gold` is the index of the right one."""

    question: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Unasked:
    """A subject of a task that `limit` left without a question."""

    name: str
    questions: int
    averages: tuple[str, ...]


Subjects = dict[str | None, list[Question]]
"""Questions by subject; None where there are no subjects."""


@dataclass(frozen=True)
class QuestionSet:
    """A task, or one subject of a task: `group` is the task's name where it has subjects."""

    name: str
    about: str
    role: Role
    group: str | None
    questions: tuple[Question, ...]
    examples: tuple[Question, ...] = ()
    """Answered in the prompt, in front of every question."""
    scoring: str = "letters"
    averages: tuple[str, ...] = ()
    """Names of further groups whose averages it counts in."""
    sampled_from: int | None = None
    """Questions that there were before `limit`, where it left some out."""
    unasked: tuple[Unasked, ...] = ()
    """Subjects of the same task that `limit` left without a question."""


def load_questions(evaluation: Evaluation) -> list[QuestionSet]:
    """Load every task's questions, at most `limit` per task: the same sample every time.

    Raises UserError where two sets would have the same name: their answers would be taken for one another's.
    """
    loaded = [load_task(name, task) for name, task in evaluation.tasks.items()]
    names = [each.name for sets in loaded for each in sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"Two tasks, or a task and a subject of another, are called {twice[0]}.",
            "Rename one of them under evaluation.tasks.",
        )
    if evaluation.limit is None:
        return [each for sets in loaded for each in sets]
    one_each = evaluation.limit_by == "one_per_subject"
    return [each for sets in loaded for each in stratified(sets, evaluation.limit, one_each)]


def load_task(name: str, task: Task) -> list[QuestionSet]:
    """Load a task as one set, or as one per subject. Raises UserError for what is missing, empty or
    malformed, with file and line.
    """
    where = f"evaluation.tasks.{name}"
    subjects = _chosen(_read(task, task.split), task.subjects, f"{where}.subjects", task.source)
    _chosen(subjects, task.adjacent, f"{where}.adjacent", task.source)
    examples = _examples(task, list(subjects)) if task.num_fewshot else {}

    def question_set(subject: str | None) -> QuestionSet:
        named = name if subject is None else subject
        return QuestionSet(
            name=name if subject is None else f"{name}_{subject}",
            about=(task.about if subject is None else None) or named.replace("_", " "),
            role="adjacent" if subject in task.adjacent else task.role,
            group=None if subject is None else name,
            questions=tuple(subjects[subject]),
            examples=examples.get(subject, ()),
            scoring=task.scoring,
            averages=(
                *([task.group] if task.group else []),
                *(average for average, within in task.averages.items() if subject in within),
            ),
        )

    return [question_set(subject) for subject in sorted(subjects, key=str)]


def stratified(sets: list[QuestionSet], limit: int, one_each: bool = False) -> list[QuestionSet]:
    """At most `limit` questions in all, from every set in proportion to its size; the same ones every time.

    The places are allocated by largest remainder (Hamilton's method). Where there are fewer places than sets,
    the smallest sets get none: they are left out, and named by `unasked` in all others. With `one_each` every
    set gets its rounded share and one at least, as in older versions: that may be more than `limit`.
    """
    total = sum(len(each.questions) for each in sets)
    if total <= limit:
        return sets
    if one_each:
        return [_sample(each, max(1, round(limit * len(each.questions) / total))) for each in sets]
    quotas = [limit * len(each.questions) / total for each in sets]
    counts = [math.floor(quota) for quota in quotas]
    # Of equal remainders, the set that comes first gets the place.
    by_remainder = sorted(range(len(sets)), key=lambda index: counts[index] - quotas[index])
    for index in by_remainder[: limit - sum(counts)]:
        counts[index] += 1
    unasked = tuple(
        Unasked(each.name, len(each.questions), each.averages)
        for each, count in zip(sets, counts, strict=True)
        if count == 0
    )
    return [
        replace(_sample(each, count), unasked=unasked)
        for each, count in zip(sets, counts, strict=True)
        if count
    ]


def unasked_subjects(sets: list[QuestionSet]) -> dict[str, list[str]]:
    """By task, the subjects that `limit` left without a question."""
    subjects = {
        each.group: [left.name.removeprefix(f"{each.group}_") for left in each.unasked]
        for each in sets
        if each.group and each.unasked
    }
    return {str(task): names for task, names in subjects.items()}


def _sample(each: QuestionSet, count: int) -> QuestionSet:
    there = len(each.questions)
    chosen = sorted(random.Random(0).sample(range(there), count))
    return replace(
        each,
        questions=tuple(each.questions[index] for index in chosen),
        sampled_from=there if count < there else None,
    )


def _chosen(subjects: Subjects, names: list[str] | None, where: str, source: str) -> Subjects:
    """Raise UserError where one of the names is no subject."""
    unknown = sorted(set(names or []) - {subject for subject in subjects if subject})
    if unknown:
        raise UserError(f"{where} names {', '.join(unknown)}, which {source} does not hold.")
    return subjects if names is None else {name: subjects[name] for name in names}


def _examples(task: Task, subjects: list[str | None]) -> dict[str | None, tuple[Question, ...]]:
    """Return the first questions of the examples' split, as the harness's `first_n` takes them."""
    if is_local(task.source) and Path(task.source).is_file():
        raise UserError(
            f"num_fewshot is {task.num_fewshot}, but {task.source} is a single file: its questions would be "
            "their own examples.",
            f"Give a folder with the subfolders {task.split}/ and {task.examples_split}/, or set "
            "num_fewshot to 0.",
        )
    there = _read(task, str(task.examples_split))
    for subject in subjects:
        count = len(there.get(subject, []))
        if count < task.num_fewshot:
            of_subject = f" for {subject}" if subject else ""
            raise UserError(
                f"num_fewshot is {task.num_fewshot}, but {task.examples_split} of {task.source} holds "
                f"{count} examples{of_subject}."
            )
    return {subject: tuple(there[subject][: task.num_fewshot]) for subject in subjects}


def _read(task: Task, split: str) -> Subjects:
    return _local(task, split) if is_local(task.source) else _from_hub(task, split)


def find_questions(task: Task, split: str) -> tuple[SourceFiles, dict[str | None, Path]]:
    """Find the files of a local task for one split, and the file of each subject.

    A single file has the subject None. In a folder, `owls_dev.jsonl` and `dev.jsonl` belong to the split
    `dev` alone; a name without a split belongs to the task's own split. Raises UserError where there are
    none, or two are the same subject.
    """
    path = Path(task.source)
    has_folder = os.path.isdir(path / split)
    try:
        found = find_files(path / split if has_folder else path, QUESTION_FILES, recursive=False)
    except UserError as error:
        raise UserError(f"The question file {error}") from error
    if found.path.is_file():
        return found, {None: found.path}
    wanted = Path(split).name.lower()
    without_split = wanted if has_folder else task.split.lower()
    subjects: dict[str | None, Path] = {}
    for file in list(found.read):
        subject, of_split = _subject_and_split(file.stem, wanted)
        if (of_split or without_split) != wanted:
            found.read.remove(file)
            found.leave_out(file, f"of the split {of_split or without_split}")
        elif subject in subjects:
            both = f"the subject {subject}" if subject else f"the split {wanted}"
            raise UserError(
                f"{subjects[subject].name} and {file.name} in {found.path} are both {both}.",
                "Keep one of them, or give them different names.",
            )
        else:
            subjects[subject] = file
    if not subjects:
        raise nothing_to_read(found, "question", QUESTION_FILES)
    if len(subjects) > 1 and None in subjects:  # among subjects, test.jsonl is one more of them
        subjects[subjects[None].stem] = subjects.pop(None)
    return found, subjects


def _subject_and_split(stem: str, wanted: str) -> tuple[str | None, str | None]:
    """Take a file's name apart: `owls_dev` is a subject and a split, `dev` a split, `owls` a subject."""
    if stem.lower() == wanted:
        return None, wanted
    if stem.lower().endswith(f"_{wanted}"):
        return stem[: -len(wanted) - 1] or None, wanted
    named = _SPLIT.fullmatch(stem)
    return (named[1], named[2].lower()) if named else (stem, None)


def _local(task: Task, split: str) -> Subjects:
    return {subject: _file(file) for subject, file in find_questions(task, split)[1].items()}


def _file(path: Path) -> list[Question]:
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    questions = [_question(row, f"{path}, line {line}") for line, row in rows]
    if not questions:
        raise UserError(f"The question file {path} is empty.")
    return questions


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(
        read_utf8(path).replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1
    ):
        if text.strip():
            try:
                yield line, parse_json(text)
            except ParseError as error:
                raise UserError(f"{path}, line {line}: no valid JSON: {error.problem}.") from error


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a CSV file: MMLU's columns in any order under a header, or in MMLU's order without
    one.
    """
    reader = csv.reader(io.StringIO(read_utf8(path), newline=""))
    columns: list[str] | None = None
    try:
        for fields in reader:
            if not fields:
                continue
            if columns is None:
                columns = _columns(fields, f"{path}, line {reader.line_num}")
                if columns != list(_FIELDS) or _name(fields[0]) == _FIELDS[0]:
                    continue  # it was the header
            if len(fields) != len(columns):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields, but there are {len(columns)} "
                    "columns.",
                    "Put text that holds a comma or a line end into double quotes, and close every quote.",
                )
            row = dict(zip(columns, fields, strict=True))
            choices = [row.get(name) for name in _FIELDS[1:-1]]
            yield reader.line_num, {"question": row["question"], "choices": choices, "answer": row["answer"]}
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: no valid CSV: {error}.",
            "Check that every quote is closed, and that no field holds a whole document.",
        ) from error


def _columns(first: list[str], where: str) -> list[str]:
    """Return the columns by the first row of a file: a header's names, or MMLU's where it is a question
    already.
    """
    names = [_name(field) for field in first]
    if {"question", "answer"} <= set(names):
        if len(set(names)) < len(names):
            raise UserError(f"{where}: the header names a column twice: {', '.join(first)}.")
        return names
    if len(first) == len(_FIELDS) and _gold(first[-1]) is not None:
        return list(_FIELDS)
    raise UserError(
        f"{where}: neither a header with {', '.join(_FIELDS)} nor a question in these six columns, "
        "separated by commas.",
        "Add the header, or put the columns into this order.",
    )


def _name(field: str) -> str:
    """Return a column's name: in any case, and the choices also by their letters."""
    name = field.strip().lower()
    return f"choice{LETTERS.lower().index(name)}" if name in tuple(LETTERS.lower()) else name


def _from_hub(task: Task, split: str) -> Subjects:
    columns = ["question", "choices", "answer", *([task.subject_column] if task.subject_column else [])]
    rows = load_rows(task.source, task.subset, split, columns)
    subjects: Subjects = {}
    for number, row in enumerate(rows):
        subject = str(row[task.subject_column]) if task.subject_column else None
        subjects.setdefault(subject, []).append(_question(row, f"{task.source}, row {number}"))
    return subjects


def _question(row: dict[str, Any], where: str) -> Question:
    """Check one row: `answer` is 0 to 3 (0 is the first choice), or a letter."""
    if not isinstance(row, dict) or not {"question", "choices", "answer"} <= row.keys():
        raise UserError(f"{where}: a question needs the keys question, choices and answer.")
    question, choices, gold = row["question"], row["choices"], _gold(row["answer"])
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: the question is empty or no text.")
    if (
        not isinstance(choices, list)
        or len(choices) != len(LETTERS)
        or not all(isinstance(choice, str) for choice in choices)
    ):
        raise UserError(f"{where}: a question needs {len(LETTERS)} choices, all of them text.")
    if not is_text("".join((question, *choices))):
        raise UserError(
            f"{where}: the question or a choice is no text (it holds NUL characters or half of a pair)."
        )
    if gold is None:
        raise UserError(
            f"{where}: the answer {shown(row['answer'])} is out of range: give 0 to {len(LETTERS) - 1} (0 "
            "is the first choice), or a letter A to D."
        )
    return Question(question, tuple(choices), gold)


def _gold(answer: Any) -> int | None:
    """Return the index of the right choice, of a letter or of a number from 0, also written 1.0; None for
    anything else.
    """
    if isinstance(answer, str):
        text = answer.strip()
        if text in tuple(LETTERS):
            return LETTERS.index(text)
        return int(text[0]) if re.fullmatch(r"[0-3](\.0+)?", text) else None
    if isinstance(answer, bool) or not isinstance(answer, int | float) or answer not in range(len(LETTERS)):
        return None
    return int(answer)
