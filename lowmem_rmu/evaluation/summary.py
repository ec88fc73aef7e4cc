"""What a run measured, as its `summary.json` has it, and what attacks on it found, as its `audit.json` has
it.
"""

from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lowmem_rmu.errors import AuditAgain, Fix, ResumeRun, UserError
from lowmem_rmu.evaluation.compare import Row, TextRow, Verdict
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.records import AuditResult, Condition, Object, StageCost, checked_json, read_record

GRADES = {
    "yes": "Yes",
    "partly": "Partly",
    "no": "No",
    "inconclusive": "Inconclusive",
    "unknown": "Not known",
}
"""The grades of a verdict (`compare.Grade`) as they are shown."""
NOT_AUDITED, UNREADABLE = "not audited", "not readable"
"""What stands for an audit's mark where there is none."""
ADDED_LATER = {"base_balanced", "unlearned_balanced"}
"""Fields of a row that runs of earlier versions do not have."""
EARLIER_WORDS = {"cannot be told": "inconclusive"}
"""Marks and findings as earlier versions called them in `audit.json` and `verification.json`."""


@dataclass(frozen=True)
class BothAnswers:
    """The shape of a prompt of the preset with what either side answered."""

    prompt: str
    base: str
    unlearned: str | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The content of `summary.json`."""

    preset: str = ""
    title: str
    model: str
    verdict: Verdict
    audit: str = NOT_AUDITED
    """The audit's mark, once there is one."""
    rows: list[Row]
    texts: list[TextRow]
    samples: list[BothAnswers]
    stages: list[StageCost]
    limit: int | None
    notes: list[str] = field(default_factory=list)
    unasked: dict[str, list[str]] = field(default_factory=dict)
    """By task: subjects without a question. Runs of earlier versions have neither."""


@dataclass(frozen=True)
class Grades:
    """The grades of a verdict without its sentences."""

    forgotten: str
    kept: str


@dataclass(frozen=True)
class ListedSummary:
    """What a list of runs shows of `summary.json`."""

    verdict: Grades


@dataclass(frozen=True)
class EvaluationSummary:
    """The content of `summary.json` in the folder of an evaluation."""

    model: str
    rows: list[Row]
    limit: int | None
    unasked: dict[str, list[str]]


@dataclass(frozen=True)
class Headline:
    """What is said of a run in one line: two grades, and what attacks found. Every front end shows these
    words.
    """

    forgotten: str
    kept: str
    audit: str
    """The audit's mark, or NOT_AUDITED."""

    @classmethod
    def of(cls, run: RunFolder, verdict: Verdict | Grades) -> "Headline":
        return cls(verdict.forgotten, verdict.kept, audit_mark(run))

    @property
    def sentence(self) -> str:
        return f"Forgotten: {self.forgotten}. Kept: {self.kept}. Audit: {self.audit}."

    @property
    def forgotten_words(self) -> str:
        """The answer to "is it forgotten?": a plain yes only where an audit says that it is gone."""
        if self.audit == "hidden" and self.forgotten in ("yes", "partly"):
            return {"yes": "Only hidden", "partly": "Partly, and only hidden"}[self.forgotten]
        if self.forgotten == "yes" and self.audit != "gone":
            return f"Yes, {'audit inconclusive' if self.audit == 'inconclusive' else self.audit}"
        return GRADES.get(self.forgotten, GRADES["unknown"])

    @property
    def forgotten_class(self) -> str:
        """The grade by whose color it is shown."""
        return "partly" if self.forgotten == "yes" and self.audit == "hidden" else self.forgotten

    @property
    def kept_words(self) -> str:
        return GRADES.get(self.kept, GRADES["unknown"])

    @property
    def audit_class(self) -> str:
        return {"gone": "yes", "hidden": "no"}.get(self.audit, "unknown")


def read_summary(run: RunFolder) -> Summary:
    """Read the run's `summary.json`.

    Raises UserError where it is missing, damaged, or of another version, or where the answers that it sums up
    are damaged.
    """
    path, again = run.path / "summary.json", ResumeRun(run.path.name)
    if not path.exists():
        raise UserError(
            f"Run {run.path} has no summary.json: it has not finished.",
            Fix("Go on with it: {action}", again),
        )
    what_next = Fix("Have it written again: {action}", again)
    summary = read_record(path, Summary, what_next)
    # Every field of a row is written, also those with a default: a row that lacks one is damaged.
    row_fields = {each.name for each in fields(Row)} - ADDED_LATER
    for row in checked_json(path, Object, what_next)["rows"]:
        for name in row_fields - row.keys():
            raise UserError(
                f"{path} was written by another version of this program, or is damaged: it lacks {name}.",
                what_next,
            )
    for side in ("base", "unlearned"):
        if run.evaluation(side).exists():
            run.read_answers(side)
    return summary


def read_audit(run: RunFolder) -> AuditResult | None:
    """Read the run's `audit.json`; None where it was not audited. Raises UserError where it is damaged, or of
    another version.
    """
    return read_audit_file(run.audit_result) if run.audit_result.exists() else None


def read_audit_file(path: Path) -> AuditResult:
    """Read an `audit.json` by its path. Raises UserError where it is damaged, or of another version."""
    again = Fix("Audit it again: {action}", AuditAgain(str(path.parent)))
    audit = read_record(path, AuditResult, again)
    verdict = replace(audit.verdict, mark=in_todays_words(audit.verdict.mark))
    attacks = tuple(replace(result, finding=in_todays_words(result.finding)) for result in audit.attacks)
    return replace(audit, verdict=verdict, attacks=attacks)


def in_todays_words(word: Any) -> Any:
    """Return a mark or finding of an earlier version as this version calls it."""
    return EARLIER_WORDS.get(word, word) if isinstance(word, str) else word


def audit_mark(run: RunFolder) -> str:
    """Return the mark that an audit gave the run; NOT_AUDITED where there was none, UNREADABLE where its file
    is damaged.
    """
    try:
        audit = read_audit(run)
        return audit.verdict.mark if audit else NOT_AUDITED
    except UserError:
        return UNREADABLE


def note_audit(run: RunFolder) -> None:
    """Write the audit's mark into the run's `summary.json`, where there is one that can be read."""
    with suppress(UserError):
        summary = checked_json(run.path / "summary.json", Object, "")
        write_json(run.path / "summary.json", summary | {"audit": audit_mark(run)})


def bounds_in_words(best: Condition) -> str:
    """Return the 95% interval of what an attack recovers, in percent: `61 to 85`."""
    if best.low is None or best.high is None:
        return "any share"
    return f"{100 * best.low:.0f} to {100 * best.high:.0f}"


def recovered_in_words(best: Condition | None) -> str:
    """Return `73% (61 to 85)`; a dash where nothing can be recovered, or recovery is not asked."""
    if best is None or best.recovered is None:
        return "-"
    return f"{best.recovered:.0%} ({bounds_in_words(best)})"


def known_in_words(audit: AuditResult, figure: float) -> str:
    """Return what a model knows in words: accuracy in percent, or the loss in nats/token."""
    return f"{100 * figure:.1f}" if audit.is_accuracy else f"{figure:.2f}"
