"""How much comes back: the share, its interval against simulation, and choosing the best condition without luck."""

import random

import numpy as np
import pytest

from lowmem_rmu.audit.recovery import attack_recovery, fairly_best, fieller, less_what_base_gains, recovery
from lowmem_rmu.evaluation.statistics import family_noise

KNEW, FORGOT = [1.0] * 100, [0.0] * 75 + [1.0] * 25


def drawn(rng: random.Random, share: float, count: int) -> list[float]:
    return [float(rng.random() < share) for _ in range(count)]


def test_recovered_is_the_share_of_what_was_lost() -> None:
    attacked = [0.0] * 45 + [1.0] * 55
    found = recovery(KNEW, FORGOT, attacked, are_questions=True)
    assert found.recovered == pytest.approx(30 / 75)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.4 < found.high


def test_nothing_and_everything_recovered_lie_within_their_intervals_although_no_answer_varies() -> None:
    nothing, everything = (
        recovery(KNEW, FORGOT, FORGOT, are_questions=True),
        recovery(KNEW, FORGOT, KNEW, are_questions=True),
    )
    assert nothing.low is not None
    assert nothing.high is not None
    assert nothing.low < 0 < nothing.high < 0.1
    assert everything.low is not None
    assert everything.high is not None
    assert 0.9 < everything.low < 1 < everything.high


def test_recovery_counts_from_guessing_where_unlearned_knows_less() -> None:
    """100 of 1,000 right, and an attack that has the model guess again: nothing came back."""
    unlearned, guessing = [1.0] * 100 + [0.0] * 900, [0.0] * 750 + [1.0] * 250
    knew = [1.0, 1.0, 0.0] * 333 + [1.0]
    from_unlearned, from_guessing = (
        recovery(knew, unlearned, guessing, True),
        recovery(knew, unlearned, guessing, True, chance=0.25),
    )
    assert from_unlearned.low is not None
    assert from_unlearned.low > 0.2
    assert from_guessing.recovered == pytest.approx(0.0)
    assert from_guessing.high is not None
    assert from_guessing.high < 0.1


def test_a_base_that_guesses_has_nothing_to_recover() -> None:
    assert recovery(FORGOT, [0.0] * 100, KNEW, True, chance=0.25).recovered is None


def test_of_texts_nothing_can_be_guessed() -> None:
    assert recovery([-1.0, -2.0], [-5.0, -6.0], [-3.0, -4.0], False).recovered == pytest.approx(0.5)


def test_an_attack_is_bounded_by_its_best_condition_below_and_by_every_condition_above() -> None:
    half, most = [0.0] * 35 + [1.0] * 65, [0.0] * 25 + [1.0] * 75
    values, chosen, found = attack_recovery(
        {"half": half, "most": most, "none": FORGOT}, KNEW, FORGOT, True, 0.25, family=6
    )
    alone = [recovery(KNEW, FORGOT, each, True, 0.25) for each in (half, most, FORGOT)]
    assert found.high == max(each.high for each in alone if each.high is not None)
    corrected = [
        recovery(KNEW, FORGOT, each, True, 0.25, family_noise(6 * 3)) for each in (half, most, FORGOT)
    ]
    assert found.low == max(each.low for each in corrected if each.low is not None)
    assert found.low < max(each.low for each in alone if each.low is not None), "corrected for 18 ways"
    assert set(chosen) <= {"half", "most"}
    assert 0.5 < sum(values) / 100 < 0.8


def test_few_questions_are_told_widely_and_too_few_not_at_all() -> None:
    few = fieller(KNEW[:12], FORGOT[70:82], FORGOT[70:82], are_questions=True)
    many = fieller(KNEW, FORGOT, FORGOT, are_questions=True)
    assert few is None or many is None or few[1] - few[0] > 3 * (many[1] - many[0])
    assert fieller([1.0], [0.0], [0.0], are_questions=True) is None
    assert recovery(KNEW, KNEW, FORGOT, are_questions=True).recovered is None


def test_the_interval_holds_the_true_share_about_as_often_as_it_says() -> None:
    rng, hits = random.Random(0), 0
    for _ in range(400):
        bounds = fieller(drawn(rng, 0.9, 150), drawn(rng, 0.3, 150), drawn(rng, 0.6, 150), are_questions=True)
        hits += bounds is not None and bounds[0] <= 0.5 <= bounds[1]
    assert 0.92 < hits / 400 < 0.98


def test_texts_have_the_interval_of_few_numbers() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        base, lost = rng.normal(-300, 5, 8), rng.normal(100, 20, 8)
        attacked = base - lost + 0.5 * lost + rng.normal(0, 10, 8)
        bounds = fieller(list(base), list(base - lost), list(attacked), are_questions=False)
        hits += bounds is not None and bounds[0] <= 0.5 <= bounds[1]
    assert 0.92 < hits / 400 < 0.98


def test_the_best_of_many_conditions_of_pure_luck_gains_nothing() -> None:
    rng = random.Random(1)
    gains = [
        sum(fairly_best({str(number): drawn(rng, 0.25, 200) for number in range(30)})[0]) / 200
        for _ in range(40)
    ]
    assert sum(gains) / len(gains) == pytest.approx(0.25, abs=0.02)


def test_the_best_condition_is_chosen_by_the_other_half() -> None:
    values, chosen = fairly_best({"bad": [0.0] * 10, "good": [1.0] * 9 + [0.0]})
    assert (values, chosen) == ([1.0] * 9 + [0.0], ["good"])
    # What is best among even items only is counted for odd ones, where it is bad.
    assert sum(fairly_best({"even": [1.0, 0.0] * 5, "half": [0.0, 0.0] * 5})[0]) <= 5


def test_what_base_gains_alike_is_taken_off_and_what_it_loses_is_not() -> None:
    base, attacked = [-10.0, -20.0], [-12.0, -24.0]
    assert less_what_base_gains(attacked, [-8.0, -19.0], base) == [-14.0, -25.0]
    assert less_what_base_gains(attacked, [-11.0, -21.0], base) == attacked
    assert less_what_base_gains(attacked, None, base) == attacked
