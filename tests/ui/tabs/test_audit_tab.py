"""The tab that attacks a run: a real audit by a process of its own, and what the page says of it."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import gradio as gr
import pytest
import torch
from inline_snapshot import snapshot

from lowmem_rmu import __version__
from lowmem_rmu.audit.suite import ATTACKS, Settings
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.errors import AuditAgain, Fix, UserError
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.queue import one_at_a_time, take_ticket, tickets
from lowmem_rmu.runs.records import AttackResult
from lowmem_rmu.runs.status import Silent, StatusWriter
from lowmem_rmu.ui import jobs
from lowmem_rmu.ui.tabs.audit import NOTHING, STOPPED, AuditTab, minutes, progress
from tests.records import audit_json
from tests.texts import plain, text_with, without_numbers
from tests.waiting import wait_until

CPU = torch.device("cpu")
ALL = list(ATTACKS)
AT_WORK = snapshot("<p><strong>At work</strong>")


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    """Two runs of which the page asks no more than that they have an adapter, and one that has none yet."""
    for age, name in enumerate(("newest", "older", "unfinished")):
        run = RunFolder.create(tmp_path, name)
        write_json(run.path / "config.json", {"settings": load_preset("tiny").model_dump()})
        os.utime(run.path / "config.json", (1e9 - age, 1e9 - age))
        if name != "unfinished":
            run.adapter.mkdir()
    return tmp_path


@pytest.fixture
def tab(runs_dir: Path) -> AuditTab:
    with gr.Blocks():
        return AuditTab(runs_dir, CPU)


@pytest.fixture
def own_run(forgetful: RunFolder, tmp_path: Path) -> RunFolder:
    """A run that forgot, whose audit was begun with few questions."""
    run = RunFolder(
        Path(
            shutil.copytree(
                forgetful.path, tmp_path / "own" / "mine", ignore=shutil.ignore_patterns("exports")
            )
        )
    )
    run.audit.mkdir()
    write_json(run.audit / "settings.json", asdict(Settings(limit=5)) | {"version": __version__})
    return run


def test_an_audit_from_the_page_is_stopped_and_gone_on_with(tab: AuditTab, own_run: RunFolder) -> None:
    tab.runs_dir = own_run.path.parent
    told, found, seen = tab.show("mine")
    assert (told, found) == (NOTHING, "")
    assert tab.start("mine", ["relearning"], "", False)[0].partition(":")[0] == AT_WORK
    with pytest.raises(UserError) as caught:
        tab.start("mine", ["relearning"], "", False)
    assert plain(caught.value) == snapshot(
        "Run mine is being audited already: wait until that is done, or stop it."
    )
    for change, said in (
        (jobs.delete, snapshot("Run mine is being audited: stop that before it is deleted.")),
        (
            lambda folder: jobs.rename(folder, "other"),
            snapshot("Run mine is being audited: stop that before it is renamed."),
        ),
    ):
        with pytest.raises(UserError) as caught:
            change(own_run)
        assert plain(caught.value) == said
    assert [jobs.needed_by(ticket, CPU) for ticket in tickets(tab.runs_dir)] == [None]
    wait_until(
        lambda: "relearning: 10 unrelated" in own_run.audit_output.read_text(),
        own_run.audit_output.read_text,
        seconds=240,
    )
    begin, _, what = tab.tick("mine", seen)[0].partition(": ")
    assert (begin, what.partition(" ")[0]) == (AT_WORK, "relearning")
    tab.stop("mine")
    wait_until(lambda: not jobs.is_audited_now(own_run), own_run.audit_output.read_text, seconds=240)
    assert progress(own_run) == STOPPED

    assert tab.start("mine", ["relearning"], "0.001", False)[0].partition(":")[0] == AT_WORK
    wait_until(lambda: not jobs.is_audited_now(own_run), own_run.audit_output.read_text, seconds=240)
    told, found, seen = tab.tick("mine", seen)
    assert plain(told) == snapshot("<p><strong>Done</strong></p>"), own_run.audit_output.read_text()
    assert "10 questions" in found
    [cell] = {cell for cell in re.findall("not run: [^<]*", found) if re.search(r"\d", cell)}
    assert without_numbers(cell).replace("N min", "N s") == snapshot(
        "not run: it would take about N s, and N s of the budget are left"
    )
    assert tab.tick("mine", seen) == (gr.skip(), gr.skip(), gr.skip())
    heading = re.findall("<h2>(.*?)</h2>", found)[0]
    assert heading in (own_run.path / "report.html").read_text()


def test_all_attacks_are_offered_in_words_and_chosen(tab: AuditTab) -> None:
    assert tab.attacks.choices == [(f"{name}: {ATTACKS[name].asks}", name) for name in ALL]
    assert tab.attacks.value == ALL


def test_runs_with_an_adapter_are_offered_newest_first(tab: AuditTab) -> None:
    update = tab.refresh(None)
    assert (update["choices"], update["value"]) == (["newest", "older"], "newest")
    for chosen in ("older", "unfinished", "gone"):
        assert "value" not in tab.refresh(chosen), "by the time it arrives another may have been chosen"


@pytest.mark.parametrize(
    ("typed", "found"), [("", None), (" ", None), ("30", 30.0), (" 0.5 ", 0.5), ("0,5", 0.5)]
)
def test_a_budget_is_minutes_or_nothing(typed: str, found: float | None) -> None:
    assert minutes(typed) == found


@pytest.mark.parametrize(
    ("name", "attacks", "budget", "said"),
    [
        (
            None,
            ALL,
            "",
            snapshot("Choose a run first.\nThere is none yet? Start one in the Unlearn tab."),
        ),
        ("newest", [], "", snapshot("Choose an attack first.")),
        (
            "newest",
            ALL,
            "soon",
            snapshot('"soon" is no budget: give minutes, such as 30, or leave the field empty.'),
        ),
        (
            "newest",
            ALL,
            "-1",
            snapshot('"-1" is no budget: give minutes, such as 30, or leave the field empty.'),
        ),
        (
            "newest",
            ALL,
            "0",
            snapshot('"0" is no budget: give minutes, such as 30, or leave the field empty.'),
        ),
        (
            "newest",
            ALL,
            "nan",
            snapshot('"nan" is no budget: give minutes, such as 30, or leave the field empty.'),
        ),
        (
            "unfinished",
            ALL,
            "",
            snapshot("Run unfinished has no adapter yet.\nResume it, and wait until it has unlearned."),
        ),
    ],
)
def test_what_cannot_be_audited_is_told(
    tab: AuditTab, name: str | None, attacks: list[str], budget: str, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        tab.start(name, attacks, budget, False)
    assert plain(caught.value) == said
    assert not tickets(tab.runs_dir)


def test_what_is_not_under_way_is_not_stopped(tab: AuditTab) -> None:
    with pytest.raises(UserError) as caught:
        tab.stop("newest")
    assert plain(caught.value) == snapshot("Run newest is not being audited.")
    with pytest.raises(UserError) as caught:
        tab.stop(None)
    assert plain(caught.value) == snapshot("Choose a run first.")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            UserError("Run x forgot nothing: <b>.", "Unlearn harder first."),
            snapshot(
                "<p><strong>Failed</strong></p><pre class='rmu-error'>Run x forgot nothing: &lt;b&gt;.\n"
                "Unlearn harder first.</pre>"
            ),
        ),
        (
            KeyError("x"),
            snapshot(
                "<p><strong>Failed</strong></p><pre class='rmu-error'>Its process ended before it was done. "
                "Audit continues where it was.</pre>"
            ),
        ),
        (
            None,
            snapshot(
                "<p><strong>Failed</strong></p><pre class='rmu-error'>Its process ended before it was done. "
                "Audit continues where it was.</pre>"
            ),
        ),
        (
            UserError("x was audited otherwise.", Fix("Discard it: {action}", AuditAgain())),
            snapshot(
                "<p><strong>Failed</strong></p><pre class='rmu-error'>x was audited otherwise.\n"
                "Discard it: check &#34;Start over&#34; under Audit</pre>"
            ),
        ),
    ],
)
def test_why_an_audit_failed_is_told_without_a_stack_trace(
    runs_dir: Path, error: Exception | None, said: str
) -> None:
    """None: its process was killed, so that its status says that it runs."""
    run = RunFolder(runs_dir / "older")
    with suppress(UserError, KeyError, Killed), StatusWriter(run.job_status("audit"), Silent()) as status:
        status.started("relearning")
        raise error or Killed
    told = progress(run)
    assert plain(told) == said
    assert "Traceback" not in told


class Killed(BaseException):
    """Ends a job without a word, as a kill does."""


def test_an_audit_of_an_earlier_version_has_no_status(runs_dir: Path) -> None:
    run = RunFolder(runs_dir / "older")
    run.audit_output.write_text("Audited: x\n")
    assert progress(run) == NOTHING
    run.audit_result.write_text("{}")
    assert progress(run) == ""


def test_an_audit_that_waits_says_for_what_and_is_stopped(tab: AuditTab, runs_dir: Path) -> None:
    run, process = (
        RunFolder(runs_dir / "older"),
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]),
    )
    with one_at_a_time(runs_dir):
        take_ticket(runs_dir, "other", os.getpid())
        take_ticket(runs_dir, run.audit_name, process.pid)
    jobs.begin(run, "audit")
    assert plain(progress(run)) == snapshot("<p><strong>At work</strong>: waiting for other …</p>")
    tab.stop("older")
    process.wait(180)
    assert progress(run) == STOPPED


def test_a_damaged_result_is_told_in_its_place_and_an_older_one_is_shown(
    tab: AuditTab, runs_dir: Path
) -> None:
    run = RunFolder(runs_dir / "older")
    write_json(
        run.audit_result,
        audit_json(
            "older",
            60,
            True,
            1.0,
            0.3,
            [AttackResult("relearning", "does it come back?", "not run", "not asked for")],
        ),
    )
    told, found, seen = tab.show("older")
    assert told == ""
    assert text_with(found, "not asked for") == snapshot("not run: not asked for")
    run.audit_result.write_text("{")
    told, found, seen = tab.tick("older", seen)
    assert told == gr.skip()
    assert plain(text_with(found, "audit.json"), run=run.path) == snapshot(
        "<run>/audit.json is damaged: it does not hold a JSON object. Audit it again: check &#34;Start "
        "over&#34; under Audit"
    )


def test_the_form_remembers_what_was_asked_for(tab: AuditTab, runs_dir: Path) -> None:
    run = RunFolder(runs_dir / "older")
    assert tab.choose("older") == ALL
    reasons = {"relearning": "it would take about 3 min", "suffix": "not yet"}
    results = [AttackResult(name, "so?", "not run", reasons.get(name, "not asked for")) for name in ALL]
    write_json(run.audit_result, audit_json("older", 60, True, 1.0, 0.3, results))
    assert tab.choose("older") == ["relearning", "suffix"]
    run.audit_result.write_text("{")
    for name in ("older", "gone", None):
        assert tab.choose(name) == gr.skip()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "../newest",
            snapshot(
                '"../newest" cannot be the name of a run: use letters, digits, ".", "_" and "-" only, at '
                "most 100, and no name of a Windows device, so that it stays inside <runs>."
            ),
        ),
        (
            "/etc",
            snapshot(
                '"/etc" cannot be the name of a run: use letters, digits, ".", "_" and "-" only, at most '
                "100, and no name of a Windows device, so that it stays inside <runs>."
            ),
        ),
        ("gone", snapshot("There is no run gone in <runs>. There is: newest, older, unfinished.")),
    ],
)
def test_only_runs_are_audited(tab: AuditTab, name: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        tab.start(name, ALL, "", False)
    assert plain(caught.value, runs=tab.runs_dir) == said
    assert tab.tick(name, ("", "")) == (gr.skip(), gr.skip(), gr.skip())


def test_no_event_is_part_of_the_public_api(runs_dir: Path) -> None:
    with gr.Blocks() as page:
        AuditTab(runs_dir, CPU).wire(page.load)
    assert page.fns
    assert {event.api_visibility for event in page.fns.values()} == {"private"}
