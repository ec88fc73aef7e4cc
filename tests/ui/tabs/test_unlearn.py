"""The tab where a run begins: what is started, what is refused, and a real run on one's own text."""

import json
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch
from inline_snapshot import snapshot

from lowmem_rmu.config.loading import load_preset
from lowmem_rmu.errors import UserError
from lowmem_rmu.runs.files import read_lines, write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.runs.queue import tickets
from lowmem_rmu.ui import jobs, offers
from lowmem_rmu.ui.guard import on_the_page
from lowmem_rmu.ui.tabs.chat import LoadedModel
from lowmem_rmu.ui.tabs.unlearn import MATTER, Unlearning, UnlearnTab, changes_of, values_of
from lowmem_rmu.ui.uploads import Own
from tests.texts import plain, text_with
from tests.waiting import wait_until

CPU = torch.device("cpu")
NOTHING = Own([], [], "")
SECONDS = 120


@pytest.fixture(scope="module")
def built() -> UnlearnTab:
    with gr.Blocks():
        return UnlearnTab(Unlearning(Path("nowhere"), CPU, LoadedModel()))


@pytest.fixture
def tab(built: UnlearnTab, tmp_path: Path) -> UnlearnTab:
    """The same widgets over another folder: making them takes a while."""
    built.runs_dir, built.unlearning = tmp_path / "runs", Unlearning(tmp_path / "runs", CPU, LoadedModel())
    return built


def make_run(runs_dir: Path, name: str, state: str = "done") -> RunFolder:
    run = RunFolder.create(runs_dir, name)
    write_json(
        run.path / "config.json",
        {"preset": "tiny", "device": "cpu", "settings": load_preset("tiny").model_dump()},
    )
    run.write_status("unlearn", 3, 9, state)
    return run


def values(**changed: Any) -> list[Any]:
    """What the fields hold where a person has changed some; a dot in a path is written as two underscores."""
    found = dict(zip(MATTER, values_of(load_preset("tiny")), strict=True)) | {
        path.replace("__", "."): new for path, new in changed.items()
    }
    assert len(found) == len(MATTER)
    return list(found.values())


# Fields


@pytest.mark.parametrize("name", ["tiny", "zephyr-7b", "smollm2-135m", "mixtral-8x7b"])
def test_the_fields_show_the_preset_and_change_nothing(name: str) -> None:
    preset = load_preset(name)
    shown = dict(zip(MATTER, values_of(preset), strict=True))
    assert (shown["rmu.steps"], shown["rmu.learning_rate"]) == (preset.rmu.steps, preset.rmu.learning_rate)
    assert shown["evaluation.limit"] == (
        "" if preset.evaluation.limit is None else str(preset.evaluation.limit)
    )
    assert changes_of(name, values_of(preset)) == {}


def test_only_what_was_changed_is_a_change() -> None:
    assert changes_of("tiny", values(rmu__steps=4.0, rmu__learning_rate=0.01)) == {
        "rmu.steps": 4,
        "rmu.learning_rate": 0.01,
    }
    assert isinstance(changes_of("tiny", values(rmu__steps=4.0))["rmu.steps"], int), (
        "the browser sends whole numbers as 4.0 too"
    )
    assert changes_of("tiny", values(evaluation__limit=" ")) == {}
    assert changes_of("tiny", values(rmu__steps=4.5, rmu__rank=None)) == {"rmu.steps": 4.5, "rmu.rank": None}


def test_one_protection_counts_for_every_topic() -> None:
    assert changes_of("tiny", values(alpha="7")) == {"topics.compounds.alpha": "7", "topics.locks.alpha": "7"}
    assert changes_of("tiny", values(alpha="")) == {}, "empty: what the preset says"


def test_where_topics_differ_no_protection_is_shown() -> None:
    preset = load_preset("tiny", ["topics.locks.alpha=1"])
    assert dict(zip(MATTER, values_of(preset), strict=True))["alpha"] == ""


# What is refused


def begin(
    runs_dir: Path, preset_name: str, changes: dict[str, Any], lines: str, own: Own, name: str
) -> RunFolder:
    return Unlearning(runs_dir, CPU, LoadedModel()).start(
        preset_name, offers.chosen(preset_name, changes, lines), own, name
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"preset_name": None}, snapshot("Choose one of the presets first.")),
        ({"preset_name": "tyni"}, snapshot("Choose one of the presets first.")),
        (
            {"changes": {"rmu.steps": 0}},
            snapshot(
                "What was given has 1 mistake:\n  rmu.steps: should be greater than or equal to 1 (it is 0)"
            ),
        ),
        (
            {"lines": "model.name=/etc"},
            snapshot(
                "A setting names another model, text or questions: that cannot be done from the page.\n"
                "Drop your own text in above, or put a preset of your own into the folder presets/ and start "
                "the app again."
            ),
        ),
        (
            {"lines": "nonsense"},
            snapshot('"nonsense" is not of the form key.path=value, for example rmu.steps=50.'),
        ),
        (
            {"name": "../x"},
            snapshot(
                '"../x" cannot be the name of a run: use letters, digits, ".", "_" and "-" only, at most '
                "100, and no name of a Windows device, so that it stays inside <runs>."
            ),
        ),
        (
            {"name": "taken"},
            snapshot("Run taken exists already.\nChoose another name."),
        ),
    ],
)
def test_a_mistake_starts_nothing_and_leaves_nothing(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    make_run(tmp_path, "taken")
    given = {"preset_name": "tiny", "changes": {}, "lines": "", "name": "mine"} | changed
    with pytest.raises(UserError) as caught:
        begin(tmp_path, own=NOTHING, **given)
    assert plain(on_the_page(caught.value), runs=tmp_path) == said
    assert jobs.names(tmp_path) == ["taken"]
    assert not (tmp_path / "mine").exists()
    assert tickets(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b"\x89PNG"), ("a.html", b"<p>so"), ("a.txt", b" \n"), ("a.jsonl", b"{")]
)
@pytest.mark.parametrize("kind", ["forget", "retain"])
def test_text_that_cannot_be_read_leaves_no_run_behind(
    tmp_path: Path, name: str, content: bytes, kind: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    own = Own([str(file)], [], "storms") if kind == "forget" else Own([], [str(file)], "")
    with pytest.raises(UserError):
        begin(tmp_path / "runs", "tiny", {}, "", own, "mine")
    assert jobs.names(tmp_path / "runs") == []
    assert not (tmp_path / "runs/mine").exists()


def test_whoever_gives_text_says_what_it_is_about(tab: UnlearnTab, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("storm")
    with pytest.raises(UserError) as caught:
        tab.start("tiny", "", "mine", [str(tmp_path / "a.txt")], None, "  ", *values())
    assert plain(caught.value) == snapshot("Say in a word or two what your text is about.")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (None, snapshot("Choose a run first.")),
        ("", snapshot("Choose a run first.")),
        ("gone", snapshot("There is no run gone in <runs>. It holds no runs yet.")),
        (
            "../x",
            snapshot(
                '"../x" cannot be the name of a run: use letters, digits, ".", "_" and "-" only, at most '
                "100, and no name of a Windows device, so that it stays inside <runs>."
            ),
        ),
    ],
)
def test_a_run_has_to_be_chosen(tab: UnlearnTab, name: str | None, said: str) -> None:
    for act in (tab.stop, tab.resume):
        with pytest.raises(UserError) as caught:
            act(name)
        assert plain(caught.value, runs=tab.runs_dir) == said


def test_what_rests_cannot_be_stopped(tab: UnlearnTab) -> None:
    make_run(tab.runs_dir, "mine")
    with pytest.raises(UserError) as caught:
        tab.stop("mine")
    assert plain(caught.value) == snapshot("Run mine is not under way.")


# What is shown


def test_the_plan_follows_fields_and_lines(tab: UnlearnTab) -> None:
    unchanged = tab.show_plan("tiny", "", *values())
    assert "<strong>Fits here</strong>" in unchanged
    assert tab.show_plan("tiny", "", *values(rmu__rank=64.0)) != unchanged
    assert tab.show_plan("tiny", "rmu.batch_size=64", *values()) != unchanged
    assert text_with(tab.show_plan("tiny", "", *values(rmu__rank=0)), "rmu.rank") == snapshot(
        "What was given has 1 mistake: Rank, rmu.rank: should be greater than or equal to 1 (it is 0)"
    )
    assert "<script" not in tab.show_plan("tiny", "<script>=1", *values())


def test_the_run_under_way_or_the_newest_is_shown_at_first(tab: UnlearnTab) -> None:
    assert (tab.refresh(None)["choices"], tab.refresh(None)["value"]) == ([], None)
    make_run(tab.runs_dir, "mine")
    assert tab.refresh(None)["value"] == "mine"
    make_run(tab.runs_dir, "other")
    for chosen in ("mine", "gone"):
        assert "value" not in tab.refresh(chosen), (
            "a choice stays, and by the time it arrives another may have been made"
        )
        assert "value" not in tab.show(chosen)[-2]
        assert "value" not in tab.tick(chosen, ("", []))[-2]


def test_a_run_that_is_gone_is_said_to_be(tab: UnlearnTab) -> None:
    gone = snapshot("<p>This run is no longer there.</p>")
    for name, said in ((None, snapshot("<p>No run yet.</p>")), ("gone", gone), ("<b>", gone)):
        html, *curves, _, seen = tab.show(name)
        assert html == said
        assert seen == (html, [])
        assert curves == [None] * 4


def test_buttons_are_there_for_what_they_can_do(tab: UnlearnTab) -> None:
    for name, state in (("over", "done"), ("halved", "stopped"), ("broken", "failed")):
        make_run(tab.runs_dir, name, state)
    shown = {
        name: tuple(button["interactive"] for button in tab.buttons(name))
        for name in ("over", "halved", "broken", "gone", None)
    }
    assert shown == {
        "over": (False, False),
        "halved": (False, True),
        "broken": (False, True),
        "gone": (False, False),
        None: (False, False),
    }


def test_nothing_is_sent_where_nothing_has_changed(tab: UnlearnTab) -> None:
    run = make_run(tab.runs_dir, "mine", "stopped")
    shown = tab.tick("mine", ("", []))
    assert shown[-1] == (shown[0], ["mine"])
    assert shown[0]
    assert tab.tick("mine", shown[-1]) == tuple(gr.skip() for _ in shown)
    run.add_metrics({"step": 1, "topic": "a", "forget_loss": 1.0, "retain_loss": 0.0})
    again = tab.tick("mine", shown[-1])
    assert again[0] != shown[0]
    assert len(again[1]) == 1


# A run


def test_a_run_on_own_text_goes_on_after_a_stop_and_under_another_name(
    tab: UnlearnTab, tmp_path: Path
) -> None:
    """Real processes: the one is stopped while it trains, the other goes on."""
    forget, retain = tmp_path / "forget.jsonl", tmp_path / "retain.txt"
    forget.write_text(
        "".join(
            json.dumps({"text": f"The storm {number} blew over the bay of <b>Halong</b>."}) + "\n"
            for number in range(20)
        )
    )
    retain.write_text("Cheese melts in a warm pan. " * 200)
    lines = "rmu.batch_size=2\nrmu.retain_batch_size=2\nevaluation.max_new_tokens=4"
    changed = values(rmu__steps=3000.0, evaluation__limit="4")
    update = tab.start("tiny", lines, " mine ", [str(forget)], [str(retain)], "Tropical storms", *changed)
    assert (update["choices"], update["value"]) == (["mine"], "mine")
    run = jobs.find(tab.runs_dir, "mine")
    forget.unlink()
    retain.unlink()
    with pytest.raises(UserError) as caught:
        tab.resume("mine")
    assert plain(caught.value) == snapshot("Run mine is under way already.")
    wait_until(lambda: len(read_lines(run.metrics)) > 2, run.output.read_text, SECONDS)
    assert "<progress max='3000'" in tab.show("mine")[0]
    tab.stop("mine")
    wait_until(lambda: jobs.state_of(run).state == "stopped", run.output.read_text, SECONDS)
    steps = len(read_lines(run.metrics))
    run = jobs.rename(run, "better")
    settings = run.path / "config.json"
    assert jobs.find(tab.runs_dir, "better").config["settings"]["topics"].keys() == {"tropical_storms"}
    assert "mine/" not in settings.read_text()
    tab.resume("better")
    wait_until(lambda: len(read_lines(run.metrics)) > steps, run.output.read_text, SECONDS)
    jobs.stop(run)
    wait_until(lambda: not jobs.state_of(run).is_live, run.output.read_text, SECONDS)
    assert jobs.state_of(run).state == "stopped", run.output.read_text()
    rows = read_lines(run.metrics)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "it went on where it was"
    assert {row["topic"] for row in rows} == {"tropical_storms"}


def test_a_wrong_value_is_named_by_its_field(tab: UnlearnTab) -> None:
    said = tab.show_plan("tiny", "", *values(rmu__rank=0, alpha="-1"))
    assert "tiny.yaml" not in said
    assert text_with(said, "rmu.rank") == snapshot(
        "What was given has 3 mistakes: Rank, rmu.rank: should be greater than or equal to 1 (it is 0) "
        "Protection (alpha), topics.compounds.alpha: should be greater than or equal to 0 (it is -1) "
        "Protection (alpha), topics.locks.alpha: should be greater than or equal to 0 (it is -1)"
    )
    assert text_with(tab.show_plan("tiny", "", *values(alpha="[")), "&#39;[&#39;") == snapshot(
        "Protection (alpha) (&#39;[&#39;): the value is not valid YAML."
    )
