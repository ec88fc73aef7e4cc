"""The real app as a process of its own, and what talks to it."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest

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
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while time.monotonic() < until:
        assert process.poll() is None, "the app ended"
        try:
            httpx.get(address)
            break
        except httpx.TransportError:
            time.sleep(0.5)
    try:
        yield address, process
    finally:
        process.terminate()
        process.wait(30)


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
