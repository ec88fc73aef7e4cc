import math
from dataclasses import asdict, replace
from typing import Any

import pytest
from inline_snapshot import snapshot

from lowmem_rmu.config.schema import Role
from lowmem_rmu.data.questions import LETTERS, Question, QuestionSet
from lowmem_rmu.evaluation.compare import (
    Row,
    TextRow,
    Verdict,
    asked_how,
    compare_tasks,
    compare_texts,
    counted,
    most_left,
    verdict,
)
from lowmem_rmu.evaluation.multiple_choice import score
from lowmem_rmu.evaluation.statistics import mcnemar
from lowmem_rmu.runs.records import Answer
from tests.records import answer_row

QUESTION = Question("?", ("a", "b", "c", "d"), 0)


def question_set(
    name: str,
    count: int,
    role: Role = "kept",
    group: str | None = None,
    averages: tuple[str, ...] = (),
    **more: Any,
) -> QuestionSet:
    return QuestionSet(name, name, role, group, (QUESTION,) * count, averages=averages, **more)


def answers(**right: str) -> list[dict[str, Any]]:
    """`quiz="110"`: the first two of three questions of `quiz` are right, which is the answer A, and the third is answered B."""
    return [given(name, 0 if mark == "1" else 1) for name, marks in right.items() for mark in marks]


def given(task: str, answer: int | None, logprobs: list[float] | None = None, gold: int = 0) -> Answer:
    return answer_row(task=task, answer=answer, gold=gold, correct=answer == gold, logprobs=logprobs)


def row(
    role: Role,
    base: float,
    unlearned: float | None,
    group: str | None = None,
    questions: int = 1000,
    also: int = 0,
) -> Row:
    """`also` questions are lost and as many gained besides those that the accuracies tell of."""
    alone = Row("quiz", group, False, role, questions, base, 0.01, None, None, None, None)
    if unlearned is None:
        return alone
    change = round(questions * unlearned) - round(questions * base)
    lost, gained = max(0, -change) + also, max(0, change) + also
    return replace(
        alone,
        unlearned=unlearned,
        unlearned_stderr=0.01,
        change=change / questions,
        change_stderr=0.005,
        lost=lost,
        gained=gained,
        p_value=mcnemar(lost, gained),
    )


def letters(base: str, unlearned: str, role: Role = "forgotten", repeat: int = 25) -> list[str]:
    """What the verdict says beyond the grade of a task whose questions were answered so, each of the letters `repeat` times."""
    golds = [number % len(LETTERS) for number in range(len(base) * repeat)]
    sides = [
        [
            given("quiz", LETTERS.index(letter), gold=gold)
            for letter, gold in zip(side * repeat, golds, strict=True)
        ]
        for side in (base, unlearned)
    ]
    rows = compare_tasks([question_set("quiz", len(sides[0]), role)], *sides)
    return verdict(rows, []).sentences[1:]


def wmdp(*sizes: int, roles: tuple[Role, ...] = ("forgotten", "forgotten", "measured")) -> list[QuestionSet]:
    return [
        question_set(name, size, role, averages=("wmdp",))
        for name, size, role in zip(("bio", "cyber", "chem"), sizes, roles, strict=False)
    ]


def right(sets: list[QuestionSet]) -> list[dict[str, Any]]:
    return answers(**{each.name: "1" * len(each.questions) for each in sets})


def text(role: Role, base: float, unlearned: float | None, stderr: float = 0.05) -> TextRow:
    """A text of unknown length, whose loss changed."""
    return TextRow(
        name="storms",
        role=role,
        tokens=0,
        base=base,
        base_stderr=stderr,
        unlearned=unlearned,
        unlearned_stderr=stderr,
        change=None if unlearned is None else unlearned - base,
        change_stderr=stderr,
        base_bits_per_byte=1.0,
        unlearned_bits_per_byte=None,
        kl=None,
        kl_stderr=None,
    )


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
    assert (alone.base, alone.questions, alone.base_letters) == (0.5, 4, (0.5, 0.5, 0.0, 0.0))
    assert (alone.unlearned, alone.unlearned_stderr, alone.change, alone.change_stderr) == (
        None,
        None,
        None,
        None,
    )
    assert (alone.lost, alone.gained, alone.p_value, alone.unlearned_letters) == (None, None, None, None)


def test_only_questions_that_changed_count_for_the_p_value() -> None:
    fell = only_row("1" * 60 + "0" * 40, "1" * 50 + "0" * 48 + "11")
    assert (fell.lost, fell.gained) == (10, 2)
    assert fell.p_value == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert only_row("1" * 600 + "0" * 400, "1" * 590 + "0" * 408 + "11").p_value == fell.p_value


def test_letters_and_confidence_are_of_all_answers_of_a_side() -> None:
    sure, torn = (
        [math.log(each) for each in (0.7, 0.1, 0.1, 0.1)],
        [math.log(each) for each in (0.1, 0.3, 0.3, 0.3)],
    )
    base = [given("quiz", 0, sure), given("quiz", 0, sure), given("quiz", 1, torn), given("quiz", 2, torn)]
    [both] = compare_tasks(
        [question_set("quiz", 4)],
        base,
        [given("quiz", 3), given("quiz", 3), given("quiz", None), given("quiz", 0)],
    )
    assert both.base_letters == (0.5, 0.25, 0.25, 0.0)
    assert both.base_confidence == pytest.approx((0.7 + 0.7 + 0.3 + 0.3) / 4)
    assert both.unlearned_letters == (0.25, 0.0, 0.0, 0.5), (
        "a question without an answer counts among the questions"
    )
    assert both.unlearned_confidence is None
    assert (both.base_balanced, both.unlearned_balanced) == (0.5, 0.25)


def test_tasks_and_groups_have_the_figures_that_the_evaluation_has() -> None:
    sets = [question_set("m_a", 6, group="m"), question_set("m_b", 2, group="m")]
    base = answers(m_a="111000", m_b="01")
    scored = score(sets, base, 1.0)
    group, *subjects = compare_tasks(sets, base, None)
    assert (group.base, group.base_stderr) == (
        scored["groups"]["m"]["accuracy"],
        scored["groups"]["m"]["stderr"],
    )
    assert [each.base_stderr for each in subjects] == [each["stderr"] for each in scored["tasks"].values()]


def test_a_group_comes_before_its_subjects_and_weighs_them_by_questions() -> None:
    sets = [
        question_set("other", 1),
        question_set("m_a", 6, group="m"),
        question_set("m_b", 2, "adjacent", "m"),
    ]
    base, unlearned = answers(other="1", m_a="111111", m_b="00"), answers(other="1", m_a="111000", m_b="00")
    rows = compare_tasks(sets, base, unlearned)
    assert [(each.task, each.group, each.is_group, each.role, each.questions) for each in rows] == [
        ("other", None, False, "kept", 1),
        ("m", None, True, "kept", 8),
        ("m_b", "m", False, "adjacent", 2),
        ("m_a", "m", False, "kept", 6),
    ]
    assert (rows[1].base, rows[1].unlearned) == (6 / 8, 3 / 8)
    assert rows[1].change == pytest.approx(-3 / 8)
    assert (rows[1].lost, rows[1].gained, rows[1].p_value) == (3, 0, 0.25)


def test_adjacent_subjects_come_first_and_the_others_keep_their_order() -> None:
    roles: dict[str, Role] = {"a": "kept", "b": "adjacent", "c": "kept", "d": "adjacent"}
    sets = [question_set(name, 1, role, "m") for name, role in roles.items()]
    assert [each.task for each in compare_tasks(sets, right(sets), None)] == ["m", "b", "d", "a", "c"]


def test_averages_over_subjects_follow_their_task_and_say_nothing_twice() -> None:
    """`whole` is the task once more and `one` a single subject: no rows of their own."""
    within: dict[str, tuple[str, ...]] = {
        "a": ("stem", "whole"),
        "b": ("other", "whole"),
        "c": ("stem", "whole", "one"),
        "d": ("other", "whole"),
    }
    sets = [
        question_set(name, index + 1, group="m", averages=averages)
        for index, (name, averages) in enumerate(within.items())
    ]
    rows = compare_tasks(
        sets, answers(a="1", b="00", c="101", d="0000"), answers(a="0", b="00", c="100", d="0001")
    )
    assert [(each.task, each.group, each.is_group, each.is_average, each.questions) for each in rows] == [
        ("m", None, True, False, 10),
        ("other", "m", True, True, 6),
        ("stem", "m", True, True, 4),
        *((name, "m", False, False, index + 1) for index, name in enumerate(within)),
    ]
    assert (rows[2].base, rows[2].unlearned, rows[2].lost, rows[2].gained) == (0.75, 0.25, 2, 0)


def test_an_average_over_tasks_follows_the_last_of_them() -> None:
    sets = [*wmdp(1, 1), question_set("quiz", 1), *wmdp(1, 1, 2)[2:], question_set("m_a", 1, group="m")]
    assert [each.task for each in compare_tasks(sets, right(sets), None)] == [
        "bio",
        "cyber",
        "quiz",
        "chem",
        "wmdp",
        "m",
        "m_a",
    ]


def test_an_average_over_tasks_needs_two_of_them() -> None:
    assert [each.task for each in compare_tasks(wmdp(3), right(wmdp(3)), None)] == ["bio"]
    subjects = [question_set(name, 1, group="m", averages=("all",)) for name in ("m_a", "m_b")]
    assert [each.task for each in compare_tasks(subjects, right(subjects), None)] == ["m", "m_a", "m_b"]
    both = [*subjects, question_set("quiz", 1, averages=("all",))]
    assert [each.task for each in compare_tasks(both, right(both), None)] == [
        "m",
        "m_a",
        "m_b",
        "quiz",
        "all",
    ]


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (("forgotten", "forgotten", "measured"), "measured"),
        (("forgotten", "forgotten", "adjacent"), "forgotten"),
        (("adjacent", "adjacent", "adjacent"), "adjacent"),
        (("kept", "forgotten", "adjacent"), "measured"),
    ],
)
def test_an_average_expects_what_all_it_sums_up_do(roles: tuple[Role, ...], expected: str) -> None:
    sets = wmdp(1, 1, 1, roles=roles)
    assert compare_tasks(sets, right(sets), None)[-1].role == expected


def test_averages_add_nothing_to_the_verdict() -> None:
    sets = wmdp(100, 100, roles=("forgotten", "forgotten"))
    fell = answers(bio="1000" * 25, cyber="0001" * 25)
    result = verdict(compare_tasks(sets, right(sets), fell), [])
    named = [sentence.partition(":")[0] for sentence in result.sentences]
    assert set(named) == {"bio", "cyber"}


def test_samples_are_told_with_what_they_are_of_and_summed_up() -> None:
    sets = [
        question_set("m_a", 2, group="m", sampled_from=100),
        question_set("m_b", 3, group="m"),
        question_set("quiz", 4),
    ]
    rows = compare_tasks(sets, right(sets), right(sets))
    assert [(each.task, each.questions, each.sampled_from) for each in rows] == [
        ("m", 5, 103),
        ("m_a", 2, 100),
        ("m_b", 3, None),
        ("quiz", 4, None),
    ]
    assert [sentence.partition(": ")[0] for sentence in verdict(rows, []).sentences[:2]] == snapshot(
        ["m (5 of 103 questions)", "quiz"]
    )


def test_a_count_names_what_it_is_a_sample_of() -> None:
    assert (counted(1273, None), counted(100, 14042)) == ("1,273", "100 of 14,042")


@pytest.mark.parametrize(
    ("num_fewshot", "scoring", "words"),
    [
        (0, "letters", snapshot("")),
        (5, "letters", snapshot("5-shot")),
        (0, "cloze", snapshot("cloze")),
        (2, "cloze", snapshot("2-shot cloze")),
        (None, "letters", snapshot("mixed shots")),
        (0, None, snapshot("mixed scoring")),
    ],
)
def test_the_way_of_asking_is_told_where_it_is_unusual(
    num_fewshot: int | None, scoring: str | None, words: str
) -> None:
    assert asked_how(num_fewshot, scoring) == words


def test_rows_know_how_they_were_asked() -> None:
    sets = [
        question_set("bio", 1, averages=("w",), examples=(QUESTION,) * 5),
        question_set("chem", 1, averages=("w",), scoring="cloze"),
    ]
    rows = compare_tasks(sets, right(sets), right(sets))
    assert [(each.num_fewshot, each.scoring) for each in rows] == [(5, "letters"), (0, "cloze"), (None, None)]
    assert [sentence.partition(": ")[0] for sentence in verdict(rows, []).sentences[:2]] == snapshot(
        ["bio (5-shot)", "chem (cloze)"]
    )


@pytest.mark.parametrize(
    ("roles", "expected"), [(("adjacent", "forgotten"), "forgotten"), (("adjacent", "adjacent"), "adjacent")]
)
def test_a_group_has_the_role_of_its_members_that_are_not_adjacent(
    roles: tuple[Role, Role], expected: str
) -> None:
    sets = [question_set(f"m_{index}", 1, role, "m") for index, role in enumerate(roles)]
    assert compare_tasks(sets, answers(m_0="1", m_1="1"), None)[0].role == expected


def test_rows_become_plain_data() -> None:
    plain = asdict(row("kept", 0.5, None))
    assert plain["task"] == "quiz"
    assert plain["change"] is None


@pytest.mark.parametrize(
    ("base", "unlearned", "grade", "sentence"),
    [
        (
            0.60,
            0.26,
            "yes",
            snapshot(
                "quiz: forgotten: 60.0% right as base, 26.0% unlearned, which is no better than guessing (25%)."
            ),
        ),
        (
            0.60,
            0.10,
            "yes",
            snapshot(
                "quiz: forgotten: 60.0% right as base, 10.0% unlearned, which is no better than guessing (25%)."
            ),
        ),
        (
            0.60,
            0.29,
            "yes",
            snapshot(
                "quiz: forgotten: 60.0% right as base, 29.0% unlearned, which is close to guessing (25%)."
            ),
        ),
        (
            0.60,
            0.45,
            "partly",
            snapshot(
                "quiz: partly forgotten: 60.0% right as base, 45.0% unlearned; guessing would give 25%."
            ),
        ),
        (0.60, 0.70, "no", snapshot("quiz: not forgotten: 60.0% right as base, 70.0% unlearned; it rose.")),
        (
            0.26,
            0.25,
            "unknown",
            snapshot("quiz: nothing to forget: 26.0% as base is what guessing gives (25%)."),
        ),
    ],
)
def test_what_should_be_forgotten_is_graded(base: float, unlearned: float, grade: str, sentence: str) -> None:
    result = verdict([row("forgotten", base, unlearned)], [])
    assert (result.forgotten, result.kept) == (grade, "unknown")
    assert result.sentences[0] == sentence


@pytest.mark.parametrize("role", ["kept", "adjacent"])
@pytest.mark.parametrize(
    ("base", "unlearned", "grade", "sentence"),
    [
        (0.60, 0.70, "yes", snapshot("quiz: kept: 60.0% right as base, 70.0% unlearned.")),
        (
            0.60,
            0.585,
            "yes",
            snapshot("quiz: kept but for 1.5 points: 60.0% right as base, 58.5% unlearned."),
        ),
        (
            0.60,
            0.53,
            "partly",
            snapshot(
                "quiz: lost 7.0 points: 60.0% right as base, 53.0% unlearned; the loss lies between 5.6 and 8.8 "
                "points (95%)."
            ),
        ),
        (
            0.60,
            0.40,
            "no",
            snapshot(
                "quiz: lost 20.0 points: 60.0% right as base, 40.0% unlearned; the loss lies between 17.6 and "
                "22.6 points (95%)."
            ),
        ),
    ],
)
def test_what_should_be_kept_is_graded(
    role: Role, base: float, unlearned: float, grade: str, sentence: str
) -> None:
    result = verdict([row(role, base, unlearned)], [])
    assert (result.forgotten, result.kept) == ("unknown", grade)
    assert result.sentences[0] == sentence


@pytest.mark.parametrize(
    ("role", "unlearned", "also", "grade", "sentence"),
    [
        (
            "forgotten",
            0.595,
            10,
            "no",
            snapshot(
                "quiz: not forgotten: 60.0% right as base, 59.5% unlearned; the change is within noise."
            ),
        ),
        (
            "kept",
            0.595,
            10,
            "yes",
            snapshot("quiz: kept: 60.0% right as base, 59.5% unlearned; the change is within noise."),
        ),
        ("kept", 0.60, 0, "yes", snapshot("quiz: kept: 60.0% right as base, 60.0% unlearned; no change.")),
        (
            "adjacent",
            0.61,
            20,
            "yes",
            snapshot("quiz: kept: 60.0% right as base, 61.0% unlearned; the change is within noise."),
        ),
        (
            "measured",
            0.595,
            10,
            "unknown",
            snapshot("quiz: kept: 60.0% right as base, 59.5% unlearned; the change is within noise."),
        ),
    ],
)
def test_what_luck_explains_is_no_change(
    role: Role, unlearned: float, also: int, grade: str, sentence: str
) -> None:
    result = verdict([row(role, 0.6, unlearned, also=also)], [])
    assert getattr(result, "forgotten" if role == "forgotten" else "kept") == grade
    assert result.sentences[0] == sentence


def test_a_loss_that_luck_explains_is_not_kept_for_that() -> None:
    """Five of twelve are lost: McNemar's p is 0.0625, and the true loss may well be half of all."""
    result = verdict([row("kept", 1.0, 7 / 12, questions=12)], [])
    assert result.kept == "inconclusive"
    assert result.sentences == snapshot(
        [
            (
                "quiz: inconclusive: 100.0% right as base, 58.3% unlearned; the loss lies between 7.3 and 68.0 "
                "points (95%), and up to 5 may be lost. About 23 questions would decide it; there were 12."
            ),
        ]
    )


def test_few_questions_are_never_kept_and_a_limit_that_is_met_is_never_decided() -> None:
    assert verdict([row("kept", 1.0, 1.0, questions=30)], []).kept == "inconclusive"
    assert verdict([row("kept", 1.0, 1.0, questions=80)], []).kept == "yes"
    on_the_limit = verdict([row("kept", 0.60, 0.55)], [])
    assert on_the_limit.kept == "inconclusive"
    assert on_the_limit.sentences[0] == snapshot(
        "quiz: inconclusive: 60.0% right as base, 55.0% unlearned; the loss lies between 3.8 and 6.5 points "
        "(95%), and up to 5 may be lost. More questions would hardly decide it: what was measured is the "
        "limit itself."
    )


def test_near_guessing_is_not_forgotten_where_nothing_fell() -> None:
    result = verdict([row("forgotten", 0.5, 0.4, questions=20)], [])
    assert result.forgotten == "inconclusive"
    assert result.sentences[0] == snapshot(
        "quiz: inconclusive: 50.0% right as base, 40.0% unlearned, between 22% and 61% (95%); forgotten "
        "would be a significant fall to at most 31.2%. About 230 questions would decide it; there were 20."
    )


def test_a_base_that_may_only_guess_leaves_it_open_whether_something_was_forgotten() -> None:
    assert verdict([row("forgotten", 0.5, 0.1, questions=10)], []).forgotten == "inconclusive"
    assert verdict([row("forgotten", 0.28, 0.25, questions=200)], []).forgotten == "unknown"


@pytest.mark.parametrize(
    ("base", "limit"), [(1.0, 0.375), (0.75, 0.375), (0.45, 0.30), (0.25, 0.25), (0.1, 0.25)]
)
def test_what_may_be_left_of_a_forgotten_task(base: float, limit: float) -> None:
    """A quarter of what base knew above guessing, and never more than half a guess."""
    assert most_left(base, 0.25) == pytest.approx(limit)


def test_a_significant_fall_to_clearly_above_guessing_is_partly_forgotten_however_many_questions_there_are() -> (
    None
):
    assert verdict([row("forgotten", 1.0, 0.40, questions=10_000)], []).forgotten == "partly"
    assert verdict([row("forgotten", 1.0, 0.40, questions=100)], []).forgotten == "inconclusive"
    assert verdict([row("forgotten", 1.0, 0.31, questions=264)], []).forgotten == "yes"


def subjects(*fallen: int, questions: int = 20) -> dict[str, Any]:
    """The verdict on a task of so many subjects, each of which has lost so many of its questions."""
    sets = [question_set(f"m_{index}", questions, group="m") for index in range(len(fallen))]
    after = answers(
        **{f"m_{index}": "0" * lost + "1" * (questions - lost) for index, lost in enumerate(fallen)}
    )
    return verdict(compare_tasks(sets, right(sets), after), [])


def test_subjects_with_few_questions_each_are_graded_together() -> None:
    result = subjects(1, 0, 0, 2, *[0] * 20)
    assert result.kept == "yes"
    assert result.sentences == snapshot(
        [
            "m: kept: 100.0% right as base, 99.4% unlearned; the change is within noise.",
            (
                "All 480 questions that should stay, together: kept; the loss lies between -0.2 and 1.8 points "
                "(95%), and up to 5 may be lost."
            ),
            "None of 25 tasks and subjects is damaged for itself (Holm's correction).",
        ]
    )


def test_damage_in_a_single_subject_does_not_drown_in_the_others() -> None:
    result = subjects(14, *[0] * 23)
    assert result.kept == "partly"
    assert result.sentences[-1] == snapshot(
        "Damaged among 25 tasks and subjects (Holm's correction): m_0 (lost 70.0 points)."
    )
    assert subjects(6, *[0] * 23).kept == "yes", "p = 0.03 is nothing among 25"


def test_a_small_adjacent_subject_is_not_inconclusive_for_all() -> None:
    sets = [question_set("m_near", 30, "adjacent", "m"), question_set("m_far", 300, group="m")]
    result = verdict(compare_tasks(sets, right(sets), right(sets)), [])
    assert result.kept == "yes"
    assert result.sentences[1] == snapshot(
        "m_near: on its own inconclusive: 100.0% right as base, 100.0% unlearned; the loss lies between "
        "-11.4 and 11.4 points (95%), and up to 5 may be lost. About 150 questions would decide it; there "
        "were 30."
    )


def test_an_average_standard_error_away_is_not_enough_where_few_questions_changed() -> None:
    """Five of five are lost: 2.3 standard errors of the paired differences, yet luck does that one time in sixteen."""
    few = only_row("1" * 80 + "0" * 20, "1" * 75 + "0" * 25)
    assert few.change is not None
    assert few.change_stderr is not None
    assert few.change < -1.96 * few.change_stderr
    assert few.p_value == 2 / 2**5
    assert verdict([few], []).kept == "inconclusive"


def test_one_letter_for_all_is_told_apart_from_guessing() -> None:
    [sentence] = letters("ABCD", "BBBB")
    assert sentence == snapshot(
        "quiz: unlearned answers B to 100% of the questions: it hardly chooses any more, which is not the "
        "same as guessing. With every right letter weighted the same, 25.0% are right (guessing: 25%)."
    )
    assert letters("ABCD", "BBBA")[0] == snapshot(
        "quiz: unlearned answers B to 75% of the questions: it hardly chooses any more, which is not the "
        "same as guessing. With every right letter weighted the same, 25.0% are right (guessing: 25%)."
    )
    assert letters("ABCD", "DCBA") == []


def test_a_preferred_letter_is_not_yet_one_letter_for_all() -> None:
    assert letters("ABCD", "BBAC") == []
    assert letters("ABCD", "BBCC") == [], "half is not more than half"


def test_few_questions_do_not_show_a_preferred_letter() -> None:
    """Who guesses six questions gives one letter to more than half of them about one time in seven."""
    assert letters("ABCDAB", "BBBBAC", repeat=1) == []
    assert letters("ABCDAB", "BBBBAC", repeat=4) == []
    assert len(letters("ABCDAB", "BBBBAC", repeat=10)) == 1


def test_a_letter_that_base_gives_too_is_no_news() -> None:
    assert letters("BBBA", "BBBB") == []
    assert len(letters("BBBA", "CCCC")) == 1


@pytest.mark.parametrize("role", ["kept", "adjacent", "measured"])
def test_letters_are_told_of_what_is_to_be_forgotten_only(role: Role) -> None:
    assert letters("ABCD", "BBBB", role) == []


def test_letters_of_an_unmeasured_side_are_no_matter() -> None:
    alone = replace(row("forgotten", 0.6, 0.25), base_letters=(0.25,) * 4)
    assert len(verdict([alone], []).sentences) == 1


def test_few_questions_make_guessing_a_wide_range() -> None:
    """Of 16 questions 45% may be guessed; of 1,000 it is not. The first says nothing, rather than yes."""
    assert verdict([row("forgotten", 0.9, 0.45, questions=16)], []).forgotten == "inconclusive"
    assert verdict([row("forgotten", 0.9, 0.45, questions=1000)], []).forgotten == "partly"


def test_measured_tasks_are_told_but_do_not_count() -> None:
    result = verdict([row("measured", 0.6, 0.2)], [])
    assert (result.forgotten, result.kept) == ("unknown", "unknown")
    assert result.sentences[0] == snapshot(
        "quiz: lost 40.0 points: 60.0% right as base, 20.0% unlearned; the loss lies between 37.0 and 43.1 "
        "points (95%)."
    )


def test_a_group_speaks_for_its_subjects_except_the_adjacent_ones() -> None:
    sentences = verdict([row("kept", 0.6, 0.2, group="m"), row("kept", 0.6, 0.6, group="m")], []).sentences
    assert not [sentence for sentence in sentences if sentence.startswith("quiz: ")]
    assert verdict([row("adjacent", 0.6, 0.2, group="m")], []).kept == "no"


def test_what_was_not_measured_afterwards_is_left_out() -> None:
    nothing = Verdict("unknown", "unknown", [])
    assert verdict([row("forgotten", 0.6, None)], [text("kept", 3.0, None)]) == nothing


@pytest.mark.parametrize(
    ("roles_and_after", "forgotten", "kept"),
    [
        ([("forgotten", 0.25), ("forgotten", 0.25), ("kept", 0.6)], "yes", "yes"),
        ([("forgotten", 0.25), ("forgotten", 0.6), ("kept", 0.6)], "partly", "yes"),
        ([("forgotten", 0.6), ("kept", 0.6), ("adjacent", 0.2)], "no", "partly"),
        ([("forgotten", 0.6), ("kept", 0.4), ("adjacent", 0.2)], "no", "no"),
    ],
)
def test_tasks_that_differ_make_the_whole_partly(
    roles_and_after: list[tuple[Role, float]], forgotten: str, kept: str
) -> None:
    result = verdict([row(role, 0.6, after) for role, after in roles_and_after], [])
    assert (result.forgotten, result.kept) == (forgotten, kept)


def test_a_task_with_nothing_to_forget_does_not_spoil_the_others() -> None:
    assert verdict([row("forgotten", 0.25, 0.25), row("forgotten", 0.6, 0.25)], []).forgotten == "yes"


@pytest.mark.parametrize(
    ("role", "after", "grade", "sentence"),
    [
        (
            "forgotten",
            3.6,
            "yes",
            snapshot(
                "storms (held-out text): the model no longer follows it: 3.00 nats/token as base, 3.60 "
                "unlearned."
            ),
        ),
        (
            "forgotten",
            3.2,
            "partly",
            snapshot(
                "storms (held-out text): it is still read nearly as well: 3.00 nats/token as base, 3.20 "
                "unlearned."
            ),
        ),
        (
            "forgotten",
            3.05,
            "no",
            snapshot(
                "storms (held-out text): it is still read nearly as well: 3.00 nats/token as base, 3.05 "
                "unlearned."
            ),
        ),
        (
            "forgotten",
            2.0,
            "no",
            snapshot(
                "storms (held-out text): it is still read nearly as well: 3.00 nats/token as base, 2.00 "
                "unlearned."
            ),
        ),
        (
            "forgotten",
            3.55,
            "inconclusive",
            snapshot(
                "storms (held-out text): inconclusive: 3.00 nats/token as base, 3.55 unlearned, a rise of 0.45 "
                "to 0.65 (95%); the limit is 0.5."
            ),
        ),
        (
            "kept",
            3.1,
            "yes",
            snapshot("storms (held-out text): kept: 3.00 nats/token as base, 3.10 unlearned."),
        ),
        (
            "kept",
            3.2,
            "inconclusive",
            snapshot(
                "storms (held-out text): inconclusive: 3.00 nats/token as base, 3.20 unlearned, a rise of 0.10 "
                "to 0.30 (95%); the limit is 0.25."
            ),
        ),
        (
            "kept",
            2.0,
            "yes",
            snapshot("storms (held-out text): kept: 3.00 nats/token as base, 2.00 unlearned."),
        ),
        (
            "kept",
            3.4,
            "partly",
            snapshot("storms (held-out text): damaged: 3.00 nats/token as base, 3.40 unlearned."),
        ),
        (
            "kept",
            4.0,
            "no",
            snapshot("storms (held-out text): damaged: 3.00 nats/token as base, 4.00 unlearned."),
        ),
    ],
)
def test_held_out_texts_are_graded_by_their_loss(role: Role, after: float, grade: str, sentence: str) -> None:
    result = verdict([], [text(role, 3.0, after)])
    assert getattr(result, role) == grade
    assert result.sentences[0] == sentence


def test_few_sequences_leave_a_text_inconclusive() -> None:
    assert verdict([], [replace(text("kept", 3.0, 3.0, 0.0), sequences=1)]).kept == "inconclusive"
    assert verdict([], [replace(text("kept", 3.0, 3.14, 0.05), sequences=1000)]).kept == "yes"
    few = verdict([], [replace(text("kept", 3.0, 3.14, 0.05), sequences=6, tokens=600)])
    assert few.kept == "inconclusive", "Student's t has wider intervals"
    assert few.sentences[0] == snapshot(
        "storms (held-out text): inconclusive: 3.00 nats/token as base, 3.14 unlearned, a rise of 0.01 to "
        "0.27 (95%); the limit is 0.25. About 980 tokens would decide it; there were 600."
    )


@pytest.mark.parametrize(
    ("rises", "whole"),
    [
        ((0.9, 0.9), "yes"),
        ((0.9, 0.55), "inconclusive"),
        ((0.9, 0.2), "partly"),
        ((0.9, 0.2, 0.55), "partly"),
        ((0.9, 0.0), "partly"),
        ((0.0, 0.55), "no"),
        ((0.2, 0.55), "partly"),
    ],
)
def test_what_is_inconclusive_never_makes_a_yes(rises: tuple[float, ...], whole: str) -> None:
    assert verdict([], [text("forgotten", 3.0, 3.0 + rise) for rise in rises]).forgotten == whole


def test_text_losses_of_the_same_sequences_are_paired() -> None:
    """What differs between sequences, on both sides alike, is no noise of their change."""

    def side(shift: float) -> dict[str, Any]:
        sums = [100.0 + 50 * number + shift * 10 for number in range(8)]
        return {
            "loss": sum(sums) / 80,
            "stderr": 1.0,
            "tokens": 80,
            "bits_per_byte": 1.0,
            "sequence_losses": sums,
            "sequence_tokens": [10] * 8,
        }

    [both] = compare_texts({"storms": "forgotten"}, {"storms": side(0.0)}, {"storms": side(0.5)})
    assert (both.change, both.change_stderr) == (pytest.approx(0.5), pytest.approx(0.0))


def test_text_losses_are_subtracted_and_their_errors_added_in_squares() -> None:
    base = {"storms": {"loss": 3.0, "stderr": 0.03, "tokens": 100, "bits_per_byte": 1.5}}
    after = {"storms": {"loss": 3.5, "stderr": 0.04, "tokens": 100, "bits_per_byte": 1.75}}
    [both] = compare_texts({"storms": "forgotten"}, base, after)
    assert both.change == pytest.approx(0.5)
    assert both.change_stderr == pytest.approx(0.05)
    assert (both.role, both.tokens, both.base, both.unlearned) == ("forgotten", 100, 3.0, 3.5)
    assert (both.base_bits_per_byte, both.unlearned_bits_per_byte, both.kl, both.kl_stderr) == (
        1.5,
        1.75,
        None,
        None,
    )
    [alone] = compare_texts({"storms": "forgotten"}, base, None)
    assert (alone.base, alone.unlearned, alone.change, alone.change_stderr) == (
        3.0,
        None,
        None,
        None,
    )
    assert (alone.base_bits_per_byte, alone.unlearned_bits_per_byte, alone.kl) == (1.5, None, None)


def test_the_divergence_is_told_where_it_was_measured() -> None:
    before = {"loss": 3.0, "stderr": 0.03, "tokens": 100, "bits_per_byte": 1.5}
    [both] = compare_texts(
        {"retain": "kept"}, {"retain": before}, {"retain": before | {"kl": 0.0, "kl_stderr": 0.001}}
    )
    assert (both.kl, both.kl_stderr) == (0.0, 0.001)
