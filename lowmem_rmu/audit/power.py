"""How many questions an audit needs: the probability that a model that knows nothing any more is found to be
*gone*.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from lowmem_rmu.evaluation.compare import TOLERATED
from lowmem_rmu.evaluation.multiple_choice import CHANCE
from lowmem_rmu.evaluation.statistics import MANY, NOISE, POWER, rounded_up

CONDITIONS = 60
"""Ways that all attacks together try, about. Each must stay below the limit; twice as many need some 10% more
questions."""


@dataclass(frozen=True)
class Power:
    """What so many questions can tell of a model with these accuracies, as shares."""

    questions: int
    base: float
    unlearned: float

    @property
    def of_gone(self) -> float:
        """Probability of *gone*, if no attack brings back anything."""
        return power_of_gone(self.base, self.unlearned, self.questions)

    @property
    def needed(self) -> int | None:
        """Questions for a power of POWER; None where no number is enough."""
        return questions_for_gone(self.base, self.unlearned)

    @property
    def words(self) -> str:
        if self.needed is None:
            more = "No number of questions is enough, for base is hardly better than guessing."
        elif self.needed <= self.questions:
            more = ""
        else:
            more = f"For {POWER:.0%} it takes about {self.needed:,} questions (--limit, per task)."
        probability = f"if it is gone, the audit says so with a probability of about {self.of_gone:.0%}"
        return f"{self.questions:,} questions: {probability}. {more}".strip()


def power_of_gone(
    base: float, unlearned: float, questions: int, conditions: int = CONDITIONS, chance: float = CHANCE
) -> float:
    """Estimate the probability that every condition's upper bound lies below TOLERATED, if all of them answer
    at the floor by chance alone.

    The conditions' own luck is independent of each other, which is the worst case; the luck of base and of
    unlearned is shared by them. A condition passes by its recovery from unlearned or by that from chance: the
    better of the two counts.
    """
    floor = max(unlearned, chance)
    own = floor * (1 - floor)
    skewness = (1 - 2 * floor) / math.sqrt(questions * own)
    # What `fieller` adds, so that no answer is taken for certain.
    half_answers = (0.5 - floor) * 2 / (questions + 2)
    powers = []
    for start, variance in ((unlearned, unlearned * (1 - unlearned)), (chance, 0.0)):
        # Passed where mean(attacked - start - limit * (base - start)) lies NOISE standard errors below 0. A
        # model
        # that is just about to pass has more right than the floor, and so a wider interval.
        gap = TOLERATED * (base - start) - (floor - start) - half_answers
        shared = (1 - TOLERATED) ** 2 * variance + TOLERATED**2 * base * (1 - base)
        above = 0.0
        for _ in range(5):
            highest = min(max(floor + above, floor), 0.5)
            above = gap - NOISE * math.sqrt((highest * (1 - highest) + shared) / questions)
        z = above * math.sqrt(questions / own)
        z -= (z**2 - 1) * skewness / 6 if z > 1 else 0.0
        powers.append(all_below(z, 1.0, math.sqrt(shared / own), conditions))
    return max(powers)


def all_below(limit: float, own: float, shared: float, members: int) -> float:
    """Give the probability that the largest of `members` normal numbers lies below a limit; `own` and
    `shared` are standard deviations.
    """
    z = np.linspace(-6, 6, 241)
    weights = np.exp(-(z**2) / 2)
    normal = NormalDist()
    below = np.array([normal.cdf((limit - shared * value) / own) for value in z])
    return float((weights * below**members).sum() / weights.sum())


def questions_for_gone(base: float, unlearned: float, power: float = POWER) -> int | None:
    """Give the fewest questions (two significant digits) with this power of *gone*; None where there are
    none.
    """
    low, high = 1, MANY
    if power_of_gone(base, unlearned, high) < power:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if power_of_gone(base, unlearned, middle) < power:
            low = middle
        else:
            high = middle
    return rounded_up(high)
