import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from inline_snapshot import snapshot

from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.compare import Row
from lowmem_rmu.report.html import app_stylesheet, render_comparison, render_parts
from lowmem_rmu.runs.files import write_json, write_lines
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.ui.guard import guarded
from lowmem_rmu.ui.tabs import results
from tests.texts import plain

HOSTILE = "</dd><script>alert('--> \"1\"')</script><img src=x onerror=alert(1)> & ]]>"


def row(
    task: str, unlearned: float, p_value: float, group: str | None = None, **other: Any
) -> dict[str, Any]:
    role = "forgotten" if unlearned < 0.5 else "kept"
    measured = {
        "lost": 9,
        "gained": 1,
        "p_value": p_value,
        "base_letters": (0.25,) * 4,
        "unlearned_letters": (0.25,) * 4,
    }
    return asdict(
        Row(
            task,
            group,
            False,
            role,
            100,
            0.9,
            0.03,
            unlearned,
            0.04,
            unlearned - 0.9,
            0.05,
            **measured,
            **other,
        )
    )


def make_run(
    runs_dir: Path, name: str, rows: list[dict[str, Any]], forgotten: str = "yes", age: int = 0, **rmu: Any
) -> RunFolder:
    """A finished run; the larger its `age`, the older."""
    run = RunFolder.create(runs_dir, name)
    settings = {"rmu": rmu, "topics": {"a.b": {"alpha": 1.0}}, "evaluation": {"max_new_tokens": 64}}
    device = {"device": "cpu", "device_name": "AMD EPYC", "versions": {"python": "3.11.7"}, "seed": 7}
    write_json(
        run.path / "config.json",
        {"preset": "tiny", "settings": settings, **device, "created": "2026-11-21T03:00:00+00:00"},
    )
    os.utime(run.path / "config.json", (1_800_000_000 - age,) * 2)
    verdict = {"forgotten": forgotten, "kept": "partly", "sentences": [f"{name}: {HOSTILE}"]}
    samples = [{"prompt": "What is it?", "base": "Amber.", "unlearned": HOSTILE}]
    content = {
        "preset": "tiny",
        "title": f"Forget {HOSTILE}",
        "model": "m",
        "verdict": verdict,
        "rows": rows,
        "texts": [],
        "samples": samples,
    }
    write_json(run.path / "summary.json", {**content, "stages": [], "limit": None})
    write_lines(
        run.metrics,
        [{"step": n, "topic": "a.b", "forget_loss": 2.0 / n, "retain_loss": 0.1} for n in (1, 2, 3)],
    )
    (run.path / "report.html").write_text(f"the report of {name}", encoding="utf-8")
    return run


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    """Two finished runs, and one that is not."""
    make_run(
        tmp_path, "old", [row("compounds", 0.3, 0.0001), row("kept", 0.88, 0.6)], age=60, steps=60, lr=0.001
    )
    subject = row("law", 0.9, 1.0, group="mmlu", num_fewshot=5)
    make_run(
        tmp_path,
        "new",
        [row("compounds", 0.25, 0.0001, num_fewshot=5), subject],
        "partly",
        steps=380,
        lr=0.001,
    )
    write_json(RunFolder.create(tmp_path, "begun").path / "config.json", {})
    return tmp_path


@pytest.fixture
def tab(runs_dir: Path) -> results.Results:
    with gr.Blocks():
        return results.build(runs_dir)


def last(shown: Iterator[Any]) -> Any:
    return list(shown)[-1]


def cells(html: str, task: str) -> list[str]:
    """The row of a table that begins with `task`, without its tags."""
    found = next(
        row
        for row in re.findall(r"<tr>.*?</tr>", html, re.DOTALL)
        if re.search(rf'scope="row"[^>]*>{task}<', row)
    )
    return [
        re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", found, re.DOTALL)
    ]


def test_finished_runs_are_offered_newest_first(runs_dir: Path) -> None:
    assert results.choices(runs_dir) == ["new", "old"]


def test_the_newest_run_is_chosen_and_a_choice_stays(tab: results.Results) -> None:
    run, other = tab.refresh(None, None)
    assert (run["choices"], run["value"]) == (["new", "old"], "new")
    assert (other["choices"], "value" in other) == ([results.NO_OTHER, "new", "old"], False)
    assert tab.other.value == ""
    for chosen in (("old", "new"), ("gone", "gone")):
        run, other = tab.refresh(*chosen)
        assert "value" not in run, "by the time it arrives another may have been chosen"
        assert "value" not in other


def test_a_folder_without_runs_says_what_to_do(tmp_path: Path) -> None:
    with gr.Blocks():
        tab = results.build(tmp_path / "nowhere")
    assert tab.refresh(None, None)[0]["value"] is None
    html, download = last(tab.show(None))
    assert html == results.EMPTY == snapshot("<p>No finished run yet. Start one under Unlearn.</p>")
    assert download["interactive"] is False


def test_a_run_is_shown_with_its_report_to_keep(tab: results.Results) -> None:
    html, download = last(tab.show("new"))
    assert html.startswith('<div class="rmu-results">')
    assert re.findall(r"<h2>(.*?)</h2>", html) == snapshot(
        [
            "Questions, base and unlearned",
            "How training went",
            "The same prompt to both",
            "What this does not show",
        ]
    )
    assert re.findall(r"<dd class=\"(\w+)\">", html) == ["partly", "partly", "unknown"]
    assert cells(html, "compounds")[:3] == ["compounds5-shot", "90.0% ± 3.0", "25.0% ± 4.0"]
    assert html.count("<svg") == 3 * 2
    assert Path(download["value"]).name == "new-report.html"
    assert Path(download["value"]).read_text(encoding="utf-8") == "the report of new"


def test_the_page_keeps_its_own_look(tab: results.Results) -> None:
    html, _ = last(tab.show("new"))
    assert "<style" not in html
    assert "<html" not in html
    outermost = re.findall(r"^([^\s}][^{\n]*) \{", app_stylesheet(), re.MULTILINE)
    assert set(outermost) == {".rmu-results", ".dark .rmu-results"}
    assert "var(--base)" in html
    assert {"--base", "--page", "--topic-4"} <= set(re.findall(r"--[\w-]+(?=:)", app_stylesheet()))


def test_other_peoples_text_stays_text(runs_dir: Path) -> None:
    old, new = RunFolder.open(runs_dir, "old"), RunFolder.open(runs_dir, "new")
    for html in (render_parts(old), render_comparison(old, new)):
        assert "<script" not in html
        assert "<img" not in html
        assert escape(HOSTILE, quote=False).split("'")[0] in html


def test_two_runs_side_by_side(tab: results.Results) -> None:
    shown = last(tab.compare("old", "new"))
    html = shown["value"]
    assert shown["visible"] is True
    assert cells(html, "Is it forgotten[?]")[1:] == snapshot(["Yes, not audited", "Partly"])
    assert cells(html, "What did the audit find[?]")[1:] == snapshot(["Not audited", "Not audited"])
    notes, *numbers = cells(html, "compounds")
    assert notes == snapshot("compounds0-shot (first); 5-shot (second)")
    assert numbers == ["90.0%", "30.0%", "−60.0", "90.0%", "25.0%", "−65.0"]
    assert cells(html, "kept") == ["kept", "90.0%", "88.0%", "−2.0", "–", "–", "–"]
    assert cells(html, "law") == ["law", "–", "–", "–", "90.0%", "90.0%", "+0.0"]
    [title] = [title for title in re.findall("<summary>(.*?)</summary>", html) if "mmlu" in title]
    assert title == snapshot("All 1 parts of mmlu, one by one")
    assert html.index(title) < html.index(">law<")
    assert cells(html, "rmu.steps") == ["rmu.steps", "60", "380"]
    assert "rmu.lr" not in html


def test_settings_that_only_one_run_has(runs_dir: Path) -> None:
    make_run(runs_dir, "more", [], steps=60, lr=0.001, rank=None)
    make_run(runs_dir, "same", [], steps=60, lr=0.001)
    old = RunFolder.open(runs_dir, "old")
    same = render_comparison(old, RunFolder.open(runs_dir, "same"))
    assert "rmu.steps" not in same
    config = RunFolder.open(runs_dir, "more").config
    config["settings"]["topics"] = {"a.b": {"alpha": 2.0}, "c": {"alpha": 1.0}}
    write_json(runs_dir / "more" / "config.json", config)
    html = render_comparison(old, RunFolder.open(runs_dir, "more"))
    paragraphs = re.findall("<p[^>]*>(.*?)</p>", html, re.DOTALL)
    assert [
        text for text in re.findall("<p[^>]*>(.*?)</p>", same, re.DOTALL) if text not in paragraphs
    ] == snapshot(["Both ran with the same settings."])
    assert cells(html, "topics.a.b.alpha")[1:] == ["1.0", "2.0"]
    assert cells(html, "topics.c")[1:] == ["–", "{alpha: 1.0}"]


def test_no_other_run_is_no_comparison(tab: results.Results) -> None:
    assert last(tab.compare("old", ""))["visible"] is False
    assert last(tab.compare(None, "old"))["visible"] is False


def test_a_run_beside_itself_is_refused(tab: results.Results) -> None:
    with pytest.raises(UserError) as caught:
        last(tab.compare("old", "old"))
    assert plain(caught.value) == snapshot(
        "This is the run that is shown already: choose another one to compare it with."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            snapshot(
                "Run <run> has no summary.json: it has not finished.\nGo on with it: --resume --name new"
            ),
        ),
        (
            '{"rows": [',
            snapshot(
                "<run>/summary.json is damaged: it does not hold a JSON object.\n"
                "Have it written again: --resume --name new"
            ),
        ),
        (
            "[]",
            snapshot(
                "<run>/summary.json is damaged: it does not hold a JSON object.\n"
                "Have it written again: --resume --name new"
            ),
        ),
        (
            "\udcff",
            snapshot(
                "<run>/summary.json is damaged: it does not hold a JSON object.\n"
                "Have it written again: --resume --name new"
            ),
        ),
        (
            '{"rows": []}',
            snapshot(
                "<run>/summary.json was written by another version of this program, or is damaged: it lacks "
                "title.\n"
                "Have it written again: --resume --name new"
            ),
        ),
    ],
)
def test_results_that_cannot_be_read_are_told_and_nothing_old_stands(
    tab: results.Results, runs_dir: Path, content: str | None, message: str
) -> None:
    path = runs_dir / "new" / "summary.json"
    path.unlink()
    if content is not None:
        path.write_text(content, encoding="utf-8", errors="surrogateescape")
    for shown, nothing in (
        (tab.show("new"), ("", gr.update(value=None, interactive=False))),
        (tab.compare("old", "new"), None),
    ):
        cleared = next(shown)
        assert cleared == nothing if nothing else cleared["visible"] is False
        with pytest.raises(UserError) as caught:
            next(shown)
        assert plain(caught.value, run=runs_dir / "new") == message
    with pytest.raises(UserError) as caught:
        results.results(runs_dir, "new")
    assert plain(caught.value, run=runs_dir / "new") == message
    with pytest.raises(UserError) as caught:
        tab.opened("new")
    assert plain(caught.value, run=runs_dir / "new") == message


def test_rows_of_another_version_are_told(runs_dir: Path) -> None:
    summary = asdict(results.results(runs_dir, "new"))
    del summary["rows"][0]["p_value"]
    write_json(runs_dir / "new" / "summary.json", summary)
    with pytest.raises(UserError) as caught:
        results.results(runs_dir, "new")
    assert plain(caught.value, run=runs_dir / "new") == snapshot(
        "<run>/summary.json was written by another version of this program, or is damaged: it lacks "
        "p_value.\n"
        "Have it written again: --resume --name new"
    )


def test_a_damaged_config_is_told(runs_dir: Path, tab: results.Results) -> None:
    (runs_dir / "new" / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        last(tab.show("new"))
    assert plain(caught.value, run=runs_dir / "new") == snapshot(
        "<run>/config.json is damaged: it does not hold a JSON object.\n"
        "Put the file back from a copy, or delete the folder <run>."
    )


def test_a_run_that_is_gone_is_told_by_the_event(tab: results.Results) -> None:
    event = guarded(tab.show)("gone<b>")
    next(event)
    with pytest.raises(gr.Error) as told:
        next(event)
    assert plain(told.value.message, runs=tab.runs_dir) == snapshot(
        "&#34;gone&lt;b&gt;&#34; cannot be the name of a run: use letters, digits, &#34;.&#34;, &#34;_&#34; "
        "and &#34;-&#34; only, at most 100, and no name of a Windows device, so that it stays inside <runs>."
    )
    with pytest.raises(UserError) as caught:
        tab.opened("gone")
    assert plain(caught.value, runs=tab.runs_dir) == snapshot(
        'There is no run gone in <runs>. Did you mean "new"?'
    )


def test_a_run_opens_from_another_tab(tab: results.Results) -> None:
    run, other = tab.opened("old")
    assert (run["value"], other["value"]) == ("old", "")


def test_a_run_without_a_report_has_nothing_to_download(tab: results.Results, runs_dir: Path) -> None:
    (runs_dir / "old" / "report.html").unlink()
    assert last(tab.show("old"))[1]["interactive"] is False


def test_results_are_the_summary(runs_dir: Path) -> None:
    assert results.results(runs_dir, "old").verdict.forgotten == "yes"


def test_no_event_is_part_of_the_public_api(runs_dir: Path) -> None:
    with gr.Blocks() as demo:
        tab = results.build(runs_dir)
        tab.refresh_on(demo.load)
        tab.open_on(gr.Button().click, gr.Textbox())
    assert demo.fns
    assert {event.api_visibility for event in demo.fns.values()} == {"private"}


def test_another_choice_takes_the_old_report_away_before_the_new_one_is_read(tab: results.Results) -> None:
    parts, download, comparison = tab.clear("old")
    assert plain(parts) == snapshot("<p>Reading the results of old …</p>")
    assert (download["value"], download["interactive"], comparison["visible"]) == (None, False, False)
    assert tab.clear(None)[0] == results.EMPTY
    assert "&lt;b&gt;" in tab.clear("<b>")[0]


def test_that_there_is_no_run_is_said_once_it_is_known(tab: results.Results, tmp_path: Path) -> None:
    assert tab.parts.value == results.LOADING
    assert tab.tell_none(None) == gr.skip()
    with gr.Blocks():
        empty = results.build(tmp_path / "nowhere")
    assert empty.tell_none(None) == results.EMPTY
