"""Who may reach the page, request by request, as the middleware in front of Gradio decides."""

import asyncio
import re
from types import SimpleNamespace
from typing import Any

import pytest
from inline_snapshot import snapshot

from lowmem_rmu.errors import UserError
from lowmem_rmu.ui import access
from lowmem_rmu.ui.access import Access, Answer, Site, Sites, Token, Uploads, page_policy
from tests.texts import plain, without_numbers

HERE = "127.0.0.1:7860"
OWN = "http://127.0.0.1:7860"
SECRET = "c29tZSBzZWNyZXQ"


def gate(
    host: str = "127.0.0.1",
    allowed: list[str] | None = None,
    token: bool = False,
    cookie: str = "so=1; Path=/",
) -> Access:
    """The middleware in front of an app that answers everything, with a cookie."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Answer(200, "served", {"Set-Cookie": cookie}).send(send)

    made = Access(
        Sites.bound(host, 7860, allowed or []), Token(SECRET, "lowmem-rmu-7860", "passed") if token else None
    )
    made.around(app)
    return made


def asked(
    made: Access, path: str = "/", method: str = "GET", gradio: Any = None, kind: str = "http", **headers: str
) -> Any:
    """The answer to a request: status, text and headers. A header's name has underscores for hyphens."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    given = {"host": HERE} | {name.replace("_", "-"): value for name, value in headers.items()}
    raw = [(name.encode(), value.encode()) for name, value in given.items() if value]
    place, _, query = path.partition("?")
    scope = {
        "type": kind,
        "path": place,
        "query_string": query.encode(),
        "method": method,
        "headers": raw,
        "client": ("10.0.0.9", 1),
    }
    asyncio.run(made(scope | ({"app": gradio} if gradio else {}), receive, send))
    if kind == "websocket":
        return sent
    text = b"".join(message.get("body", b"") for message in sent).decode()
    return SimpleNamespace(
        status=sent[0]["status"], text=text, headers=[(a.decode(), b.decode()) for a, b in sent[0]["headers"]]
    )


@pytest.mark.parametrize("host", [HERE, "localhost:7860", "[::1]:7860", "LOCALHOST:7860"])
def test_the_machine_s_own_names_work(host: str) -> None:
    assert asked(gate(), host=host).status == 200
    assert (
        asked(gate(), "/gradio_api/call/start", "POST", host=host, origin=f"http://{host.lower()}").status
        == 200
    )


@pytest.mark.parametrize(
    "host",
    [
        "evil.test:7860",
        "127.0.0.1",
        "127.0.0.1:80",
        "localhost:7861",
        "localhost.evil.test:7860",
        "127.0.0.1.nip.io:7860",
        "",
        "a b",
        "[::1",
        "x@y:7860",
        "localhost:7860:7860",
        "192.168.0.7:7860",
    ],
)
@pytest.mark.parametrize("path", ["/", "/config", "/assets/index.js", "/gradio_api/upload", "/login"])
def test_any_other_host_is_refused_whatever_it_asks_for(host: str, path: str) -> None:
    answer = asked(gate(), path, host=host)
    assert answer.status == 403
    assert "--allowed-host NAME:PORT" in answer.text


@pytest.mark.parametrize(
    "origin",
    [
        "http://127.0.0.1:9999",
        "http://localhost",
        "https://127.0.0.1:7860",
        "null",
        "http://evil.test",
        "http://evil.test:7860",
        "file://",
        "http://127.0.0.1:7860.evil.test",
        "http://127.0.0.1:7860/",
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/queue/join"),
        ("GET", "/config"),
        ("OPTIONS", "/config"),
        ("POST", "/login"),
        ("GET", "/"),
    ],
)
def test_what_another_origin_s_page_sends_is_refused(origin: str, method: str, path: str) -> None:
    answer = asked(gate(), path, method, origin=origin)
    assert (answer.status, answer.text) == (
        403,
        snapshot("This was asked for by a page of another address, which may not use this one."),
    )


def test_programs_name_no_origin_and_are_served() -> None:
    assert asked(gate(), "/gradio_api/call/start", "POST").status == 200


@pytest.mark.parametrize("site", ["same-site", "cross-site"])
def test_from_elsewhere_a_person_may_open_the_page_and_nothing_else(site: str) -> None:
    opened = {"sec_fetch_site": site, "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert asked(gate(), "/?__theme=dark", **opened).status == 200
    for path, changed in (
        ("/config", {}),
        ("/logout", {}),
        ("/", {"sec_fetch_dest": "iframe"}),
        ("/", {"sec_fetch_mode": "no-cors", "sec_fetch_dest": "image"}),
    ):
        assert asked(gate(), path, **(opened | changed)).status == 403, (path, changed)
    assert asked(gate(), "/", "POST", **opened).status == 403


def test_two_hosts_are_none() -> None:
    made = gate()
    scope = {
        "type": "http",
        "path": "/",
        "query_string": b"",
        "method": "GET",
        "headers": [(b"host", HERE.encode())] * 2,
    }
    assert made.refusal(access.Asked(scope)).status == 403  # type: ignore[union-attr]


def test_websockets_are_checked_too() -> None:
    assert asked(gate(), kind="websocket", origin="http://evil.test") == [
        {"type": "websocket.close", "code": 1008, "reason": "refused"}
    ]
    assert asked(gate(), kind="websocket", origin=OWN)[0]["type"] == "http.response.start"


# Names that the user adds, other addresses to listen on, proxies


@pytest.mark.parametrize(
    ("allowed", "host", "origin", "is_served"),
    [
        ("gpu.lab", "gpu.lab:7860", "http://gpu.lab:7860", True),
        ("gpu.lab", "gpu.lab", "https://gpu.lab", True),
        ("gpu.lab", "gpu.lab:8443", "https://gpu.lab:8443", False),
        ("gpu.lab:8443", "gpu.lab:8443", "https://gpu.lab:8443", True),
        ("gpu.lab:8443", "gpu.lab", "https://gpu.lab", False),
        ("https://gpu.lab", "gpu.lab", "https://gpu.lab", True),
        ("https://gpu.lab", "gpu.lab", "http://evil.test", False),
        ("localhost:8888", "localhost:8888", "http://localhost:8888", True),
        ("https://gpu.lab/", "127.0.0.1:7860", "https://gpu.lab", True),
    ],
)
def test_names_that_the_user_allows(allowed: str, host: str, origin: str, is_served: bool) -> None:
    made = gate(allowed=[allowed])
    assert (
        asked(made, "/gradio_api/queue/join", "POST", host=host, origin=origin).status == 200
    ) == is_served
    assert asked(made).status == 200, "the own address stays"
    assert asked(made, host="evil.test").status == 403


@pytest.mark.parametrize("text", ["", "a b", "ftp://gpu.lab", "http://", "gpu.lab:port", "gpu.lab/x", "*"])
def test_what_is_no_host_cannot_be_allowed(text: str) -> None:
    with pytest.raises(UserError) as caught:
        Sites.bound("127.0.0.1", 7860, [text])
    assert plain(caught.value, given=f'"{text}"') == snapshot(
        "--allowed-host <given> is no host: give a name such as gpu.example.org, gpu.example.org:8443 or "
        "https://gpu.example.org."
    )


def test_a_proxy_s_header_is_checked_like_the_host() -> None:
    made = gate(allowed=["https://gpu.lab"])
    assert asked(made, "/config", x_forwarded_host="gpu.lab", origin="https://gpu.lab").status == 200
    assert asked(made, "/config", x_forwarded_host="evil.test").status == 403


def test_on_every_interface_any_literal_address_counts_and_no_foreign_name() -> None:
    made = gate("0.0.0.0")
    for host in (
        "192.168.0.7:7860",
        "[fe80::1]:7860",
        "localhost:7860",
        f"{access.socket.gethostname()}:7860",
    ):
        assert asked(made, host=host).status == 200, host
        assert asked(made, "/x", "POST", host=host, origin=f"http://{host.lower()}").status == 200, host
    for host in ("evil.test:7860", "192.168.0.7:80"):
        assert asked(made, host=host).status == 403, host
    assert (
        asked(made, "/x", "POST", host="192.168.0.7:7860", origin="http://203.0.113.9:7860").status == 403
    ), "another machine's page"


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
def test_browsers_leave_out_the_port_of_http(bound: str) -> None:
    sites = Sites.bound(bound, 80, [])
    assert sites.knows_host("127.0.0.1")
    assert sites.knows_host("localhost:80")
    assert sites.knows_origin("http://127.0.0.1", "127.0.0.1")
    assert not sites.knows_host("127.0.0.1:443")


def test_an_address_of_the_network_is_the_only_one() -> None:
    made = gate("192.168.0.7")
    assert asked(made, host="192.168.0.7:7860").status == 200
    assert asked(made, host="127.0.0.1:7860").status == 403


def test_origins_are_read_whole() -> None:
    assert Site.read("http://[::1]:7860") == Site("http", "::1", 7860)
    assert Site.read("https://GPU.lab") == Site("https", "gpu.lab", 443)
    for text in ("null", "gpu.lab", "http://a/b", "ws://gpu.lab", ""):
        assert Site.read(text) is None


# The secret in the address


def test_without_the_secret_nothing_is_served() -> None:
    made = gate(token=True)
    for path in ("/", "/config", "/assets/x.js", "/?token=", f"/?token={SECRET[:-1]}", "/login"):
        answer = asked(made, path)
        assert (answer.status, "?token=..." in answer.text) == (401, True), path
    assert asked(made, "/gradio_api/startup-events").status == 200, "Gradio asks for it itself"


def test_the_secret_in_the_address_becomes_a_cookie_that_no_other_site_can_use() -> None:
    made = gate(token=True)
    answer = asked(made, f"/?token={SECRET}")
    assert answer.status == 200
    assert SECRET not in answer.text
    assert 'content="0; url=/"' in answer.text
    cookie = dict(answer.headers)["set-cookie"]
    assert cookie == "lowmem-rmu-7860=passed; Path=/; HttpOnly; SameSite=Strict"
    assert asked(made, "/config", cookie="other=1; lowmem-rmu-7860=passed").text == "served"
    assert asked(made, "/config", cookie="lowmem-rmu-7860=" + SECRET).status == 401, (
        "the cookie does not hold the secret"
    )


def test_programs_give_the_secret_as_a_bearer_or_in_the_address() -> None:
    made = gate(token=True)
    assert asked(made, "/config", authorization=f"Bearer {SECRET}").text == "served"
    assert asked(made, f"/config?token={SECRET}").text == "served"
    assert asked(made, "/config", authorization="Bearer x").status == 401


def test_the_secret_does_not_open_the_page_to_other_origins() -> None:
    assert asked(gate(token=True), f"/config?token={SECRET}", origin="http://evil.test").status == 403
    first, second = Token.drawn(7860), Token.drawn(7860)
    assert first.secret != second.secret
    assert first.secret != first.session
    assert len(first.secret) > 40


# The login


def app_with_login() -> Any:
    return SimpleNamespace(auth={"me": "x"}, cookie_id="id", tokens={"known": "me"})


@pytest.mark.parametrize(
    "path",
    [
        "/openapi.json",
        "/docs",
        "/redoc",
        "/config",
        "/gradio_api/info",
        "/gradio_api/heartbeat/x",
        "/monitoring/x",
        "/gradio_api/app_id",
    ],
)
def test_all_but_the_login_page_is_behind_the_login(path: str) -> None:
    assert asked(gate(), path, gradio=app_with_login()).text == snapshot("Log in first.")
    for name in ("access-token-id", "access-token-unsecure-id"):
        assert asked(gate(), path, gradio=app_with_login(), cookie=f"{name}=known").text == "served"
        assert asked(gate(), path, gradio=app_with_login(), cookie=f"{name}=guessed").status == 401


@pytest.mark.parametrize(
    "path", ["/", "/login", "/assets/index.js", "/theme.css", "/gradio_api/startup-events"]
)
def test_the_login_page_is_served(path: str) -> None:
    assert asked(gate(), path, gradio=app_with_login()).text == "served"


def test_without_a_login_nothing_is_behind_it() -> None:
    assert asked(gate(), "/config", gradio=SimpleNamespace(auth=None)).text == "served"


def test_cookies_stay_at_home() -> None:
    for cookie in ("a=1; SameSite=none; Secure; HttpOnly", "a=1; HttpOnly; samesite=Lax", "a=1"):
        sent = [
            value
            for name, value in asked(gate(cookie=cookie), "/login", "POST").headers
            if name == "set-cookie"
        ]
        assert len(sent) == 1
        assert re.findall("samesite=([a-z]+)", sent[0], re.IGNORECASE) == ["Strict"]
        assert ("HttpOnly" in sent[0]) == ("HttpOnly" in cookie)


def test_only_this_page_logs_out() -> None:
    """Also on plain HTTP in a network, where browsers do not say which site asks."""
    made = gate("192.168.0.7")
    for given in (
        {},
        {"referer": "http://evil.test/x"},
        {"referer": "http://192.168.0.7:7861/"},
        {"sec_fetch_site": "cross-site"},
    ):
        assert asked(made, "/logout", host="192.168.0.7:7860", **given).status == 403, given
    for given in (
        {"referer": "http://192.168.0.7:7860/"},
        {"sec_fetch_site": "same-origin"},
        {"sec_fetch_site": "none"},
    ):
        assert asked(made, "/logout", host="192.168.0.7:7860", **given).status == 200, given


def test_guessing_a_password_is_slowed_down() -> None:
    made = gate()
    made.around(lambda scope, receive, send: Answer(400, "Incorrect credentials.").send(send))
    statuses = [asked(made, "/login", "POST").status for _ in range(7)]
    assert statuses[0] == 400
    assert statuses[-1] == 429
    answer = asked(made, "/login/", "POST")
    assert without_numbers(answer.text) == snapshot("Too many wrong passwords: try again in N s.")
    assert int(dict(answer.headers)["retry-after"]) >= 1
    assert asked(made, "/", "POST").status == 400, "the page itself is not slowed down"


def test_a_right_password_is_never_slowed_down() -> None:
    made = gate()
    assert {asked(made, "/login", "POST").status for _ in range(30)} == {200}


# What is sent to the page


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/gradio_api/upload", {"content_length": "200000000"}, 200),
        ("/gradio_api/upload", {"content_length": "300000000"}, 413),
        ("/gradio_api/upload/", {"content_length": "300000000"}, 413),
        ("/gradio_api/queue/join", {"content_length": "15000000"}, 200),
        ("/gradio_api/queue/join", {"content_length": "20000000"}, 413),
        ("/gradio_api/upload", {"transfer_encoding": "chunked"}, 411),
        ("/gradio_api/upload", {"content_length": "-1"}, 411),
        ("/gradio_api/upload", {"content_length": "10", "origin": "http://127.0.0.1:9999"}, 403),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_read(
    path: str, headers: dict[str, str], status: int
) -> None:
    assert asked(gate(), path, "POST", **headers).status == status


def test_uploads_are_limited_in_all_and_after_a_day_there_is_room_again() -> None:
    now = [0.0]
    uploads = Uploads(most=100, clock=lambda: now[0])
    assert uploads.take(60)
    now[0] = 1000.0
    assert not uploads.take(50)
    assert uploads.take(40), "what was refused is not counted"
    now[0] = 86_500.0
    assert uploads.take(60)
    assert not uploads.take(1)


def test_many_uploads_end_in_a_message() -> None:
    made = gate()
    made.uploads.most = 3 * 10**6
    statuses = [asked(made, "/gradio_api/upload", "POST", content_length="1000000").status for _ in range(4)]
    assert statuses == [200, 200, 200, 413]


# What other pages may do with what is sent back


@pytest.mark.parametrize("path", ["/", "/config", "/assets/x.js", "/gradio_api/file=x"])
@pytest.mark.parametrize("origin", ["", "http://evil.test"])
def test_every_answer_forbids_embedding(path: str, origin: str) -> None:
    headers = dict(asked(gate(), path, origin=origin).headers)
    assert headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert (
        headers["cross-origin-resource-policy"]
        == headers["cross-origin-opener-policy"]
        == headers["referrer-policy"]
        == "same-origin"
    )


def test_nothing_in_users_files_runs() -> None:
    policy = dict(asked(gate(), "/gradio_api/file=/x/report.html").headers)["content-security-policy"]
    assert policy.startswith("sandbox; default-src 'none'")


def test_the_page_loads_from_itself_alone() -> None:
    assert "http" not in page_policy("")
    assert "script-src 'self' https://cdn 'unsafe-inline'" in page_policy("https://cdn"), (
        "a shared page has Gradio's scripts from there"
    )
