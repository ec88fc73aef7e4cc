"""Make records for tests: the fields that a test is about, the others with plain values."""

from dataclasses import asdict
from typing import Any

from lowmem_rmu.audit.verdict import audit_result
from lowmem_rmu.runs.records import Answer


def answer_row(**fields: Any) -> Answer:
    """Return an answer to a question."""
    plain = {
        "task": "quiz",
        "index": 0,
        "prompt": "",
        "logprobs": None,
        "answer": 0,
        "gold": 0,
        "correct": True,
    }
    return Answer(**plain | fields)


def audit_json(*given: Any) -> dict[str, Any]:
    """Return what `audit.json` holds of an audit: the arguments are those of `audit_result`."""
    return asdict(audit_result(*given))
