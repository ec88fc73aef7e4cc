"""The tab with every run: the list, and what its buttons do to real folders."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import gradio as gr
import pytest
import yaml
from inline_snapshot import snapshot

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.errors import UserError
from lowmem_rmu.runs.files import folder_replaced, write_atomically, write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.queue import one_at_a_time, take_ticket
from lowmem_rmu.ui import jobs
from lowmem_rmu.ui.tabs.runs import COLUMNS, RunsTab, rows
from tests.records import audit_json
from tests.texts import plain

VERDICT = {"forgotten": "yes", "kept": "partly", "sentences": []}


def make_run(
    runs_dir: Path, name: str, state: str = "done", age: float = 0, verdict: Any = None
) -> RunFolder:
    run = RunFolder.create(runs_dir, name)
    config = {
        "preset": "tiny",
        "device": "cpu",
        "settings": load_preset("tiny", ["title=Vergiß"]).model_dump(),
    }
    write_json(run.path / "config.json", config)
    os.utime(run.path / "config.json", (time.time() - age,) * 2)
    run.write_status("unlearn", 3, 9, state)
    if verdict is not None:
        write_json(run.path / "summary.json", {"verdict": verdict})
    return run


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    """A finished run, one that was stopped, and a folder whose process was refused."""
    make_run(tmp_path, "finished", age=20, verdict=VERDICT)
    make_run(tmp_path, "stopped", "stopped", age=40)
    refused = jobs.reserve(tmp_path, "tiny", "refused")
    (refused.path / "zephyr-7b.yaml").write_text("title: so")
    os.utime(refused.output, (time.time() - 60,) * 2)
    return tmp_path


@pytest.fixture(scope="module")
def built() -> RunsTab:
    with gr.Blocks():
        return RunsTab(Path("nowhere"))


@pytest.fixture
def tab(built: RunsTab, runs_dir: Path) -> RunsTab:
    """The same widgets over another folder: making them takes a while."""
    built.runs_dir = runs_dir
    return built


@pytest.fixture
def busy(runs_dir: Path) -> Iterator[RunFolder]:
    """A run whose process lives."""
    run = make_run(runs_dir, "busy", "running")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with one_at_a_time(runs_dir):
        take_ticket(runs_dir, "busy", process.pid)
    yield run
    process.kill()
    process.wait()


def listed(runs_dir: Path) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in rows(runs_dir)}


def test_every_run_has_a_row(runs_dir: Path, busy: RunFolder) -> None:
    found = rows(runs_dir)
    assert all(len(row) == len(COLUMNS) for row in found)
    assert [row[:4] for row in found] == snapshot(
        [
            ["busy", "running", "tiny", "–"],
            ["finished", "done", "tiny", "Forgotten: yes. Kept: partly. Audit: not audited."],
            ["stopped", "stopped; it can go on", "tiny", "–"],
            ["refused", "failed", "zephyr-7b", "–"],
        ]
    )


def test_a_runs_folder_that_is_not_there_is_an_empty_list(tmp_path: Path) -> None:
    assert rows(tmp_path / "nowhere") == []


def test_the_size_is_that_of_all_its_files(runs_dir: Path) -> None:
    path = runs_dir / "finished/checkpoint"
    path.mkdir()
    (path / "weights").write_bytes(bytes(12_300_000))
    (path / "link").symlink_to(path / "weights")
    assert listed(runs_dir)["finished"][-1] == "12.3 MB"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_run_spoils_no_list_and_can_be_deleted(tab: RunsTab, runs_dir: Path, content: str) -> None:
    run = make_run(runs_dir, "damaged")
    (run.path / "config.json").write_text(content)
    (run.path / "summary.json").write_text(content)
    assert len(listed(runs_dir)) == 4
    assert tab.settings_of("damaged") == ""
    tab.delete("damaged")
    assert len(listed(runs_dir)) == 3


def test_the_list_names_what_the_audit_found(runs_dir: Path) -> None:
    audit = audit_json("finished", 60, True, 1.0, 0.3, [])
    write_json(runs_dir / "finished/audit.json", audit | {"verdict": {"mark": "hidden", "sentences": []}})
    assert rows(runs_dir)[0][3] == snapshot("Forgotten: yes. Kept: partly. Audit: hidden.")
    (runs_dir / "finished/audit.json").write_text("{")
    assert rows(runs_dir)[0][3] == snapshot("Forgotten: yes. Kept: partly. Audit: not readable.")


@pytest.mark.parametrize("verdict", [{}, {"forgotten": "yes"}, [], "yes", 3])
def test_a_summary_of_another_version_has_no_verdict(runs_dir: Path, verdict: Any) -> None:
    make_run(runs_dir, "other", verdict=verdict)
    assert listed(runs_dir)["other"][2] == "–"


def test_files_that_come_and_go_do_not_spoil_the_list(runs_dir: Path) -> None:
    """A run under way replaces its files all the time."""
    over = Event()

    def write() -> None:
        while not over.is_set():
            write_atomically(runs_dir / "stopped/status.json", "{}")
            with folder_replaced(runs_dir / "stopped/adapter") as new:
                (new / "weights").touch()

    writer = Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            rows(runs_dir)
    finally:
        over.set()
        writer.join()


def test_a_choice_stays_as_long_as_it_is_there(tab: RunsTab) -> None:
    table, run = tab.refresh("stopped")
    assert [row[0] for row in table] == run["choices"] == ["finished", "stopped", "refused"]
    assert "value" not in run, "by the time it arrives another may have been chosen"
    assert "value" not in tab.refresh("gone")[1], "of a run that is gone too"
    assert tab.refresh(None)[1]["value"] == "finished"


def test_settings_are_shown_as_a_preset_that_loads(tab: RunsTab, tmp_path: Path) -> None:
    (tmp_path / "again.yaml").write_text(tab.settings_of("finished"), encoding="utf-8")
    assert load_preset(str(tmp_path / "again.yaml")) == load_preset("tiny", ["title=Vergiß"])
    assert "title: Vergiß" in tab.settings_of("finished")
    assert tab.settings_of(None) == tab.settings_of("refused") == ""


def test_deleting_asks_first_and_says_how_much_goes(tab: RunsTab, runs_dir: Path) -> None:
    question, words, asked_about = tab.ask("finished")
    assert asked_about == "finished"
    assert question["visible"] is True
    assert words == snapshot("Delete **finished** (0.0 MB)? This cannot be undone.")
    assert (runs_dir / "finished").exists()
    table, run, question = tab.delete("finished")
    assert not (runs_dir / "finished").exists()
    assert ([row[0] for row in table], run["value"], question["visible"]) == (
        ["stopped", "refused"],
        "stopped",
        False,
    )


def test_renaming_keeps_the_run_chosen(tab: RunsTab, runs_dir: Path) -> None:
    table, run = tab.rename("stopped", "  better ")
    assert run["value"] == "better"
    assert [row[0] for row in table] == ["finished", "better", "refused"]
    assert (runs_dir / "better/config.json").is_file()


@pytest.mark.parametrize("name", ["", "  "])
def test_a_new_name_has_to_be_typed(tab: RunsTab, name: str) -> None:
    with pytest.raises(UserError) as caught:
        tab.rename("stopped", name)
    assert plain(caught.value) == snapshot("Type the new name first.")


@pytest.mark.parametrize("act", ["resume", "ask", "delete"])
def test_a_run_has_to_be_chosen(tab: RunsTab, act: str) -> None:
    with pytest.raises(UserError) as caught:
        getattr(tab, act)(None)
    assert plain(caught.value, runs=tab.runs_dir) == snapshot("Choose a run first.")
    with pytest.raises(UserError) as caught:
        getattr(tab, act)("gone")
    assert plain(caught.value, runs=tab.runs_dir) == snapshot(
        "There is no run gone in <runs>. There is: finished, stopped."
    )


def test_what_is_under_way_is_left_alone(tab: RunsTab, busy: RunFolder) -> None:
    for act, said in (
        (lambda: tab.delete("busy"), snapshot("Run busy is under way: stop it before it is deleted.")),
        (
            lambda: tab.rename("busy", "idle"),
            snapshot("Run busy is under way: stop it before it is renamed."),
        ),
        (lambda: tab.resume("busy"), snapshot("Run busy is under way already.")),
    ):
        with pytest.raises(UserError) as caught:
            act()
        assert plain(caught.value) == said
    assert yaml.safe_load(tab.settings_of("busy"))["title"] == "Vergiß"


def test_no_event_is_part_of_the_public_api(runs_dir: Path) -> None:
    with gr.Blocks() as page:
        RunsTab(runs_dir).wire(page.load)
    assert page.fns
    assert {event.api_visibility for event in page.fns.values()} == {"private"}


def test_what_was_asked_about_is_deleted_though_another_was_chosen_meanwhile(
    tab: RunsTab, runs_dir: Path
) -> None:
    *_, asked_about = tab.ask("finished")
    _, run, _ = tab.delete(asked_about, "stopped")
    assert not (runs_dir / "finished").exists()
    assert "value" not in run, "the other stays chosen"


def test_resume_is_there_for_what_can_go_on(tab: RunsTab, busy: RunFolder) -> None:
    shown = {
        name: tab.buttons(name)["interactive"]
        for name in ("finished", "stopped", "busy", "refused", "gone", None)
    }
    assert shown == {
        "finished": False,
        "stopped": True,
        "busy": False,
        "refused": True,
        "gone": False,
        None: False,
    }
