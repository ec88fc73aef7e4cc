"""What is read of an audit, and its figures in words."""

from pathlib import Path
from typing import Any

import pytest

from lowmem_rmu.audit.verdict import Result, as_json
from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.summary import bounds_in_words, known_in_words, read_audit, recovered_in_words
from lowmem_rmu.runs import RunFolder, write_json


def test_what_an_audit_wrote_is_read_and_nothing_where_there_was_none(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert read_audit(run) is None
    audit = as_json("mine", 60, True, 1.0, 0.3, [Result("relearning", "does it come back?", "not run", "not asked for")])
    write_json(run.audit_result, audit)
    assert read_audit(run) == {**audit, "attacks": [{**audit["attacks"][0], "conditions": [], "sentences": []}]}


@pytest.mark.parametrize("text", ["", "[]", '{"run": "mine", "attac'])
def test_a_damaged_audit_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "audit.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_audit(RunFolder(tmp_path))
    again = f"Audit it again: python -m lowmem_rmu audit {tmp_path} --again"
    assert str(caught.value) == f"{tmp_path / 'audit.json'} is damaged: it does not hold a JSON object.\n{again}"


@pytest.mark.parametrize("change", [{"attacks": [{"attack": "relearning"}]}, {"verdict": None}])
def test_an_audit_of_another_version_is_told(tmp_path: Path, change: dict[str, Any]) -> None:
    audit = {**as_json("mine", 60, True, 1.0, 0.3, []), **change}
    write_json(tmp_path / "audit.json", {key: value for key, value in audit.items() if value is not None})
    with pytest.raises(UserError, match=r"audit\.json was written by another version of this program\.\nAudit it again: python -m .* --again$"):
        read_audit(RunFolder(tmp_path))


def test_figures_in_words() -> None:
    best = {"recovered": 0.731, "low": 0.606, "high": 0.849}
    assert (recovered_in_words(best), bounds_in_words(best)) == ("73% (61 to 85)", "61 to 85")
    assert recovered_in_words({"recovered": -0.1, "low": None, "high": None}) == "-10% (any share)"
    assert recovered_in_words(best | {"recovered": None}) == recovered_in_words(None) == "-"
    assert known_in_words({"measured_in": "accuracy"}, 0.316) == "31.6"
    assert known_in_words({"measured_in": "nats a token"}, 4.316) == "4.32"
