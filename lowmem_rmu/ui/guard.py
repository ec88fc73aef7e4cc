"""What every event of the page goes through: a user's mistake becomes a message, anything else a plain apology and a line in the log."""

import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup, escape

from lowmem_rmu.errors import UserError, is_disk_full
from lowmem_rmu.ui.markup import complaint, joined, paragraph

LOG = logging.getLogger(__name__)
LINES = 3
"""Of what a process printed, shown where it ended in a mistake."""


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function (or generator) for an event of the page: it raises nothing but `gr.Error`, whose text the page shows."""

    @wraps(function)
    def plain(*arguments: Any, **named: Any) -> Any:
        with _shown():
            return function(*arguments, **named)

    @wraps(function)
    def streamed(*arguments: Any, **named: Any) -> Iterator[Any]:
        with _shown():
            yield from function(*arguments, **named)

    return streamed if inspect.isgeneratorfunction(function) else plain


def on_the_page(message: str) -> str:
    """A message whose options of the command line are said in the page's words."""
    lines = [line for line in message.splitlines() if not line.strip().startswith("--stages")]
    text = "\n".join(lines).replace("--set ", "")
    word = r"(?:'[^']*'|\S)+"  # quoted where it holds spaces
    text = re.sub(rf"(python -m lowmem_rmu\.run {word} )?--resume --name \S+", "Resume, under Runs.", text)
    return re.sub(rf"(python -m lowmem_rmu audit {word} )?--again", 'check "Start over" under Audit', text)


def printed_in(output: Path) -> list[str] | None:
    """The lines that a process of the page printed; None where none has."""
    return output.read_text(encoding="utf-8", errors="replace").strip().splitlines() if output.exists() else None


def failure(printed: list[str], what_next: str) -> Markup:
    """The end of what a process printed that failed, as HTML: a user's mistake in its words, of anything else only that it ended."""
    text = "\n".join(printed)
    told = f"Its process ended before it was done. {what_next}" if "Traceback" in text or not printed else "\n".join(printed[-LINES:])
    return joined([paragraph("Failed"), complaint(on_the_page(told))])


@contextmanager
def _shown() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        # The page shows it as HTML, and may quote what somebody typed.
        raise gr.Error(str(escape(on_the_page(str(error)))), title="That did not work", duration=None, print_exception=False) from None
    except gr.Error:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise gr.Error("The disk is full. Make room, then do it again: what was finished is kept.", duration=None) from error
        LOG.exception("An event of the page failed")
        raise gr.Error("Something went wrong here, and it was not you. The terminal that runs app.py says more.", duration=None) from error
