"""Rows of the report's tables and charts."""

from typing import Any

from lowmem_rmu.evaluation.compare import counted

Row = dict[str, Any]

ROLES = {
    "forgotten": "To be forgotten",
    "adjacent": "Close to it, should stay",
    "kept": "Should stay",
    "measured": "Only measured",
}
"""What is expected of a task, as the page says it and in its order."""
SIDES = ("base", "unlearned")


def by_role(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Heading and rows of each role that occurs, in the order of ROLES."""
    groups = [(heading, [row for row in rows if row["role"] == role]) for role, heading in ROLES.items()]
    return [(heading, group) for heading, group in groups if group]


def question_count(row: Row) -> str:
    return counted(row["questions"], row["sampled_from"])
