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


@dataclass(frozen=True)
class QuestionSet:
    """A task, or one subject of a task: `group` is the task's name where it has subjects."""

    name: str
    about: str
    role: Role
    group: str | None
    questions: tuple[Question, ...]


def load_questions(evaluation: Evaluation) -> list[QuestionSet]:
    """Every task's questions, at most `limit` a set: the same sample every time."""
    sets = [question_set for name, task in evaluation.tasks.items() for question_set in load_task(name, task)]
    if evaluation.limit is None:
        return sets
    return [replace(each, questions=_sample(each.questions, evaluation.limit)) for each in sets]


def load_task(name: str, task: Task) -> list[QuestionSet]:
    """One set, or one a subject. Raises UserError for what is missing, empty or malformed, with file and line."""
    subjects = _local(Path(task.source)) if is_local(task.source) else _from_hub(task)
    unknown = sorted(set(task.adjacent) - {subject for subject in subjects if subject})
    if unknown:
        raise UserError(f"evaluation.tasks.{name}.adjacent names {', '.join(unknown)}, which {task.source} does not hold.")
    if None in subjects:
        return [QuestionSet(name, task.about or name.replace("_", " "), task.role, None, tuple(subjects[None]))]
    return [
        QuestionSet(
            name=f"{name}_{subject}",
            about=str(subject).replace("_", " "),
            role="adjacent" if subject in task.adjacent else task.role,
            group=name,
            questions=tuple(questions),
        )
        for subject, questions in sorted(subjects.items(), key=str)
    ]


def _sample(questions: tuple[Question, ...], limit: int) -> tuple[Question, ...]:
    if len(questions) <= limit:
        return questions
    return tuple(questions[index] for index in sorted(random.Random(0).sample(range(len(questions)), limit)))


def _local(path: Path) -> dict[str | None, list[Question]]:
    """Questions by subject; a single file has the subject None."""
    if path.is_dir():
        files = sorted([*path.glob("*.jsonl"), *path.glob("*.csv")])
        if not files:
            raise UserError(f"The question folder {path} holds no .jsonl or .csv file.")
        return {file.stem.removesuffix("_test"): _file(file) for file in files}
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


def _from_hub(task: Task) -> dict[str | None, list[Question]]:
    columns = ["question", "choices", "answer", *([task.subject_column] if task.subject_column else [])]
    rows = load_rows(task.source, task.subset, task.split, columns)
    subjects: dict[str | None, list[Question]] = {}
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
