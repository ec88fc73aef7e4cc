import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from inline_snapshot import snapshot
from pydantic import ValidationError

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.config.schema import Evaluation, Task, known_tasks
from lowmem_rmu.data.questions import (
    Question,
    QuestionSet,
    Unasked,
    find_questions,
    load_questions,
    load_task,
    stratified,
)
from lowmem_rmu.errors import UserError
from lowmem_rmu.runs.recorded import recorded_preset
from tests.texts import plain

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
    return plain(caught.value, source=path)


def mistake_of_the_hub(**settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_task("quiz", Task(source="owner/quiz", role="kept", **settings))
    return plain(caught.value)


def test_a_json_file_is_one_task(tmp_path: Path) -> None:
    rows = [row(0), row(3, question="line\u2028separator and next\x85line", note="ignored")]
    [questions] = load_task("light_colours", task(jsonl(tmp_path / "a.jsonl", rows), role="forgotten"))
    assert (questions.name, questions.about, questions.role, questions.group) == (
        "light_colours",
        "light colours",
        "forgotten",
        None,
    )
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
    path.write_text(
        mark + HEADER + '"Which, ""then""\nis it?",red,"green, dark",blue,white,1\nWhich?,a,b,c,d,D\n',
        encoding="utf-8",
    )
    [questions] = load_task("colours", task(path))
    assert questions.questions == (
        Question('Which, "then"\nis it?', ("red", "green, dark", "blue", "white"), 1),
        Question("Which?", ("a", "b", "c", "d"), 3),
    )


@pytest.mark.parametrize(
    ("answer", "gold"),
    [(0, 0), (3, 3), ("0", 0), ("3", 3), ("A", 0), ("D", 3), (1.0, 1), ("1.0", 1), (" B ", 1)],
)
def test_an_answer_is_a_number_or_a_letter(tmp_path: Path, answer: int | str, gold: int) -> None:
    [questions] = load_task("colours", task(jsonl(tmp_path / "a.jsonl", [row(answer=answer)])))
    assert questions.questions[0].gold == gold


@pytest.mark.parametrize(
    "answer",
    [4, -1, "E", "a", "AB", "BCD", "", "4", "²", "1.5", "0x1", "1e0", None, True, 1.5, -1.0, 4.0, [1]],
    ids=repr,
)
def test_an_answer_out_of_range_is_named_with_file_and_line(tmp_path: Path, answer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row(), row(answer=answer)])
    assert mistake(path).replace(f"the answer {answer!r} ", "the answer <answer> ", 1) == snapshot(
        "<source>, line 2: the answer <answer> is out of range: give 0 to 3 (0 is the first choice), or a letter A to D."
    )


@pytest.mark.parametrize(
    "choices", [CHOICES[:3], [*CHOICES, "black"], "abcd", None, [1, 2, 3, 4], []], ids=repr
)
def test_a_wrong_number_or_kind_of_choices_is_named_with_file_and_line(tmp_path: Path, choices: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row(), row(choices=choices)])
    assert mistake(path) == snapshot("<source>, line 2: a question needs 4 choices, all of them text.")


@pytest.mark.parametrize("question", ["", "  ", 3, None], ids=repr)
def test_a_question_without_text_is_named_with_file_and_line(tmp_path: Path, question: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row(question=question)])
    assert mistake(path) == snapshot("<source>, line 1: the question is empty or no text.")


@pytest.mark.parametrize(
    "line", ['{"question": "x", "choices": []}', '["question", "choices", "answer"]', "3"]
)
def test_a_row_without_the_keys_is_named_with_the_keys(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    assert mistake(path) == snapshot(
        "<source>, line 1: a question needs the keys question, choices and answer."
    )


def test_a_bad_json_line_is_named_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row()) + "\n\n{bad\n")
    assert mistake(path) == snapshot(
        "<source>, line 3: no valid JSON: Expecting property name enclosed in double quotes."
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Which?,a,b,c,1", snapshot("<source>, line 2: a question needs 4 choices, all of them text.")),
        (
            "Which?,a,b,c,d,9",
            snapshot(
                "<source>, line 2: the answer '9' is out of range: give 0 to 3 (0 is the first choice), or a letter A to D."
            ),
        ),
    ],
)
def test_a_bad_csv_row_is_named_with_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(HEADER.replace("choice3,", "") + line if "9" not in line else HEADER + line)
    assert mistake(path) == said


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_file_that_is_not_utf8_is_named_with_the_place(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes("é".encode("latin-1"))
    assert mistake(path) == snapshot("<source> is not UTF-8 text (byte 0).\nSave it as UTF-8.")


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.csv", ""), ("a.csv", HEADER)]
)
def test_a_file_without_questions_is_a_mistake(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert mistake(path) == snapshot("The question file <source> is empty.")


def test_a_missing_file_is_named_with_what_it_could_be(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    assert mistake(path) == snapshot(
        "The question file <source> does not exist.\nGive a .jsonl or .csv file, or a folder of them."
    )


def test_a_folder_without_questions_says_what_it_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    assert mistake(tmp_path) == snapshot(
        "The question folder <source> holds no .jsonl or .csv file.\nNot read: a.txt (a .txt file)."
    )


def test_a_folder_has_a_subject_a_file_and_those_next_to_the_topic_are_adjacent(tmp_path: Path) -> None:
    jsonl(tmp_path / "warm_colours.jsonl", [row()])
    (tmp_path / "cold_colours_test.csv").write_text(HEADER + "Which?,a,b,c,d,1\n")
    cold, warm = load_task("mmlu", task(tmp_path, adjacent=["cold_colours"]))
    assert (cold.name, cold.about, cold.role, cold.group) == (
        "mmlu_cold_colours",
        "cold colours",
        "adjacent",
        "mmlu",
    )
    assert (warm.name, warm.about, warm.role, warm.group) == (
        "mmlu_warm_colours",
        "warm colours",
        "kept",
        "mmlu",
    )


def test_unknown_adjacent_subjects_are_all_named(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [row()])
    assert mistake(tmp_path, adjacent=["c", "a", "b"]) == snapshot(
        "evaluation.tasks.colours.adjacent names b, c, which <source> does not hold."
    )


def test_a_single_file_has_no_subjects_that_could_be_adjacent(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row()])
    assert mistake(path, adjacent=["a"]) == snapshot(
        "evaluation.tasks.colours.adjacent names a, which <source> does not hold."
    )


def test_a_hub_data_set_is_split_by_its_subject_column(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(source: str, subset: str | None, split: str) -> Dataset:
        assert (source, subset, split) == ("owner/quiz", "all", "test")
        return Dataset.from_list([row(0, subject="warm"), row(1, subject="cold"), row(2, subject="warm")])

    monkeypatch.setattr("datasets.load_dataset", rows)
    settings = Task(
        source="owner/quiz", subset="all", subject_column="subject", role="kept", adjacent=["warm"]
    )
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
    assert mistake_of_the_hub(subset="x") == snapshot(
        "The data set owner/quiz cannot be read: BuilderConfig 'x' not found."
    )


def test_a_bad_row_of_the_hub_is_named_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_list([row(), row(answer=7)]))
    assert mistake_of_the_hub() == snapshot(
        "owner/quiz, row 1: the answer 7 is out of range: give 0 to 3 (0 is the first choice), or a letter A to D."
    )


def test_a_missing_subject_column_is_told_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_list([row()]))
    assert mistake_of_the_hub(subject_column="field") == snapshot(
        'The data set owner/quiz has no column "field". There is: question, choices, answer.'
    )


def test_a_limit_is_spread_over_the_subjects_in_proportion_the_same_each_time(tmp_path: Path) -> None:
    folder = tmp_path / "subjects"
    folder.mkdir()
    for name, count in (("a", 60), ("b", 36), ("c", 4)):
        jsonl(folder / f"{name}.jsonl", [row(number) for number in range(count)])
    tasks = {"quiz": task(folder)}
    everything, first, second = (
        load_questions(Evaluation(tasks=tasks, limit=limit)) for limit in (None, 10, 10)
    )
    assert first == second
    assert [len(each.questions) for each in everything] == [60, 36, 4]
    assert [each.sampled_from for each in everything] == [None, None, None]
    assert [len(each.questions) for each in first] == [6, 4], (
        "10 at most, by largest remainder: 6.0, 3.6 and 0.4"
    )
    assert [each.sampled_from for each in first] == [60, 36]
    assert all(each.unasked == (Unasked("quiz_c", 4, ()),) for each in first)
    for sample, whole in zip(first, everything[:2], strict=True):
        assert list(sample.questions) == [
            question for question in whole.questions if question in set(sample.questions)
        ]
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
    assert (mice.name, mice.about, mice.group, len(mice.questions)) == (
        "quiz_field_mice",
        "field mice",
        "quiz",
        7,
    )
    assert [example.question for example in owls.examples] == ["dev owls 0", "dev owls 1"]


def test_only_the_subjects_asked_for_are_read_and_averaged(splits: Path) -> None:
    [owls] = load_task(
        "quiz",
        task(splits, subjects=["owls"], averages={"birds": ["owls"], "rest": ["field_mice"]}, group="zoo"),
    )
    assert (owls.name, owls.averages) == ("quiz_owls", ("zoo", "birds"))
    assert mistake(splits, subjects=["owl"]) == snapshot(
        "evaluation.tasks.colours.subjects names owl, which <source> does not hold."
    )


def test_too_few_examples_are_named(splits: Path) -> None:
    assert mistake(splits, examples_split="dev", num_fewshot=5) == snapshot(
        "num_fewshot is 5, but dev of <source> holds 3 examples for field_mice."
    )


def test_few_shot_without_examples_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValidationError) as caught:
        task(tmp_path, num_fewshot=5)
    assert [each["msg"] for each in caught.value.errors()] == snapshot(
        ["Value error, num_fewshot 5 takes an examples_split; this task has none, so ask it with 0"]
    )


def test_a_known_task_needs_only_what_differs() -> None:
    tasks = Evaluation.model_validate(
        {"tasks": {"wmdp_bio": {"role": "forgotten"}, "mmlu": {"num_fewshot": 5}}}
    ).tasks
    bio, mmlu = tasks["wmdp_bio"], tasks["mmlu"]
    assert (bio.source, bio.subset, bio.about, bio.role, bio.group) == (
        "cais/wmdp",
        "wmdp-bio",
        "biology",
        "forgotten",
        "wmdp",
    )
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
    assert {subject.about for subject in subjects if subject.role == "adjacent"} == {
        "virology",
        "college biology",
    }
    assert {subject.name for subject in subjects} >= {"mmlu_abstract_algebra", "mmlu_world_religions"}


# Limits


@pytest.mark.parametrize("limit", [1, 2, 10, 25, 56, 57, 58, 100, 500, 14_041, 14_042, 20_000])
def test_a_limit_is_never_exceeded_and_always_used_up(limit: int) -> None:
    sizes = [100 + 7 * number for number in range(56)] + [3]
    question = Question("Which?", tuple(CHOICES), 0)
    sets = [
        QuestionSet(f"quiz_{number}", "", "kept", "quiz", (question,) * size)
        for number, size in enumerate(sizes)
    ]
    sampled = stratified(sets, limit)
    counts = {each.name: len(each.questions) for each in sampled}
    assert sum(counts.values()) == min(limit, sum(sizes))
    for each, size in zip(sets, sizes, strict=True):
        assert abs(counts.get(each.name, 0) - min(limit, sum(sizes)) * size / sum(sizes)) < 1, (
            "the next whole number, up or down"
        )
    assert {name for left in sampled for name in (subject.name for subject in left.unasked)} == {
        each.name for each in sets
    } - counts.keys()
    assert sampled == stratified(sets, limit)


def test_a_run_of_an_older_version_keeps_its_sample(tmp_path: Path) -> None:
    folder = stems(tmp_path, "a.jsonl")
    jsonl(folder / "b.jsonl", [row(number) for number in range(60)])
    preset = load_preset(
        "tiny", ["evaluation.limit=10", f"evaluation.tasks={{q: {{source: {folder}, role: kept}}}}"]
    )
    settings = preset.model_dump()
    del settings["evaluation"]["limit_by"]
    old, new = (load_questions(each.evaluation) for each in (recorded_preset(settings, tmp_path), preset))
    assert [len(each.questions) for each in old] == [1, 10]
    assert [len(each.questions) for each in new] == [10]
    del settings["evaluation"]["limit"]
    assert recorded_preset(settings, tmp_path).evaluation.limit_by == "largest_remainder"


# Files of a folder


def stems(folder: Path, *names: str, content: str = HEADER + "Which?,a,b,c,d,1\n") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.lower().endswith(".csv"):
            (folder / name).write_text(content)
        else:
            jsonl(folder / name, [row()])
    return folder


@pytest.mark.parametrize(
    ("first", "second"),
    [("a.csv", "a.jsonl"), ("a.JSONL", "a.jsonl"), ("a.jsonl", "a_test.jsonl"), ("a.CSV", "a_test.csv")],
)
def test_two_files_of_the_same_subject_do_not_replace_each_other(
    tmp_path: Path, first: str, second: str
) -> None:
    assert plain(mistake(stems(tmp_path, first, second)), pair=f"{first} and {second}") == snapshot(
        "<pair> in <source> are both the subject a.\nKeep one of them, or give them different names."
    )


def test_files_of_other_splits_are_no_subjects(tmp_path: Path) -> None:
    folder = stems(
        tmp_path,
        "bio_test.jsonl",
        "bio_val.jsonl",
        "bio_dev.csv",
        "bio_validation.csv",
        "owls.jsonl",
        "owls_train.jsonl",
        "x.parquet",
    )
    tasks = {split: load_task("quiz", task(folder, split=split)) for split in ("test", "val")}
    assert [each.name for each in tasks["test"]] == ["quiz_bio", "quiz_owls"]
    assert [each.name for each in tasks["val"]] == ["quiz_bio", "quiz_owls"]
    found, _ = find_questions(task(folder), "test")
    assert found.left_out == {
        "bio_dev.csv": "of the split dev",
        "bio_val.jsonl": "of the split val",
        "bio_validation.csv": "of the split validation",
        "owls_train.jsonl": "of the split train",
        "x.parquet": "a Parquet file",
    }
    [bio] = load_task("quiz", task(folder, subjects=["bio"], examples_split="dev", num_fewshot=1))
    assert len(bio.examples) == 1


def test_files_that_are_called_like_splits_are_one_task(tmp_path: Path) -> None:
    folder = stems(tmp_path, "test.csv", "dev.csv", "train.csv", "README.md", "._test.csv")
    [questions] = load_task("quiz", task(folder, examples_split="dev", num_fewshot=1))
    assert (questions.name, questions.group, len(questions.examples)) == ("quiz", None, 1)


def test_a_folder_without_the_split_names_those_that_it_has(tmp_path: Path) -> None:
    assert mistake(stems(tmp_path, "bio_dev.jsonl", "bio_val.jsonl")) == snapshot(
        "The question folder <source> holds no .jsonl or .csv file.\n"
        "Not read: bio_dev.jsonl (of the split dev), bio_val.jsonl (of the split val).\n"
        "Set the task's split to the one you mean: dev, val."
    )


def test_questions_of_a_file_are_never_their_own_examples(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row(), row()])
    assert mistake(path, num_fewshot=1, examples_split="dev") == snapshot(
        "num_fewshot is 1, but <source> is a single file: its questions would be their own examples.\n"
        "Give a folder with the subfolders test/ and dev/, or set num_fewshot to 0."
    )
    folder = stems(tmp_path / "flat", "owls.jsonl")
    assert mistake(folder, num_fewshot=1, examples_split="dev") == snapshot(
        "The question folder <source> holds no .jsonl or .csv file.\n"
        "Not read: owls.jsonl (of the split test).\n"
        "Set the task's split to the one you mean: test."
    )


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    folder = stems(tmp_path / "quiz", "owls.jsonl")
    tasks = {"quiz": task(folder), "quiz_owls": task(jsonl(tmp_path / "a.jsonl", [row()]))}
    with pytest.raises(UserError) as caught:
        load_questions(Evaluation(tasks=tasks))
    assert plain(caught.value) == snapshot(
        "Two tasks, or a task and a subject of another, are called quiz_owls.\n"
        "Rename one of them under evaluation.tasks."
    )


# Kinds of files


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "a.json",
            snapshot(
                "The question file <source> is a JSON file, which is not read here.\n"
                'Convert it to .jsonl, for example with pandas: read_json(FILE).to_json("data.jsonl", orient="records", lines=True).'
            ),
        ),
        (
            "a.parquet",
            snapshot(
                "The question file <source> is a Parquet file, which is not read here.\n"
                'Convert it to .jsonl, for example with pandas: read_parquet(FILE).to_json("data.jsonl", orient="records", lines=True).'
            ),
        ),
        (
            "a.jsonl.gz",
            snapshot(
                "The question file <source> is a compressed file or an archive, which is not read here.\n"
                "Unpack it first."
            ),
        ),
        (
            "a.txt",
            snapshot(
                "The question file <source> is a .txt file, which is not read here.\n"
                "Give a .jsonl or .csv file."
            ),
        ),
        (
            "a.tsv",
            snapshot(
                "The question file <source> is a table, which is not read here.\n"
                "Convert it to .jsonl: one JSON object per line."
            ),
        ),
        (
            "a",
            snapshot(
                "The question file <source> is a file without a suffix, which is not read here.\n"
                "Give a .jsonl or .csv file."
            ),
        ),
    ],
)
def test_a_file_of_another_kind_is_refused_by_what_it_is(tmp_path: Path, name: str, said: str) -> None:
    jsonl(tmp_path / name, [row()])
    told = mistake(tmp_path / name)
    assert told == said
    assert "UTF-8" not in told


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"PAR1\x15\xff",
            snapshot(
                "<source> is a Parquet file, whatever its name says.\n"
                'Convert it to .jsonl, for example with pandas: read_parquet(FILE).to_json("data.jsonl", orient="records", lines=True).'
            ),
        ),
        (
            b"\x1f\x8b\x08\x00",
            snapshot("<source> is compressed by gzip, whatever its name says.\nUnpack it first."),
        ),
        (
            b"PK\x03\x04\xff",
            snapshot(
                "<source> is a ZIP archive or an office document, whatever its name says.\n"
                "Unpack it, or save its text as .txt, in UTF-8."
            ),
        ),
    ],
)
def test_a_file_with_another_suffix_than_its_content_is_named_by_what_it_is(
    tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert mistake(tmp_path / "a.jsonl") == said


# CSV


def test_mmlu_as_its_authors_publish_it_has_no_header(tmp_path: Path) -> None:
    path = tmp_path / "colours_test.CSV"
    path.write_text('"Which, ""then""\nis it?",red,"green, dark",blue,white,B\r\nWhich?,a,b,c,d,D\r\n')
    [questions] = load_task("colours", task(path))
    assert questions.questions == (
        Question('Which, "then"\nis it?', ("red", "green, dark", "blue", "white"), 1),
        Question("Which?", ("a", "b", "c", "d"), 3),
    )


def test_the_choices_of_a_header_may_be_letters_and_the_columns_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,Answer,Question,A,B,C,D\n7,2.0,Which?,a,b,c,d\n")
    [questions] = load_task("colours", task(path))
    assert questions.questions == (Question("Which?", ("a", "b", "c", "d"), 2),)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "Which,a,b,c,d\n",
            snapshot(
                "<source>, line 1: neither a header with question, choice0, choice1, choice2, choice3, answer nor a question in these six columns, separated by commas.\n"
                "Add the header, or put the columns into this order."
            ),
        ),
        (
            "question;choice0;answer\n",
            snapshot(
                "<source>, line 1: neither a header with question, choice0, choice1, choice2, choice3, answer nor a question in these six columns, separated by commas.\n"
                "Add the header, or put the columns into this order."
            ),
        ),
        (
            HEADER + "Which, then?,a,b,c,A,D\n",
            snapshot(
                "<source>, line 2: 7 fields, but there are 6 columns.\n"
                "Put text that holds a comma or a line end into double quotes, and close every quote."
            ),
        ),
        (
            HEADER + '"Which?,a,b,c,d,1\nWhich?,a,b,c,d,1\n',
            snapshot(
                "<source>, line 3: 1 fields, but there are 6 columns.\n"
                "Put text that holds a comma or a line end into double quotes, and close every quote."
            ),
        ),
        (
            HEADER + "Which?,a\n",
            snapshot(
                "<source>, line 2: 2 fields, but there are 6 columns.\n"
                "Put text that holds a comma or a line end into double quotes, and close every quote."
            ),
        ),
        (
            "question,answer,answer,a,b,c,d\n",
            snapshot(
                "<source>, line 1: the header names a column twice: question, answer, answer, a, b, c, d."
            ),
        ),
        (
            HEADER + "x" * 140_000 + ",a,b,c,d,1\n",
            snapshot(
                "<source>, line 2: no valid CSV: field larger than field limit (131072).\n"
                "Check that every quote is closed, and that no field holds a whole document."
            ),
        ),
    ],
    ids=["five columns", "semicolons", "unquoted comma", "open quote", "cut", "twice", "long field"],
)
def test_a_csv_file_that_is_none_of_questions_is_told_with_its_line(
    tmp_path: Path, content: str, said: str
) -> None:
    (tmp_path / "a.csv").write_text(content)
    told = mistake(tmp_path / "a.csv")
    assert told == said
    assert len(told) < 500


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[" * 100_000, snapshot("<source>, line 1: no valid JSON: nested too deeply.")),
        (
            '{"answer": ' + "9" * 5000 + "}",
            snapshot("<source>, line 1: no valid JSON: a number of thousands of digits."),
        ),
        (
            '{"answer": 0, "answer": 1}',
            snapshot('<source>, line 1: no valid JSON: an object with the key "answer" twice.'),
        ),
        (
            json.dumps(row(question="half \ud800")),
            snapshot(
                "<source>, line 1: the question or a choice is no text (it holds NUL characters or half of a pair)."
            ),
        ),
        (
            json.dumps(row(choices=["a", "b", "c", "\0"])),
            snapshot(
                "<source>, line 1: the question or a choice is no text (it holds NUL characters or half of a pair)."
            ),
        ),
    ],
    ids=["depth", "digits", "twice", "surrogate", "nul"],
)
def test_a_json_line_that_python_or_a_tokenizer_cannot_take_is_told(
    tmp_path: Path, line: str, said: str
) -> None:
    (tmp_path / "a.jsonl").write_text(line)
    assert mistake(tmp_path / "a.jsonl") == said


def test_a_long_answer_is_not_repeated_whole(tmp_path: Path) -> None:
    said = mistake(jsonl(tmp_path / "a.jsonl", [row(answer="x" * 10_000)]))
    assert len(said) < 400
