"""What a run measured, as its `summary.json` has it, and what attacks on it found, as its `audit.json` has it."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.compare import Row
from lowmem_rmu.runs import RunFolder

SUMMARY = {"title", "model", "verdict", "rows", "texts", "samples", "stages", "limit"}
"""What a `summary.json` of this version has at least; a row of it has the fields of `compare.Row`."""
AUDIT = {"run", "items", "measured_in", "base", "unlearned", "verdict", "attacks", "controls"}
ATTACK = {
    "attack", "asks", "state", "reason", "foretold_seconds", "seconds", "peak_memory_bytes",
    "best", "finding", "conditions", "sentences", "details",
}  # fmt: skip
"""What an `audit.json` of this version has at least, and each of its attacks."""


def read_summary(run: RunFolder) -> dict[str, Any]:
    """What the run's `summary.json` holds. Raises UserError where it is missing, damaged, or of another version."""
    path, again = run.path / "summary.json", f"--resume --name {run.path.name}"
    if not path.exists():
        raise UserError(f"Run {run.path} has no summary.json: it has not finished.\nGo on with it: {again}")
    summary = read_object(path, f"Have it written again: {again}")
    row_fields = {field.name for field in fields(Row)}
    if not summary.keys() >= SUMMARY or not all(row.keys() >= row_fields for row in summary["rows"]):
        raise UserError(f"{path} was written by another version of this program.\nHave it written again: {again}")
    return summary


def read_audit(run: RunFolder) -> dict[str, Any] | None:
    """What the run's `audit.json` holds; None where it was not audited. Raises UserError where that is damaged, or of another version."""
    path, again = run.audit_result, f"Audit it again: python -m lowmem_rmu audit {run.path} --again"
    if not path.exists():
        return None
    audit = read_object(path, again)
    if not audit.keys() >= AUDIT or not all(attack.keys() >= ATTACK for attack in audit["attacks"]):
        raise UserError(f"{path} was written by another version of this program.\n{again}")
    return audit


def bounds_in_words(best: dict[str, Any]) -> str:
    """The 95% interval of what an attack recovers, in percent: `61 to 85`."""
    return "any share" if best["low"] is None or best["high"] is None else f"{100 * best['low']:.0f} to {100 * best['high']:.0f}"


def recovered_in_words(best: dict[str, Any] | None) -> str:
    """`73% (61 to 85)`; a dash where nothing can be recovered, or recovery is not asked."""
    return "-" if best is None or best["recovered"] is None else f"{best['recovered']:.0%} ({bounds_in_words(best)})"


def known_in_words(audit: dict[str, Any], figure: float) -> str:
    """What a model knows: accuracy in percent, or the loss in nats a token."""
    return f"{100 * figure:.1f}" if audit["measured_in"] == "accuracy" else f"{figure:.2f}"


def read_object(path: Path, what_next: str) -> dict[str, Any]:
    """The JSON object in a file of a run. Raises UserError, which ends with `what_next`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.\n{what_next}") from error
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it does not hold a JSON object.\n{what_next}")
    return content
