"""What is read of an audit, and its figures in words."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from inline_snapshot import snapshot

from lowmem_rmu.audit.verdict import audit_result
from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.compare import Grade
from lowmem_rmu.evaluation.summary import (
    GRADES,
    Headline,
    audit_mark,
    bounds_in_words,
    known_in_words,
    note_audit,
    read_audit,
    recovered_in_words,
)
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.records import AttackResult, Condition, Object, checked_json
from tests.records import audit_json
from tests.texts import plain


def test_what_an_audit_wrote_is_read_and_nothing_where_there_was_none(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert read_audit(run) is None
    audit = audit_result(
        "mine",
        60,
        True,
        1.0,
        0.3,
        [AttackResult("relearning", "does it come back?", "not run", "not asked for")],
    )
    write_json(run.audit_result, asdict(audit))
    assert read_audit(run) == audit


@pytest.mark.parametrize("text", ["", "[]", '{"run": "mine", "attac'])
def test_a_damaged_audit_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "audit.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_audit(RunFolder(tmp_path))
    assert plain(caught.value, run=tmp_path) == snapshot(
        "<run>/audit.json is damaged: it does not hold a JSON object.\n"
        "Audit it again: python -m lowmem_rmu audit <run> --again"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attacks": [{"attack": "relearning"}]},
            snapshot(
                "<run>/audit.json was written by another version of this program, or is damaged: it lacks "
                "attacks.0.asks.\n"
                "Audit it again: python -m lowmem_rmu audit <run> --again"
            ),
        ),
        (
            {"verdict": None},
            snapshot(
                "<run>/audit.json was written by another version of this program, or is damaged: it lacks "
                "verdict.\n"
                "Audit it again: python -m lowmem_rmu audit <run> --again"
            ),
        ),
    ],
)
def test_an_audit_of_another_version_is_told(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    audit = {**audit_json("mine", 60, True, 1.0, 0.3, []), **change}
    write_json(tmp_path / "audit.json", {key: value for key, value in audit.items() if value is not None})
    with pytest.raises(UserError) as caught:
        read_audit(RunFolder(tmp_path))
    assert plain(caught.value, run=tmp_path) == message


def an_audit(mark: str = "hidden", finding: str = "brought back") -> dict[str, Any]:
    audit = audit_json("mine", 60, True, 1.0, 0.3, [AttackResult("relearning", "does it come back?", "done")])
    audit["attacks"][0]["finding"] = finding
    return audit | {"verdict": {"mark": mark, "sentences": []}}


def test_an_audit_of_an_earlier_version_is_read_in_todays_words(tmp_path: Path) -> None:
    older = an_audit("cannot be told", "cannot be told")
    del older["floor"]
    write_json(tmp_path / "audit.json", older)
    audit = read_audit(RunFolder(tmp_path))
    assert audit is not None
    assert (audit.verdict.mark, audit.attacks[0].finding) == ("inconclusive", "inconclusive")


def test_the_mark_of_a_run_is_that_of_its_audit(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert audit_mark(run) == "not audited"
    write_json(run.audit_result, an_audit())
    assert audit_mark(run) == "hidden"
    write_json(run.audit_result, an_audit() | {"verdict": {}})
    assert audit_mark(run) == "not readable"
    run.audit_result.write_text("{")
    assert audit_mark(run) == "not readable"


def test_the_mark_is_noted_in_the_summary_and_changes_nothing_else(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    note_audit(run)
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "summary.json", {"title": "mine", "audit": "not audited"})
    write_json(run.audit_result, an_audit())
    note_audit(run)
    assert checked_json(tmp_path / "summary.json", Object, "") == {"title": "mine", "audit": "hidden"}


@pytest.mark.parametrize(
    ("forgotten", "mark", "words", "color"),
    [
        ("yes", "not audited", snapshot("Yes, not audited"), "yes"),
        ("yes", "hidden", snapshot("Only hidden"), "partly"),
        ("partly", "hidden", snapshot("Partly, and only hidden"), "partly"),
        ("yes", "gone", snapshot("Yes"), "yes"),
        ("yes", "inconclusive", snapshot("Yes, audit inconclusive"), "yes"),
        ("no", "hidden", snapshot("No"), "no"),
        ("inconclusive", "gone", snapshot("Inconclusive"), "inconclusive"),
        ("unknown", "not audited", snapshot("Not known"), "unknown"),
    ],
)
def test_a_headline_says_a_plain_yes_only_where_an_audit_does(
    forgotten: str, mark: str, words: str, color: str
) -> None:
    headline = Headline(forgotten, "yes", mark)
    assert headline.forgotten_words == words
    assert headline.forgotten_class == color


def test_a_headline_is_a_sentence() -> None:
    assert Headline("partly", "yes", "hidden").sentence == snapshot(
        "Forgotten: partly. Kept: yes. Audit: hidden."
    )


def test_every_grade_has_its_word() -> None:
    assert GRADES.keys() == set(get_args(Grade))


def test_figures_in_words() -> None:
    best = Condition("x", 0.5, 0.731, 0.606, 0.849)
    assert (recovered_in_words(best), bounds_in_words(best)) == snapshot(("73% (61 to 85)", "61 to 85"))
    assert recovered_in_words(Condition("x", 0.5, -0.1, None, None)) == snapshot("-10% (any share)")
    assert recovered_in_words(replace(best, recovered=None)) == recovered_in_words(None) == "-"
    assert known_in_words(audit_result("mine", 60, True, 1.0, 0.3, []), 0.316) == "31.6"
    assert known_in_words(audit_result("mine", 60, False, 1.0, 0.3, []), 4.316) == "4.32"
