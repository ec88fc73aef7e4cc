"""The Chat tab: the one model in memory, what its events give, and the messages for whatever cannot be done."""

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import gradio as gr
import psutil
import pytest
import torch
from inline_snapshot import snapshot

from lowmem_rmu.chat.conversation import SIDES, Sampling
from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.errors import UserError
from lowmem_rmu.model.adapters import add_adapter, save_adapter
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.queue import one_at_a_time, take_ticket
from lowmem_rmu.ui.tabs import chat
from lowmem_rmu.ui.tabs.chat import (
    ChatTab,
    Conversation,
    LoadedModel,
    ask,
    build,
    foretold_bytes,
    read_sampling,
    room_made,
    suggested_prompts,
    where_they_part,
)
from tests.texts import plain, without_numbers

CPU = torch.device("cpu")
UNLOADED = snapshot("The chat model was unloaded to make room for a run.")
PROMPT = "Where does the bird Jinidove nest?"


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the tiny model with a random adapter, and one that has none yet."""
    runs_dir, preset = tmp_path_factory.mktemp("runs"), load_preset("tiny")
    model = add_adapter(load_model(preset.model, CPU), preset.rmu, preset.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    for age, name in enumerate(("newest", "older", "unfinished")):
        run = RunFolder.create(runs_dir, name)
        write_json(run.path / "config.json", {"settings": preset.model_dump(mode="json")})
        os.utime(run.path / "config.json", (1e9 - age, 1e9 - age))
        if name != "unfinished":
            save_adapter(model, run.adapter)
    return runs_dir


@pytest.fixture
def run(runs_dir: Path) -> RunFolder:
    return RunFolder(runs_dir / "newest")


@pytest.fixture
def holder() -> Iterator[LoadedModel]:
    holder = LoadedModel()
    yield holder
    holder.unload()


@pytest.fixture
def tab(runs_dir: Path, holder: LoadedModel) -> ChatTab:
    with gr.Blocks(), gr.Tab("Chat"):
        return build(runs_dir, CPU, holder)


def send(
    tab: ChatTab, prompt: str = PROMPT, conversation: Conversation | None = None, **changed: Any
) -> Iterator[dict[Any, Any]]:
    typed = {"name": "newest", "system_prompt": "", "temperature": 0, "length": 12, "seed": 0} | changed
    yield from tab.send(prompt=prompt, conversation=conversation or Conversation(), **typed)


def merged(updates: Iterator[dict[Any, Any]]) -> dict[Any, Any]:
    """What every widget holds at the end."""
    return {widget: value for update in updates for widget, value in update.items()}


def test_a_model_is_loaded_once_and_named(holder: LoadedModel, run: RunFolder, runs_dir: Path) -> None:
    assert (holder.name, holder.bytes, holder.status) == (None, 0, snapshot("No chat model is loaded."))
    model = holder.load(run, CPU)
    assert holder.load(run, CPU) is model
    assert (holder.name, holder.bytes) == ("newest", foretold_bytes(run, CPU))
    assert without_numbers(holder.status) == snapshot("Loaded: the model of newest. It takes about N MiB.")
    holder.load(RunFolder(runs_dir / "older"), CPU)
    assert model.is_closed
    assert holder.name == "older"


def test_unloading_frees_the_model(holder: LoadedModel, run: RunFolder) -> None:
    holder.load(run, CPU).answers(PROMPT, Sampling(max_new_tokens=4))
    kept = holder.load(run, CPU)  # as a page does that was answering
    assert kept._parts
    alive, before = weakref.ref(kept._parts[0]), psutil.Process().memory_info().rss
    holder.unload()
    assert alive() is None
    assert psutil.Process().memory_info().rss <= before
    assert (holder.name, holder.bytes) == (None, 0)
    assert holder.status == UNLOADED


def test_what_it_takes_is_foretold(holder: LoadedModel, run: RunFolder) -> None:
    gc.collect()
    before = psutil.Process().memory_info().rss
    holder.load(run, CPU).answers(PROMPT, Sampling(max_new_tokens=64))
    taken = psutil.Process().memory_info().rss - before
    assert taken < 1.5 * foretold_bytes(run, CPU) + 16 * 2**20, (
        "beside the libraries' own memory at their first use"
    )


def test_a_model_that_does_not_fit_is_refused_and_the_loaded_one_stays(
    holder: LoadedModel, run: RunFolder, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder.load(RunFolder(runs_dir / "older"), CPU)
    monkeypatch.setattr(
        chat, "memory_available", lambda device: 2**20 - holder.bytes
    )  # a full machine cannot be had otherwise
    with pytest.raises(UserError) as caught:
        holder.load(run, CPU)
    assert without_numbers(caught.value) == snapshot(
        "The chat model of newest takes about N MiB, but N MiB are free on cpu.\n"
        "Stop a run or close other programs, then load it again."
    )
    assert holder.name == "older"


def test_room_is_made_only_where_it_is_short(holder: LoadedModel, run: RunFolder) -> None:
    for needed, stays in ((2**20, True), (2**60, False), (None, False)):
        holder.load(run, CPU)
        holder.make_room(needed, CPU)
        assert (holder.name == "newest") == stays


def test_a_run_whose_turn_comes_finds_room_whoever_started_it(
    holder: LoadedModel, run: RunFolder, runs_dir: Path
) -> None:
    holder.load(run, CPU)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with room_made(holder, runs_dir, CPU):
        with one_at_a_time(runs_dir):
            ticket = take_ticket(runs_dir, "begun-on-the-command-line", process.pid)
        until = time.monotonic() + 180
        while holder.name and time.monotonic() < until:
            time.sleep(0.1)
        assert holder.status == UNLOADED
    process.kill()
    process.wait()
    ticket.give_back()
    assert not [thread for thread in threading.enumerate() if "watch" in thread.name]


def test_a_model_finds_no_room_beside_a_run_that_may_grow(
    holder: LoadedModel, run: RunFolder, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_at_a_time(runs_dir):
        ticket = take_ticket(runs_dir, "older", os.getpid())
    monkeypatch.setattr(chat, "memory_available", lambda device: foretold_bytes(run, CPU) + 2**20)
    with pytest.raises(UserError) as caught:
        holder.load(run, CPU)
    assert without_numbers(caught.value).replace("GiB", "MiB") == snapshot(
        "The chat model of newest takes about N MiB in addition to the N MiB of run older, but N MiB are "
        "free on cpu.\n"
        "Stop a run or close other programs, then load it again."
    )
    ticket.give_back()
    holder.load(run, CPU)


def test_unloading_stops_an_answer_that_is_being_made(holder: LoadedModel, run: RunFolder) -> None:
    stream = holder.load(run, CPU).stream(PROMPT, Sampling(max_new_tokens=400, temperature=5.0), Event())
    next(stream)
    begun = time.monotonic()
    holder.unload()
    assert time.monotonic() - begun < 2
    assert {side for side, _ in stream} <= {"base"}


def test_a_run_made_anew_under_its_name_is_loaded_anew(holder: LoadedModel, run: RunFolder) -> None:
    first = holder.load(run, CPU)
    os.utime(run.adapter)
    assert holder.load(run, CPU) is not first


def test_a_conversation_from_the_page(tab: ChatTab, run: RunFolder) -> None:
    updates = list(send(tab))
    assert without_numbers(updates[0][tab.status]) == snapshot("Loading the model of newest, about N MiB …")
    assert updates[1][tab.prompt] == ""
    assert isinstance(updates[1][tab.stop], Event)
    shown = merged(iter(updates))
    first = shown[tab.conversation]
    again = merged(send(tab, "Sure?", first))
    conversation = again[tab.conversation]
    assert [turn.prompt for turn in conversation.turns] == [PROMPT, "Sure?"]
    assert first.turns[0].base != first.turns[0].unlearned
    for side, pane in tab.panes.items():
        assert [message["content"] for message in again[pane]][:2] == [PROMPT, first.turns[0].of(side)]
    assert "parting-unlearned" in shown[tab.parting]
    assert all(again[button].interactive for button in tab.downloads)
    files = {path.suffix: path for path in (run.path / "conversations").iterdir()}
    assert files.keys() == {".md", ".json"}, "one conversation, one file of each kind"
    assert [turn["prompt"] for turn in json.loads(files[".json"].read_text())["turns"]] == [PROMPT, "Sure?"]
    shutil.rmtree(run.path / "conversations")


def test_another_run_begins_another_conversation(tab: ChatTab) -> None:
    first = merged(send(tab))[tab.conversation]
    second = merged(send(tab, PROMPT, first, name="older"))[tab.conversation]
    assert (second.run, len(second.turns)) == ("older", 1)
    assert second.started != first.started


def test_stop_ends_the_answer_and_keeps_what_there_is(tab: ChatTab) -> None:
    updates = send(tab, length=400, temperature=5.0)
    seen: dict[Any, Any] = {}
    for update in updates:
        seen |= update
        if tab.stop in update and update[tab.stop]:
            tab.stop_answer(update[tab.stop])
    turn = seen[tab.conversation].turns[-1]
    assert turn.stopped
    assert not turn.unlearned
    assert seen[tab.panes["unlearned"]][-1]["content"] == snapshot("(nothing)")
    tab.stop_answer(None)


def test_a_closed_page_leaves_nothing_running(tab: ChatTab) -> None:
    updates = send(tab, length=400, temperature=5.0)
    assert any(tab.parting in next(updates) for _ in range(4))
    updates.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if "_answer_into" in thread.name]


def test_the_page_says_that_a_run_took_the_memory(tab: ChatTab, holder: LoadedModel) -> None:
    updates = send(tab, length=400, temperature=5.0)
    for update in updates:
        if update.get(tab.stop):
            break
    next(updates)
    holder.unload()
    shown = merged(updates)
    assert shown[tab.status] == UNLOADED
    assert shown[tab.conversation].turns[-1].stopped


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"prompt": "  "},
            snapshot("The prompt is empty.\nType a question, or choose one of the suggested prompts."),
        ),
        (
            {"name": None},
            snapshot("No run is chosen.\nChoose one above. There is none yet? Start one in the Unlearn tab."),
        ),
        (
            {"name": "unfinished"},
            snapshot(
                "Run <runs>/unfinished has no adapter yet.\n"
                "Go on with it: python -m lowmem_rmu.run ... --resume --name unfinished"
            ),
        ),
        ({"name": "newes"}, snapshot('There is no run newes in <runs>. Did you mean "newest"?')),
        (
            {"name": "../newest"},
            snapshot(
                '"../newest" cannot be the name of a run: use letters, digits, ".", "_" and "-" only, at '
                "most 100, and no name of a Windows device, so that it stays inside <runs>."
            ),
        ),
        (
            {"temperature": None},
            snapshot("The temperature is empty: give a number, 0 or more, for example 0.7."),
        ),
        (
            {"temperature": "warm"},
            snapshot("The temperature is “warm”: give a number, 0 or more, for example 0.7."),
        ),
        (
            {"temperature": -0.5},
            snapshot(
                "The temperature is -0.5: give 0 (always the likeliest word) or a number above it, for "
                "example 0.7."
            ),
        ),
        ({"length": 0}, snapshot("The length is 0: give at least 1 token.")),
        ({"length": 1.5}, snapshot("The length is “1.5”: give a whole number, for example 256.")),
        (
            {"length": 10**5},
            snapshot(
                "The length is 100000, but the model reads at most 512 tokens, prompt and answer together."
            ),
        ),
        ({"seed": float("inf")}, snapshot("The seed is “inf”: give a whole number, for example 0.")),
        ({"seed": -1}, snapshot("The seed is -1: give a whole number from 0 to 9223372036854775807.")),
    ],
)
def test_a_mistake_gives_one_clear_message_and_loses_nothing(
    tab: ChatTab, changed: dict[str, Any], message: str
) -> None:
    updates = list[dict[Any, Any]]()
    with pytest.raises(UserError) as error:
        updates.extend(send(tab, **changed))
    assert plain(error.value, runs=tab.runs_dir) == message
    shown = merged(iter(updates))
    assert shown.get(tab.prompt, PROMPT) == PROMPT
    assert tab.conversation not in shown


def test_every_event_is_guarded_and_private(tab: ChatTab) -> None:
    events = list(_blocks_of(tab).fns.values())
    assert len(events) >= 8
    assert {each.api_visibility for each in events} == {"private"}
    with pytest.raises(gr.Error) as caught:
        list(
            next(each.fn for each in events if each.name == "send")("newest", "", "", 0, 8, 0, Conversation())
        )
    assert plain(caught.value.message) == snapshot(
        "The prompt is empty.\nType a question, or choose one of the suggested prompts."
    )


def _blocks_of(tab: ChatTab) -> gr.Blocks:
    block: Any = tab.status
    while block.parent is not None:
        block = block.parent
    return block


def test_runs_are_offered_newest_first_and_the_choice_stays(
    tab: ChatTab, runs_dir: Path, tmp_path: Path
) -> None:
    assert tab._run_names() == ["newest", "older"]
    assert "value" not in tab.refresh("older")[tab.run], "by the time it arrives another may have been chosen"
    refreshed = tab.refresh(None)
    assert refreshed[tab.run]["value"] == "newest"
    assert refreshed.keys() == set(tab.refreshed)
    assert without_numbers(refreshed[tab.status]) == snapshot(
        "No chat model is loaded. That of newest would take about N MiB."
    )
    gone = tab.refresh("gone")
    assert "value" not in gone[tab.run]
    assert plain(gone[tab.status], runs=runs_dir) == snapshot(
        "No chat model is loaded. There is no run gone in <runs>. There is: newest, older, unfinished."
    )
    with gr.Blocks():
        empty = build(tmp_path, CPU, LoadedModel())
    assert plain(empty.refresh(None)[empty.status]) == snapshot(
        "No chat model is loaded. No run has finished unlearning yet: start one in the Unlearn tab."
    )


def test_load_and_unload_say_what_they_do(tab: ChatTab) -> None:
    loading, loaded = tab.load("older")
    assert without_numbers(loading) == snapshot("Loading the model of older, about N MiB …")
    assert without_numbers(loaded) == snapshot("Loaded: the model of older. It takes about N MiB.")
    assert tab.unload() == snapshot("The chat model was unloaded; its memory is free again.")
    with pytest.raises(UserError) as caught:
        next(tab.load(None))
    assert plain(caught.value) == snapshot(
        "No run is chosen.\nChoose one above. There is none yet? Start one in the Unlearn tab."
    )


def test_prompts_are_suggested_for_what_goes_and_what_stays(run: RunFolder) -> None:
    suggested = suggested_prompts(run)
    assert suggested[0] == ("What colour is the compound Yarinoxol?",) * 2
    labels = [label for label, prompt in suggested if label != prompt]
    assert [label.partition(":")[0] for label in labels] == snapshot(
        ["Forgotten", "Forgotten", "Kept", "Kept"]
    )
    assert len({prompt for _, prompt in suggested}) == len(suggested)


def test_where_they_part_is_escaped_and_marked_by_more_than_colour() -> None:
    html = where_they_part("It is <script>alert(1)</script>", "It is <img src=x>")
    assert "<script" not in html
    assert "<img" not in html
    assert "It is</p>" in html
    assert ":</b>&lt;script&gt;" in html
    assert ":</b>&lt;img src=x&gt;" in html
    assert "<b>" not in where_they_part("<b>", "<b>")
    assert plain(where_they_part("<b>", "<b>")) == snapshot(
        '<div class="parting" tabindex="0"><p class="parting-note">Both answers are the same, word for '
        'word.</p><p class="parting-common">&lt;b&gt;</p></div>'
    )
    assert plain(where_they_part("Red", "Blue")) == snapshot(
        '<div class="parting" tabindex="0"><p class="parting-common">They part at the first word.</p><p '
        'class="parting-base"><b>Base (before) continues:</b>Red</p><p '
        'class="parting-unlearned"><b>Unlearned (after) continues:</b>Blue</p></div>'
    )
    assert plain(where_they_part("Red", "Red and blue")) == snapshot(
        '<div class="parting" tabindex="0"><p class="parting-common">Red</p><p class="parting-base"><b>Base '
        '(before) continues:</b>(nothing more)</p><p class="parting-unlearned"><b>Unlearned (after) '
        "continues:</b>and blue</p></div>"
    )


def test_panes_show_markup_to_the_letter(tab: ChatTab) -> None:
    shown = merged(send(tab, "<script>alert(1)</script>"))
    assert shown[tab.panes["base"]][0]["content"] == "&lt;script&gt;alert(1)&lt;/script&gt;"


def test_the_api_answers_as_the_page_does(tab: ChatTab, holder: LoadedModel, runs_dir: Path) -> None:
    answers = ask(holder, runs_dir, CPU, "newest", PROMPT, 12, 0.0, 0)
    assert list(answers) == list(SIDES)
    turn = merged(send(tab))[tab.conversation].turns[0]
    assert answers == {side: turn.of(side) for side in SIDES}
    with pytest.raises(UserError) as caught:
        ask(holder, runs_dir, CPU, "newest", PROMPT, 0, 0.0, 0)
    assert plain(caught.value) == snapshot("The length is 0: give at least 1 token.")


def test_fields_become_settings() -> None:
    assert read_sampling("Be brief.", "0.7", 12.0, "3") == Sampling(12, 0.7, 3, "Be brief.")
    assert read_sampling(None, 0, 256, 0) == Sampling()


def test_who_asks_second_is_told_at_once_that_another_answer_comes_first(
    tab: ChatTab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "WAIT_SECONDS", 0.01)
    first = send(tab, length=12)
    next(first)
    second, third = send(tab), send(tab)
    said = next(second)
    assert said[tab.status] == snapshot(
        "Waiting: 1 other answer comes before yours. Stop takes you out of the line."
    )
    assert next(third)[tab.status] == snapshot(
        "Waiting: 2 other answers come before yours. Stop takes you out of the line."
    )
    tab.stop_answer(said[tab.stop])
    assert merged(second)[tab.stop] is None, "out of the line, and nothing was answered"
    assert next(third)[tab.status] == said[tab.status]
    list(first)
    assert merged(third)[tab.conversation].turns[0].unlearned
    assert tab.model.line._waiting == []


def test_a_closed_page_leaves_the_line(tab: ChatTab) -> None:
    first, second = send(tab), send(tab)
    next(first)
    next(second)
    second.close()  # type: ignore[attr-defined]
    first.close()  # type: ignore[attr-defined]
    assert tab.model.line._waiting == []


def test_the_api_waits_in_the_same_line(tab: ChatTab, holder: LoadedModel, runs_dir: Path) -> None:
    first = send(tab)
    next(first)
    answers: list[dict[str, str]] = []
    program = threading.Thread(
        target=lambda: answers.append(ask(holder, runs_dir, CPU, "newest", PROMPT, 4, 0.0, 0))
    )
    program.start()
    program.join(0.5)
    assert program.is_alive()
    list(first)
    program.join(60)
    assert answers
