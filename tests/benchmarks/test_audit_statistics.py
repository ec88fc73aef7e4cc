"""Error rates and power of the verdicts on drawn answers, seeded: small versions of the tables in docs/verdicts.md."""

import pytest

from benchmarks.audit_statistics import (
    ATTACKS,
    Audited,
    Changes,
    audit_rates,
    finding_after,
    finding_before,
    forgotten_after,
    kept_after,
    kept_before,
    main,
    task_rate,
)
from lowmem_rmu.audit.power import questions_for_gone

AT_THE_LIMIT = 0.28 + 0.25 * (0.65 - 0.28)


def test_a_loss_of_ten_points_is_not_kept() -> None:
    small = Changes(30, 0.6, 0.12 / 0.6, 0.02 / 0.4)
    assert task_rate(small, "kept", kept_before, 500) > 0.8
    assert task_rate(small, "kept", kept_after, 500) < 0.02


@pytest.mark.parametrize("questions", [75, 150, 400])
def test_a_loss_of_what_is_tolerated_is_rarely_kept(questions: int) -> None:
    assert task_rate(Changes(questions, 1.0, 0.05, 0.0), "kept", kept_after, 2000) < 0.035


def test_what_lost_nothing_is_kept_once_there_are_questions_enough() -> None:
    assert task_rate(Changes(500, 0.6, 0.02 / 0.6, 0.02 / 0.4), "kept", kept_after, 300) > 0.95


def test_forgotten_is_rarely_wrong_and_found_where_it_is_true() -> None:
    assert task_rate(Changes(100, 1.0, 0.625, 0.0), "forgotten", forgotten_after, 1000) < 0.05
    assert task_rate(Changes(20, 0.5, 0.2, 0.0), "forgotten", forgotten_after, 1000) < 0.01
    assert task_rate(Changes(264, 1.0, 0.75, 0.0), "forgotten", forgotten_after, 300) > 0.95


def test_attacks_at_the_limit_make_nothing_hidden() -> None:
    at_the_limit = Audited(500, 0.65, 0.28, AT_THE_LIMIT, ways=1)
    assert audit_rates(at_the_limit, finding_before, 300).hidden > 0.07
    assert audit_rates(at_the_limit, finding_after, 300).hidden < 0.05


def test_many_ways_at_the_limit_make_nothing_hidden() -> None:
    """Where both halves of the questions choose the same way by luck, that luck counts in both of them."""
    at_the_limit = Audited(300, 0.65, 0.28, AT_THE_LIMIT, ways=10)
    assert audit_rates(at_the_limit, finding_before, 40).hidden > 0.1
    assert audit_rates(at_the_limit, finding_after, 40).hidden < 0.05


def test_attacks_at_the_limit_are_not_gone() -> None:
    assert audit_rates(Audited(500, 0.65, 0.28, AT_THE_LIMIT, ways=2), finding_after, 100).gone < 0.02


def test_guessing_again_is_not_recovering() -> None:
    guessing = Audited(1000, 0.5, 0.10, 0.25, ways=1)
    assert audit_rates(guessing, finding_before, 20).hidden > 0.5
    assert audit_rates(guessing, finding_after, 40).hidden == 0.0


def test_the_interval_of_the_best_of_near_equals_holds_the_truth() -> None:
    half = Audited(200, 1.0, 0.27, 0.635, ways=20, spread=0.15)
    before, after = (audit_rates(half, judge, 20) for judge in (finding_before, finding_after))
    assert before.below > 0.05
    assert after.below < 0.03
    assert after.above < 0.03


def test_what_is_gone_is_found_with_the_power_that_was_planned() -> None:
    needed = questions_for_gone(0.65, 0.28, 0.8)
    assert needed is not None
    gone = audit_rates(Audited(needed, 0.65, 0.28, 0.28), finding_after, 30).gone
    assert gone > 0.6, f"80% were planned for {ATTACKS} attacks"


def test_the_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(draws=1, task_draws=2)
    said = capsys.readouterr().out
    assert said.count("| --- |") >= 3
    assert "| 65% / 28% | 780 |" in said
