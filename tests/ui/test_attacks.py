"""Pages that mean harm, in a real browser: a foreign name that points here, and another port of this machine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
from inline_snapshot import snapshot

BODY = '{"data": ["tiny", "evil", "rmu.steps=2"]}'
ATTACKS = {
    "fetch, simple POST": "fetch(app + START, {method: 'POST', body: BODY, mode: 'no-cors', headers: {'Content-Type': 'text/plain'}})"
    ".then(a => a.type + ' ' + a.status)",
    "fetch, preflight": "fetch(app + START, {method: 'POST', body: BODY, headers: {'Content-Type': 'application/json'}}).then(a => a.text())",
    "fetch, states read": "fetch(app + '/config').then(a => a.text())",
    "upload": "(() => { const form = new FormData(); form.append('files', new Blob(['x']), 'x.txt');"
    " return fetch(app + '/gradio_api/upload', {method: 'POST', body: form}).then(a => a.text()) })()",
    "image": "element('img', 'src', app + '/gradio_api/startup-events')",
    "favicon as image": "element('img', 'src', app + '/favicon.ico')",
    "script": "element('script', 'src', app + '/config')",
    "style": "element('link', 'href', app + '/theme.css', {rel: 'stylesheet'})",
    "EventSource": "new Promise(done => { const s = new EventSource(app + '/gradio_api/heartbeat/evil');"
    " s.onopen = () => done('open'); s.onerror = () => done('refused') })",
    "WebSocket": "new Promise(done => { const s = new WebSocket(app.replace('http', 'ws') + '/queue/join');"
    " s.onopen = () => done('open'); s.onerror = () => done('refused') })",
    "form POST": "framed(name => { const form = Object.assign(document.createElement('form'), {method: 'POST', action: app + START,"
    " target: name, enctype: 'text/plain'}); form.append(Object.assign(document.createElement('input'),"
    ' {name: \'{"data": ["tiny", "evil\', value: \'", ""]}\'})); document.body.append(form); form.submit() })',
    "iframe": "framed(name => { document.getElementsByName(name)[0].src = app + '/' })",
    "logout by image": "element('img', 'src', app + '/logout')",
}
"""What a page of another origin tries, as JavaScript that gives what came of it."""
HELP = f"""
const START = '/gradio_api/call/start', BODY = {BODY!r};
const element = (tag, key, value, more = {{}}) => new Promise(done => {{
  const made = Object.assign(document.createElement(tag), more);
  made.onload = () => done('loaded'); made.onerror = () => done('refused');
  made[key] = value; document.body.append(made); setTimeout(() => done('silent'), 3000);
}});
const framed = act => new Promise(done => {{
  const frame = Object.assign(document.createElement('iframe'), {{name: 'frame' + Math.random()}});
  document.body.append(frame); act(frame.name); setTimeout(() => done('tried'), 1500);
}});
const tried = async what => {{ try {{ return String(await what()).slice(0, 60) }} catch (error) {{ return 'refused: ' + error.message }} }};
"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def page_elsewhere(folder: Path) -> Iterator[int]:
    """Serve a page from another port of this machine."""
    (folder / "index.html").write_text("<!DOCTYPE html><title>Elsewhere</title><body>")
    server = HTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()


@pytest.fixture
def answers(new_page: Callable[..., Any], app: str) -> tuple[Any, list[tuple[str, int]]]:
    """A page, and the status of everything that the app answered it."""
    page, answers = new_page(), []
    port = urlsplit(app).port
    page.on(
        "response",
        lambda got: answers.append((got.url, got.status)) if urlsplit(got.url).port == port else None,
    )
    return page, answers


def attempt(page: Any, app: str, code: str) -> str:
    return str(page.evaluate(f"app => {{ {HELP} return tried(() => {code}) }}", app))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "evil.test"])
@pytest.mark.parametrize("name", ATTACKS)
def test_another_port_starts_reads_and_shows_nothing(
    answers: Any, app: str, runs_dir: Path, tmp_path: Path, host: str, name: str
) -> None:
    page, answered = answers
    with page_elsewhere(tmp_path) as port:
        page.goto(f"http://{host}:{port}/")
        said = attempt(page, app, ATTACKS[name])
    print(f"| {name} | http://{host}:other port | {said} | {sorted({status for _, status in answered})} |")
    assert {status for _, status in answered} <= {403}, said
    assert said.startswith(("refused", "opaque", "tried", "silent")), said
    assert not (runs_dir / "evil").exists()


def test_a_foreign_name_that_points_here_sees_nothing(answers: Any, app: str, runs_dir: Path) -> None:
    page, answered = answers
    rebound = f"http://evil.test:{urlsplit(app).port}"
    first = page.goto(f"{rebound}/")
    assert first.status == 403
    assert "--allowed-host NAME:PORT" in first.text()
    for name in ("fetch, preflight", "fetch, states read", "upload"):
        said = attempt(page, rebound, ATTACKS[name])
        print(f"| {name} | {rebound} (rebinding) | {said} | {sorted({status for _, status in answered})} |")
        assert said.partition("\n")[0] == snapshot(
            "This page cannot be reached by the address that was used."
        )
    assert {status for _, status in answered} == {403}
    assert not (runs_dir / "evil").exists()


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_the_user_s_own_addresses_simply_work(new_page: Callable[..., Any], app: str, name: str) -> None:
    page = new_page()
    errors: list[str] = []
    page.on(
        "console", lambda said: errors.append(said.text) if "Content Security Policy" in said.text else None
    )
    page.goto(app.replace("127.0.0.1", name))
    page.get_by_role("tab", name="Runs").click()
    page.get_by_role("button", name="Rename").wait_for()
    assert not errors


def test_a_link_from_elsewhere_opens_the_page_and_nothing_more(
    new_page: Callable[..., Any], app: str, tmp_path: Path
) -> None:
    page = new_page()
    with page_elsewhere(tmp_path) as port:
        for path, status in (("/", 200), ("/config", 403), ("/logout", 403)):
            page.goto(f"http://evil.test:{port}/")
            # The whole navigation: one that is still under way would interrupt the next.
            with page.expect_navigation(url=f"{app}{path}") as got:
                page.evaluate("address => { location.href = address }", f"{app}{path}")
            assert got.value.status == status, path


def test_nothing_of_all_that_was_started(app: str, runs_dir: Path) -> None:
    """What was asked for would have come from the queue a moment later."""
    assert [path.name for path in runs_dir.iterdir() if not path.name.startswith(".")] == []
