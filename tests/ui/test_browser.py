"""The app as a person uses it: a real browser, the real tiny preset, a process that lives on when the page is closed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from gradio_client import Client
from inline_snapshot import snapshot
from playwright.sync_api import Locator, Page, expect

from lowmem_rmu import __version__
from lowmem_rmu.audit.suite import Settings
from lowmem_rmu.runs.files import read_lines, write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.ui import jobs
from tests.texts import plain
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
SHORT = "rmu.steps=12\nevaluation.limit=8\nevaluation.max_new_tokens=8"
LONG = "rmu.steps=3000\nevaluation.limit=8\nevaluation.max_new_tokens=8"
TABS = ("Unlearn", "Results", "Chat", "Audit", "Export", "Runs")


@pytest.fixture(scope="module")
def requests() -> list[str]:
    """Every address that the browser asked for."""
    return []


@pytest.fixture
def page(new_page: Callable[..., Page], app: str, requests: list[str]) -> Page:
    page = new_page(viewport={"width": 1280, "height": 1000})
    page.on("request", lambda request: requests.append(request.url))
    visit(page, app)
    return page


def visit(page: Page, address: str) -> None:
    """Open the app, and wait until it has been built: what is typed or clicked before reaches nothing."""
    page.goto(address)
    expect(page.get_by_role("button", name="Start", exact=True)).to_be_visible()


def fill(field: Locator, text: str) -> None:
    """Types, and again where the page was not ready for it."""
    for _ in range(20):
        field.fill(text)
        field.page.wait_for_timeout(300)
        if field.input_value() == text:
            return
    raise AssertionError(f"the page does not keep what is typed: {field}")


def open_settings(page: Page) -> None:
    page.get_by_role("button", name="3. Settings").click()
    page.get_by_role("button", name="All other settings").click()


def start(page: Page, name: str, lines: str) -> None:
    open_settings(page)
    fill(page.get_by_label("One a line, as key=value"), lines)
    fill(page.get_by_label("Name of the run"), name)
    page.get_by_role("button", name="Start", exact=True).click()
    expect(state_of(page, name)).to_be_visible()


def state_of(page: Page, name: str) -> Locator:
    """The line that says what the run is doing."""
    return page.locator(".rmu-state", has_text=f"{name}:")


def steps_of(runs_dir: Path, name: str) -> int:
    return len(read_lines(RunFolder(runs_dir / name).metrics))


def test_from_start_to_a_report_and_an_answer(page: Page, runs_dir: Path, tmp_path: Path) -> None:
    start(page, "mine", SHORT)
    page.reload()  # the run is found again
    expect(page.locator(".rmu-done")).to_be_visible()
    page.get_by_role("tab", name="Results").click()
    expect(page.locator(".rmu-results").first).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the report").click()
    download.value.save_as(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == (runs_dir / "mine/report.html").read_bytes()


def test_both_sides_answer_and_the_conversation_is_kept(page: Page, runs_dir: Path, tmp_path: Path) -> None:
    page.get_by_role("tab", name="Chat").click()
    fill(page.get_by_placeholder("Ask both sides something"), "What is the compound for?")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".parting-base").or_(page.locator(".parting-common")).first).to_be_visible()
    for form in ("Markdown", "JSON"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Save as {form}").click()
        download.value.save_as(tmp_path / form)
        assert "What is the compound for?" in (tmp_path / form).read_text()


def test_the_adapter_is_exported_verified_and_downloaded(page: Page, runs_dir: Path, tmp_path: Path) -> None:
    page.get_by_role("tab", name="Export").click()
    expect(page.locator('input[aria-label="Run"]:visible')).to_have_value("mine")
    page.get_by_role("button", name="Export", exact=True).click()
    expect(page.get_by_text("Asked the run's own questions:")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download", exact=True).click()
    download.value.save_as(tmp_path / "adapter.zip")
    shutil.unpack_archive(tmp_path / "adapter.zip", tmp_path / "adapter")
    kept = runs_dir / "mine/adapter/adapter_model.safetensors"
    assert (tmp_path / "adapter" / kept.name).read_bytes() == kept.read_bytes()


def test_an_audit_names_what_it_had_no_time_for(page: Page, runs_dir: Path, forgetful: RunFolder) -> None:
    run = RunFolder(Path(shutil.copytree(forgetful.path, runs_dir / "audited")))
    os.utime(run.path / "config.json")  # the newest, which is offered first
    run.audit.mkdir()
    write_json(run.audit / "settings.json", asdict(Settings(limit=5)) | {"version": __version__})
    page.reload()
    page.get_by_role("tab", name="Audit").click()
    expect(page.locator('input[aria-label="Run"]:visible')).to_have_value("audited")
    fill(page.get_by_label("Budget in minutes"), "0.001")
    page.get_by_role("button", name="Audit", exact=True).click()
    expect(page.locator(".attacks:visible tr", has_text="relearning")).to_contain_text(
        "not run: it would take about"
    )
    wait_until(lambda: not jobs.is_audited_now(run))
    shutil.rmtree(run.path)


def test_a_run_stops_and_goes_on(page: Page, runs_dir: Path) -> None:
    start(page, "halved", LONG)
    wait_until(lambda: steps_of(runs_dir, "halved") > 2)
    page.get_by_role("button", name="Stop", exact=True).first.click()
    expect(state_of(page, "halved")).to_contain_text("stopped; it can go on")
    stopped_at = steps_of(runs_dir, "halved")
    page.get_by_role("button", name="Resume").first.click()
    expect(state_of(page, "halved")).to_contain_text("running")
    wait_until(lambda: steps_of(runs_dir, "halved") > stopped_at)
    page.get_by_role("button", name="Stop", exact=True).first.click()
    expect(state_of(page, "halved")).to_contain_text("stopped; it can go on")
    steps = [row["step"] for row in read_lines(RunFolder(runs_dir / "halved").metrics)]
    assert steps == list(range(1, len(steps) + 1)), "no step is lost or done twice"


def test_a_second_run_waits_its_turn_and_another_tab_sees_both(
    page: Page, new_page: Callable[..., Page], app: str, runs_dir: Path
) -> None:
    start(page, "one", LONG)
    other = new_page()
    visit(other, app)
    expect(state_of(other, "one")).to_be_visible()
    start(other, "two", SHORT)
    expect(state_of(other, "two")).to_contain_text("waiting: 1 run before it")
    other.close()  # nothing stops with it
    page.get_by_role("button", name="Stop", exact=True).first.click()
    expect(state_of(page, "one")).to_contain_text("stopped")
    page.get_by_label("Run shown").click()
    page.get_by_role("option", name="two").click()
    expect(state_of(page, "two")).to_contain_text("done")


def test_own_text_is_read_shown_and_used(page: Page, runs_dir: Path, tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"storm {number}.txt").write_text(
            f"<b>Storm {number}</b> came over the sea and went inland. " * 40
        )
    page.get_by_role("button", name="2. Your own text").click()
    page.locator("input[type=file]").first.set_input_files(sorted(tmp_path.glob("*.txt")))
    expect(page.get_by_text("12 files, 12 documents")).to_be_visible()
    expect(page.get_by_text("</b> came over").first).to_be_visible()
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_text("Say in a word or two what your text is about.")).to_be_visible()
    fill(page.get_by_label("What is your text about?"), "tropical storms")
    start(page, "own", SHORT)
    expect(page.locator(".rmu-done")).to_be_visible()
    assert {row["topic"] for row in read_lines(RunFolder(runs_dir / "own").metrics)} == {"tropical_storms"}
    assert len(list((runs_dir / "own/texts/forget").iterdir())) == 12


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("Steps", "0", "rmu.steps: should be greater than or equal to 1"),
        ("Steps", "1.5", "rmu.steps: should be a valid integer"),
        ("Steps", "", "rmu.steps: should be a valid integer"),
        ("Learning rate", "-1", "rmu.learning_rate: should be greater than 0"),
        ("Protection (alpha)", "-1", "alpha: should be greater than or equal to 0"),
        ("Rank", "0", "rmu.rank: should be greater than or equal to 1"),
        ("Questions a test", "-3", "evaluation.limit: should be greater than or equal to 1"),
        ("Name of the run", "../x", '"../x" cannot be the name of a run'),
        ("Name of the run", "mine", "Run mine exists already."),
        ("One a line, as key=value", "rmu.stepps=3", 'Did you mean "steps"'),
        ("One a line, as key=value", "model.name=/etc", "A setting names another model"),
        ("One a line, as key=value", "nonsense", "nonsense"),
        ("Questions a test", "many", "evaluation.limit: should be a valid integer"),
    ],
)
def test_a_mistake_is_told_on_the_page(
    page: Page, runs_dir: Path, field: str, value: str, message: str
) -> None:
    before = sorted(runs_dir.iterdir())
    open_settings(page)
    fill(page.get_by_label(field), value)
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.locator(".toast-body").get_by_text(message)).to_be_visible()
    expect(page.get_by_text("Traceback")).to_have_count(0)
    assert sorted(runs_dir.iterdir()) == before


def test_what_is_not_set_stays_unset(page: Page) -> None:
    open_settings(page)
    questions = page.get_by_label("Questions a test")
    assert questions.input_value() == ""
    fill(questions, "7")
    fill(questions, "")
    expect(page.locator(".rmu-fit")).to_be_visible()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.exe", b"MZ", "a.exe"),
        ("empty.txt", b"", "There is no text"),
        ("big.txt", None, "maximum allowed size of 50.0"),
    ],
)
def test_what_is_no_text_or_too_much_is_refused(
    page: Page, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    with (tmp_path / name).open("wb") as file:
        file.write(content or b"")
        file.truncate(51 * 2**20 if content is None else len(content))
    page.get_by_role("button", name="2. Your own text").click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / name)
    expect(page.locator(".toast-body").get_by_text(message).first).to_be_visible()
    expect(page.get_by_text("Traceback")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_needs_no_scrolling_sideways(
    new_page: Callable[..., Page], app: str, scheme: str
) -> None:
    page = new_page(viewport={"width": 400, "height": 900}, color_scheme=scheme)
    visit(page, app)
    for tab in TABS:
        show(page, tab)
        page.wait_for_timeout(700)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, tab
    ink, paper = (
        page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
    )
    assert (brightness(ink) < brightness(paper)) == (scheme == "light")


def show(page: Page, tab: str) -> None:
    """In a narrow window the last tabs stand in a menu."""
    expect(page.get_by_role("tab").first).to_be_visible()
    shown = page.get_by_role("tab", name=tab, exact=True)
    if not shown.is_visible():
        page.locator(".overflow-menu > button").click()
        shown = page.locator(".overflow-dropdown button", has_text=tab)
    shown.click()


def brightness(colour: str) -> int:
    return sum(int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])


def test_the_keyboard_is_enough(page: Page, runs_dir: Path) -> None:
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "[document.activeElement].map(each => each.innerText || each.ariaLabel || each.type || each.tagName)[0]"
        )
        seen.append(focused.strip())
        if seen[-1] == "Start":
            break
    assert seen[-1] == "Start", seen
    assert "Unlearn" in seen
    assert any("3. Settings" in each for each in seen)


def test_nothing_is_asked_of_another_machine(page: Page, app: str, requests: list[str]) -> None:
    for tab in TABS:
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
    elsewhere = {urlparse(url).netloc for url in requests if url.startswith("http")} - {urlparse(app).netloc}
    assert len(requests) > 100
    assert not elsewhere, elsewhere


def test_runs_are_renamed_and_deleted(page: Page, runs_dir: Path) -> None:
    page.get_by_role("tab", name="Runs").click()
    run = page.locator('input[aria-label="Run"]:visible')
    run.click()
    page.get_by_role("option", name="own").locator("visible=true").click()
    expect(run).to_have_value("own")
    fill(page.get_by_label("New name"), "storms")
    page.get_by_role("button", name="Rename").click()
    # The page names the run by its new name a moment after the folder has it.
    expect(run).to_have_value("storms")
    assert (runs_dir / "storms/report.html").exists()
    assert not (runs_dir / "own").exists()
    page.get_by_role("button", name="Delete …").click()
    page.get_by_role("button", name="Keep it").click()
    expect(page.get_by_role("button", name="Keep it")).to_be_hidden()
    page.get_by_role("button", name="Delete …").click()
    page.get_by_role("button", name="Delete for good").click()
    wait_until(lambda: not (runs_dir / "storms").exists())


def test_a_run_outlives_the_app(
    open_app: Callable[[Path], AbstractContextManager[Any]], new_page: Callable[..., Page], tmp_path: Path
) -> None:
    with open_app(tmp_path) as (address, _):
        Client(address, verbose=False).predict("tiny", "lasting", LONG, api_name="/start")
        wait_until(lambda: steps_of(tmp_path, "lasting") > 0)
    steps = steps_of(tmp_path, "lasting")
    wait_until(lambda: steps_of(tmp_path, "lasting") > steps)
    with open_app(tmp_path) as (address, _):
        page = new_page()
        visit(page, address)
        expect(state_of(page, "lasting")).to_contain_text("running")
        page.get_by_role("button", name="Stop", exact=True).first.click()
        expect(state_of(page, "lasting")).to_contain_text("stopped")
        page.close()
    assert jobs.state_of(RunFolder(tmp_path / "lasting")).state == "stopped"


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["--share"]])
def test_others_are_let_in_with_a_password_only(arguments: list[str]) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "LOWMEM_RMU_AUTH"}
    result = subprocess.run(
        [sys.executable, "app.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert plain(result.stderr) == snapshot(
        "Others could reach this page: give --auth-file FILE, or set LOWMEM_RMU_AUTH, or leave out --share "
        "and --host.\n"
    )
