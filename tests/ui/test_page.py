"""The page as a whole: what its API offers, what it keeps to itself, and what the endpoints give and refuse."""

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch
from inline_snapshot import snapshot

from lowmem_rmu.config.loading import load_preset, preset_names
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.ui.page import build_page, style
from lowmem_rmu.ui.tabs.chat import LoadedModel
from tests.texts import plain

CPU = torch.device("cpu")
ENDPOINTS = {"list_presets", "start", "status", "stop", "results", "chat"}
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs_dir = tmp_path_factory.mktemp("runs")
    run = RunFolder.create(runs_dir, "mine")
    write_json(
        run.path / "config.json",
        {"preset": "tiny", "device": "cpu", "settings": load_preset("tiny").model_dump()},
    )
    write_json(
        run.path / "status.json",
        {"stage": "unlearn", "step": 3, "total": 9, "state": "stopped", "pid": 0, "error": None},
    )
    return runs_dir


@pytest.fixture(scope="module")
def page(runs_dir: Path) -> gr.Blocks:
    return build_page(runs_dir, CPU, LoadedModel())


@pytest.fixture
def endpoint(page: gr.Blocks) -> Callable[..., Any]:
    """Calls an endpoint as the API does."""
    functions = {event.api_name: event.fn for event in page.fns.values() if event.api_visibility == "public"}
    return lambda name, *arguments: functions[name](*arguments)


def refused(endpoint: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(gr.Error) as caught:
        endpoint(*arguments)
    return caught.value.message


def test_the_api_is_six_endpoints_and_no_more(page: gr.Blocks) -> None:
    events = list(page.fns.values())
    assert {event.api_name for event in events if event.api_visibility == "public"} == ENDPOINTS
    others = [event for event in events if event.api_name not in ENDPOINTS]
    assert len(others) > 10
    assert {event.api_visibility for event in others} == {"private"}
    assert {name.removeprefix("/") for name in page.get_api_info()["named_endpoints"]} == ENDPOINTS
    assert page.get_api_info()["unnamed_endpoints"] == {}


def test_every_endpoint_says_what_it_does(page: gr.Blocks) -> None:
    told = page.get_api_info()["named_endpoints"]
    for event in page.fns.values():
        if event.api_visibility == "public":
            words = inspect.getdoc(event.fn) or ""
            assert words.endswith("."), event.api_name
            assert " ".join(words.split(".")[0].split()) in told[f"/{event.api_name}"]["description"]
    assert {each["parameter_name"] for each in told["/start"]["parameters"]} == {"preset", "name", "settings"}


def test_answers_are_made_one_at_a_time(page: gr.Blocks) -> None:
    [chat] = [event for event in page.fns.values() if event.api_name == "chat"]
    assert (chat.queue, chat.concurrency_limit) == (True, 1)


def test_the_look_comes_from_this_machine() -> None:
    assert ".rmu-table" in style()
    assert ".chat-panes" in style()
    for outside in ("http:", "https:", "@import", "url("):
        assert outside not in style()


def test_the_page_reports_to_nobody(page: gr.Blocks) -> None:
    assert page.analytics_enabled is False


def test_presets_and_states_can_be_sent_as_json(endpoint: Callable[..., Any]) -> None:
    listed = json.loads(json.dumps(endpoint("list_presets")))
    assert {each["preset"] for each in listed} == set(preset_names())
    told = json.loads(json.dumps(endpoint("status", "mine")))
    assert (told["name"], told["state"], told["stage"], told["step"], told["total"]) == (
        "mine",
        "stopped",
        "unlearn",
        3,
        9,
    )
    assert told.keys() == {"name", "state", "stage", "step", "total", "place", "seconds_left", "error"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("status", ""), snapshot("Choose a run first.")),
        (("status", "mind"), snapshot("There is no run mind in <runs>. Did you mean &#34;mine&#34;?")),
        (
            ("status", f"../{HOSTILE}"),
            snapshot(
                "&#34;../&lt;script&gt;alert(1)&lt;/script&gt;&#34; cannot be the name of a run: use "
                "letters, digits, &#34;.&#34;, &#34;_&#34; and &#34;-&#34; only, at most 100, and no name of "
                "a Windows device, so that it stays inside <runs>."
            ),
        ),
        (("stop", "mine"), snapshot("Run mine is not under way.")),
        (
            ("stop", "/etc"),
            snapshot(
                "&#34;/etc&#34; cannot be the name of a run: use letters, digits, &#34;.&#34;, &#34;_&#34; "
                "and &#34;-&#34; only, at most 100, and no name of a Windows device, so that it stays inside "
                "<runs>."
            ),
        ),
        (
            ("results", "mine"),
            snapshot(
                "Run <runs>/mine has no summary.json: it has not finished.\n"
                "Go on with it: Resume, under Runs."
            ),
        ),
        (
            ("chat", "mine", "Why?"),
            snapshot("Run <runs>/mine has no adapter yet.\nGo on with it: Resume, under Runs."),
        ),
        (("start", "tyni"), snapshot("Choose one of the presets first.")),
        (
            ("start", "tiny", "mine", ""),
            snapshot("Run mine exists already.\nChoose another name."),
        ),
        (
            ("start", "tiny", "x" * 300),
            snapshot(
                "&#34;<long>&#34; cannot be the name of a run: use letters, digits, &#34;.&#34;, &#34;_&#34; "
                "and &#34;-&#34; only, at most 100, and no name of a Windows device, so that it stays inside "
                "<runs>."
            ),
        ),
        (
            ("start", "tiny", "new", "rmu.steps=0"),
            snapshot(
                "What was given has 1 mistake:\n  rmu.steps: should be greater than or equal to 1 (it is 0)"
            ),
        ),
        (
            ("start", "tiny", "new", "model.name=./x"),
            snapshot(
                "A setting names another model, text or questions: that cannot be done from the page.\n"
                "Drop your own text in above, or put a preset of your own into the folder presets/ and start "
                "the app again."
            ),
        ),
        (
            ("start", "tiny", "new", HOSTILE),
            snapshot(
                "&#34;&lt;script&gt;alert(1)&lt;/script&gt;&#34; is not of the form key.path=value, for "
                "example rmu.steps=50."
            ),
        ),
    ],
)
def test_a_mistake_at_an_endpoint_is_told_and_leaves_nothing(
    endpoint: Callable[..., Any], runs_dir: Path, arguments: tuple[str, ...], said: str
) -> None:
    told = refused(endpoint, *arguments)
    assert "<" not in told
    assert plain(told, runs=runs_dir, long="x" * 300) == said
    assert [path.name for path in runs_dir.iterdir() if path.name != ".queue"] == ["mine"]


def test_too_little_memory_is_told_before_anything_is_made(
    endpoint: Callable[..., Any], runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lowmem_rmu.memory.advice.memory_available", lambda device: 2**20
    )  # a full machine cannot be had otherwise
    assert "1 MiB are free on cpu." in refused(endpoint, "start", "tiny", "new", "")
    assert not (runs_dir / "new").exists()


def test_what_no_event_foresaw_is_an_apology(endpoint: Callable[..., Any], runs_dir: Path) -> None:
    path = RunFolder.create(runs_dir, "broken").path
    (path / "config.json").write_text("{}")
    (path / "status.json").mkdir()
    try:
        assert refused(endpoint, "status", "broken") == snapshot(
            "Something went wrong here, and it was not you. The terminal that runs app.py says more."
        )
    finally:
        (path / "status.json").rmdir()
        (path / "config.json").unlink()
        (path / "evaluation").rmdir()
        path.rmdir()


def test_building_the_page_makes_nothing_in_the_runs_folder(tmp_path: Path) -> None:
    before = dict(os.environ)
    build_page(tmp_path / "nowhere", CPU, LoadedModel())
    assert not (tmp_path / "nowhere").exists()
    assert dict(os.environ) == before
