"""The real app as a process of its own, and what talks to it."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright

from tests.waiting import PATIENCE

CHROMIUM = shutil.which("chromium")
ROOT = Path(__file__).resolve().parent.parent.parent
App = tuple[str, subprocess.Popen[bytes]]


@contextmanager
def app_over(runs_dir: Path, *options: str) -> Iterator[App]:
    """The app's address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "app.py", "--port", str(port), "--runs-dir", str(runs_dir), *options]
    with (runs_dir / ".app.txt").open("w") as printed:
        process = subprocess.Popen(command, cwd=ROOT, stderr=printed)
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    while time.monotonic() < until:
        assert process.poll() is None, "the app ended"
        try:
            httpx.get(address)
            break
        except httpx.TransportError:
            time.sleep(0.5)
    else:
        raise AssertionError(f"the app does not answer after {PATIENCE} seconds")
    try:
        yield address, process
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for a file of tests. Every page of it has its own cookies and storage.

    Not one for all files: as long as it is open, Playwright's event loop runs in this thread and no other can.
    """
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    expect.set_options(timeout=PATIENCE * 1000)
    # A name that leads to this machine, for pages that pretend to be the app's.
    foreign_name = "--host-resolver-rules=MAP evil.test 127.0.0.1"
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", foreign_name]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=arguments, timeout=PATIENCE * 1000
        )
        yield browser
        browser.close()


@pytest.fixture
def new_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open pages that wait as long as everything else, and close them at the end."""
    opened = []

    def open_page(**options: Any) -> Any:
        page = browser.new_page(**options)
        page.set_default_timeout(PATIENCE * 1000)
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        page.close()


@pytest.fixture(scope="session")
def open_app() -> Callable[..., AbstractContextManager[App]]:
    """Opens another app, over a runs folder of its own, which has what the app printed in `.app.txt`."""
    return app_over


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def app(runs_dir: Path) -> Iterator[str]:
    """Its address."""
    with app_over(runs_dir) as (address, _):
        yield address
