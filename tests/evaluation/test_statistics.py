"""Intervals and tests against exact enumeration, hand calculation and published values."""

import math
import time
from collections.abc import Iterator

import pytest

from lowmem_rmu.evaluation.statistics import (
    NOISE,
    change_bounds,
    change_interval,
    change_score,
    family_noise,
    holm,
    mcnemar,
    questions_needed,
    share_bounds,
    share_score,
    student,
)


def outcomes(n: int, lose: float, gain: float) -> Iterator[tuple[int, int, float]]:
    """Every number of lost and gained questions of n, with its probability."""
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            ways = math.comb(n, lost) * math.comb(n - lost, gained)
            yield lost, gained, ways * lose**lost * gain**gained * (1 - lose - gain) ** (n - lost - gained)


@pytest.mark.parametrize(
    ("lost", "gained", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (6, 0, 2 / 2**6),
        (1, 9, 2 * (1 + 10) / 2**10),
        (9, 1, 2 * (1 + 10) / 2**10),
        (121, 59, 4.434e-06),
        (40, 20, 0.013490),
    ],
)
def test_mcnemar_is_exact(lost: int, gained: int, p_value: float) -> None:
    """The last two as SciPy's `binomtest(min(lost, gained), lost + gained)` has them."""
    assert mcnemar(lost, gained) == pytest.approx(p_value, rel=1e-3)


def test_mcnemar_takes_thousands_of_questions_without_overflow_and_at_once() -> None:
    """The normal approximation with continuity correction is close there: z = 199 / sqrt(9800)."""
    began = time.monotonic()
    assert mcnemar(5000, 4800) == pytest.approx(math.erfc(199 / math.sqrt(9800) / math.sqrt(2)), rel=1e-3)
    assert mcnemar(7000, 7000) == 1.0
    assert mcnemar(14000, 0) == 0.0
    assert time.monotonic() - began < 5


def test_the_interval_of_a_change_by_hand() -> None:
    assert change_interval(0, 0, 18) == pytest.approx((-0.098, 0.098))  # 1.96 * sqrt(1 / 20 / 20)
    low, high = change_interval(lost=30, gained=10, questions=98)
    assert (low, high) == pytest.approx(
        (-0.2 - 1.96 * math.sqrt((0.41 - 0.04) / 100), -0.2 + 1.96 * math.sqrt((0.41 - 0.04) / 100))
    )


@pytest.mark.parametrize(("lose", "gain"), [(0.02, 0.02), (0.1, 0.1), (0.25, 0.05), (0.05, 0.25), (0.0, 0.5)])
def test_the_interval_of_a_change_holds_the_true_change_as_often_as_it_says(lose: float, gain: float) -> None:
    """Over every outcome that 40 questions can have, each by its probability."""
    covered, n = 0.0, 40
    for lost in range(n + 1):
        for gained in range(n + 1 - lost):
            low, high = change_interval(lost, gained, n)
            ways = math.comb(n, lost) * math.comb(n - lost, gained)
            covered += (
                ways
                * lose**lost
                * gain**gained
                * (1 - lose - gain) ** (n - lost - gained)
                * (low <= gain - lose <= high)
            )
    assert covered > 0.93


@pytest.mark.parametrize("n", [20, 40, 60])
@pytest.mark.parametrize(("lose", "gain"), [(0.05, 0.0), (0.06, 0.01), (0.1, 0.05), (0.2, 0.15), (0.3, 0.05)])
def test_the_score_interval_rarely_lies_above_the_true_change(n: int, lose: float, gain: float) -> None:
    """One side, 2.5%: what decides on *kept*. Agresti and Min's interval errs in 14% of cases where none of 40 questions was lost."""
    errs = sum(
        chance
        for lost, gained, chance in outcomes(n, lose, gain)
        if change_score(lost, gained, n, gain - lose) > NOISE
    )
    assert errs < 0.031


def test_the_score_interval_is_what_its_test_does_not_reject() -> None:
    low, high = change_bounds(10, 3, 100)
    assert [change_score(10, 3, 100, end) for end in (high, low)] == [
        pytest.approx(-NOISE, abs=1e-6),
        pytest.approx(NOISE, abs=1e-6),
    ]
    assert change_bounds(0, 0, 38) == pytest.approx((-0.0918, 0.0918), abs=1e-4)  # z^2 / (n + z^2)
    assert change_bounds(12, 0, 12)[0] == pytest.approx(-1.0)


def test_wilsons_interval() -> None:
    """15 of 148: 0.0624 to 0.1605 (Newcombe 1998, Statistics in Medicine 17:857-872)."""
    assert share_bounds(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-4)
    assert share_bounds(0, 20)[0] == 0.0
    assert share_score(15, 148, share_bounds(15, 148)[1]) == pytest.approx(-NOISE)


def test_holm_rejects_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert holm([0.013, 0.03, 0.02, 0.9]) == [False] * 4
    assert holm([]) == []


def test_a_family_of_one_has_the_usual_interval() -> None:
    assert family_noise(1) == pytest.approx(NOISE, abs=1e-3)
    assert family_noise(6) == pytest.approx(2.638, abs=1e-3)
    assert student(9, family_noise(6)) == pytest.approx(3.3637, rel=0.01)


def test_the_number_of_questions_that_would_decide() -> None:
    """Four times the questions double the statistic; 2.8 standard errors are wanted: 1.96 and 0.84 for a power of 80%."""
    assert questions_needed(100, 1.4) == 410
    assert questions_needed(100, -1.4) == 410
    assert questions_needed(30, change_score(0, 0, 30, -0.05)) == 150
    assert questions_needed(100, 0.0) is None


@pytest.mark.parametrize(("freedom", "quantile"), [(4, 2.776), (9, 2.262), (30, 2.042), (1000, 1.962)])
def test_students_quantiles(freedom: int, quantile: float) -> None:
    assert student(freedom) == pytest.approx(quantile, rel=0.01)
