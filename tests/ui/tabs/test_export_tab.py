"""The tab to take a result away: real exports by processes of their own, and what the page says of them."""

import json
import os
import re
import subprocess
import sys
import zipfile
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch
from inline_snapshot import snapshot

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.errors import Fix, ResumeRun, UserError
from lowmem_rmu.export.formats import FORMATS, KINDS
from lowmem_rmu.export.verification import Compared
from lowmem_rmu.model.adapters import add_adapter, save_adapter
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.queue import one_at_a_time, take_ticket
from lowmem_rmu.runs.status import Silent, StatusWriter
from lowmem_rmu.ui import jobs
from lowmem_rmu.ui.tabs.export import (
    FORMAT_WORDS,
    KIND_WORDS,
    NOTHING,
    ExportTab,
    output_of,
    place_of,
    progress,
)
from tests.texts import plain, text_with
from tests.waiting import wait_until

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the tiny model with an adapter, and one that has none yet."""
    runs_dir, preset = tmp_path_factory.mktemp("runs"), load_preset("tiny")
    model = add_adapter(load_model(preset.model, CPU), preset.rmu, preset.model)
    for age, name in enumerate(("newest", "older", "unfinished")):
        run = RunFolder.create(runs_dir, name)
        write_json(run.path / "config.json", {"settings": preset.model_dump()})
        os.utime(run.path / "config.json", (1e9 - age, 1e9 - age))
        if name != "unfinished":
            save_adapter(model, run.adapter)
    return runs_dir


@pytest.fixture
def tab(runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExportTab:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / ".page"))
    with gr.Blocks():
        return ExportTab(runs_dir, CPU)


def wait_for_export(run: RunFolder) -> None:
    wait_until(lambda: not jobs.is_exported_now(run), seconds=120)


def test_every_format_is_offered_in_words() -> None:
    assert tuple(FORMAT_WORDS) == FORMATS
    assert tuple(KIND_WORDS) == KINDS


def test_runs_with_an_adapter_are_offered_newest_first(tab: ExportTab, tmp_path: Path) -> None:
    update = tab.refresh(None)
    assert (update["choices"], update["value"]) == (["newest", "older"], "newest")
    for chosen in ("older", "unfinished", "gone"):
        assert "value" not in tab.refresh(chosen), "by the time it arrives another may have been chosen"
    with gr.Blocks():
        nothing = ExportTab(tmp_path / "nowhere", CPU).refresh(None)
    assert (nothing["choices"], nothing["value"]) == ([], None)


def test_an_export_from_the_page(tab: ExportTab, forgetful: RunFolder, tmp_path: Path) -> None:
    tab.runs_dir = forgetful.path.parent
    assert tab.show("forgetful", "adapter", "q8_0")[0] == NOTHING
    told, button, seen = tab.start("forgetful", "adapter", "q8_0")
    assert plain(told.partition(":")[0]) == snapshot("<p><strong>At work</strong>")
    assert button["interactive"] is False
    with pytest.raises(UserError) as caught:
        tab.start("forgetful", "merged", "q8_0")
    assert plain(caught.value) == snapshot(
        "Run forgetful is being exported already: wait until that is done."
    )
    with pytest.raises(UserError) as caught:
        jobs.delete(forgetful)
    assert plain(caught.value) == snapshot(
        "Run forgetful is being exported: wait until that is done before it is deleted."
    )
    wait_for_export(forgetful)
    told, button, seen = tab.tick("forgetful", "adapter", "q8_0", seen)
    place = place_of(forgetful, "adapter", "q8_0")
    done, verified, *_ = re.findall("<p>(.*?)</p>", told)
    assert done.endswith(place.name)
    assert plain(done.partition(":")[0]) == snapshot("<strong>Done</strong>"), output_of(place).read_text()
    assert plain(verified) == snapshot("Asked the run's own questions: <strong>verified</strong>.")
    assert "<th scope='row'>compounds</th><td>100.0%" in told
    path = Path(button["value"])
    assert path.name == "forgetful-adapter.zip"
    assert path.is_relative_to(tmp_path / ".page"), "it lies where this page's files do"
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.read("adapter_config.json"))["peft_type"] == "LORA"
        assert {"README.md", "SHA256SUMS", "verification.json", "reproduce/preset.yaml"} <= set(
            archive.namelist()
        )
    assert tab.tick("forgetful", "adapter", "q8_0", seen) == (gr.skip(), gr.skip(), gr.skip())
    with pytest.raises(UserError) as caught:
        tab.start("forgetful", "adapter", "q8_0")
    assert plain(caught.value, place=place_of(forgetful, "adapter", "q8_0")) == snapshot(
        "This export is there already, in <place>.\nDelete that folder to have it made again."
    )


NO_ADAPTER = UserError("Run x has no adapter.", Fix("Go on with it: {action}", ResumeRun("x")))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            UserError("The disk <b> is full.", "Make room."),
            snapshot(
                "<p><strong>Failed</strong></p><pre class='rmu-error'>The disk &lt;b&gt; is full.\n"
                "Make room.</pre>"
            ),
        ),
        (
            KeyError("x"),
            snapshot(
                "<p><strong>Failed</strong></p><pre class='rmu-error'>Its process ended before it was done. "
                "Do it again.</pre>"
            ),
        ),
        (
            NO_ADAPTER,
            snapshot(
                "<p><strong>Failed</strong></p><pre class='rmu-error'>Run x has no adapter.\n"
                "Go on with it: Resume, under Runs.</pre>"
            ),
        ),
    ],
)
def test_why_an_export_failed_is_told_without_a_stack_trace(
    runs_dir: Path, error: Exception, said: str
) -> None:
    run = RunFolder(runs_dir / "older")
    place = place_of(run, "merged", "q8_0")
    with suppress(UserError, KeyError), StatusWriter(run.job_status("export-merged"), Silent()):
        raise error
    told = progress(run, place)
    run.job_status("export-merged").unlink()
    assert plain(told) == said
    assert "Traceback" not in told


def test_an_export_whose_process_was_killed_has_failed(runs_dir: Path) -> None:
    run = RunFolder(runs_dir / "older")
    jobs.begin(run, "export-merged")
    assert plain(progress(run, place_of(run, "merged", "q8_0"))) == snapshot(
        "<p><strong>Failed</strong></p><pre class='rmu-error'>Its process ended before it was done. Do it "
        "again.</pre>"
    )
    run.job_status("export-merged").unlink()


HOSTILE = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"


def make_export(run: RunFolder, name: str, **verification: Any) -> Path:
    """An export that lies in a run's folder, with what verifying it found."""
    place = run.exports / name
    place.mkdir(parents=True)
    write_json(place / "verification.json", verification)
    return place


def test_nothing_in_a_verification_is_markup(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "runs", "mine")
    numbers = {each.name: 0.5 for each in fields(Compared)}
    task = numbers | {"task": HOSTILE, "role": "forgotten", "questions": 8, "finding": "survived"}
    ways = [
        {"name": HOSTILE, "mark": "verified", "reason": None, "seconds": 1.0, "tasks": [task]},
        {"name": HOSTILE, "mark": None, "reason": HOSTILE, "seconds": 0.0, "tasks": []},
    ]
    told = progress(run, make_export(run, "adapter", mark="verified", checked=ways))
    assert "<img" not in told
    assert "<script" not in told
    assert told.count("&lt;script&gt;") == 4


HOSTILE_MARK = json.dumps({"mark": HOSTILE, "checked": []})


WRONG_NAME = json.dumps({"mark": "verified", "checked": [{"mark": "verified", "name": 3}]})


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", HOSTILE_MARK, WRONG_NAME, json.dumps({"mark": "verified"})]
)
def test_a_damaged_verification_is_told_and_the_rest_is_shown(tmp_path: Path, content: str) -> None:
    run = RunFolder.create(tmp_path / "runs", "mine")
    place = make_export(run, "adapter")
    (place / "verification.json").write_text(content)
    told = progress(run, place)
    assert told.startswith("<p><strong>Done</strong>: ")
    assert re.search(
        r"verification\.json (is|was written by another version of this program, or is) damaged", told
    )
    assert "<script" not in told


def test_the_form_remembers_what_was_exported(tab: ExportTab, tmp_path: Path) -> None:
    tab.runs_dir = tmp_path / "runs"
    run = RunFolder.create(tab.runs_dir, "mine")
    write_json(run.path / "config.json", {})
    assert tab.choose("mine") == tab.choose("gone") == tab.choose(None) == (gr.skip(), gr.skip())
    for age, name in ((20, "merged"), (10, "gguf-q4_0"), (30, "adapter")):
        os.utime(make_export(run, name, mark="verified", checked=[]), (1e9 - age,) * 2)
    assert tab.choose("mine") == ("gguf", "q4_0")
    told, _, _ = tab.show("mine", "merged", "q8_0")
    assert text_with(told, "gguf q4_0") == snapshot("Also exported: adapter, gguf q4_0.")
    assert plain(tab.show("mine", "gguf", "f16")[0]) == snapshot(
        "<p>Not exported yet.</p><p>Also exported: adapter, merged, gguf q4_0.</p>"
    )
    output_of(run.exports / "merged").write_text("At work")
    assert tab.choose("mine") == ("merged", gr.skip()), "one that failed or is under way counts too"


def test_an_export_that_waits_says_for_what(runs_dir: Path) -> None:
    run, process = (
        RunFolder(runs_dir / "older"),
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]),
    )
    place = place_of(run, "gguf", "f16")
    jobs.begin(run, "export-gguf-f16")
    with one_at_a_time(runs_dir):
        first = take_ticket(runs_dir, "other", os.getpid())
        ticket = take_ticket(runs_dir, run.export_name, process.pid)
    assert plain(progress(run, place)) == snapshot("<p><strong>At work</strong>: waiting for other …</p>")
    process.kill()
    process.wait()
    first.give_back()
    ticket.give_back()
    run.job_status("export-gguf-f16").unlink()


def test_how_numbers_are_stored_is_asked_for_gguf_alone(tab: ExportTab) -> None:
    assert [tab.show_kinds(format)["visible"] for format in FORMATS] == [False, False, True]
    assert {place_of(RunFolder(Path("x")), format, "q4_0").name for format in FORMATS} == {
        "adapter",
        "merged",
        "gguf-q4_0",
    }


@pytest.mark.parametrize(
    ("name", "format", "said"),
    [
        (
            None,
            "adapter",
            snapshot("Choose a run first.\nThere is none yet? Start one in the Unlearn tab."),
        ),
        (
            "",
            "adapter",
            snapshot("Choose a run first.\nThere is none yet? Start one in the Unlearn tab."),
        ),
        (
            "unfinished",
            "merged",
            snapshot("Run unfinished has no adapter yet.\nResume it, and wait until it has unlearned."),
        ),
        ("newest", "../x", snapshot("Choose a format first.")),
        ("newest", None, snapshot("Choose a format first.")),
    ],
)
def test_what_cannot_be_exported_is_told(tab: ExportTab, name: str | None, format: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        tab.start(name, format, "q8_0")
    assert plain(caught.value) == said


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
def test_only_runs_are_exported(tab: ExportTab, name: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        tab.start(name, "adapter", "q8_0")
    assert plain(caught.value, runs=tab.runs_dir) == said
    assert tab.tick(name, "adapter", "q8_0", "") == (gr.skip(), gr.skip(), gr.skip())


def test_no_event_is_part_of_the_public_api(runs_dir: Path) -> None:
    with gr.Blocks() as page:
        ExportTab(runs_dir, CPU).wire(page.load)
    assert page.fns
    assert {event.api_visibility for event in page.fns.values()} == {"private"}
