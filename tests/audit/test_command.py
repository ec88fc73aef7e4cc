"""`python -m lowmem_rmu audit`: what it prints, what it writes, and the one message for each mistake."""

import json
import re
import shutil
from html import escape
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot
from typer.testing import CliRunner

from lowmem_rmu.__main__ import app
from lowmem_rmu.audit.suite import Settings, claim
from lowmem_rmu.cli.run import print_summary
from lowmem_rmu.runs.folder import RunFolder
from tests.texts import plain


@pytest.fixture
def run(forgetful: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(forgetful.path, tmp_path / "mine")))


def audit(run: RunFolder, *options: str) -> Any:
    return CliRunner().invoke(app, ["audit", str(run.path), "--device", "cpu", "--limit", "10", *options])


def test_costs_come_first_then_the_table_and_the_verdict(run: RunFolder) -> None:
    result = audit(run, "--attacks", "requantisation, collateral")
    assert result.exit_code == 0, result.output
    assert result.stderr.index(" MiB") < result.stderr.index("requantisation ...")
    lines = result.stdout.splitlines()
    assert next(line.strip() for line in lines if line.startswith(f"{run.path.name}: ")) == snapshot(
        "mine: accuracy in % over 20 items; recovered with its 95% interval"
    )
    assert any(line.split()[-2:] == ["refusing", "ignorant"] for line in lines), "the controls"
    found = json.loads(run.audit_result.read_text(encoding="utf-8"))
    assert found["attacks"][2]["state"] == "done"
    sentences = found["verdict"]["sentences"]
    assert next(sentence for sentence in sentences if "relearning" in sentence) == snapshot(
        "Not run: relearning, ablation, representation, prompting, suffix."
    )
    assert all(f"- {sentence}" in " ".join(result.stdout.split()) for sentence in sentences)
    report = (run.path / "report.html").read_text(encoding="utf-8")
    assert all(escape(sentence, quote=False) in report for sentence in sentences)


def test_the_run_knows_what_its_audit_found(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """In its summary, in its report and wherever its headline is printed, once an audit has ended, and before that it was not audited."""
    before = json.loads((run.path / "summary.json").read_text(encoding="utf-8"))
    print_summary(run, as_json=False)
    said = capsys.readouterr().out.splitlines()
    headline = said.index(next(line for line in said if line.endswith(" not audited.")))
    assert before["audit"] == "not audited"
    assert plain(said[headline + 1], run=run.path) == snapshot(
        "Gone, or only hidden? python -m lowmem_rmu audit <run>"
    )
    assert audit(run, "--attacks", "requantisation").exit_code == 0
    after = json.loads((run.path / "summary.json").read_text(encoding="utf-8"))
    assert after == before | {"audit": "inconclusive"}, "not all attacks were run"
    print_summary(run, as_json=False)
    assert capsys.readouterr().out.splitlines()[headline].endswith(" inconclusive.")
    assert ">Inconclusive</dd>" in (run.path / "report.html").read_text(encoding="utf-8")


def test_the_plan_tries_nothing(run: RunFolder) -> None:
    result = audit(run, "--plan")
    assert result.exit_code == 0, result.output
    assert all(name in result.stderr for name in ("relearning", "suffix", "MiB"))
    power = next(line for line in result.stderr.splitlines() if line.startswith("20 "))
    assert re.sub(r"\d+ questions \(", "<needed> questions (", power) == snapshot(
        "20 questions: if it is gone, the audit says so with a probability of about 0%. For 80% it takes "
        "about <needed> questions (--limit, per task)."
    )
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
    assert reasons.pop("representation") == snapshot(
        "a probe learns from questions, and there are 20: it needs 30"
    )
    assert {re.sub(r"[\d.]+ (s|min), ", "<time>, ", reason) for reason in reasons.values()} == snapshot(
        {"it would take about <time>, and 0 s of the budget are left"}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--attacks", "relearnin"],
            snapshot(
                'There is no attack "relearnin". Did you mean "relearning" or "requantisation" or '
                '"representation"?\n'
            ),
        ),
        (["--device", "tpu"], snapshot('There is no device "tpu": choose auto, cpu, cuda or mps.\n')),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(
    run: RunFolder, options: list[str], message: str
) -> None:
    result = audit(run, *options)
    assert result.exit_code == 2
    assert plain(result.stderr) == message
    assert not run.audit.exists()


def test_a_run_without_unlearning_cannot_be_audited(run: RunFolder) -> None:
    shutil.rmtree(run.adapter)
    result = audit(run)
    assert result.exit_code == 2
    assert plain(result.stderr, run=run.path) == snapshot(
        "Audit: <run>\n"
        "Run <run> has unlearned nothing, so there is nothing to audit.\n"
        "Go on with it: --resume --name mine\n"
    )
    assert "Traceback" not in result.output
