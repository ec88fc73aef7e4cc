"""`python -m lowmem_rmu audit`: what it prints, what it writes, and the one message for each mistake."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lowmem_rmu.__main__ import app
from lowmem_rmu.audit.suite import Settings, claim
from lowmem_rmu.cli.run import print_summary
from lowmem_rmu.runs import RunFolder


@pytest.fixture
def run(forgetful: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(forgetful.path, tmp_path / "mine")))


def audit(run: RunFolder, *options: str) -> Any:
    return CliRunner().invoke(app, ["audit", str(run.path), "--device", "cpu", "--limit", "10", *options])


def test_costs_come_first_then_the_table_and_the_verdict(run: RunFolder) -> None:
    result = audit(run, "--attacks", "requantisation, collateral")
    assert result.exit_code == 0, result.output
    assert result.stderr.index("What it will take") < result.stderr.index("requantisation ...")
    assert "accuracy in % over 20 items" in result.stdout
    assert "Recovered, beside models of which the truth is known" in result.stdout
    assert "Not run: relearning" in result.stdout
    assert json.loads(run.audit_result.read_text(encoding="utf-8"))["attacks"][2]["state"] == "done"
    assert "Gone, or only hidden?" in (run.path / "report.html").read_text(encoding="utf-8")


def test_the_run_knows_what_its_audit_found(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """In its summary, in its report and wherever its headline is printed, once an audit has ended, and before that it was not audited."""
    before = json.loads((run.path / "summary.json").read_text(encoding="utf-8"))
    print_summary(run, as_json=False)
    said = capsys.readouterr().out
    assert before["audit"] == "not audited"
    assert f"Audit: not audited.\nGone, or only hidden? python -m lowmem_rmu audit {run.path}\n" in said
    assert audit(run, "--attacks", "requantisation").exit_code == 0
    after = json.loads((run.path / "summary.json").read_text(encoding="utf-8"))
    assert after == before | {"audit": "inconclusive"}, "not all attacks were run"
    print_summary(run, as_json=False)
    assert "Audit: inconclusive.\n" in capsys.readouterr().out
    assert ">Inconclusive</dd>" in (run.path / "report.html").read_text(encoding="utf-8")


def test_the_plan_tries_nothing(run: RunFolder) -> None:
    result = audit(run, "--plan")
    assert result.exit_code == 0, result.output
    assert all(name in result.stderr for name in ("relearning", "suffix", "MiB"))
    assert "20 questions: if it is gone, the audit says so with a probability of about 0%. For 80% it takes about " in result.stderr
    assert not run.audit_result.exists()
    assert not run.audit.exists(), "settings of a plan would bind the next audit"


def test_the_plan_of_other_settings_leaves_an_earlier_audit_as_it_is(run: RunFolder) -> None:
    claim(run.audit, run.audit_result, Settings(20), again=False)
    (run.audit / "suffix.jsonl").write_text('{"key": "first", "value": 1}\n')
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    for options in ([], ["--again"]):
        result = audit(run, "--plan", *options)
        assert result.exit_code == 0, result.output
        assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_budget_that_is_too_small_is_said_for_each_attack(run: RunFolder) -> None:
    result = audit(run, "--budget", "0", "--json")
    assert result.exit_code == 0, result.output
    reasons = {each["attack"]: each["reason"] for each in json.loads(result.stdout)["attacks"]}
    assert reasons.pop("representation") == "a probe learns from questions, and there are 20: it needs 30"
    assert all("of the budget are left" in reason for reason in reasons.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--attacks", "relearnin"], ['There is no attack "relearnin".', 'Did you mean "relearning"']),
        (["--device", "tpu"], ['There is no device "tpu"']),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(run: RunFolder, options: list[str], words: list[str]) -> None:
    result = audit(run, *options)
    assert result.exit_code == 2
    assert all(word in result.stderr for word in words)
    assert not run.audit.exists()


def test_a_run_without_unlearning_cannot_be_audited(run: RunFolder) -> None:
    shutil.rmtree(run.adapter)
    result = audit(run)
    assert result.exit_code == 2
    assert "has unlearned nothing, so there is nothing to audit." in result.stderr
    assert "Traceback" not in result.output
