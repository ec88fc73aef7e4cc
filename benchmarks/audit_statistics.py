"""How often verdicts are wrong, and how often they are right: drawn answers of models of which the truth is
known, judged by old and new rules.

    python benchmarks/audit_statistics.py                    # all tables, as docs/verdicts.md has them
    python benchmarks/audit_statistics.py --draws 20         # quicker and rougher

Answers are drawn independently for every question, side and way of asking: the worst case for an audit, whose
ways share much of their luck in a real model. `before` is the rule of earlier versions, kept here for
comparison only.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs from anywhere

from lowmem_rmu.audit.power import power_of_gone, questions_for_gone
from lowmem_rmu.audit.recovery import Values, attack_recovery, fairly_best, fieller
from lowmem_rmu.audit.verdict import Finding, Mark, finding_of, mark_of
from lowmem_rmu.config.schema import Role
from lowmem_rmu.console import prepare_streams
from lowmem_rmu.evaluation.compare import TOLERATED, Row, verdict
from lowmem_rmu.evaluation.multiple_choice import CHANCE
from lowmem_rmu.evaluation.statistics import LUCK, by_luck, mcnemar
from lowmem_rmu.runs.records import AttackResult, Condition

ATTACKS, WAYS = 6, 10
Rule = Callable[[Row], bool]
Judged = tuple[Finding, tuple[float, float] | None]
"""What is said of an attack, and the interval of what it recovers."""


@dataclass(frozen=True)
class Changes:
    """A task whose answers change with these probabilities: of all questions, right as base, and of these and
    of the others, lost and gained.
    """

    questions: int
    base: float
    lose: float
    gain: float

    def draw(self, random: np.random.Generator, role: Role) -> Row:
        """One measurement of it."""
        known = int(random.binomial(self.questions, self.base))
        lost = int(random.binomial(known, self.lose))
        gained = int(random.binomial(self.questions - known, self.gain))
        base, unlearned = known / self.questions, (known - lost + gained) / self.questions
        return Row(
            "task",
            None,
            False,
            role,
            self.questions,
            base,
            0.0,
            unlearned,
            0.0,
            unlearned - base,
            0.0,
            lost=lost,
            gained=gained,
            p_value=mcnemar(lost, gained),
        )


@dataclass(frozen=True)
class Audited:
    """Models with these true accuracies, and what every way of every attack makes of the unlearned one."""

    questions: int
    base: float
    unlearned: float
    attacked: float
    ways: int = WAYS
    spread: float = 0.0
    """How far the worst way lies below the best, which `attacked` is of; the others lie evenly between."""

    @property
    def recovered(self) -> float:
        """The true share of what was lost that the best way brings back."""
        floor = max(self.unlearned, CHANCE)
        return (self.attacked - floor) / (self.base - floor)

    def draw(self, random: np.random.Generator) -> tuple[Values, Values, list[dict[str, Values]]]:
        """Answers of base, of unlearned, and of the ways of each attack."""
        answers = [draw(random, share, self.questions) for share in (self.base, self.unlearned)]
        shares = np.linspace(self.attacked, self.attacked - self.spread, self.ways)
        attacks = [
            {str(way): draw(random, share, self.questions) for way, share in enumerate(shares)}
            for _ in range(ATTACKS)
        ]
        return answers[0], answers[1], attacks


def draw(random: np.random.Generator, share: float, count: int) -> Values:
    return (random.random(count) < share).astype(float).tolist()


def kept_before(row: Row) -> bool:
    """McNemar's test finds no loss, or it is less than two points."""
    return (row.p_value or 0.0) >= LUCK or (row.change or 0.0) >= -0.02


def forgotten_before(row: Row) -> bool:
    """Return whether base is above guessing and unlearned is not, significantly."""
    guessing = by_luck(CHANCE, row.questions)
    return row.base > guessing and (row.unlearned or 0.0) <= guessing


def kept_after(row: Row) -> bool:
    return verdict([row], []).kept == "yes"


def forgotten_after(row: Row) -> bool:
    return verdict([row], []).forgotten == "yes"


def finding_before(base: Values, unlearned: Values, ways: dict[str, Values]) -> Judged:
    """By the 95% interval of the cross-selected way alone, from unlearned, without any correction."""
    bounds = fieller(base, unlearned, fairly_best(ways)[0], are_questions=True)
    if bounds is None:
        return "inconclusive", None
    return finding_of(Condition("", 0.0, None, *bounds)), bounds


def finding_after(base: Values, unlearned: Values, ways: dict[str, Values]) -> Judged:
    _, _, found = attack_recovery(ways, base, unlearned, are_questions=True, chance=CHANCE, family=ATTACKS)
    bounds = None if found.low is None or found.high is None else (found.low, found.high)
    return finding_of(Condition("", 0.0, found.recovered, found.low, found.high)), bounds


Judge = Callable[[Values, Values, dict[str, Values]], Judged]


@dataclass(frozen=True)
class Rates:
    """Shares of the draws."""

    hidden: float
    gone: float
    below: float
    """Intervals of single attacks that lie below the true recovery."""
    above: float


def audit_rates(audited: Audited, judge: Judge, draws: int, seed: int = 0) -> Rates:
    """Simulate what a rule says of audits that are drawn again and again."""
    random = np.random.default_rng(seed)
    marks: list[Mark] = []
    below = above = 0
    for _ in range(draws):
        base, unlearned, attacks = audited.draw(random)
        found = [judge(base, unlearned, ways) for ways in attacks]
        marks.append(mark_of([AttackResult("attack", "", "done", finding=finding) for finding, _ in found]))
        below += sum(bounds is not None and bounds[1] < audited.recovered for _, bounds in found)
        above += sum(bounds is not None and bounds[0] > audited.recovered for _, bounds in found)
    count = draws * ATTACKS
    return Rates(marks.count("hidden") / draws, marks.count("gone") / draws, below / count, above / count)


def task_rate(changes: Changes, role: Role, rule: Rule, draws: int, seed: int = 0) -> float:
    """How often a rule says yes of a task."""
    random = np.random.default_rng(seed)
    return sum(rule(changes.draw(random, role)) for _ in range(draws)) / draws


def task_lines(draws: int) -> Iterator[str]:
    """Make the table of verdicts on one task."""
    yield "| the truth | questions | verdict | before | now |"
    yield "| --- | ---: | --- | ---: | ---: |"
    kept = [
        ("10 points lost: wrong if kept", [Changes(n, 1.0, 0.10, 0.0) for n in (30, 100, 300)]),
        (
            "10 points lost, 15 changed: wrong if kept",
            [Changes(n, 0.6, 0.125 / 0.6, 0.025 / 0.4) for n in (30, 100, 300)],
        ),
        (
            "5 points lost, what is tolerated: wrong if kept",
            [Changes(n, 1.0, 0.05, 0.0) for n in (30, 100, 300, 1000)],
        ),
        (
            "nothing lost, 4 points changed: right if kept",
            [Changes(n, 0.6, 0.02 / 0.6, 0.02 / 0.4) for n in (30, 100, 300, 600, 1000)],
        ),
    ]
    forgotten = [
        ("50% fell to 40%: wrong if forgotten", [Changes(n, 0.5, 0.2, 0.0) for n in (20, 100, 300)]),
        (
            "100% fell to 37.5%, the limit: wrong if forgotten",
            [Changes(n, 1.0, 0.625, 0.0) for n in (20, 100, 300)],
        ),
        ("100% fell to 25%: right if forgotten", [Changes(n, 1.0, 0.75, 0.0) for n in (20, 100, 264)]),
        ("60% fell to 25%: right if forgotten", [Changes(n, 0.6, 0.75, 0.25) for n in (100, 300, 1000)]),
    ]
    kinds: list[tuple[Role, list[tuple[str, list[Changes]]], Rule, Rule]] = [
        ("kept", kept, kept_before, kept_after),
        ("forgotten", forgotten, forgotten_before, forgotten_after),
    ]
    for role, tables, before, after in kinds:
        for truth, cases in tables:
            for changes in cases:
                rates = [task_rate(changes, role, rule, draws) for rule in (before, after)]
                yield f"| {truth} | {changes.questions:,} | {role} | {rates[0]:.1%} | {rates[1]:.1%} |"


def audit_lines(draws: int) -> Iterator[str]:
    """Make the table of audits of six attacks in ten ways each."""
    yield (
        f"| the truth, of {ATTACKS} attacks in {WAYS} ways each | questions | share of audits | before | "
        "now |"
    )
    yield "| --- | ---: | --- | ---: | ---: |"
    limit_65, limit_45 = (0.28 + TOLERATED * (base - 0.28) for base in (0.65, 0.45))
    at_limit, one_way = "each recovers exactly the limit", " (one way each)"
    enough = [questions_for_gone(*sides) or 0 for sides in ((0.65, 0.28), (0.45, 0.25), (0.65, 0.10))]
    fewer = "half comes back at best, 29 ways up to 15 points less"
    cases = [
        (f"{at_limit}, 65% / 28%{one_way}", Audited(1000, 0.65, 0.28, limit_65, ways=1), "hidden"),
        (f"{at_limit}, 65% / 28%{one_way}", Audited(200, 0.65, 0.28, limit_65, ways=1), "hidden"),
        (f"{at_limit}, 45% / 28%{one_way}", Audited(1000, 0.45, 0.28, limit_45, ways=1), "hidden"),
        (f"{at_limit}, 65% / 28%", Audited(1000, 0.65, 0.28, limit_65), "hidden"),
        (f"guessing is restored, 60% / 10%{one_way}", Audited(1000, 0.60, 0.10, CHANCE, ways=1), "hidden"),
        ("half comes back, 65% / 28%", Audited(200, 0.65, 0.28, 0.465), "hidden"),
        ("all comes back, 65% / 28%", Audited(100, 0.65, 0.28, 0.65), "hidden"),
        (f"{at_limit}, 65% / 28%", Audited(1000, 0.65, 0.28, limit_65), "gone"),
        ("nothing comes back, 65% / 28%", Audited(100, 0.65, 0.28, 0.28), "gone"),
        ("nothing comes back, 65% / 28%", Audited(enough[0], 0.65, 0.28, 0.28), "gone"),
        ("nothing comes back, 45% / 25%", Audited(200, 0.45, 0.25, 0.25), "gone"),
        ("nothing comes back, 45% / 25%", Audited(enough[1], 0.45, 0.25, 0.25), "gone"),
        ("nothing comes back, 100% / 27%", Audited(200, 1.0, 0.27, 0.27), "gone"),
        ("guessing is restored, 65% / 10%", Audited(enough[2], 0.65, 0.10, CHANCE), "gone"),
        ("half comes back in ten ways alike, 65% / 28%", Audited(200, 0.65, 0.28, 0.465), "below"),
        (f"{fewer}, 65% / 28%", Audited(200, 0.65, 0.28, 0.465, 30, 0.15), "below"),
        (f"{fewer}, 100% / 27%", Audited(200, 1.0, 0.27, 0.635, 30, 0.15), "below"),
        ("half comes back in ten ways alike, 65% / 28%", Audited(200, 0.65, 0.28, 0.465), "above"),
    ]
    words = {
        "below": "interval below the truth",
        "above": "interval above the truth",
        "hidden": "hidden",
        "gone": "gone",
    }
    for truth, audited, what in cases:
        count = 4 * draws if audited.ways == 1 else draws
        before, after = (
            getattr(audit_rates(audited, judge, count), what) for judge in (finding_before, finding_after)
        )
        yield f"| {truth} | {audited.questions:,} | {words[what]} | {before:.1%} | {after:.1%} |"


def power_lines() -> Iterator[str]:
    """Make the table of what `audit --plan` says of some models."""
    yield "| base / unlearned | questions for 80% | power with 100 | with 200 | with 600 | with 2,000 |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for base, unlearned in (
        (1.0, 0.27),
        (0.9, 0.30),
        (0.65, 0.28),
        (0.65, 0.25),
        (0.65, 0.10),
        (0.45, 0.28),
        (0.45, 0.25),
    ):
        powers = " | ".join(f"{power_of_gone(base, unlearned, count):.0%}" for count in (100, 200, 600, 2000))
        yield f"| {base:.0%} / {unlearned:.0%} | {questions_for_gone(base, unlearned):,} | {powers} |"


def main(
    draws: Annotated[
        int, typer.Option(min=1, help="Audits per row; four times as many where each attack has one way.")
    ] = 100,
    task_draws: Annotated[int, typer.Option(min=1, help="Tasks per row.")] = 4000,
) -> None:
    for lines in (task_lines(task_draws), audit_lines(draws), power_lines()):
        for line in lines:
            print(line, flush=True)
        print()


if __name__ == "__main__":
    prepare_streams()
    typer.run(main)
