"""Rows of the report's tables and charts."""

from dataclasses import dataclass
from typing import TypeVar

from lowmem_rmu.evaluation.compare import Role, Row, TextRow, counted

ROLES = {
    "forgotten": "To be forgotten",
    "adjacent": "Close to it, should stay",
    "kept": "Should stay",
    "measured": "Only measured",
}
"""What is expected of a task, as the page says it and in its order."""
SIDES = ("base", "unlearned")


@dataclass(frozen=True)
class PairOfRows:
    """The same task in two runs. `sides` has the row of each, None where a run did not ask it."""

    task: str
    group: str | None
    is_group: bool
    is_average: bool
    role: Role
    sides: list[Row | None]
    notes: str
    """How the task was asked in either run."""


WithRole = TypeVar("WithRole", Row, TextRow, PairOfRows)


def by_role(rows: list[WithRole]) -> list[tuple[str, list[WithRole]]]:
    """Heading and rows of each role that occurs, in the order of ROLES."""
    groups = [(heading, [row for row in rows if row.role == role]) for role, heading in ROLES.items()]
    return [(heading, group) for heading, group in groups if group]


def question_count(row: Row) -> str:
    return counted(row.questions, row.sampled_from)
