"""The page while its runs change: renamed in another tab, chosen one after the other, exported before, read out by a screen reader."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from lowmem_rmu.runs.files import write_json
from lowmem_rmu.runs.folder import RunFolder
from lowmem_rmu.ui import jobs

HOSTILE = "<img src=x onerror=\"document.title='run'\">${document.title='run'}"


@pytest.fixture(scope="module")
def own_runs(tmp_path_factory: pytest.TempPathFactory, forgetful: RunFolder) -> Path:
    """Two finished runs; a hostile export lies in the older one."""
    runs_dir = tmp_path_factory.mktemp("runs")
    for age, name in enumerate(("newer", "older")):
        path = Path(shutil.copytree(forgetful.path, runs_dir / name))
        os.utime(path / "config.json", (1e9 - age,) * 2)
    exported = runs_dir / "older/exports/merged"
    exported.mkdir(parents=True)
    way = {"name": HOSTILE, "mark": "damaged", "reason": None, "seconds": 1.0, "tasks": []}
    write_json(exported / "verification.json", {"mark": "damaged", "checked": [way]})
    return runs_dir


@pytest.fixture(scope="module")
def address(open_app: Callable[..., AbstractContextManager[Any]], own_runs: Path) -> Iterator[str]:
    with open_app(own_runs) as (address, _):
        yield address


@pytest.fixture
def page(new_page: Callable[..., Page], address: str) -> Page:
    page = new_page(viewport={"width": 1280, "height": 1000})
    page.goto(address)
    expect(page.get_by_label("Run shown")).to_have_value("newer")
    return page


def run_of(page: Page) -> Locator:
    """The list of runs of the tab that is open."""
    return page.locator('input[aria-label="Run"]:visible')


def choose(page: Page, field: Locator, name: str) -> None:
    field.click()
    page.get_by_role("option", name=name, exact=True).locator("visible=true").click()
    expect(field).to_have_value(name)


def test_a_run_renamed_elsewhere_is_said_to_be_gone_and_raises_nothing(page: Page, own_runs: Path) -> None:
    failed: list[str] = []
    page.on("response", lambda answer: failed.append(answer.url) if answer.status >= 400 else None)
    shown = page.get_by_label("Run shown")
    choose(page, shown, "older")
    expect(page.locator(".rmu-state", has_text="older:")).to_be_visible()
    jobs.rename(RunFolder(own_runs / "older"), "other")
    expect(page.get_by_text("This run is no longer there.")).to_be_visible()
    page.wait_for_timeout(4000)
    expect(shown).to_have_value("older")
    for tab in ("Results", "Chat", "Audit", "Export", "Runs", "Unlearn"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(500)
    assert not failed
    jobs.rename(RunFolder(own_runs / "other"), "older")


def test_another_run_s_report_is_never_offered_under_a_new_name(page: Page) -> None:
    page.get_by_role("tab", name="Results").click()
    download = page.get_by_role("button", name="Download the report")
    eyebrow = page.locator(".rmu-results .eyebrow:visible").first
    expect(eyebrow).to_contain_text("Run newer")
    expect(download).to_be_enabled()
    # Every state of the page from here on: what is shown and what can be downloaded.
    page.evaluate(
        """() => { window.seen = []; setInterval(() => {
            const run = [...document.querySelectorAll('input[aria-label="Run"]')].find(each => each.offsetParent);
            const report = [...document.querySelectorAll('.rmu-results .eyebrow')].find(each => each.offsetParent);
            window.seen.push([run && run.value, report ? report.innerText : '']) }, 20) }"""
    )
    choose(page, run_of(page), "older")
    expect(eyebrow).to_contain_text("Run older")
    expect(download).to_be_enabled()
    with page.expect_download() as got:
        download.click()
    assert got.value.suggested_filename == "older-report.html"
    # The old report goes within a second, and does not come back.
    seen = [report.startswith("Run newer") for run, report in page.evaluate("window.seen") if run == "older"]
    assert True not in seen[50:]
    assert "No finished run yet" not in page.content()


def test_no_script_runs_in_the_export_tab_which_remembers_what_there_is(page: Page) -> None:
    page.get_by_role("tab", name="Export").click()
    expect(run_of(page)).to_have_value("newer")
    choose(page, run_of(page), "older")
    expect(page.get_by_text("Asked the run's own questions:")).to_be_visible()
    expect(page.locator("input[type=radio][value=merged]")).to_be_checked()
    page.wait_for_timeout(1000)
    assert page.title() == "lowmem-rmu"
    expect(page.get_by_text("<img src=x").first).to_be_visible()


def test_a_screen_reader_hears_words_and_no_keys(page: Page) -> None:
    page.evaluate(
        """() => { window.heard = []; new MutationObserver(() => {
            for (const each of document.querySelectorAll('[role=status]')) window.heard.push(each.textContent.trim())
        }).observe(document.body, {subtree: true, childList: true, characterData: true}) }"""
    )
    page.get_by_role("tab", name="Chat").click()
    page.get_by_role("button", name="Refresh").locator("visible=true").click()
    page.wait_for_function("window.heard.some(each => each === 'Done')")
    assert not [each for each in page.evaluate("window.heard") if each.startswith("common.")]


def test_a_finished_run_offers_neither_stop_nor_resume(page: Page) -> None:
    for name in ("Stop", "Resume"):
        expect(page.get_by_role("button", name=name, exact=True).first).to_be_disabled()
