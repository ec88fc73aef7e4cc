import math
from typing import Any

import pytest

from lowmem_rmu.data.questions import Question, QuestionSet
from lowmem_rmu.evaluation.compare import Row, compare_tasks, compare_texts, rows_as_json, verdict
from lowmem_rmu.presets import Role


def question_set(name: str, count: int, role: Role = "kept", group: str | None = None) -> QuestionSet:
    return QuestionSet(name, name, role, group, (Question("?", ("a", "b", "c", "d"), 0),) * count)


def answers(**right: str) -> list[dict[str, Any]]:
    """`quiz="110"`: the first two of three questions of `quiz` are right."""
    return [{"task": name, "correct": mark == "1"} for name, marks in right.items() for mark in marks]


def row(role: Role, base: float, unlearned: float | None, stderr: float = 0.005, group: str | None = None, questions: int = 1000) -> Row:
    change = None if unlearned is None else unlearned - base
    return Row("quiz", group, False, role, questions, base, 0.01, unlearned, 0.01, change, stderr)


def text(role: Role, base: float, unlearned: float | None, stderr: float = 0.05) -> dict[str, Any]:
    change = None if unlearned is None else unlearned - base
    return {"name": "storms", "role": role, "base": base, "unlearned": unlearned, "change": change, "change_stderr": stderr}


def only_row(base: str, unlearned: str | None) -> Row:
    after = None if unlearned is None else answers(quiz=unlearned)
    [only] = compare_tasks([question_set("quiz", len(base))], answers(quiz=base), after)
    return only


def test_the_change_has_the_standard_error_of_the_paired_differences() -> None:
    """Differences -1, 0, 0, +1: mean 0, variance 2/3 in the n-1 form, standard error sqrt(2/3/4)."""
    both = only_row("1100", "0101")
    assert (both.base, both.unlearned, both.change) == (0.5, 0.5, 0.0)
    assert both.change_stderr == pytest.approx(math.sqrt(2 / 3 / 4))
    assert both.base_stderr == pytest.approx(math.sqrt(1 / 3 / 4))
    assert both.chance == 0.25


def test_equal_answers_have_no_change_and_no_error_of_it() -> None:
    same = only_row("1101000", "1101000")
    assert (same.change, same.change_stderr) == (0.0, 0.0)
    assert same.base_stderr > 0


def test_pairing_makes_a_small_change_certain() -> None:
    """Ten of a hundred fall and none rises: the unpaired error would be twice as large."""
    fell = only_row("1" * 60 + "0" * 40, "1" * 50 + "0" * 50)
    assert fell.change == pytest.approx(-0.1)
    assert fell.change_stderr == pytest.approx(math.sqrt((10 * 0.9**2 + 90 * 0.1**2) / 99 / 100))
    assert fell.unlearned_stderr is not None
    assert fell.change_stderr < math.hypot(fell.base_stderr, fell.unlearned_stderr) / 2


def test_one_question_has_no_standard_error() -> None:
    assert only_row("1", "0").change_stderr == 0.0


def test_answers_to_different_numbers_of_questions_are_never_compared() -> None:
    with pytest.raises(ValueError, match="shorter"):
        only_row("110", "11")


def test_without_unlearned_answers_only_base_is_known() -> None:
    alone = only_row("1100", None)
    assert (alone.base, alone.questions) == (0.5, 4)
    assert (alone.unlearned, alone.unlearned_stderr, alone.change, alone.change_stderr) == (None, None, None, None)


def test_a_group_comes_before_its_subjects_and_weighs_them_by_questions() -> None:
    sets = [question_set("other", 1), question_set("m_a", 6, group="m"), question_set("m_b", 2, "adjacent", "m")]
    base, unlearned = answers(other="1", m_a="111111", m_b="00"), answers(other="1", m_a="111000", m_b="00")
    rows = compare_tasks(sets, base, unlearned)
    assert [(each.task, each.group, each.is_group, each.role, each.questions) for each in rows] == [
        ("other", None, False, "kept", 1),
        ("m", None, True, "kept", 8),
        ("m_a", "m", False, "kept", 6),
        ("m_b", "m", False, "adjacent", 2),
    ]
    assert (rows[1].base, rows[1].unlearned) == (6 / 8, 3 / 8)
    assert rows[1].change == pytest.approx(-3 / 8)


@pytest.mark.parametrize(("roles", "expected"), [(("adjacent", "forgotten"), "forgotten"), (("adjacent", "adjacent"), "adjacent")])
def test_a_group_has_the_role_of_its_members_that_are_not_adjacent(roles: tuple[Role, Role], expected: str) -> None:
    sets = [question_set(f"m_{index}", 1, role, "m") for index, role in enumerate(roles)]
    assert compare_tasks(sets, answers(m_0="1", m_1="1"), None)[0].role == expected


def test_rows_become_plain_data() -> None:
    [plain] = rows_as_json([row("kept", 0.5, None)])
    assert plain["task"] == "quiz"
    assert plain["change"] is None


@pytest.mark.parametrize(
    ("base", "unlearned", "grade", "words"),
    [
        (0.60, 0.26, "yes", "quiz: forgotten: 60.0% right as base, 26.0% unlearned, which is no better than guessing (25%)."),
        (0.60, 0.10, "yes", "no better than guessing"),
        (0.60, 0.45, "partly", "quiz: partly forgotten: 60.0% right as base, 45.0% unlearned; guessing would give 25%."),
        (0.60, 0.595, "no", "quiz: not forgotten: 60.0% right as base, 59.5% unlearned; the change is within noise."),
        (0.60, 0.70, "no", "not forgotten"),
        (0.26, 0.25, "unknown", "quiz: nothing to forget: 26.0% as base is what guessing gives (25%)."),
    ],
)
def test_what_should_be_forgotten_is_graded(base: float, unlearned: float, grade: str, words: str) -> None:
    result = verdict([row("forgotten", base, unlearned)], [])
    assert (result["forgotten"], result["kept"]) == (grade, "unknown")
    assert words in result["sentences"][0]


@pytest.mark.parametrize("role", ["kept", "adjacent"])
@pytest.mark.parametrize(
    ("base", "unlearned", "grade", "words"),
    [
        (0.60, 0.60, "yes", "quiz: kept: 60.0% right as base, 60.0% unlearned; no change."),
        (0.60, 0.595, "yes", "quiz: kept: 60.0% right as base, 59.5% unlearned; the change is within noise."),
        (0.60, 0.70, "yes", "quiz: kept: "),
        (0.60, 0.585, "yes", "quiz: kept but for 1.5 points: 60.0% right as base, 58.5% unlearned."),
        (0.60, 0.55, "partly", "quiz: lost 5.0 points: 60.0% right as base, 55.0% unlearned."),
        (0.60, 0.40, "no", "quiz: lost 20.0 points: 60.0% right as base, 40.0% unlearned."),
    ],
)
def test_what_should_be_kept_is_graded(role: Role, base: float, unlearned: float, grade: str, words: str) -> None:
    result = verdict([row(role, base, unlearned)], [])
    assert (result["forgotten"], result["kept"]) == ("unknown", grade)
    assert words in result["sentences"][0]


def test_a_large_loss_within_a_large_noise_is_no_loss() -> None:
    assert verdict([row("kept", 0.6, 0.5, stderr=0.06)], [])["kept"] == "yes"


def test_few_questions_make_guessing_a_wide_range() -> None:
    """Of 16 questions guessing gets up to 25% + 1.96 * 10.8%; of 1,000 it does not."""
    assert verdict([row("forgotten", 0.9, 0.45, questions=16)], [])["forgotten"] == "yes"
    assert verdict([row("forgotten", 0.9, 0.45, questions=1000)], [])["forgotten"] == "partly"


def test_measured_tasks_are_told_but_do_not_count() -> None:
    result = verdict([row("measured", 0.6, 0.2)], [])
    assert (result["forgotten"], result["kept"]) == ("unknown", "unknown")
    assert "lost 40.0 points" in result["sentences"][0]


def test_a_group_speaks_for_its_subjects_except_the_adjacent_ones() -> None:
    assert verdict([row("kept", 0.6, 0.2, group="m")], [])["sentences"] == []
    assert verdict([row("adjacent", 0.6, 0.2, group="m")], [])["kept"] == "no"


def test_what_was_not_measured_afterwards_is_left_out() -> None:
    nothing = {"forgotten": "unknown", "kept": "unknown", "sentences": []}
    assert verdict([row("forgotten", 0.6, None)], [text("kept", 3.0, None)]) == nothing


@pytest.mark.parametrize(
    ("roles_and_after", "forgotten", "kept"),
    [
        ([("forgotten", 0.25), ("forgotten", 0.25), ("kept", 0.6)], "yes", "yes"),
        ([("forgotten", 0.25), ("forgotten", 0.6), ("kept", 0.6)], "partly", "yes"),
        ([("forgotten", 0.6), ("kept", 0.6), ("adjacent", 0.2)], "no", "partly"),
    ],
)
def test_tasks_that_differ_make_the_whole_partly(roles_and_after: list[tuple[Role, float]], forgotten: str, kept: str) -> None:
    result = verdict([row(role, 0.6, after) for role, after in roles_and_after], [])
    assert (result["forgotten"], result["kept"]) == (forgotten, kept)


def test_a_task_with_nothing_to_forget_does_not_spoil_the_others() -> None:
    assert verdict([row("forgotten", 0.25, 0.25), row("forgotten", 0.6, 0.25)], [])["forgotten"] == "yes"


@pytest.mark.parametrize(
    ("role", "after", "grade", "words"),
    [
        ("forgotten", 3.6, "yes", "storms (held-out text): the model no longer follows it: 3.00 nats a token as base, 3.60 unlearned."),
        ("forgotten", 3.2, "partly", "it is still read nearly as well"),
        ("forgotten", 3.05, "no", "it is still read nearly as well"),
        ("forgotten", 2.0, "no", "it is still read nearly as well"),
        ("kept", 3.2, "yes", "storms (held-out text): kept: 3.00 nats a token as base, 3.20 unlearned."),
        ("kept", 2.0, "yes", "kept"),
        ("kept", 3.4, "partly", "damaged"),
        ("kept", 4.0, "no", "storms (held-out text): damaged: 3.00 nats a token as base, 4.00 unlearned."),
    ],
)
def test_held_out_texts_are_graded_by_their_loss(role: Role, after: float, grade: str, words: str) -> None:
    result = verdict([], [text(role, 3.0, after)])
    assert result[role] == grade
    assert words in result["sentences"][0]


def test_text_losses_are_subtracted_and_their_errors_added_in_squares() -> None:
    base = {"storms": {"loss": 3.0, "stderr": 0.03, "tokens": 100}}
    [both] = compare_texts({"storms": "forgotten"}, base, {"storms": {"loss": 3.5, "stderr": 0.04, "tokens": 100}})
    assert both["change"] == pytest.approx(0.5)
    assert both["change_stderr"] == pytest.approx(0.05)
    assert (both["role"], both["tokens"], both["base"], both["unlearned"]) == ("forgotten", 100, 3.0, 3.5)
    [alone] = compare_texts({"storms": "forgotten"}, base, None)
    assert (alone["base"], alone["unlearned"], alone["change"], alone["change_stderr"]) == (3.0, None, None, None)
