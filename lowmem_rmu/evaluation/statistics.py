"""Tests and intervals of shares: what so many questions can tell, and how many more it would take."""

import math
from collections.abc import Sequence
from statistics import NormalDist

LUCK = 0.05
"""Level of every test: a change is significant where chance alone gives one like it less often than this."""
NOISE = 1.96
"""Standard errors to either side of an estimate that make its 95% interval."""
POWER = 0.8
"""Probability with which a planned number of questions decides what is true."""
MANY = 1_000_000
"""Questions that nobody asks: a number needed beyond it is not told."""


def mcnemar(lost: int, gained: int) -> float:
    """Give the two-sided p-value of McNemar's exact test: fair coins, one per question that changed, falling
    so unevenly or more so.
    """
    changed = lost + gained
    # The ways to choose none of them, then one, two, ...: whole numbers, so that thousands of them are exact
    # too.
    ways = together = 1
    for count in range(min(lost, gained)):
        ways = ways * (changed - count) // (count + 1)
        together += ways
    return min(1.0, 2 * together / 2**changed)


def change_interval(lost: int, gained: int, questions: int) -> tuple[float, float]:
    """Give the 95% interval of a change of accuracy, as shares, by the paired questions that changed.

    Agresti and Min (2005, Statistics in Medicine 24:729-740): Wald's interval with half a question more of
    each of the four kinds, so that few questions without any change are no proof that nothing changes.
    """
    n = questions + 2
    change = (gained - lost) / n
    stderr = math.sqrt(((gained + lost + 1) / n - change**2) / n)
    return change - NOISE * stderr, change + NOISE * stderr


def change_score(lost: int, gained: int, questions: int, change: float) -> float:
    """Give Tango's score statistic, standard normal where the true change of accuracy is `change`.

    Tango (1998, Statistics in Medicine 17:891-908). Its variance is that of the hypothesis, so it holds its
    level where nothing or next to nothing changed too: 40 questions of which none was lost do not show that
    fewer than 5% of all are lost.
    """
    # The share of lost questions that is most likely if the true change is `change`: the larger root of a x^2
    # + b x + c.
    a = 2 * questions
    b = -(lost + gained) + (2 * questions - gained + lost) * change
    c = -lost * change * (1 - change)
    share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = questions * (2 * share + change * (1 - change))
    surplus = gained - lost - questions * change
    if variance > 0:
        return surplus / math.sqrt(variance)
    return math.copysign(math.inf, surplus) if surplus else 0.0


def change_bounds(lost: int, gained: int, questions: int) -> tuple[float, float]:
    """Give the 95% score interval of a change of accuracy: the changes that Tango's test does not reject, by
    bisection.
    """
    measured = (gained - lost) / questions
    bounds = []
    for end in (-1.0, 1.0):
        inside, outside = measured, end
        for _ in range(40):
            middle = (inside + outside) / 2
            if abs(change_score(lost, gained, questions, middle)) <= NOISE:
                inside = middle
            else:
                outside = middle
        bounds.append(inside)
    return bounds[0], bounds[1]


def share_score(right: int, questions: int, share: float) -> float:
    """Give the score statistic of a share, standard normal where the true one is `share`."""
    return (right - questions * share) / math.sqrt(questions * share * (1 - share))


def share_bounds(right: int, questions: int) -> tuple[float, float]:
    """Give Wilson's 95% interval of a share (1927, JASA 22:209-212)."""
    n, z = questions + NOISE**2, NOISE
    middle = (right + z**2 / 2) / n
    half = z / n * math.sqrt(right * (questions - right) / questions + z**2 / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def by_luck(share: float, questions: int) -> float:
    """Give the highest share that luck makes of a true one (97.5%): a higher one that is measured is really
    higher.
    """
    return share + NOISE * math.sqrt(share * (1 - share) / questions)


def ratio_of_means(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Give the mean per counted unit of sums over groups of unequal size, with its standard error (that of
    the ratio of two means).
    """
    total, n = sum(counts), len(counts)
    mean = sum(sums) / total
    residuals = sum((each - mean * count) ** 2 for each, count in zip(sums, counts, strict=True))
    return mean, math.sqrt(residuals * n / (n - 1)) / total if n > 1 else 0.0


def student(freedom: float, z: float = NOISE) -> float:
    """Give the quantile of Student's t that belongs to `z` of the normal distribution, within 1% from 4
    degrees of freedom on.

    Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5).
    """
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def family_noise(members: int) -> float:
    """Give what NOISE is for each of several tests so that all of them together err as rarely as one
    (Bonferroni).
    """
    return NormalDist().inv_cdf(1 - LUCK / 2 / members)


def holm(p_values: Sequence[float]) -> list[bool]:
    """Tell which of several p-values are significant together, so that chance makes any of them so less often
    than LUCK (Holm 1979).
    """
    significant = [False] * len(p_values)
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] >= LUCK / (len(p_values) - place):
            break
        significant[index] = True
    return significant


def questions_needed(questions: int, score: float) -> int | None:
    """Estimate how many questions would decide what `questions` with this score statistic leave open, if the
    rates stay as measured.

    The statistic grows with the root of the number; it must exceed NOISE with probability POWER. Two
    significant digits, rounded up; None beyond MANY, where the measured rate lies at the limit itself.
    """
    wanted = NOISE + NormalDist().inv_cdf(POWER)
    if abs(score) * math.sqrt(MANY / questions) <= wanted:
        return None
    return rounded_up(questions * (wanted / score) ** 2)


def rounded_up(number: float) -> int:
    """Give a whole number of two significant digits, not below `number`."""
    unit = 10 ** max(0, math.floor(math.log10(max(1.0, number))) - 1)
    return math.ceil(number / unit) * unit
