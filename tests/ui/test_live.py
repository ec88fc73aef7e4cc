"""What the page shows of a run, read from real folders: how far it is, its figures, and why it ended."""

import re
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from lowmem_rmu.runs.files import add_lines, write_json
from lowmem_rmu.runs.folder import STAGES, RunFolder
from lowmem_rmu.ui import live
from lowmem_rmu.ui.jobs import RunState
from tests.texts import plain, text_with

HOSTILE = "<script>alert('1')</script><img src=x onerror=alert(1)>"
ENDED = snapshot(
    "Its process ended before it was done; output.txt in its folder says more.\n"
    "Resume continues from the last checkpoint."
)
TRACE = 'Traceback (most recent call last):\n  File "/home/me/run.py", line 3, in <module>\n    go()\nValueError: so\n'
BOXED = "╭───── Traceback (most recent call last) ─────╮\n│ /home/me/run.py:3 in <module> │\n╰────╯\nAssertionError\n"
CPP = "so\nException raised from f at a.cpp:3 (most recent call first):\nframe #0: f"
TORN = '{"step": 3, "topic": "a", "forget_lo'


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder.reserve(tmp_path, "mine")
    write_json(run.path / "config.json", {})
    return run


def state(name: str = "running", **more: Any) -> RunState:
    return RunState("mine", name, **more)


def step(number: int, **more: Any) -> dict[str, Any]:
    return {
        "step": number,
        "topic": "ab"[number % 2],
        "forget_loss": 10.0 / number,
        "retain_loss": 0.25,
    } | more


def figures(html: str) -> dict[str, str]:
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))


def test_a_run_that_has_not_begun_shows_its_state_alone(run: RunFolder) -> None:
    html = live.progress(state("waiting", place=2), run)
    assert plain(html) == snapshot(
        "<p class='rmu-state rmu-waiting'><strong>mine</strong>: waiting: 2 runs before it</p>"
    )


def test_a_stage_without_a_count_is_named(run: RunFolder) -> None:
    assert plain(live.progress(state(stage="unlearn"), run)) == snapshot(
        "<p class='rmu-state rmu-running'><strong>mine</strong>: running</p><p>Unlearning (stage 2 of 4) "
        "…</p>"
    )
    assert plain(live.progress(state("starting", stage="queue"), run)) == snapshot(
        "<p class='rmu-state rmu-starting'><strong>mine</strong>: starting</p><p>Waiting for its turn …</p>"
    )


def test_how_far_a_stage_is(run: RunFolder) -> None:
    html = live.progress(state(stage="evaluate-base", step=1300, total=14000, seconds_left=3725.0), run)
    assert plain(html) == snapshot(
        "<p class='rmu-state rmu-running'><strong>mine</strong>: running</p><p>Asking the model before "
        "(stage 1 of 4): 1,300 of 14,000, about 1 h 02 min left</p><progress max='14000' value='1300' "
        "aria-label='Asking the model before (stage 1 of 4)'></progress>"
    )
    assert text_with(live.progress(state(stage="unlearn", step=0, total=9), run), "9") == snapshot(
        "Unlearning (stage 2 of 4): 0 of 9"
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, snapshot("Unlearning (stage 2 of 4): 1 of 9, about 0 s left")),
        (59.4, snapshot("Unlearning (stage 2 of 4): 1 of 9, about 59 s left")),
        (59.6, snapshot("Unlearning (stage 2 of 4): 1 of 9, about 1 min 00 s left")),
        (3599.6, snapshot("Unlearning (stage 2 of 4): 1 of 9, about 1 h 00 min left")),
        (90061, snapshot("Unlearning (stage 2 of 4): 1 of 9, about 25 h 01 min left")),
    ],
)
def test_time_left_in_words(run: RunFolder, seconds: float, words: str) -> None:
    html = live.progress(state(stage="unlearn", step=1, total=9, seconds_left=seconds), run)
    assert text_with(html, "1 of 9") == words


def test_every_stage_has_words() -> None:
    assert set(STAGES) < live.STAGE_WORDS.keys()


def test_a_run_that_rests_has_no_bar(run: RunFolder) -> None:
    for name in ("stopped", "failed", "done", "interrupted"):
        assert "<progress" not in live.progress(state(name, stage="unlearn", step=3, total=9), run)


def test_figures_of_the_last_step(run: RunFolder) -> None:
    for number in (1, 2):
        run.add_metrics(step(number, forget_norm=1.5, retain_norm=None))
    html = live.progress(state(), run)
    assert figures(html) == snapshot(
        {"Step": "2", "Forget loss": "5", "Retain loss": "0.25", "Activation norm, forget set": "1.5"}
    )


def test_a_torn_line_is_passed_over(run: RunFolder) -> None:
    run.add_metrics(step(1))
    run.add_metrics(step(2))
    with run.metrics.open("a") as file:
        file.write(TORN)
    assert figures(live.progress(state(), run))["Step"] == "2"
    forget, *_ = live.curves(run)
    assert forget is not None
    assert list(forget["step"]) == [1, 2]
    with run.answers("base").open("wb") as raw:
        raw.write('{"task": "a", "correct": true}\n{"task": "ä'.encode()[:-1])
    assert text_with(live.progress(state(), run), "100.0%") == snapshot("100.0% of 1")


def test_right_answers_so_far_by_side_and_task(run: RunFolder) -> None:
    for side, right in (("base", (True, True, False)), ("unlearned", (False, False, False))):
        add_lines(
            run.answers(side),
            [
                {"task": task, "correct": each}
                for task, each in zip(("locks", "locks", "7"), right, strict=True)
            ],
        )
    html = live.progress(state(), run)
    assert re.findall("<summary>(.*?)</summary>", html) == snapshot(["Right answers so far"])
    rows = re.findall(r"<tr><th scope='row'>(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>", html)
    assert rows == snapshot([("locks", "100.0% of 2", "0.0% of 2"), ("7", "0.0% of 1", "0.0% of 1")])


def test_names_errors_and_tasks_are_shown_to_the_letter(run: RunFolder) -> None:
    add_lines(run.answers("base"), [{"task": HOSTILE, "correct": True}])
    html = live.progress(RunState(HOSTILE, "failed", error=f"No text in {HOSTILE}.\nGive some."), run)
    assert not re.search(r"<(script|img)", html)
    assert html.count("&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;") == 3
    assert "\nGive some.</pre>" in html
    (run.output).write_text(HOSTILE)
    assert "&lt;img src=x" in live.progress(state("failed"), run)
    assert "<img" not in live.progress(state("failed"), run)


def test_a_mistake_is_told_in_its_own_words(run: RunFolder) -> None:
    run.output.write_text(TRACE)
    assert live.complaint(state("failed", error="The corpus is empty."), run) == "The corpus is empty."


def test_of_the_output_the_last_lines_are_told(run: RunFolder) -> None:
    run.output.write_bytes("Run folder: x\none\ntwo \xff\nthree ü\n".encode("latin-1"))
    assert live.complaint(state("failed"), run) == "one\ntwo �\nthree �"


@pytest.mark.parametrize(
    "trace", [TRACE, BOXED, f"one\n{TRACE}two\nthree\nfour\n", f"Exception in thread:\n{TRACE}"]
)
@pytest.mark.parametrize("name", ["failed", "interrupted"])
def test_no_stack_trace_is_shown_of_what_was_printed(run: RunFolder, trace: str, name: str) -> None:
    run.output.write_text(trace, encoding="utf-8")
    html = live.progress(state(name), run)
    shown = re.findall("<pre[^>]*>(.*?)</pre>", html, re.DOTALL)
    assert shown == [ENDED]
    assert "Traceback" not in html
    assert "run.py" not in html


@pytest.mark.parametrize("trace", [TRACE, f"CUDA error: so\n{TRACE}", CPP])
def test_no_stack_trace_is_shown_of_an_error_that_holds_one(run: RunFolder, trace: str) -> None:
    assert live.complaint(state("failed", error=trace), run) == ENDED


def test_without_any_word_its_folder_says_more(run: RunFolder) -> None:
    assert live.complaint(state("failed"), run) == ENDED
    run.output.write_text("Waiting: other in runs before this run.\n")
    assert live.complaint(state("interrupted"), run) == ENDED
    run.output.unlink()
    assert live.complaint(state("failed", error=""), run) == ENDED


def test_curves_by_step_and_topic(run: RunFolder) -> None:
    for number in (1, 2, 3):
        run.add_metrics(step(number, forget_norm=1.0 * number, retain_norm=None if number == 1 else 2.0))
    forget, retain, norms, divergences = live.curves(run)
    assert forget is not None
    assert retain is not None
    assert norms is not None
    assert forget.to_dict("list") == {
        "step": [1, 2, 3],
        "value": [10.0, 5.0, 10 / 3],
        "line": ["b", "a", "b"],
    }
    assert list(retain["value"]) == [0.25] * 3
    assert sorted(zip(norms["line"], norms["step"], strict=True)) == [
        ("forget set", 1),
        ("forget set", 2),
        ("forget set", 3),
        ("retain set", 2),
        ("retain set", 3),
    ]
    assert divergences is None


def test_the_guards_curves_have_a_point_a_check(run: RunFolder) -> None:
    for number in (1, 2, 3):
        run.add_metrics(
            step(number, **{"retain_kl": 0.1, "question_kl": None, "topic_kl": 2.0} if number == 2 else {})
        )
    divergences = live.curves(run)[3]
    assert divergences is not None
    assert divergences.to_dict("list") == {
        "step": [2, 2],
        "value": [0.1, 2.0],
        "line": ["text to keep", "topic"],
    }


def test_before_the_first_step_there_are_no_curves(run: RunFolder) -> None:
    assert live.curves(None) == live.curves(run) == [None] * 4
