"""What an audit found, as tables for a terminal of 80 columns."""

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lowmem_rmu.audit.suite import Estimate, duration
from lowmem_rmu.evaluation.summary import known_in_words, recovered_in_words
from lowmem_rmu.memory.estimate import gib
from lowmem_rmu.runs.records import AuditResult


def cost_table(estimates: list[Estimate]) -> Table:
    """Make the table of each attack's cost estimate."""
    table = _table("What it will take", "Attack", "Asks", "Time", "Memory")
    for each in estimates:
        cost = (duration(each.seconds), gib(each.bytes)) if each.bytes else ("-", "-")
        table.add_row(each.attack, each.asks, *cost)
    return table


def audit_tables(audit: AuditResult) -> Group:
    """Make the tables of an audit: base, unlearned and attacked next to each other; the same attacks on
    control models; the verdict.
    """
    sentences = [Text(f"- {sentence}") for sentence in audit.verdict.sentences]
    return Group(_found(audit), *([_controls(audit)] if audit.controls else []), *sentences)


def _found(audit: AuditResult) -> Table:
    unit = "accuracy in %" if audit.is_accuracy else audit.measured_in
    title = f"{audit.run}: {unit} over {audit.items} items; recovered with its 95% interval"
    table = _table(title, "Attack", "Base", "Unlearned", "Attacked", "Recovered", "")
    for each in audit.attacks:
        if each.state == "not run":
            table.add_row(each.attack, "", "", "", "", f"not run: {each.reason}")
        elif each.best:
            figures = [
                known_in_words(audit, value) for value in (audit.base, audit.unlearned, each.best.attacked)
            ]
            table.add_row(each.attack, *figures, recovered_in_words(each.best), each.finding)
    return table


def _controls(audit: AuditResult) -> Table:
    names = [each.name for each in audit.controls]
    table = _table("Recovered, next to models of which the truth is known", "Attack", "This run", *names)
    for each in audit.attacks:
        if each.best:
            known = [recovered_in_words(control.attacks.get(each.attack)) for control in audit.controls]
            table.add_row(each.attack, recovered_in_words(each.best), *known)
    table.add_row("Verdict", audit.verdict.mark, *(control.mark for control in audit.controls))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        numeric = column in ("Base", "Unlearned", "Attacked", "Recovered", "Time", "Memory")
        table.add_column(
            column, justify="right" if numeric else "left", no_wrap=column == "Attack", overflow="fold"
        )
    return table
