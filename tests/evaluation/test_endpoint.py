"""A model behind a server: a real one in this process, which serves the tiny model over both APIs, and all that servers do wrong."""

import gzip
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from inline_snapshot import snapshot
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowmem_rmu.config.schema import ModelSettings, Task
from lowmem_rmu.data.questions import LETTERS, Question, QuestionSet, load_task
from lowmem_rmu.errors import UserError, causes
from lowmem_rmu.evaluation import endpoint as module
from lowmem_rmu.evaluation.endpoint import Endpoint, evaluate_endpoint
from lowmem_rmu.evaluation.multiple_choice import Evaluated, Interrupted, ask, evaluate
from lowmem_rmu.model.loading import load_model
from lowmem_rmu.runs.records import Answer
from tests.texts import plain

TINY = Path(__file__).parent.parent.parent / "lowmem_rmu/tiny"
KEY = "sk-test/0123456789abcdef"
PATHS = ["/v1", "/v1/chat/completions", "/v1/completions"]

Likeliest = Callable[[str, int], list[tuple[str, float]]]


@dataclass(frozen=True)
class Request:
    """What a server was asked; `number` counts from 1."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def is_chat(self) -> bool:
        return self.path == "/v1/chat/completions"

    @property
    def context(self) -> str:
        return self.body["messages"][0]["content"] if self.is_chat else self.body["prompt"]

    @property
    def top(self) -> int | None:
        """How many log-probabilities are wanted."""
        return self.body.get("top_logprobs" if self.is_chat else "logprobs")


@dataclass
class Response:
    content: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Server(ThreadingHTTPServer):
    """Answers with what `respond` makes of a request, and remembers it."""

    daemon_threads = True

    def __init__(self, respond: Callable[[Request], Response]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.respond, self.lock = respond, threading.Lock()
        self.asked: list[Request] = []

    def endpoint(self, path: str = "/v1") -> Endpoint:
        return Endpoint(f"http://127.0.0.1:{self.server_port}{path}", "tiny")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            request = Request(len(self.server.asked) + 1, self.path, dict(self.headers), body)
            self.server.asked.append(request)
        response = self.server.respond(request)
        content = (
            response.content if isinstance(response.content, str) else json.dumps(response.content)
        ).encode()
        self.send_response(response.status)
        for name, value in ({"Content-Length": str(len(content))} | response.headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


Serve = Callable[[Callable[[Request], Response]], Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers, which end with the test."""
    servers: list[Server] = []

    def start(respond: Callable[[Request], Response]) -> Server:
        servers.append(Server(respond))
        threading.Thread(
            target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_model(
        ModelSettings(name=str(TINY / "model"), quantisation="none", dtype="float32"), torch.device("cpu")
    )


@pytest.fixture(scope="module")
def sets() -> list[QuestionSet]:
    """Twelve questions of two tasks; the last one of the second is asked in the first one too, with another right answer."""
    loaded = [
        load_task(name, Task(source=str(TINY / f"data/questions/{name}.jsonl"), role="measured"))[0]
        for name in ("compounds", "locks")
    ]
    first, second = (replace(each, questions=each.questions[:6], about="things") for each in loaded)
    same = first.questions[0]
    return [
        first,
        replace(second, questions=(*second.questions[:5], replace(same, gold=(same.gold + 1) % 4))),
    ]


@pytest.fixture(scope="module")
def in_memory(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: list[QuestionSet]
) -> Evaluated:
    """What the model says in memory."""
    return evaluate(model, tokenizer, sets, 1000)


@pytest.fixture(scope="module")
def likeliest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Likeliest:
    """The likeliest next tokens as text, with their log-probabilities."""
    lock = threading.Lock()

    @cache
    @torch.no_grad()
    def top(context: str) -> list[tuple[str, float]]:
        values, ids = (
            model(torch.tensor([tokenizer(context)["input_ids"]])).logits[0, -1].log_softmax(-1).topk(20)
        )
        return [
            (str(tokenizer.decode([number])), value)
            for number, value in zip(ids.tolist(), values.tolist(), strict=True)
        ]

    def some(context: str, count: int) -> list[tuple[str, float]]:
        with lock:
            return top(context)[:count]

    return some


@pytest.fixture(scope="module")
def tiny(likeliest: Likeliest) -> Callable[[Request], Response]:
    """Serves the tiny model as it should be."""
    return lambda request: answered(request, likeliest(request.context, request.top or 1))


def answered(request: Request, top: list[tuple[str, float]]) -> Response:
    """In the form of the API that was asked; log-probabilities only where they were."""
    listed = [{"token": token, "logprob": value, "bytes": None} for token, value in top]
    if request.is_chat:
        logprobs = (
            {"content": [listed[0] | {"top_logprobs": listed}], "refusal": None} if request.top else None
        )
        return Response(
            {
                "choices": [
                    {
                        "message": {"role": "assistant", "content": top[0][0]},
                        "logprobs": logprobs,
                        "finish_reason": "length",
                    }
                ]
            }
        )
    return Response(
        {"choices": [{"text": top[0][0], "logprobs": {"top_logprobs": [dict(top)]} if request.top else None}]}
    )


def error(status: int, message: str, **headers: str) -> Response:
    return Response(
        {"error": {"message": message, "type": "some_error"}},
        status,
        {name.replace("_", "-"): value for name, value in headers.items()},
    )


def refusal_of(endpoint: Endpoint, sets: list[QuestionSet]) -> UserError:
    with pytest.raises(UserError) as raised:
        evaluate_endpoint(endpoint, sets)
    return raised.value


@pytest.mark.parametrize("path", PATHS)
def test_a_served_model_answers_as_the_same_model_in_memory(
    path: str, serve: Serve, tiny: Any, likeliest: Likeliest, in_memory: Evaluated, sets: list[QuestionSet]
) -> None:
    evaluated = evaluate_endpoint(serve(tiny).endpoint(path), sets)
    without = [replace(row, logprobs=None) for row in in_memory.answers]
    assert [replace(row, logprobs=None) for row in evaluated.answers] == without
    for each, row, wanted in zip(ask(sets), evaluated.answers, in_memory.answers, strict=True):
        top = dict(likeliest(each.prompt.context, 20))
        for letter, value, exact in zip(LETTERS, row.logprobs, wanted.logprobs, strict=True):
            if f" {letter}" in top:
                assert value == pytest.approx(exact, abs=1e-4)
            else:
                assert exact - 1e-4 < value < min(top.values())
    rows = json.loads(json.dumps([vars(row) for row in evaluated.answers], allow_nan=False))
    assert [Answer(**row) for row in rows] == evaluated.answers
    for name, summary in in_memory.scores["tasks"].items():
        assert evaluated.scores["tasks"][name] == summary | {
            "confidence": pytest.approx(summary["confidence"], abs=1e-4)
        }
    assert evaluated.scores.keys() - in_memory.scores.keys() == {"unanswered"}
    assert 0 < sum(row.correct for row in evaluated.answers) < 12


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (
            "/v1/",
            {"messages": [{"role": "user", "content": "CONTEXT"}], "logprobs": True, "top_logprobs": 20},
        ),
        ("/v1/completions", {"prompt": "CONTEXT", "logprobs": 20}),
    ],
)
def test_what_a_server_is_asked(
    path: str, told: dict[str, Any], serve: Serve, tiny: Any, sets: list[QuestionSet]
) -> None:
    server = serve(tiny)
    evaluate_endpoint(server.endpoint(path), sets)
    contexts = list(dict.fromkeys(each.prompt.context for each in ask(sets)))
    assert len(contexts) == 11
    assert server.asked[0].context == contexts[0]
    assert sorted(request.context for request in server.asked) == sorted(contexts)  # each prompt once
    shared = {"model": "tiny", "max_tokens": 1, "temperature": 0}
    assert (
        json.loads(json.dumps(server.asked[0].body).replace(json.dumps(contexts[0]), '"CONTEXT"'))
        == shared | told
    )


def test_answers_are_kept_as_they_come_and_a_handful_is_asked_at_once(
    serve: Serve, tiny: Any, sets: list[QuestionSet]
) -> None:
    busy: list[int] = []
    lock = threading.Lock()
    now = 0

    def respond(request: Request) -> Response:
        nonlocal now
        with lock:
            now += 1
            busy.append(now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return tiny(request)

    kept: list[Answer] = []
    heard: list[tuple[int, float]] = []
    evaluated = evaluate_endpoint(
        serve(respond).endpoint(),
        sets,
        None,
        kept.extend,
        lambda done, accuracy: bool(heard.append((done, accuracy))),
    )
    assert 1 < max(busy) <= module.AT_ONCE
    assert [done for done, _ in heard] == [*range(2, 13)]  # the first question stands in two places
    assert heard[-1][1] == pytest.approx(sum(row.correct for row in evaluated.answers) / 12)
    assert sorted(map(str, kept)) == sorted(map(str, evaluated.answers))


@pytest.mark.parametrize("with_logprobs", [True, False])
def test_interrupted_and_resumed_equals_uninterrupted(
    with_logprobs: bool, serve: Serve, tiny: Any, sets: list[QuestionSet]
) -> None:
    def respond(request: Request) -> Response:
        return tiny(request) if with_logprobs or not request.top else error(400, "logprobs are not supported")

    server = serve(respond)
    whole = evaluate_endpoint(server.endpoint(), sets)
    kept: list[Answer] = []
    with pytest.raises(Interrupted):
        evaluate_endpoint(server.endpoint(), sets, None, kept.extend, lambda done, accuracy: done >= 5)
    assert len(kept) == 5
    known = {row.prompt: row for row in kept} | {"of another evaluation": kept[0]}
    server.asked.clear()
    resumed = evaluate_endpoint(server.endpoint(), sets, known, kept.extend)
    assert not {row.prompt for row in kept[:5]} & {row.prompt for row in kept[5:]}
    assert len({request.context for request in server.asked}) == 7
    assert resumed.answers == whole.answers
    assert resumed.scores["tasks"] == whole.scores["tasks"]
    assert (whole.scores["known_before"], resumed.scores["known_before"]) == (0, 5)
    assert sorted(map(str, kept)) == sorted(map(str, whole.answers))


def test_nothing_is_asked_where_all_is_known(serve: Serve, tiny: Any, sets: list[QuestionSet]) -> None:
    server = serve(tiny)
    whole = evaluate_endpoint(server.endpoint(), sets)
    server.asked.clear()
    assert (
        evaluate_endpoint(server.endpoint(), sets, {row.prompt: row for row in whole.answers}).answers
        == whole.answers
    )
    assert server.asked == []


def test_a_stop_waits_for_nobody_who_waits_for_the_server(
    serve: Serve, tiny: Any, sets: list[QuestionSet]
) -> None:
    started = time.monotonic()
    server = serve(
        lambda request: tiny(request) if request.number < 3 else error(429, "slowly", Retry_After="60")
    )
    with pytest.raises(Interrupted):
        evaluate_endpoint(server.endpoint(), sets, progress=lambda done, accuracy: done > 2)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("status", [400, 403, 422])
def test_fewer_log_probabilities_where_a_server_refuses_as_many(
    path: str, status: int, serve: Serve, tiny: Any, sets: list[QuestionSet]
) -> None:
    server = serve(
        lambda request: (
            tiny(request) if request.top <= 5 else error(status, "Cannot request more than 5 Logprobs.")
        )
    )
    evaluated = evaluate_endpoint(server.endpoint(path), sets)
    assert [request.top for request in server.asked] == [20, *[5] * 11]
    assert all(row.logprobs for row in evaluated.answers)


@pytest.mark.parametrize("refuses", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_without_log_probabilities_the_letter_that_was_written_counts(
    path: str, refuses: bool, serve: Serve, tiny: Any, sets: list[QuestionSet]
) -> None:
    def respond(request: Request) -> Response:
        if request.top and refuses:
            return error(400, "Unrecognized request argument supplied: logprobs")
        return tiny(
            replace(
                request, body={key: value for key, value in request.body.items() if "logprobs" not in key}
            )
        )

    expected = evaluate_endpoint(serve(tiny).endpoint(path), sets)
    server = serve(respond)
    evaluated = evaluate_endpoint(server.endpoint(path), sets)
    assert evaluated.answers == [replace(row, logprobs=None) for row in expected.answers]
    for name, summary in expected.scores["tasks"].items():
        assert evaluated.scores["tasks"][name] == summary | {"confidence": None}
    assert [request.top for request in server.asked] == ([20, 5, *[None] * 11] if refuses else [20] * 11)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("A", 0),
        (" B", 1),
        ("\nC.", 2),
        ("D) North", 3),
        ("E", None),
        ("Dog", None),
        ("", None),
        (None, None),
    ],
)
def test_only_a_letter_is_an_answer(
    text: str | None, chosen: int | None, serve: Serve, sets: list[QuestionSet]
) -> None:
    evaluated = evaluate_endpoint(
        serve(lambda request: Response({"choices": [{"message": {"content": text}}]})).endpoint(), sets
    )
    assert {row.answer for row in evaluated.answers} == {chosen}
    assert evaluated.scores["unanswered"] == (12 if chosen is None else 0)
    counts = evaluated.scores["tasks"]["compounds"]["answers"]
    assert counts == [6 * (choice == chosen) for choice in range(4)]
    assert chosen is not None or not any(row.correct for row in evaluated.answers)


@pytest.mark.parametrize(
    ("top", "expected", "chosen"),
    [
        ([(" A", -3.0), ("A", -1.0), (" D", -2.0), ("B", -1.5), ("C", -4.0)], [-1.0, -1.5, -4.0, -2.0], 0),
        ([("the", -0.1), (" D", -2.0)], [-2.0, -2.0, -2.0, -2.0], 3),
        ([("the", -0.1), ("a", -3.0), ("Dog", -4.0)], None, None),
        ([(" C", -0.1), ("A", None), ("B", -9999.0)], [-9999.0, -9999.0, -0.1, -9999.0], 2),
    ],
)
@pytest.mark.parametrize("path", ["/v1", "/v1/completions"])
@pytest.mark.parametrize("swapped", [False, True])
def test_letters_among_the_likeliest_tokens(
    top: list[tuple[str, Any]],
    expected: list[float] | None,
    chosen: int | None,
    path: str,
    swapped: bool,
    serve: Serve,
    sets: list[QuestionSet],
) -> None:
    """Some servers answer one API in the form of the other."""

    def respond(request: Request) -> Response:
        there = answered(request, top)
        if swapped:
            other = replace(
                request,
                path="/v1/completions" if request.is_chat else "/v1/chat/completions",
                body={"logprobs": 20, "top_logprobs": 20},
            )
            there.content["choices"][0]["logprobs"] = answered(other, top).content["choices"][0]["logprobs"]
        return there

    row = evaluate_endpoint(
        serve(respond).endpoint(path), [replace(sets[0], questions=sets[0].questions[:1])]
    ).answers[0]
    assert row.logprobs == (expected and pytest.approx(expected))
    assert row.answer == chosen


def test_a_letter_in_nobodys_list_is_below_the_last_one_there(serve: Serve, sets: list[QuestionSet]) -> None:
    server = serve(lambda request: answered(request, [("the", -0.1), (" D", -2.0)]))
    logprobs = evaluate_endpoint(server.endpoint(), sets).answers[0].logprobs
    assert logprobs[3] == -2.0
    assert logprobs[:3] == [math.nextafter(-2.0, -3.0)] * 3


def test_an_answer_that_is_no_letter_leaves_the_confidence_of_the_others(
    serve: Serve, tiny: Any, sets: list[QuestionSet]
) -> None:
    server = serve(
        lambda request: answered(request, [("The", -0.1)]) if request.number == 1 else tiny(request)
    )
    evaluated = evaluate_endpoint(server.endpoint(), [sets[0]])
    others = evaluate_endpoint(serve(tiny).endpoint(), [replace(sets[0], questions=sets[0].questions[1:])])
    assert [row.answer is None for row in evaluated.answers] == [True, *[False] * 5]
    assert evaluated.scores["tasks"]["compounds"]["confidence"] == pytest.approx(
        others.scores["tasks"]["compounds"]["confidence"]
    )


def test_newer_chats_count_completion_tokens(serve: Serve, tiny: Any, sets: list[QuestionSet]) -> None:
    words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    server = serve(lambda request: error(400, words) if "max_tokens" in request.body else tiny(request))
    assert (
        evaluate_endpoint(server.endpoint(), sets).answers
        == evaluate_endpoint(serve(tiny).endpoint(), sets).answers
    )
    assert ["max_tokens" in request.body for request in server.asked] == [True, *[False] * 11]
    assert all(
        request.body["max_completion_tokens"] == 1 and request.top == 20 for request in server.asked[1:]
    )


@pytest.mark.parametrize(
    ("status", "retry_after"),
    [(429, "0.15"), (503, "0.15"), (429, "Wed, 21 Oct 2015 07:28:00 GMT"), (500, "soon"), (408, "")],
)
def test_a_busy_server_is_asked_again(
    status: int, retry_after: str, serve: Serve, tiny: Any, sets: list[QuestionSet]
) -> None:
    times: dict[str, list[float]] = {}
    lock = threading.Lock()

    def respond(request: Request) -> Response:
        with lock:
            asked = times.setdefault(request.context, [])
            asked.append(time.monotonic())
        return tiny(request) if len(asked) > 1 else error(status, "busy", Retry_After=retry_after)

    server = serve(respond)
    assert (
        evaluate_endpoint(server.endpoint(), sets).answers
        == evaluate_endpoint(serve(tiny).endpoint(), sets).answers
    )
    waits = [again - first for first, again in times.values()]
    assert len(waits) == 11
    assert (min(waits) >= 0.15) is (retry_after == "0.15")


def test_a_server_that_breaks_down_costs_no_answer(serve: Serve, tiny: Any, sets: list[QuestionSet]) -> None:
    server = serve(lambda request: tiny(request) if request.number < 4 else error(500, "on\x1b[31m\nfire"))
    kept: list[Answer] = []
    with pytest.raises(UserError) as raised:
        evaluate_endpoint(server.endpoint(), sets, None, kept.extend)
    assert plain(raised.value, address=server.endpoint().address) == snapshot(
        '<address> answers with error 500: {"error": {"message": "on\\u001b[31m\\nfire", "type": '
        '"some_error"}}\n'
        "It was asked 7 times. The answers so far are kept: the same command continues from there."
    )
    assert 2 <= len(kept) <= 4
    repaired = serve(tiny)
    resumed = evaluate_endpoint(repaired.endpoint(), sets, {row.prompt: row for row in kept})
    assert resumed.answers == evaluate_endpoint(repaired.endpoint(), sets).answers


def test_a_broken_connection_is_made_again(serve: Serve, tiny: Any, sets: list[QuestionSet]) -> None:
    """The body ends before its time, and the server closes."""

    def respond(request: Request) -> Response:
        response = tiny(request)
        return (
            replace(response, headers={"Content-Length": "99999", "Connection": "close"})
            if request.number in (1, 3)
            else response
        )

    server = serve(respond)
    assert (
        evaluate_endpoint(server.endpoint(), sets).answers
        == evaluate_endpoint(serve(tiny).endpoint(), sets).answers
    )
    assert len(server.asked) == 13


def test_a_server_that_wants_an_hour_is_left_alone(serve: Serve, sets: list[QuestionSet]) -> None:
    server = serve(lambda request: error(429, "no credit", Retry_After="3600"))
    assert plain(refusal_of(server.endpoint(), sets), address=server.endpoint().address) == snapshot(
        '<address> answers with error 429: {"error": {"message": "no credit", "type": "some_error"}}\n'
        "It asks for 3600 seconds of patience. The answers so far are kept: the same command continues from "
        "there."
    )
    assert len(server.asked) == 1


def test_where_nobody_listens_the_address_is_named(serve: Serve, sets: list[QuestionSet]) -> None:
    closed = Server(lambda request: Response({}))
    closed.server_close()
    message = str(refusal_of(closed.endpoint(), sets))
    assert f"http://127.0.0.1:{closed.server_port}/v1/chat/completions" in message
    reason = message.partition("ConnectError, ")[2].partition("\n")[0]  # the system's own words
    assert plain(message, address=closed.endpoint().address, reason=reason) == snapshot(
        "<address> cannot be reached: ConnectError, <reason>\n"
        "It was asked 3 times. The answers so far are kept: the same command continues from there."
    )


NO_LOGPROB = {"content": [{"top_logprobs": [{"token": "A"}]}]}


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (
            error(404, "no such model"),
            snapshot(
                '<address> is not there, or has no model tiny: {"error": {"message": "no such model", "type": '
                '"some_error"}}\n'
                "Check both the URL and the name."
            ),
        ),
        (
            error(400, "too long"),
            snapshot(
                '<address> refuses to answer (400): {"error": {"message": "too long", "type": "some_error"}}'
            ),
        ),
        (
            Response("<html>Welcome</html>"),
            snapshot(
                "<address> does not answer as an OpenAI-compatible server does, but: <html>Welcome</html>\n"
                "Check the URL. The answers so far are kept: the same command continues from there."
            ),
        ),
        (
            Response({"choices": []}),
            snapshot(
                '<address> does not answer as an OpenAI-compatible server does, but: {"choices": []}\n'
                "Check the URL. The answers so far are kept: the same command continues from there."
            ),
        ),
        (
            Response([]),
            snapshot(
                "<address> does not answer as an OpenAI-compatible server does, but: []\n"
                "Check the URL. The answers so far are kept: the same command continues from there."
            ),
        ),
        (
            Response({"choices": [{"text": 5}]}),
            snapshot(
                '<address> does not answer as an OpenAI-compatible server does, but: {"choices": [{"text": 5}]}\n'
                "Check the URL. The answers so far are kept: the same command continues from there."
            ),
        ),
        (
            Response({"choices": [{"text": "A", "logprobs": NO_LOGPROB}]}),
            snapshot(
                '<address> does not answer as an OpenAI-compatible server does, but: {"choices": [{"text": "A", '
                '"logprobs": {"content": [{"top_logprobs": [{"token": "A"}]}]}}]}\n'
                "Check the URL. The answers so far are kept: the same command continues from there."
            ),
        ),
    ],
)
def test_a_refusal_says_what_happened(
    response: Response, message: str, serve: Serve, sets: list[QuestionSet]
) -> None:
    server = serve(lambda request: response)
    assert plain(refusal_of(server.endpoint(), sets), address=server.endpoint().address) == message
    assert len(server.asked) == 1, "the first question is asked alone"


def test_an_endless_refusal_is_cut_and_harmless(serve: Serve, sets: list[QuestionSet]) -> None:
    message = str(
        refusal_of(serve(lambda request: Response("\x1b[2J\r\n" + "no " * 10_000, 400)).endpoint(), sets)
    )
    assert len(message) < 500
    assert message.isprintable()


def served_raw(send: Callable[[socket.socket], None], header: bytes = b"") -> Endpoint:
    """A server that answers its first request with raw bytes."""
    listening = socket.create_server(("127.0.0.1", 0))

    def respond() -> None:
        with listening, listening.accept()[0] as connection, suppress(OSError):
            connection.recv(2**16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + header + b"\r\n")
            send(connection)

    threading.Thread(target=respond, daemon=True).start()
    return Endpoint(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", "tiny")


def test_an_endless_reply_is_cut(sets: list[QuestionSet]) -> None:
    def flood(connection: socket.socket) -> None:
        while True:
            connection.sendall(b" " * 2**16)

    endpoint = served_raw(flood)
    assert plain(refusal_of(endpoint, sets), address=endpoint.address) == snapshot(
        "<address> answers one question with more than 1,048,576 bytes.\n"
        "Check the URL: it must belong to an OpenAI-compatible server. The answers so far are kept: the same "
        "command continues from there."
    )


def test_a_reply_that_never_ends_is_given_up(
    sets: list[QuestionSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST_READING", 0.3)
    monkeypatch.setattr(module, "TRIES", 1)
    monkeypatch.setattr(module, "FIRST_TRIES", 1)

    def drip(connection: socket.socket) -> None:
        while True:
            connection.sendall(b" ")
            time.sleep(0.05)

    endpoint = served_raw(drip)
    assert plain(refusal_of(endpoint, sets), address=endpoint.address) == snapshot(
        "<address> cannot be reached: ReadTimeout, its reply has not ended after 0 seconds\n"
        "It was asked 1 times. The answers so far are kept: the same command continues from there."
    )


def test_a_compressed_reply_counts_by_what_it_holds(sets: list[QuestionSet]) -> None:
    bomb = gzip.compress(b" " * 2**24)
    endpoint = served_raw(lambda connection: connection.sendall(bomb), b"Content-Encoding: gzip\r\n")
    assert " 1,048,576 bytes" in str(refusal_of(endpoint, sets))


def test_an_endpoint_that_sends_on_is_not_followed(
    serve: Serve, tiny: Any, sets: list[QuestionSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    other = serve(tiny)
    server = serve(lambda request: Response("", 307, {"Location": other.endpoint().address}))
    refusal, address = refusal_of(server.endpoint(), sets), server.endpoint().address
    assert plain(refusal, address=address, other=other.endpoint().address) == snapshot(
        "<address> sends on to another address, which is not followed.\n"
        "If that is the right one, give it: <other>"
    )
    assert other.asked == []


@pytest.mark.parametrize(
    ("status", "key", "message"),
    [
        (401, None, snapshot("<address> wants a key (401).\nSet the environment variable OPENAI_API_KEY.")),
        (403, None, snapshot("<address> wants a key (403).\nSet the environment variable OPENAI_API_KEY.")),
        (401, KEY, snapshot("<address> does not accept the key in the environment variable OPENAI_API_KEY.")),
        (
            403,
            KEY,
            snapshot(
                "<address> does not let the key in the environment variable OPENAI_API_KEY use tiny: no"
            ),
        ),
    ],
)
def test_a_missing_or_wrong_key_is_told_by_its_variable(
    status: int,
    key: str | None,
    message: str,
    serve: Serve,
    sets: list[QuestionSet],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    server = serve(
        lambda request: Response("Incorrect API key provided: sk-***cdef" if status == 401 else "no", status)
    )
    assert plain(refusal_of(server.endpoint(), sets), address=server.endpoint().address) == message


def test_the_key_is_a_header_and_nowhere_else(
    serve: Serve,
    tiny: Any,
    sets: list[QuestionSet],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    server, kept = serve(tiny), list[Answer]()
    with caplog.at_level("DEBUG"):
        evaluated = evaluate_endpoint(server.endpoint(), sets, None, kept.extend)
    for request in server.asked:
        assert request.headers.pop("Authorization") == f"Bearer {KEY}"
        assert KEY not in f"{request}"
    assert KEY not in f"{evaluated!r} {kept} {server.endpoint()!r} {caplog.text}"
    monkeypatch.delenv("OPENAI_API_KEY")
    server.asked.clear()
    evaluate_endpoint(server.endpoint(), sets)
    assert not any("Authorization" in request.headers for request in server.asked)


@pytest.mark.parametrize("status", [200, 307, 400, 401, 403, 404, 500])
def test_a_server_that_sends_the_key_back_does_not_get_it_printed(
    status: int, serve: Serve, sets: list[QuestionSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def respond(request: Request) -> Response:
        headers = {"Location": f"http://localhost/{KEY}"} if status == 307 else {}
        # Cut within the key, were it still there.
        return Response(f"{'.' * 287}{request.headers['Authorization']}", status, headers)

    raised = refusal_of(serve(respond).endpoint(), sets)
    for each in causes(raised):
        assert KEY[:5] not in f"{each} {each!r}"
    assert status == 401 or "(OPEN" in str(raised)


@pytest.mark.parametrize("key", ["sk-two\nlines", "sk-a space", "sk-clé"])
def test_a_key_that_is_none_is_refused_unseen(
    key: str, serve: Serve, tiny: Any, sets: list[QuestionSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    raised = refusal_of(serve(tiny).endpoint(), sets)
    assert plain(raised) == snapshot(
        "The environment variable OPENAI_API_KEY holds characters that are part of no key, such as a space "
        "or a line break."
    )
    assert raised.__cause__ is raised.__context__ is None


@pytest.mark.parametrize(
    "host",
    ["192.0.2.7", "models.invalid", "localhost.models.invalid", "127.0.0.1.models.invalid", "[2001:db8::1]"],
)
def test_no_key_goes_over_plain_http_to_another_machine(
    host: str, sets: list[QuestionSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    message = str(refusal_of(Endpoint(f"http://{host}:8000/v1", "tiny"), sets))
    assert plain(message, host=host.strip("[]")) == snapshot(
        "The key in the environment variable OPENAI_API_KEY is not sent to <host> over plain http, where "
        "others could read it.\n"
        "Give a URL with https, or ask without a key: env -u OPENAI_API_KEY ..."
    )
    assert KEY not in message


def test_no_proxy_comes_between_this_machine_and_itself(
    serve: Serve, tiny: Any, sets: list[QuestionSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    proxy, server = serve(tiny), serve(tiny)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    evaluate_endpoint(server.endpoint(), sets)
    assert (len(proxy.asked), len(server.asked)) == (0, 11)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "localhost:8000/v1",
            snapshot(
                "The endpoint's URL must begin with http:// or https:// and name a server, as "
                "http://localhost:8000/v1 does."
            ),
        ),
        (
            "ftp://localhost/v1",
            snapshot(
                "The endpoint's URL must begin with http:// or https:// and name a server, as "
                "http://localhost:8000/v1 does."
            ),
        ),
        (
            "",
            snapshot(
                "The endpoint's URL must begin with http:// or https:// and name a server, as "
                "http://localhost:8000/v1 does."
            ),
        ),
        (
            "http:///v1",
            snapshot(
                "The endpoint's URL must begin with http:// or https:// and name a server, as "
                "http://localhost:8000/v1 does."
            ),
        ),
        ("http://localhost:port/v1", snapshot("The endpoint's URL is none: <reason>.")),
        ("http://no..host/v1", snapshot("The endpoint's URL is none: <reason>.")),
        (
            "http://localhost:8000",
            snapshot(
                "The endpoint http://localhost:8000 must end in /v1, /chat/completions or /completions."
            ),
        ),
        (
            "https://user:secret@localhost/v1",
            snapshot(
                "The endpoint's URL must end with its path and hold no password: a key comes from the environment "
                "variable OPENAI_API_KEY."
            ),
        ),
        (
            "https://localhost/v1/completions?key=secret",
            snapshot(
                "The endpoint's URL must end with its path and hold no password: a key comes from the environment "
                "variable OPENAI_API_KEY."
            ),
        ),
    ],
)
def test_a_url_that_is_none_is_refused(url: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        Endpoint(url, "tiny")
    assert plain(raised.value, reason=raised.value.__cause__) == message
    assert "secret" not in str(raised.value)


def test_texts_of_choices_are_refused_by_their_tasks_names(
    serve: Serve, tiny: Any, sets: list[QuestionSet]
) -> None:
    cloze = QuestionSet(
        "gates_cloze", "gates", "kept", None, (Question("Which?", ("a", "b", "c", "d"), 0),), scoring="cloze"
    )
    server = serve(tiny)
    assert plain(refusal_of(server.endpoint(), [*sets, cloze])) == snapshot(
        "An endpoint gives the probabilities of what it would write itself, not of given texts, so these "
        "cannot be asked: gates_cloze.\n"
        "Leave them out, or ask them for letters: scoring: letters."
    )
    assert server.asked == []
