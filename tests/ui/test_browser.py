"""The app as a person uses it: a real browser, the real tiny preset, a process that lives on when the page is closed."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import httpx
import pytest
from gradio_client import Client
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent
CHROMIUM = shutil.which("chromium")
SHORT = "rmu.steps=12\nevaluation.limit=8\nevaluation.max_new_tokens=8"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def app(runs_dir: Path) -> Iterator[str]:
    """Its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "app.py", "--port", str(port), "--runs-dir", str(runs_dir)], cwd=ROOT)
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while time.monotonic() < until:
        assert process.poll() is None, "the app ended"
        try:
            httpx.get(address)
            break
        except httpx.TransportError:
            time.sleep(0.5)
    yield address
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def requests() -> list[str]:
    """Every address that the browser asked for."""
    return []


@pytest.fixture
def page(app: str, requests: list[str]) -> Iterator[Page]:
    options: dict[str, Any] = {"executable_path": CHROMIUM, "args": ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**options)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.on("request", lambda request: requests.append(request.url))
        page.goto(app)
        yield page
        browser.close()


def test_from_start_to_a_report_and_an_answer(page: Page, runs_dir: Path, tmp_path: Path) -> None:
    page.get_by_text("3. Settings").click()
    page.get_by_text("All other settings").click()
    page.get_by_label("One a line, as key=value").fill(SHORT)
    page.get_by_label("Name of the run").fill("mine")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_text("mine:").first).to_be_visible(timeout=60_000)
    page.reload()  # the run is found again
    expect(page.locator(".rmu-done")).to_be_visible(timeout=180_000)
    page.get_by_role("tab", name="Results").click()
    expect(page.locator(".rmu-results").first).to_be_visible(timeout=30_000)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the report").click()
    download.value.save_as(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == (runs_dir / "mine/report.html").read_bytes()
    page.get_by_role("tab", name="Chat").click()
    page.get_by_placeholder("Ask both sides something").fill("What is the compound for?")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".parting-base").or_(page.locator(".parting-common")).first).to_be_visible(timeout=120_000)


def test_wrong_settings_are_told_on_the_page(page: Page, runs_dir: Path) -> None:
    page.get_by_text("3. Settings").click()
    page.get_by_label("Steps").fill("0")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_text("rmu.steps: should be greater than or equal to 1").first).to_be_visible(timeout=30_000)
    expect(page.get_by_text("Traceback")).to_have_count(0)


def test_nothing_is_asked_of_another_machine(page: Page, app: str, requests: list[str]) -> None:
    page.get_by_role("tab", name="Runs").click()
    page.wait_for_timeout(1000)
    elsewhere = {urlparse(url).netloc for url in requests if url.startswith("http")} - {urlparse(app).netloc}
    assert requests
    assert not elsewhere, elsewhere


def test_the_api_starts_tells_and_stops_and_queues(app: str, runs_dir: Path) -> None:
    client = Client(app, verbose=False)
    assert "tiny" in [preset["preset"] for preset in client.predict(api_name="/list_presets")]
    first, second = (client.predict("tiny", name, SHORT, api_name="/start") for name in ("first", "second"))
    assert (first["place"], second["state"], second["place"]) == (0, "waiting", 1)
    client.predict("second", api_name="/stop")
    client.predict("first", api_name="/stop")
    until = time.monotonic() + 60
    while (states := [client.predict(name, api_name="/status")["state"] for name in ("first", "second")]) != ["stopped", "stopped"]:
        assert time.monotonic() < until, states
        time.sleep(0.5)


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "nul", "x\0y", "..", "C:\\x"])
def test_names_that_would_leave_the_runs_folder_are_refused(app: str, runs_dir: Path, name: str) -> None:
    before = sorted(runs_dir.parent.iterdir())
    with pytest.raises(Exception, match="cannot be the name of a run"):
        Client(app, verbose=False).predict("tiny", name, SHORT, api_name="/start")
    assert sorted(runs_dir.parent.iterdir()) == before


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["--share"]])
def test_others_are_let_in_with_a_password_only(arguments: list[str]) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "LOWMEM_RMU_AUTH"}
    result = subprocess.run([sys.executable, "app.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "Others could reach this page: give --auth user:password" in result.stderr
