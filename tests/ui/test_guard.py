"""What an event of the page may raise, and what the page may show of it."""

import errno
import inspect
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr
import pytest
from inline_snapshot import snapshot

from lowmem_rmu.errors import UserError
from lowmem_rmu.ui.guard import guarded
from tests.texts import plain

SECRET = "/home/me/token-of-mine"
APOLOGY = snapshot("Something went wrong here, and it was not you. The terminal that runs app.py says more.")


def direct(error: BaseException | None = None, /, answer: str = "answer") -> str:
    """Says so."""
    if error:
        raise error
    return answer


def streamed(error: BaseException | None = None, /, answer: str = "answer") -> Iterator[str]:
    """Says so twice."""
    yield answer
    if error:
        raise error
    yield answer


KINDS = [direct, streamed]


@pytest.mark.parametrize("function", KINDS)
def test_a_full_disk_is_told_as_such(function: Any) -> None:
    with pytest.raises(gr.Error) as caught:
        outcome(function, OSError(errno.ENOSPC, SECRET))
    assert plain(caught.value.message) == snapshot(
        "The disk is full. Make room, then do it again: what was finished is kept."
    )


def outcome(function: Any, *arguments: Any, **named: Any) -> Any:
    """What it gives, a generator to its end."""
    given = guarded(function)(*arguments, **named)
    return list(given) if inspect.isgenerator(given) else given


def raised(function: Any, error: BaseException) -> gr.Error:
    with pytest.raises(gr.Error) as caught:
        outcome(function, error)
    return caught.value


def test_what_a_function_gives_is_left_as_it_is() -> None:
    assert outcome(direct) == "answer"
    assert outcome(direct, answer="other") == "other"
    assert outcome(streamed, answer="other") == ["other", "other"]


@pytest.mark.parametrize("function", KINDS)
def test_gradio_sees_the_function_itself(function: Any) -> None:
    """The name, the docstring and the arguments of an endpoint are those of its function."""
    assert (guarded(function).__name__, guarded(function).__doc__) == (function.__name__, function.__doc__)
    assert inspect.signature(guarded(function)) == inspect.signature(function)
    assert inspect.isgeneratorfunction(guarded(function)) == inspect.isgeneratorfunction(function)


@pytest.mark.parametrize("function", KINDS)
def test_a_mistake_is_shown_in_its_words_and_never_as_markup(function: Any) -> None:
    error = raised(
        function, UserError('There is no run <script>alert("1")</script> & so on.\nChoose another.')
    )
    assert (
        error.message
        == "There is no run &lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt; &amp; so on.\nChoose another."
    )
    assert (error.title, error.duration, error.print_exception) == (
        snapshot("That did not work"),
        None,
        False,
    )
    assert error.__cause__ is None
    assert error.__suppress_context__


@pytest.mark.parametrize("function", KINDS)
@pytest.mark.parametrize("kind", [ValueError, OSError, KeyError, RuntimeError, AssertionError])
def test_anything_else_is_an_apology_that_tells_nothing(
    function: Any, kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        error = raised(function, kind(SECRET))
    assert error.message == APOLOGY
    assert SECRET not in f"{error} {error.message} {error.title}"
    [record] = caplog.records
    assert record.message == snapshot("An event of the page failed")
    assert SECRET in caplog.text, "the terminal has it all"


@pytest.mark.parametrize("function", KINDS)
def test_an_error_that_is_for_the_page_already_stays(function: Any) -> None:
    error = gr.Error("So.")
    assert raised(function, error) is error


@pytest.mark.parametrize("function", KINDS)
def test_whoever_ends_the_program_ends_it(function: Any) -> None:
    for end in (KeyboardInterrupt(), SystemExit(2)):
        with pytest.raises(type(end)):
            outcome(function, end)


def test_what_came_before_a_mistake_is_shown() -> None:
    stream = guarded(streamed)(UserError("So."))
    assert next(stream) == "answer"
    with pytest.raises(gr.Error, match="So."):
        next(stream)


def test_a_closed_page_closes_the_generator() -> None:
    closed = []

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    stream = guarded(endless)()
    assert next(stream) == 1
    stream.close()
    assert closed == [True]


class Tab:
    def show(self, error: BaseException | None) -> Iterator[str]:
        yield from streamed(error)


def test_methods_and_partials_stream_too() -> None:
    assert list(guarded(Tab().show)(None)) == ["answer", "answer"]
    assert list(guarded(partial(streamed, answer="other"))()) == ["other", "other"]
    with pytest.raises(gr.Error, match="So."):
        list(guarded(Tab().show)(UserError("So.")))
