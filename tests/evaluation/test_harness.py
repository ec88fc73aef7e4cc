"""The harness's layout where nothing is asked of a model: groups in groups, what the harness leaves out, what was sampled."""

from typing import Any

import pytest
from lm_eval.utils import make_table, sanitize_model_name

from lowmem_rmu.data.questions import Question, QuestionSet
from lowmem_rmu.evaluation.harness import harness_results
from lowmem_rmu.evaluation.multiple_choice import score
from tests.records import answer_row

QUESTIONS = tuple(Question(f"Which is {number}?", ("a", "b", "c", "d"), 0) for number in range(4))


def a_set(name: str, group: str | None = None, averages: tuple[str, ...] = (), **others: Any) -> QuestionSet:
    return QuestionSet(
        **{
            "name": name,
            "about": "numbers",
            "role": "kept",
            "group": group,
            "questions": QUESTIONS,
            "averages": averages,
        }
        | others
    )


def results(*sets: QuestionSet) -> dict[str, Any]:
    """Of answers every second of which is right."""
    answers = [
        answer_row(task=each.name, gold=number % 2, correct=number % 2 == 0, logprobs=[-1.0] * 4)
        for each in sets
        for number in range(len(each.questions))
    ]
    return harness_results(score(list(sets), answers, 8.0), list(sets), "./models/one", 1234.5)


def test_groups_lie_in_each_other_as_their_questions_do() -> None:
    found = results(
        a_set("wmdp_bio", averages=("wmdp",)),
        a_set("wmdp_cyber", averages=("wmdp",)),
        a_set("mmlu_anatomy", "mmlu", ("mmlu_stem",)),
        a_set("mmlu_marketing", "mmlu", ("mmlu_other",)),
        a_set("mmlu_made_up", "mmlu"),
    )
    assert found["group_subtasks"] == {
        "wmdp": ["wmdp_bio", "wmdp_cyber"],
        "mmlu": ["mmlu_stem", "mmlu_other", "mmlu_made_up"],
        "mmlu_stem": ["mmlu_anatomy"],
        "mmlu_other": ["mmlu_marketing"],
    }
    assert [
        found["results"][name]["alias"] for name in ("wmdp_bio", "mmlu_stem", "mmlu_anatomy", "mmlu")
    ] == ["wmdp_bio", "stem", "anatomy", "mmlu"]
    assert (found["versions"]["wmdp_cyber"], found["versions"]["wmdp"], found["versions"]["mmlu_other"]) == (
        1,
        "1",
        "2",
    )


def test_a_group_with_the_same_sets_lies_in_the_one_with_the_shorter_name() -> None:
    found = results(a_set("mmlu_anatomy", "mmlu", ("mmlu_stem",)))
    assert found["group_subtasks"] == {"mmlu": ["mmlu_stem"], "mmlu_stem": ["mmlu_anatomy"]}
    lines = [line.split("|")[1].rstrip() for line in make_table(found).splitlines()[2:]]
    assert lines == ["mmlu", " - stem", "  - anatomy"]


def test_there_is_no_average_over_two_forms_or_over_nothing() -> None:
    found = results(a_set("letters", averages=("all",)), a_set("cloze", averages=("all",), scoring="cloze"))
    assert "groups" not in found
    assert found["group_subtasks"] == {}
    assert found["results"]["letters"].keys() - found["results"]["cloze"].keys() == {
        "acc,none",
        "acc_stderr,none",
    }
    assert found["higher_is_better"] == {"letters": {"acc": True}, "cloze": {"acc_norm": True}}
    assert found["versions"] == {"letters": "N/A", "cloze": "N/A"}


def test_one_question_has_no_standard_error_and_nor_has_its_group() -> None:
    found = results(a_set("mmlu_one", "mmlu", questions=QUESTIONS[:1]), a_set("mmlu_four", "mmlu"))
    assert (
        found["results"]["mmlu_one"]["acc_stderr,none"] == found["groups"]["mmlu"]["acc_stderr,none"] == "N/A"
    )
    assert found["results"]["mmlu_four"]["acc_stderr,none"] == pytest.approx(0.5 / 3**0.5)
    assert (found["groups"]["mmlu"]["sample_len"], found["groups"]["mmlu"]["sample_count"]) == (
        5,
        {"acc,none": 5},
    )
    assert make_table(found, "groups").count("N/A") == 1


def test_samples_examples_and_names_are_told() -> None:
    found = results(a_set("few", "both", sampled_from=100, examples=QUESTIONS[:2]), a_set("none", "both"))
    assert found["n-samples"] == {
        "few": {"original": 100, "effective": 4},
        "none": {"original": 4, "effective": 4},
    }
    assert found["n-shot"] == {"few": 2, "none": 0}
    assert found["config"]["limit"] == 4
    assert results(a_set("none"))["config"]["limit"] is None
    assert (found["date"], found["total_evaluation_time_seconds"]) == (1234.5, "8.0")
    assert (found["model_name"], found["model_name_sanitized"]) == (
        "./models/one",
        sanitize_model_name("./models/one"),
    )
    assert (
        found["configs"]["few"]["description"]
        == "The following are multiple choice questions (with answers) about numbers.\n\n"
    )
