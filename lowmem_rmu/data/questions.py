"""A-D questions: from the Hub, a local JSONL file, or a folder with a file a subject (JSONL, or MMLU's CSV)."""

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_rmu.data.hub import load_rows
from lowmem_rmu.errors import UserError
from lowmem_rmu.presets import Evaluation, Role, Task, is_local

LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """`choices` are four; `gold` is the index of the right one."""

    question: str
    choices: tuple[str, ...]
    gold: int


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


def load_questions(evaluation: Evaluation) -> list[QuestionSet]:
    """Every task's questions, at most `limit` a task: the same sample every time."""
    loaded = [load_task(name, task) for name, task in evaluation.tasks.items()]
    return [each for sets in loaded for each in (sets if evaluation.limit is None else stratified(sets, evaluation.limit))]


def load_task(name: str, task: Task) -> list[QuestionSet]:
    """One set, or one a subject. Raises UserError for what is missing, empty or malformed, with file and line."""
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
            averages=(*([task.group] if task.group else []), *(average for average, within in task.averages.items() if subject in within)),
        )

    return [question_set(subject) for subject in sorted(subjects, key=str)]


def stratified(sets: list[QuestionSet], limit: int) -> list[QuestionSet]:
    """About `limit` questions in all, from every set in proportion to its size and at least one; the same ones every time."""
    total = sum(len(each.questions) for each in sets)
    if total <= limit:
        return sets
    return [_sample(each, max(1, round(limit * len(each.questions) / total))) for each in sets]


def _sample(each: QuestionSet, count: int) -> QuestionSet:
    there = len(each.questions)
    chosen = sorted(random.Random(0).sample(range(there), count))
    return replace(each, questions=tuple(each.questions[index] for index in chosen), sampled_from=there if count < there else None)


def _chosen(subjects: Subjects, names: list[str] | None, where: str, source: str) -> Subjects:
    """Raises UserError where one of the names is no subject."""
    unknown = sorted(set(names or []) - {subject for subject in subjects if subject})
    if unknown:
        raise UserError(f"{where} names {', '.join(unknown)}, which {source} does not hold.")
    return subjects if names is None else {name: subjects[name] for name in names}


def _examples(task: Task, subjects: list[str | None]) -> dict[str | None, tuple[Question, ...]]:
    """The first questions of the examples' split, as the harness's `first_n` takes them."""
    there = _read(task, str(task.examples_split))
    for subject in subjects:
        count = len(there.get(subject, []))
        if count < task.num_fewshot:
            of_subject = f" for {subject}" if subject else ""
            raise UserError(f"num_fewshot is {task.num_fewshot}, but {task.examples_split} of {task.source} holds {count} examples{of_subject}.")
    return {subject: tuple(there[subject][: task.num_fewshot]) for subject in subjects}


def _read(task: Task, split: str) -> Subjects:
    return _local(Path(task.source), split) if is_local(task.source) else _from_hub(task, split)


def _local(path: Path, split: str) -> Subjects:
    """Questions by subject; a single file has the subject None."""
    if path.is_dir():
        folder = path / split if (path / split).is_dir() else path
        files = sorted([*folder.glob("*.jsonl"), *folder.glob("*.csv")])
        if not files:
            raise UserError(f"The question folder {folder} holds no .jsonl or .csv file.")
        return {file.stem.removesuffix(f"_{split}"): _file(file) for file in files}
    if not path.is_file():
        raise UserError(f"The question file {path} does not exist.\nGive a .jsonl or .csv file, or a folder of them.")
    return {None: _file(path)}


def _file(path: Path) -> list[Question]:
    rows = _csv_rows(path) if path.suffix == ".csv" else _json_rows(path)
    try:
        questions = [_question(row, f"{path}, line {line}") for line, row in rows]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}).\nSave it as UTF-8.") from error
    if not questions:
        raise UserError(f"The question file {path} is empty.")
    return questions


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if text.strip():
            try:
                yield line, json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {line}: no valid JSON: {error.msg}.") from error


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            choices = [row.get(f"choice{index}") for index in range(len(LETTERS))]
            yield reader.line_num, {"question": row.get("question"), "choices": choices, "answer": row.get("answer")}


def _from_hub(task: Task, split: str) -> Subjects:
    columns = ["question", "choices", "answer", *([task.subject_column] if task.subject_column else [])]
    rows = load_rows(task.source, task.subset, split, columns)
    subjects: Subjects = {}
    for number, row in enumerate(rows):
        subject = str(row[task.subject_column]) if task.subject_column else None
        subjects.setdefault(subject, []).append(_question(row, f"{task.source}, row {number}"))
    return subjects


def _question(row: dict[str, Any], where: str) -> Question:
    """Checks one row: `answer` is 0 to 3, or a letter."""
    if not isinstance(row, dict) or not {"question", "choices", "answer"} <= row.keys():
        raise UserError(f"{where}: a question needs the keys question, choices and answer.")
    choices, answer = row["choices"], row["answer"]
    if not isinstance(row["question"], str) or not row["question"].strip():
        raise UserError(f"{where}: the question is empty or no text.")
    if not isinstance(choices, list) or len(choices) != len(LETTERS) or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"{where}: a question needs {len(LETTERS)} choices, all of them text.")
    gold = LETTERS.index(answer) if isinstance(answer, str) and answer in tuple(LETTERS) else answer
    if isinstance(gold, str) and gold.isdecimal():
        gold = int(gold)
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(LETTERS):
        raise UserError(f"{where}: the answer {answer!r} is out of range: give 0 to {len(LETTERS) - 1}, or a letter A to D.")
    return Question(row["question"], tuple(choices), gold)
