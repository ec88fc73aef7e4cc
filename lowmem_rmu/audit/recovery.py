"""How much of what was forgotten an attack brings back, and between which bounds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from lowmem_rmu.evaluation.compare import NOISE

Values = list[float]
"""What a model knows of each item: 1 or 0 for a question, the log-probability in nats for a text."""


@dataclass(frozen=True)
class Recovery:
    """`recovered` = (attacked - unlearned) / (base - unlearned) of the items' sums, with its 95% interval.

    `recovered` is None where base and unlearned are equal, `low` and `high` where too few items tell base from unlearned.
    """

    recovered: float | None
    low: float | None
    high: float | None


def recovery(base: Sequence[float], unlearned: Sequence[float], attacked: Sequence[float], are_questions: bool) -> Recovery:
    """Of the same items on three sides."""
    fell = sum(base) - sum(unlearned)
    low, high = fieller(base, unlearned, attacked, are_questions) or (None, None)
    return Recovery((sum(attacked) - sum(unlearned)) / fell if fell else None, low, high)


def fieller(base: Sequence[float], unlearned: Sequence[float], attacked: Sequence[float], are_questions: bool) -> tuple[float, float] | None:
    """The 95% interval of a ratio of two paired mean differences (Fieller 1954); None where the denominator may be 0.

    Of questions, a quarter more of each of the eight ways to answer them on three sides is added: half a question more of each kind
    for any two sides, as in `compare.change_interval`, so that few questions without any change are no proof that nothing changes.
    """
    items = [*zip(base, unlearned, attacked, strict=True)]
    extra = [*product((0.0, 1.0), repeat=3)] if are_questions else []
    sides, weights = np.array(items + extra, dtype=float), np.array([1.0] * len(items) + [0.25] * len(extra))
    n = weights.sum()
    if n < 2:
        return None
    differences = np.stack([sides[:, 2] - sides[:, 1], sides[:, 0] - sides[:, 1]])
    top, bottom = np.average(differences, axis=1, weights=weights)
    (var_top, both), (_, var_bottom) = np.cov(differences, aweights=weights, ddof=0) / (n - 1)
    z = student(n - 1)
    g = z**2 * var_bottom / bottom**2 if bottom else math.inf
    if g >= 1:
        return None
    ratio = top / bottom
    shift = both / var_bottom if var_bottom else 0.0
    spread = var_top - 2 * ratio * both + ratio**2 * var_bottom - g * (var_top - shift * both)
    half = z / abs(bottom) * math.sqrt(max(0.0, spread))
    return float((ratio - g * shift - half) / (1 - g)), float((ratio - g * shift + half) / (1 - g))


def student(freedom: float) -> float:
    """The two-sided 95% quantile of Student's t by its Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5), within 1% from 4 degrees on."""
    z = NOISE
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(term / freedom**power for power, term in enumerate(terms))


def less_what_base_gains(attacked: Values, same: Values | None, base: Values) -> Values:
    """Of texts: without what the same attack adds to a model that never forgot (`same`, where it was measured; beside `base`).

    Text is known better in a finer precision, or once its style is learned, whether or not anything was forgotten.
    """
    if same is None or sum(same) <= sum(base):
        return attacked
    return [value - (after - before) for value, after, before in zip(attacked, same, base, strict=True)]


def fairly_best(conditions: Mapping[str, Values]) -> tuple[Values, list[str]]:
    """What the best condition gives where it is not known beforehand which that is, and what was chosen.

    Items of odd number choose for those of even number, and the other way round: the luck that chooses is not the luck that is counted.
    """
    values, chosen = dict[int, float](), []
    for half in (0, 1):
        best = max(conditions, key=lambda name: sum(conditions[name][1 - half :: 2]))
        chosen.append(best)
        values |= {index: value for index, value in enumerate(conditions[best]) if index % 2 == half}
    return [values[index] for index in sorted(values)], sorted(set(chosen))
