"""A model behind an OpenAI-compatible server is asked the same prompts over HTTP: the way to models that are
not there to be loaded.
"""

import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from itertools import islice
from typing import Any, NamedTuple

import httpx

from lowmem_rmu.data.questions import LETTERS, QuestionSet
from lowmem_rmu.errors import UserError
from lowmem_rmu.evaluation.multiple_choice import (
    Evaluated,
    Interrupted,
    as_row,
    ask,
    by_prompt,
    score,
)
from lowmem_rmu.runs.records import Answer

KEY = "OPENAI_API_KEY"
AT_ONCE = 8  # requests
# The second, as long as the server has never been heard of: its address may be wrong.
TRIES, FIRST_TRIES = (
    7,
    3,
)
FIRST_WAIT = 1.0  # seconds; every further one takes twice as long
LONGEST_WAIT = 300.0  # a server that asks for more is asked again another day
TIMEOUT = httpx.Timeout(180.0, connect=20.0)  # a small machine takes its time over a few-shot prompt
LONGEST_REPLY = 2**20  # bytes; one token with 20 log-probabilities takes a few thousand
LONGEST_READING = 300.0  # seconds from the first byte of a reply to its last
FEWER: dict[int, int | None] = {20: 5, 5: None}
"""How many of the likeliest tokens to ask for next where a server refuses so many: chats give 20 at most, old
completions 5.
"""
REFUSED = (400, 403, 422)
KEPT = "The answers so far are kept: the same command continues from there."


class Reply(NamedTuple):
    """Log-probabilities of the four letters, and the index of the one that is answered; None where the server
    gives none, or no letter.
    """

    logprobs: list[float] | None
    chosen: int | None


@dataclass(frozen=True)
class Endpoint:
    """A model by its name on a server. A `url` may name `/completions` or `/chat/completions` itself; of one
    that ends in `/v1` the latter is asked.
    """

    url: str
    model: str

    def __post_init__(self) -> None:
        """Raise UserError for what is no such URL, and for one that holds a secret: it would be written down
        with the URL.
        """
        try:
            url = httpx.URL(self.address)
            url.raw_host.decode().encode("idna")
        except (httpx.InvalidURL, UnicodeError) as error:
            raise UserError(f"The endpoint's URL is none: {error}.") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise UserError(
                "The endpoint's URL must begin with http:// or https:// and name a server, as "
                "http://localhost:8000/v1 does."
            )
        if url.userinfo or url.query or url.fragment:
            raise UserError(
                "The endpoint's URL must end with its path and hold no password: a key comes from the "
                f"environment variable {KEY}."
            )
        if not url.path.endswith("/completions"):
            raise UserError(f"The endpoint {self.url} must end in /v1, /chat/completions or /completions.")

    @property
    def address(self) -> str:
        """The URL that is asked."""
        url = self.url.strip().rstrip("/")
        return f"{url}/chat/completions" if url.endswith("/v1") else url


@dataclass(frozen=True)
class Form:
    """How a server is asked: for a chat or a completion, under what name for the length, and for how many of
    the likeliest tokens.
    """

    chat: bool
    length: str = "max_tokens"
    top: int | None = 20

    def request(self, model: str, context: str) -> dict[str, Any]:
        """Ask for one token, the likeliest."""
        body = {"model": model, self.length: 1, "temperature": 0}
        if self.chat:
            body |= {"messages": [{"role": "user", "content": context}]}
            return body | ({"logprobs": True, "top_logprobs": self.top} if self.top else {})
        return body | {"prompt": context} | ({"logprobs": self.top} if self.top else {})

    def lesser(self, complaint: str) -> "Form | None":
        """Return the request without the parameters that the server's complaint names; None where none of
        them can be left out.
        """
        if self.chat and self.length == "max_tokens" and "max_tokens" in complaint:
            return replace(self, length="max_completion_tokens")
        if self.top and "logprobs" in complaint:
            return replace(self, top=FEWER[self.top])
        return None


def evaluate_endpoint(
    endpoint: Endpoint,
    sets: list[QuestionSet],
    known: Mapping[str, Answer] | None = None,
    keep: Callable[[list[Answer]], None] = lambda answers: None,
    progress: Callable[[int, float], bool] = lambda done, accuracy: False,
) -> Evaluated:
    """Ask every question of the sets, as `multiple_choice.evaluate` does of a model in memory.

    `known` are rows of an earlier evaluation of this endpoint by the digest of their prompt, which is not
    asked again (whole rows, since not every server gives log-probabilities); `keep` and `progress` as there.
    Raises UserError and Interrupted.
    """
    _refuse_cloze(sets)
    started, everything = time.monotonic(), ask(sets)
    places = by_prompt(everything)
    replies = {
        digest: Reply(row.logprobs, row.answer) for digest, row in (known or {}).items() if digest in places
    }
    before = [as_row(each, *reply) for digest, reply in replies.items() for each in places[digest]]
    done, correct = len(before), sum(row.correct for row in before)
    contexts = {digest: same[0].prompt.context for digest, same in places.items() if digest not in replies}
    with closing(_ask_all(endpoint, contexts)) as coming:
        for digest, reply in coming:
            replies[digest] = reply
            new = [as_row(each, *reply) for each in places[digest]]
            keep(new)
            done, correct = done + len(new), correct + sum(row.correct for row in new)
            if progress(done, correct / done):
                raise Interrupted
    answers = [as_row(each, *replies[each.prompt.digest]) for each in everything]
    scores = score(sets, answers, time.monotonic() - started)
    unanswered = sum(row.answer is None for row in answers)
    return Evaluated(
        scores | {"known_before": len(before), "cut_prompts": 0, "unanswered": unanswered}, answers
    )


def _refuse_cloze(sets: list[QuestionSet]) -> None:
    cloze = [each.name for each in sets if each.scoring != "letters"]
    if cloze:
        raise UserError(
            "An endpoint gives the probabilities of what it would write itself, not of given texts, so "
            f"these cannot be asked: {', '.join(cloze)}.",
            "Leave them out, or ask them for letters: scoring: letters.",
        )


def _ask_all(endpoint: Endpoint, contexts: Mapping[str, str]) -> Generator[tuple[str, Reply]]:
    """Yield digests and replies as they come. The first prompt is asked alone, so that a refusal is found out
    only once.
    """
    url = httpx.URL(endpoint.address)
    # A proxy would be told the key in plain text.
    direct = {f"all://{url.netloc.decode()}": None} if _is_loopback(url.host) else {}
    with httpx.Client(
        headers=_authorisation(url), timeout=TIMEOUT, mounts=direct, follow_redirects=False
    ) as client:
        server, waiting = _Server(endpoint, client), iter(contexts.items())
        for digest, context in islice(waiting, 1):
            yield digest, server.reply(context)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            asked = {pool.submit(server.reply, context): digest for digest, context in waiting}
            try:
                for future in as_completed(asked):
                    yield asked[future], future.result()
            finally:
                server.stopped.set()
                pool.shutdown(cancel_futures=True)


def _key() -> str:
    return os.environ.get(KEY, "").strip()


def _authorisation(url: httpx.URL) -> dict[str, str]:
    """Return the header that holds the key, where there is one: nothing but the client gets to hold it.
    Raises UserError rather than tell it.
    """
    key = _key()
    if key and re.search(r"[^!-~]", key):
        raise UserError(
            f"The environment variable {KEY} holds characters that are part of no key, such as a space or a "
            "line break."
        )
    if key and url.scheme == "http" and not _is_loopback(url.host):
        raise UserError(
            f"The key in the environment variable {KEY} is not sent to {url.host} over plain http, where "
            "others could read it.",
            f"Give a URL with https, or ask without a key: env -u {KEY} ...",
        )
    return {"Authorization": f"Bearer {key}"} if key else {}


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class _Server:
    """What a server has been found to take and to refuse; asked by several threads at once."""

    def __init__(self, endpoint: Endpoint, client: httpx.Client) -> None:
        self.endpoint, self.client = endpoint, client
        self.form = Form(chat=endpoint.address.endswith("/chat/completions"))
        self.heard = False
        self.stopped = threading.Event()
        """Nobody waits for answers any more."""

    def reply(self, context: str) -> Reply:
        while True:
            form = self.form
            response = self._post(form.request(self.endpoint.model, context))
            if response.is_success:
                return _read(response)
            lesser = form.lesser(response.text.lower()) if response.status_code in REFUSED else None
            if lesser is None:
                raise _refusal(self.endpoint, response)
            self.form = lesser

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        """Ask again as long as the server is busy or away; UserError where it stays so."""
        tried = 0
        while True:
            wait = 0.0
            try:
                response = self._read_whole(body)
                self.heard = True
                if response.status_code not in (408, 429) and response.status_code < 500:
                    return response
                trouble, wait = (
                    f"answers with error {response.status_code}: {_quote(response.text)}",
                    _retry_after(response),
                )
            except httpx.RequestError as error:
                trouble = f"cannot be reached: {type(error).__name__}, {_quote(str(error))}"
            tried += 1
            if tried >= (TRIES if self.heard else FIRST_TRIES) or wait > LONGEST_WAIT:
                patience = (
                    f"It asks for {wait:.0f} seconds of patience."
                    if wait > LONGEST_WAIT
                    else f"It was asked {tried} times."
                )
                raise UserError(
                    f"{self.endpoint.address} {trouble}",
                    f"{patience} {KEPT}",
                )
            if self.stopped.wait(wait + random.uniform(0.5, 1) * FIRST_WAIT * 2 ** (tried - 1)):
                raise Interrupted

    def _read_whole(self, body: dict[str, Any]) -> httpx.Response:
        """Return the complete reply.

        Raises UserError for one that is too long, httpx.RequestError where reading fails or takes too long.
        """
        content = bytearray()
        with self.client.stream("POST", self.endpoint.address, json=body) as response:
            began = time.monotonic()
            for part in response.iter_bytes():
                content += part
                if len(content) > LONGEST_REPLY:
                    where = self.endpoint.address
                    raise UserError(
                        f"{where} answers one question with more than {LONGEST_REPLY:,} bytes.",
                        f"Check the URL: it must belong to an OpenAI-compatible server. {KEPT}",
                    )
                if time.monotonic() - began > LONGEST_READING:
                    trouble = f"its reply has not ended after {LONGEST_READING:.0f} seconds"
                    raise httpx.ReadTimeout(trouble, request=response.request)
                if self.stopped.is_set():
                    raise Interrupted
        # The content is decoded by now, so its encoding and its length as sent do not describe it.
        headers = httpx.Headers(response.headers)
        for name in ("content-encoding", "content-length", "transfer-encoding"):
            headers.pop(name, None)
        status = response.status_code
        return httpx.Response(status, headers=headers, content=bytes(content), request=response.request)


def _retry_after(response: httpx.Response) -> float:
    """Return seconds that the server asks to wait: it gives them, or a date; 0 where it gives neither."""
    asked = response.headers.get("Retry-After", "")
    with suppress(ValueError):
        return max(0.0, float(asked))
    with suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    return 0.0


def _quote(text: str) -> str:
    """Return a server's message on one line, shortened, and without the key."""
    if _key():
        text = text.replace(_key(), f"({KEY})")
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= 300 else f"{line[:300]} ..."


def _refusal(endpoint: Endpoint, response: httpx.Response) -> UserError:
    status, where, said = response.status_code, endpoint.address, _quote(response.text)
    if status in (401, 403) and not _key():
        return UserError(
            f"{where} wants a key ({status}).",
            f"Set the environment variable {KEY}.",
        )
    if status == 401:  # what it says may hold a part of the key
        return UserError(f"{where} does not accept the key in the environment variable {KEY}.")
    if status == 403:
        return UserError(
            f"{where} does not let the key in the environment variable {KEY} use {endpoint.model}: {said}"
        )
    if status == 404:
        return UserError(
            f"{where} is not there, or has no model {endpoint.model}: {said}",
            "Check both the URL and the name.",
        )
    if response.has_redirect_location:
        onwards = _quote(response.headers["Location"])
        return UserError(
            f"{where} sends on to another address, which is not followed.",
            f"If that is the right one, give it: {onwards}",
        )
    return UserError(f"{where} refuses to answer ({status}): {said}")


def _read(response: httpx.Response) -> Reply:
    """Return the letter with the highest log-probability; where there are none, the letter that was
    written.
    """
    try:
        choice = response.json()["choices"][0]
        logprobs = _letters(_top(choice.get("logprobs") or {}))
        text = (choice["message"]["content"] if "message" in choice else choice["text"]) or ""
        written = re.match(rf"\s*([{LETTERS}])\b", text)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{response.url} does not answer as an OpenAI-compatible server does, but: "
            f"{_quote(response.text)}",
            f"Check the URL. {KEPT}",
        ) from error
    if logprobs:
        return Reply(logprobs, logprobs.index(max(logprobs)))
    return Reply(None, LETTERS.index(written[1]) if written else None)


def _top(logprobs: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the likeliest first tokens. Servers give them in the form of chats or in that of completions,
    not always in the one that was asked.
    """
    pairs: list[tuple[str, float]] = []
    if logprobs.get("content"):
        pairs = [(each["token"], each["logprob"]) for each in logprobs["content"][0]["top_logprobs"]]
    elif logprobs.get("top_logprobs"):
        pairs = list(logprobs["top_logprobs"][0].items())
    return [(token, float(value)) for token, value in pairs if value is not None and math.isfinite(value)]


def _letters(top: list[tuple[str, float]]) -> list[float] | None:
    """Return log-probabilities of the letters: each has that of the best token that is this letter but for
    spaces; None where no token is any letter.

    A letter that is not among the tokens gets an upper bound: what is just below the least likely of them.
    """
    found = [
        max((value for token, value in top if token.strip() == letter), default=None) for letter in LETTERS
    ]
    if all(value is None for value in found):
        return None
    bound = math.nextafter(min(value for _, value in top), -math.inf)
    return [bound if value is None else value for value in found]
