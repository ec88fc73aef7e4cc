"""How many questions an audit needs: the power by calculation, against drawn audits in `tests/benchmarks/test_audit_statistics.py`."""

import math

import pytest
from inline_snapshot import snapshot

from lowmem_rmu.audit.power import CONDITIONS, Power, all_below, power_of_gone, questions_for_gone


def test_the_largest_of_independent_numbers() -> None:
    assert all_below(0.0, 1.0, 0.0, 1) == pytest.approx(0.5, abs=1e-6)
    assert all_below(0.0, 1.0, 0.0, 3) == pytest.approx(0.5**3, abs=1e-6)
    # Their sum has a variance of 2.
    assert all_below(1.0, 1.0, 1.0, 1) == pytest.approx(0.5 * math.erfc(-1 / 2), abs=1e-4)
    assert all_below(0.0, 0.01, 1.0, 50) == pytest.approx(0.5, abs=0.02), (
        "what they share, they pass or fail together"
    )


def test_the_number_planned_has_the_power_asked_for() -> None:
    for base, unlearned in ((1.0, 0.27), (0.65, 0.28), (0.65, 0.10)):
        needed = questions_for_gone(base, unlearned, 0.8)
        assert needed is not None
        assert 0.8 <= power_of_gone(base, unlearned, needed) < 0.87
        assert power_of_gone(base, unlearned, needed // 2) < 0.5


def test_more_is_needed_where_less_was_known_and_for_more_power() -> None:
    assert questions_for_gone(0.25, 0.25) is None
    few, more, most = (questions_for_gone(base, 0.25, 0.8) or 0 for base in (1.0, 0.65, 0.45))
    assert few < more < most
    assert (questions_for_gone(0.65, 0.25, 0.95) or 0) > more


def test_below_guessing_is_planned_as_guessing() -> None:
    assert questions_for_gone(0.65, 0.10) == questions_for_gone(0.65, 0.25)


def test_twice_as_many_ways_need_a_little_more() -> None:
    assert power_of_gone(0.65, 0.28, 780, 2 * CONDITIONS) > 0.7


def test_the_words_of_a_plan() -> None:
    assert Power(200, 0.65, 0.28).words == snapshot(
        "200 questions: if it is gone, the audit says so with a probability of about 1%. For 80% it takes "
        "about 780 questions (--limit, per task)."
    )
    assert Power(200, 1.0, 0.27).words == snapshot(
        "200 questions: if it is gone, the audit says so with a probability of about 93%."
    )
    assert Power(100, 0.25, 0.25).words == snapshot(
        "100 questions: if it is gone, the audit says so with a probability of about 0%. No number of "
        "questions is enough, for base is hardly better than guessing."
    )
