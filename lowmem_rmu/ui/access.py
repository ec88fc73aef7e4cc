"""Who may reach the page: one ASGI middleware that sees every request before Gradio does.

A page on this machine has two kinds of enemies that come through the user's own browser. DNS rebinding makes
a foreign name point here: the browser then sends that name as `Host`. A page of another origin (another site,
or another port of localhost) sends its own address as `Origin`, or has the browser say `Sec-Fetch-Site`. Both
are refused, whatever path they ask for. What names no origin at all (curl, gradio_client) passes where its
`Host` is right.
"""

import hashlib
import hmac
import ipaddress
import re
import secrets
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import parse_qs

from lowmem_rmu.errors import UserError
from lowmem_rmu.ui.login import Throttle

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
DEFAULT_PORTS = {"http": 80, "https": 443}
UPLOAD_PATHS = ("/gradio_api/upload", "/gradio_api/upload/")
LARGEST_UPLOAD = 200 * 2**20
"""Bytes of one upload request; a single file is limited by Gradio's `max_file_size`."""
UPLOADED_PER_DAY = 2 * 2**30
"""Bytes of all uploads that are kept at the same time: Gradio deletes them after a day."""
LARGEST_BODY = 16 * 2**20
"""Bytes of any other request."""
DAY = 86_400.0
STARTUP_PATH = "/gradio_api/startup-events"
"""Gradio asks for it itself when it starts."""
PUBLIC_PATHS = {
    "/",
    "/login",
    "/login/",
    "/logout",
    "/theme.css",
    "/gradio_api/theme.css",
    "/favicon.ico",
    "/manifest.json",
    "/robots.txt",
    STARTUP_PATH,
}
"""What the login page consists of."""
PUBLIC_FOLDERS = ("/assets/", "/static/", "/svelte/")
SHARE_ASSETS = "https://gradio.s3-us-west-2.amazonaws.com"
"""Where a page behind `--share` has its scripts from."""
FILES_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
"""Content Security Policy of what users' files hold: nothing in them runs."""

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """An origin: what a browser shows in front of the path of an address."""

    scheme: str
    host: str
    port: int

    @classmethod
    def read(cls, origin: str) -> Self | None:
        """Parse an `Origin` header. None for `null` and for anything else that is no origin of a web page."""
        scheme, separator, rest = origin.partition("://")
        place = read_host(rest)
        if not separator or scheme not in DEFAULT_PORTS or place is None:
            return None
        name, port = place
        return cls(scheme, name, port or DEFAULT_PORTS[scheme])

    def is_asked_for(self, name: str, port: int | None) -> bool:
        """Tell whether a `Host` header means this site; without a port it means the scheme's own."""
        return self.host == name and self.port == (port or DEFAULT_PORTS[self.scheme])


def read_host(text: str) -> tuple[str, int | None] | None:
    """Split `name:port`, `[::1]:port` or a bare name; None for anything else."""
    match = _HOST.fullmatch(text)
    if match is None:
        return None
    port = int(match["port"]) if match["port"] else None
    return match["name"].strip("[]").lower(), port


def is_address(name: str) -> bool:
    """Tell a literal IP address from a name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@dataclass
class Sites:
    """The sites that this page may be reached as."""

    port: int
    allowed: set[Site]
    any_address: bool = False
    """Listens on every interface: any literal address of `port` may be this machine's, and no foreign name
    can stand for it.
    """

    @classmethod
    def bound(cls, host: str, port: int, allowed_hosts: list[str]) -> Self:
        """List what a server on `host` and `port` is reached as, and what the user allows in addition.

        Raises UserError for an allowed host that cannot be one.
        """
        any_address = is_address(host) and ipaddress.ip_address(host).is_unspecified
        names = {host.lower()}
        if any_address:
            own = socket.gethostname().lower()
            names = {*LOOPBACK_NAMES, own, f"{own}.local"}
        elif host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback):
            names |= set(LOOPBACK_NAMES)
        sites = cls(port, {Site("http", name, port) for name in names}, any_address)
        for text in allowed_hosts:
            sites.allow(text)
        return sites

    def allow(self, text: str) -> None:
        """Add `[http://|https://]NAME[:PORT]`. Without a scheme both count; without a port the scheme's own
        and the one listened on.
        """
        scheme, separator, rest = text.rstrip("/").rpartition("://")
        place = read_host(rest)
        if place is None or (separator and scheme not in DEFAULT_PORTS):
            examples = "gpu.example.org, gpu.example.org:8443 or https://gpu.example.org"
            raise UserError(f'--allowed-host "{text}" is no host: give a name such as {examples}.')
        name, port = place
        for each in [scheme] if separator else DEFAULT_PORTS:
            ports = [port] if port else [DEFAULT_PORTS[each], self.port]
            self.allowed |= {Site(each, name, number) for number in ports}

    def knows_host(self, text: str) -> bool:
        """Tell whether a `Host` header names this page."""
        place = read_host(text)
        if place is None:
            return False
        name, port = place
        if self.any_address and is_address(name) and (port or DEFAULT_PORTS["http"]) == self.port:
            return True
        return any(site.is_asked_for(name, port) for site in self.allowed)

    def knows_origin(self, text: str, host: str) -> bool:
        """Tell whether a request with this `Origin` comes from this page, which was asked for as `host`
        (already known).
        """
        site, place = Site.read(text), read_host(host)
        if site is None or place is None:
            return False
        is_same = site.scheme == "http" and site.is_asked_for(*place)
        return is_same or site in self.allowed


@dataclass(frozen=True)
class Token:
    """The secret in the address, for machines with several users."""

    secret: str
    cookie: str
    """Name of the cookie: ports of a machine share their cookies, so it has the port in it."""
    session: str
    """What the cookie holds: not the secret itself."""

    @classmethod
    def drawn(cls, port: int) -> Self:
        return cls(secrets.token_urlsafe(32), f"lowmem-rmu-{port}", secrets.token_urlsafe(32))

    def is_given(self, asked: "Asked") -> bool:
        """Tell whether a request may pass: by its cookie, by `Authorization: Bearer`, or by the address."""
        bearer = asked.header("authorization").removeprefix("Bearer ")
        return (
            same(asked.cookies.get(self.cookie, ""), self.session)
            or same(bearer, self.secret)
            or self.is_in(asked)
        )

    def is_in(self, asked: "Asked") -> bool:
        """Tell whether the address has the secret."""
        query = parse_qs(asked.scope["query_string"].decode("latin-1"))
        return same(query.get("token", [""])[0], self.secret)

    def letting_in(self) -> "Answer":
        """Set the cookie and go to the page without the secret in its address.

        A redirect would still count as coming from the site that had the link, and browsers keep a strict
        cookie back then. A page that moves on by itself does not.
        """
        page = (
            '<!DOCTYPE html><meta http-equiv="refresh" content="0; url=/"><p><a href="/">Open the '
            "page</a></p>"
        )
        cookie = f"{self.cookie}={self.session}; Path=/; HttpOnly; SameSite=Strict"
        return Answer(200, page, {"Content-Type": "text/html; charset=utf-8", "Set-Cookie": cookie})


def same(given: str, wanted: str) -> bool:
    """Compare secrets in constant time, whatever their lengths."""
    return hmac.compare_digest(
        hashlib.sha256(given.encode()).digest(), hashlib.sha256(wanted.encode()).digest()
    )


@dataclass
class Uploads:
    """Bytes that were uploaded within the last day."""

    most: int = UPLOADED_PER_DAY
    clock: Callable[[], float] = time.monotonic
    _taken: deque[tuple[float, int]] = field(default_factory=deque)

    def take(self, size: int) -> bool:
        """Count an upload of so many bytes; False, and nothing is counted, where there is no room for it."""
        now = self.clock()
        while self._taken and now - self._taken[0][0] > DAY:
            self._taken.popleft()
        if sum(taken for _, taken in self._taken) + size > self.most:
            return False
        self._taken.append((now, size))
        return True


@dataclass(frozen=True)
class Answer:
    """A whole response: of a refusal, why, in a sentence for the person at the other end."""

    status: int
    text: str
    headers: dict[str, str] = field(default_factory=dict)

    async def send(self, send: Send) -> None:
        content = self.text.encode()
        headers = {
            "Content-Type": "text/plain; charset=utf-8",
            "Cache-Control": "no-store",
            "Content-Length": str(len(content)),
        }
        raw = [
            (name.lower().encode(), value.encode("latin-1"))
            for name, value in (headers | self.headers).items()
        ]
        await send({"type": "http.response.start", "status": self.status, "headers": raw})
        await send({"type": "http.response.body", "body": content})


@dataclass(frozen=True)
class Asked:
    """What the rules look at of a request."""

    scope: Scope

    def headers(self, name: str) -> list[str]:
        """Return all headers of a name, which is lower-case as in ASGI."""
        return [
            value.decode("latin-1")
            for key, value in self.scope["headers"]
            if key.decode("latin-1").lower() == name
        ]

    def header(self, name: str) -> str:
        """Return the first header of a name; empty where there is none."""
        return next(iter(self.headers(name)), "")

    @property
    def cookies(self) -> dict[str, str]:
        pairs = [
            part.strip().partition("=") for header in self.headers("cookie") for part in header.split(";")
        ]
        return {name: value for name, _, value in pairs}

    @property
    def path(self) -> str:
        return self.scope["path"]

    @property
    def method(self) -> str:
        return self.scope.get("method", "GET")  # a websocket has none

    @property
    def address(self) -> str:
        """Where it comes from."""
        return (self.scope.get("client") or ("",))[0]

    @property
    def host(self) -> str:
        """The host that the browser asked for: a proxy passes it on in a header that browsers do not send."""
        return self.header("x-forwarded-host") or self.header("host")

    @property
    def is_page_opened(self) -> bool:
        """Whether a person opens the page: by a link, a bookmark, or the address bar."""
        is_document = (
            self.header("sec-fetch-mode") == "navigate" and self.header("sec-fetch-dest") == "document"
        )
        return is_document and self.path == "/" and self.method in ("GET", "HEAD")


class Access:
    """The middleware: `around(app)` gives the app that only lets through what the rules allow."""

    def __init__(self, sites: Sites, token: Token | None = None, shared: bool = False) -> None:
        self.sites, self.token = sites, token
        self.throttle, self.uploads = Throttle(), Uploads()
        self.policy = page_policy(SHARE_ASSETS if shared else "")
        self.app: ASGIApp | None = None

    def around(self, app: ASGIApp) -> ASGIApp:
        self.app = app
        return self

    def lifespan(self) -> Callable[[Any], AbstractAsyncContextManager[None]]:
        """Put this middleware in front of all others when the server starts, before its first request.

        Gradio adds its own middleware, one of which answers preflight requests itself, outside of any that
        its users give.
        """

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[None]:
            app.middleware_stack = self.around(app.middleware_stack)
            yield

        return lifespan

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.app is not None
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        asked = Asked(scope)
        refusal = self.refusal(asked)
        if scope["type"] == "websocket":
            if refusal:
                await send({"type": "websocket.close", "code": 1008, "reason": "refused"})
            else:
                await self.app(scope, receive, send)
            return
        protected = self._protected(asked, send)
        if refusal:
            await refusal.send(protected)
        elif self.token and asked.path == "/" and self.token.is_in(asked):
            await self.token.letting_in().send(protected)
        else:
            await self.app(scope, receive, protected)

    def refusal(self, asked: Asked) -> Answer | None:
        """Say why a request is refused; None where it may pass. The cheapest and most general rules come
        first.
        """
        for rule in (
            self._host,
            self._origin,
            self._logout,
            self._token,
            self._login,
            self._body,
            self._attempt,
        ):
            if refusal := rule(asked):
                return refusal
        return None

    def _host(self, asked: Asked) -> Answer | None:
        """Refuse names that stand for this machine without belonging to it (DNS rebinding)."""
        hosts = asked.headers("host")
        if len(hosts) == 1 and all(
            self.sites.knows_host(name) for name in [*hosts, *asked.headers("x-forwarded-host")]
        ):
            return None
        return Answer(
            403,
            (
                "This page cannot be reached by the address that was used.\n"
                "Open the address that was printed when it started.\n"
                "If you trust this one, start the app with --allowed-host NAME:PORT, as the address bar "
                "shows it."
            ),
        )

    def _origin(self, asked: Asked) -> Answer | None:
        """Refuse what another site's page sends. A person may follow a link to this page; nothing else comes
        from elsewhere.
        """
        origins = asked.headers("origin")
        is_known = all(self.sites.knows_origin(origin, asked.host) for origin in origins)
        is_foreign = asked.header("sec-fetch-site") in ("cross-site", "same-site") and not origins
        if is_known and (not is_foreign or asked.is_page_opened):
            return None
        return Answer(403, "This was asked for by a page of another address, which may not use this one.")

    def _logout(self, asked: Asked) -> Answer | None:
        """Refuse to log out unless the page itself or the address bar shows as the sender.

        On plain HTTP in a network browsers send no Sec-Fetch-Site: an image of a foreign page could ask for
        it.
        """
        scheme, _, rest = asked.header("referer").partition("://")
        is_from_here = asked.header("sec-fetch-site") in ("same-origin", "none") or bool(
            asked.header("origin")
        )
        is_linked_here = self.sites.knows_origin(f"{scheme}://{rest.partition('/')[0]}", asked.host)
        if asked.path.rstrip("/") != "/logout" or is_from_here or is_linked_here:
            return None
        return Answer(403, "Log out on the page itself.")

    def _token(self, asked: Asked) -> Answer | None:
        if self.token is None or asked.path == STARTUP_PATH or self.token.is_given(asked):
            return None
        text = (
            "This page has a secret in its address.\n"
            "Open the address that was printed when it started: it ends in ?token=..."
        )
        return Answer(401, text, {"WWW-Authenticate": "Bearer"})

    def _login(self, asked: Asked) -> Answer | None:
        """Refuse all but the login page before the login: some routes of Gradio and FastAPI do not look."""
        gradio = asked.scope.get("app")
        if gradio is None or gradio.auth is None:
            return None
        if asked.path in PUBLIC_PATHS or asked.path.startswith(PUBLIC_FOLDERS):
            return None
        names = (f"access-token-{gradio.cookie_id}", f"access-token-unsecure-{gradio.cookie_id}")
        if any(asked.cookies.get(name) in gradio.tokens for name in names):
            return None
        return Answer(401, "Log in first.")

    def _attempt(self, asked: Asked) -> Answer | None:
        """Slow down who tries passwords."""
        if asked.path.rstrip("/") != "/login" or asked.method != "POST":
            return None
        seconds = self.throttle.begin(asked.address)
        if not seconds:
            return None
        return Answer(
            429, f"Too many wrong passwords: try again in {seconds:.0f} s.", {"Retry-After": f"{seconds:.0f}"}
        )

    def _body(self, asked: Asked) -> Answer | None:
        """Refuse what is too large before a byte of it is read; the server holds a sender to the length that
        it gave.
        """
        length = asked.header("content-length") or "0"
        if asked.headers("transfer-encoding") or not length.isdecimal():
            return Answer(411, "The length of what is sent must be given first (Content-Length).")
        size = int(length)
        is_upload = asked.path in UPLOAD_PATHS
        most = LARGEST_UPLOAD if is_upload else LARGEST_BODY
        if size > most:
            return Answer(
                413, f"This is too much at once: {size / 2**20:,.0f} MiB of at most {most / 2**20:,.0f} MiB."
            )
        if is_upload and not self.uploads.take(size):
            return Answer(
                413,
                (
                    f"Too much was uploaded within a day: at most {self.uploads.most / 2**30:g} GiB are "
                    "kept. Start the app again."
                ),
            )
        return None

    def _protected(self, asked: Asked, send: Send) -> Send:
        """Return the same, with the headers that keep other pages from embedding or reading what is sent."""

        async def protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                if asked.path.rstrip("/") == "/login" and message["status"] == 200:
                    self.throttle.succeeded(asked.address)
                self._add_headers(asked, message)
            await send(message)

        return protected

    def _add_headers(self, asked: Asked, message: Message) -> None:
        is_file = "/file=" in asked.path or "/file/" in asked.path
        added = {
            "content-security-policy": FILES_POLICY if is_file else self.policy,
            "x-frame-options": "DENY",
            "x-content-type-options": "nosniff",
            "referrer-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "cross-origin-opener-policy": "same-origin",
        }
        kept = [
            (name.lower(), value)
            for name, value in message.get("headers", [])
            if name.lower().decode() not in added
        ]
        # No cookie of this page travels with a request that another site makes.
        kept = [(name, strict(value) if name == b"set-cookie" else value) for name, value in kept]
        message["headers"] = [*kept, *((name.encode(), value.encode()) for name, value in added.items())]


def page_policy(scripts_from: str) -> str:
    """Content Security Policy of the page: all it shows comes from here. Gradio has scripts in its page, and
    plots compile theirs.
    """
    own = f"'self' {scripts_from}".strip()
    rules = {
        "default-src": own,
        "script-src": f"{own} 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src": f"{own} 'unsafe-inline'",
        "img-src": f"{own} data: blob:",
        "media-src": f"{own} data: blob:",
        "font-src": f"{own} data:",
        "connect-src": f"{own} data: blob:",
        "worker-src": f"{own} blob:",
        "object-src": "'none'",
        "base-uri": "'self'",
        "form-action": "'self'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def strict(cookie: bytes) -> bytes:
    """Return the same `Set-Cookie` with SameSite=Strict."""
    plain = re.sub(rb";\s*samesite=\w+", b"", cookie, flags=re.IGNORECASE)
    return plain + b"; SameSite=Strict"
