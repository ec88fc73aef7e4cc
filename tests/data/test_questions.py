import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lowmem_rmu.data.questions import Question, load_questions, load_task
from lowmem_rmu.errors import UserError
from lowmem_rmu.presets import Evaluation, Task, known_tasks

MMLU = Path(__file__).resolve().parents[3] / "shared/data/mmlu"
CHOICES = ["red", "green", "blue", "white"]
HEADER = "question,choice0,choice1,choice2,choice3,answer\n"


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {"question": f"Which colour {number}?", "choices": CHOICES, "answer": number % 4} | changes


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(each, ensure_ascii=False) for each in rows) + "\n", encoding="utf-8")
    return path


def task(path: Path, **settings: Any) -> Task:
    return Task.model_validate({"source": str(path), "role": "kept"} | settings)


def mistake(path: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_task("colours", task(path, **settings))
    return str(caught.value)


def test_a_json_file_is_one_task(tmp_path: Path) -> None:
    rows = [row(0), row(3, question="line\u2028separator and next\x85line", note="ignored")]
    [questions] = load_task("light_colours", task(jsonl(tmp_path / "a.jsonl", rows), role="forgotten"))
    assert (questions.name, questions.about, questions.role, questions.group) == ("light_colours", "light colours", "forgotten", None)
    assert questions.questions == (
        Question("Which colour 0?", tuple(CHOICES), 0),
        Question("line\u2028separator and next\x85line", tuple(CHOICES), 3),
    )


def test_a_task_may_say_what_it_is_about(tmp_path: Path) -> None:
    [questions] = load_task("x", task(jsonl(tmp_path / "a.jsonl", [row()]), about="the rainbow"))
    assert questions.about == "the rainbow"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_csv_file_in_the_form_of_mmlu_is_read(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "colours_test.csv"
    path.write_text(mark + HEADER + '"Which, ""then""\nis it?",red,"green, dark",blue,white,1\nWhich?,a,b,c,d,D\n', encoding="utf-8")
    [questions] = load_task("colours", task(path))
    assert questions.questions == (
        Question('Which, "then"\nis it?', ("red", "green, dark", "blue", "white"), 1),
        Question("Which?", ("a", "b", "c", "d"), 3),
    )


@pytest.mark.parametrize(("answer", "gold"), [(0, 0), (3, 3), ("0", 0), ("3", 3), ("A", 0), ("D", 3)])
def test_an_answer_is_a_number_or_a_letter(tmp_path: Path, answer: int | str, gold: int) -> None:
    [questions] = load_task("colours", task(jsonl(tmp_path / "a.jsonl", [row(answer=answer)])))
    assert questions.questions[0].gold == gold


@pytest.mark.parametrize("answer", [4, -1, "E", "a", "AB", "BCD", "", "4", "²", None, True, 1.0, [1]], ids=repr)
def test_an_answer_out_of_range_is_named_with_file_and_line(tmp_path: Path, answer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row(), row(answer=answer)])
    assert mistake(path) == f"{path}, line 2: the answer {answer!r} is out of range: give 0 to 3, or a letter A to D."


@pytest.mark.parametrize("choices", [CHOICES[:3], [*CHOICES, "black"], "abcd", None, [1, 2, 3, 4], []], ids=repr)
def test_a_wrong_number_or_kind_of_choices_is_named_with_file_and_line(tmp_path: Path, choices: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row(), row(choices=choices)])
    assert mistake(path) == f"{path}, line 2: a question needs 4 choices, all of them text."


@pytest.mark.parametrize("question", ["", "  ", 3, None], ids=repr)
def test_a_question_without_text_is_named_with_file_and_line(tmp_path: Path, question: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row(question=question)])
    assert mistake(path) == f"{path}, line 1: the question is empty or no text."


@pytest.mark.parametrize("line", ['{"question": "x", "choices": []}', '["question", "choices", "answer"]', "3"])
def test_a_row_without_the_keys_is_named_with_the_keys(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    assert mistake(path) == f"{path}, line 1: a question needs the keys question, choices and answer."


def test_a_bad_json_line_is_named_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row()) + "\n\n{bad\n")
    assert mistake(path).startswith(f"{path}, line 3: no valid JSON: ")


@pytest.mark.parametrize(
    ("line", "reason"),
    [("Which?,a,b,c,1", "a question needs 4 choices, all of them text."), ("Which?,a,b,c,d,9", "the answer '9' is out of range")],
)  # fmt: skip
def test_a_bad_csv_row_is_named_with_file_and_line(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(HEADER.replace("choice3,", "") + line if "9" not in line else HEADER + line)
    assert mistake(path).startswith(f"{path}, line 2: {reason}")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_file_that_is_not_utf8_is_named_with_the_place(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes("é".encode("latin-1"))
    assert mistake(path) == f"{path} is not UTF-8 text (byte 0).\nSave it as UTF-8."


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.csv", ""), ("a.csv", HEADER)])
def test_a_file_without_questions_is_a_mistake(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert mistake(path) == f"The question file {path} is empty."


def test_a_missing_file_is_named_with_what_it_could_be(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    assert mistake(path) == f"The question file {path} does not exist.\nGive a .jsonl or .csv file, or a folder of them."


def test_a_folder_without_questions_says_what_it_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    assert mistake(tmp_path) == f"The question folder {tmp_path} holds no .jsonl or .csv file."


def test_a_folder_has_a_subject_a_file_and_those_next_to_the_topic_are_adjacent(tmp_path: Path) -> None:
    jsonl(tmp_path / "warm_colours.jsonl", [row()])
    (tmp_path / "cold_colours_test.csv").write_text(HEADER + "Which?,a,b,c,d,1\n")
    cold, warm = load_task("mmlu", task(tmp_path, adjacent=["cold_colours"]))
    assert (cold.name, cold.about, cold.role, cold.group) == ("mmlu_cold_colours", "cold colours", "adjacent", "mmlu")
    assert (warm.name, warm.about, warm.role, warm.group) == ("mmlu_warm_colours", "warm colours", "kept", "mmlu")


def test_unknown_adjacent_subjects_are_all_named(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [row()])
    expected = f"evaluation.tasks.colours.adjacent names b, c, which {tmp_path} does not hold."
    assert mistake(tmp_path, adjacent=["c", "a", "b"]) == expected


def test_a_single_file_has_no_subjects_that_could_be_adjacent(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row()])
    assert mistake(path, adjacent=["a"]) == f"evaluation.tasks.colours.adjacent names a, which {path} does not hold."


def test_a_hub_data_set_is_split_by_its_subject_column(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(source: str, subset: str | None, split: str) -> Dataset:
        assert (source, subset, split) == ("owner/quiz", "all", "test")
        return Dataset.from_list([row(0, subject="warm"), row(1, subject="cold"), row(2, subject="warm")])

    monkeypatch.setattr("datasets.load_dataset", rows)
    settings = Task(source="owner/quiz", subset="all", subject_column="subject", role="kept", adjacent=["warm"])
    assert [(each.name, each.role, len(each.questions)) for each in load_task("quiz", settings)] == [
        ("quiz_cold", "kept", 1),
        ("quiz_warm", "adjacent", 2),
    ]
    [together] = load_task("quiz", settings.model_copy(update={"subject_column": None, "adjacent": []}))
    assert [each.gold for each in together.questions] == [0, 1, 2]


def test_a_subset_that_the_hub_does_not_know_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("BuilderConfig 'x' not found.")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(UserError, match="The data set owner/quiz cannot be read: BuilderConfig 'x' not found."):
        load_task("quiz", Task(source="owner/quiz", subset="x", role="kept"))


def test_a_bad_row_of_the_hub_is_named_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_list([row(), row(answer=7)]))
    with pytest.raises(UserError, match="^owner/quiz, row 1: the answer 7 is out of range"):
        load_task("quiz", Task(source="owner/quiz", role="kept"))


def test_a_missing_subject_column_is_told_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_list([row()]))
    with pytest.raises(UserError, match='owner/quiz has no column "field". There is: question, choices, answer'):
        load_task("quiz", Task(source="owner/quiz", subject_column="field", role="kept"))


def test_a_limit_is_spread_over_the_subjects_in_proportion_the_same_each_time(tmp_path: Path) -> None:
    folder = tmp_path / "subjects"
    folder.mkdir()
    for name, count in (("a", 60), ("b", 36), ("c", 4)):
        jsonl(folder / f"{name}.jsonl", [row(number) for number in range(count)])
    tasks = {"quiz": task(folder)}
    everything, first, second = (load_questions(Evaluation(tasks=tasks, limit=limit)) for limit in (None, 10, 10))
    assert first == second
    assert [len(each.questions) for each in everything] == [60, 36, 4]
    assert [each.sampled_from for each in everything] == [None, None, None]
    assert [len(each.questions) for each in first] == [6, 4, 1]  # one a subject at least
    assert [each.sampled_from for each in first] == [60, 36, 4]
    for sample, whole in zip(first, everything, strict=True):
        assert list(sample.questions) == [question for question in whole.questions if question in set(sample.questions)]
    assert list(first[0].questions) != list(everything[0].questions[:6]), "the first ones are no sample"


def test_a_limit_beyond_all_questions_leaves_no_mark(tmp_path: Path) -> None:
    tasks = {"quiz": task(jsonl(tmp_path / "a.jsonl", [row(number) for number in range(5)]))}
    assert load_questions(Evaluation(tasks=tasks, limit=5)) == load_questions(Evaluation(tasks=tasks))


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """Two subjects in MMLU's layout, with three examples each."""
    for split, count in (("dev", 3), ("test", 7)):
        (tmp_path / "quiz" / split).mkdir(parents=True)
        for subject in ("field_mice", "owls"):
            rows = [row(number, question=f"{split} {subject} {number}") for number in range(count)]
            jsonl(tmp_path / "quiz" / split / f"{subject}_{split}.jsonl", rows)
    return tmp_path / "quiz"


def test_a_folder_with_splits_gives_questions_and_examples(splits: Path) -> None:
    mice, owls = load_task("quiz", task(splits, examples_split="dev", num_fewshot=2))
    assert (mice.name, mice.about, mice.group, len(mice.questions)) == ("quiz_field_mice", "field mice", "quiz", 7)
    assert [example.question for example in owls.examples] == ["dev owls 0", "dev owls 1"]


def test_only_the_subjects_asked_for_are_read_and_averaged(splits: Path) -> None:
    [owls] = load_task("quiz", task(splits, subjects=["owls"], averages={"birds": ["owls"], "rest": ["field_mice"]}, group="zoo"))
    assert (owls.name, owls.averages) == ("quiz_owls", ("zoo", "birds"))
    assert mistake(splits, subjects=["owl"]) == f"evaluation.tasks.colours.subjects names owl, which {splits} does not hold."


def test_too_few_examples_are_named(splits: Path) -> None:
    assert mistake(splits, examples_split="dev", num_fewshot=5) == f"num_fewshot is 5, but dev of {splits} holds 3 examples for field_mice."


def test_few_shot_without_examples_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_fewshot 5 takes an examples_split; this task has none, so ask it with 0"):
        task(tmp_path, num_fewshot=5)


def test_a_known_task_needs_only_what_differs() -> None:
    tasks = Evaluation.model_validate({"tasks": {"wmdp_bio": {"role": "forgotten"}, "mmlu": {"num_fewshot": 5}}}).tasks
    bio, mmlu = tasks["wmdp_bio"], tasks["mmlu"]
    assert (bio.source, bio.subset, bio.about, bio.role, bio.group) == ("cais/wmdp", "wmdp-bio", "biology", "forgotten", "wmdp")
    assert (mmlu.source, mmlu.examples_split, mmlu.num_fewshot, mmlu.role) == ("cais/mmlu", "dev", 5, "kept")
    assert sorted(len(subjects) for subjects in mmlu.averages.values()) == [12, 13, 13, 19]
    assert len({subject for subjects in mmlu.averages.values() for subject in subjects}) == 57


@pytest.mark.skipif(not MMLU.exists(), reason=f"needs MMLU at {MMLU}")
def test_the_real_mmlu_is_read_in_full() -> None:
    subjects = load_task("mmlu", task(MMLU, adjacent=["virology", "college_biology"]))
    assert len(subjects) == 57
    assert {subject.removeprefix("mmlu_") for subject in (each.name for each in subjects)} == {
        name for names in known_tasks()["mmlu"]["averages"].values() for name in names
    }
    assert sum(len(subject.questions) for subject in subjects) == 14042
    assert {subject.about for subject in subjects if subject.role == "adjacent"} == {"virology", "college biology"}
    assert {subject.name for subject in subjects} >= {"mmlu_abstract_algebra", "mmlu_world_religions"}
