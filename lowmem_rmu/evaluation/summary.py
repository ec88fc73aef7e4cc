"""What a run measured, as its `summary.json` has it."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.compare import Row
from lowmem_rmu.runs import RunFolder

SUMMARY = {"title", "model", "verdict", "rows", "texts", "samples", "stages", "limit"}
"""What a `summary.json` of this version has at least; a row of it has the fields of `compare.Row`."""


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
