"""What every event of the page goes through: a user's mistake becomes a message, anything else a plain
apology and a line in the log.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import gradio as gr
from markupsafe import Markup, escape

from lowmem_rmu.errors import (
    Action,
    AuditAgain,
    ChangeSettings,
    ResumeRun,
    UserError,
    is_disk_full,
    recorded_error,
)
from lowmem_rmu.runs.records import Status
from lowmem_rmu.ui.markup import complaint, joined, paragraph

LOG = logging.getLogger(__name__)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function (or generator) for an event of the page: it raises nothing but `gr.Error`,
    whose text the page shows.
    """

    @wraps(function)
    def plain(*arguments: Any, **named: Any) -> Any:
        with _shown():
            return function(*arguments, **named)

    @wraps(function)
    def streamed(*arguments: Any, **named: Any) -> Iterator[Any]:
        with _shown():
            yield from function(*arguments, **named)

    return streamed if inspect.isgeneratorfunction(function) else plain


def on_the_page(error: UserError) -> str:
    """Return the message of an error with its action in the words of the page."""
    return error.words(in_words_of_page)


def in_words_of_page(action: Action) -> str:
    """Word an action for the page, which has a button where the command line has an option."""
    match action:
        case ResumeRun():
            return "Resume, under Runs."
        case AuditAgain():
            return 'check "Start over" under Audit'
        case ChangeSettings(choices):
            lines = []
            for settings, remark in choices:
                named = [
                    f"{path}={str(value).lower()}" for path, value in settings.items() if path != "stages"
                ]
                if named:  # the page always goes through all stages
                    lines.append(f"\n  {' '.join(named)}: {remark}")
            return "".join(lines)


def failure(status: Status, what_next: str) -> Markup:
    """Return why a job failed, as HTML: a user's mistake in its words, of anything else only that its process
    ended.
    """
    error = recorded_error(vars(status))
    words = f"Its process ended before it was done. {what_next}" if error is None else on_the_page(error)
    return joined([paragraph("Failed"), complaint(words)])


@contextmanager
def _shown() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        # The page shows it as HTML, and may quote what somebody typed.
        raise gr.Error(
            str(escape(on_the_page(error))), title="That did not work", duration=None, print_exception=False
        ) from None
    except gr.Error:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise gr.Error(
                "The disk is full. Make room, then do it again: what was finished is kept.", duration=None
            ) from error
        LOG.exception("An event of the page failed")
        raise gr.Error(
            "Something went wrong here, and it was not you. The terminal that runs app.py says more.",
            duration=None,
        ) from error
